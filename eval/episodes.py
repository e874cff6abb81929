"""Packs every episode of a report into one compact string that a page can carry and unpack by itself.

Equal texts are stored once and the whole is deflated, so 1000 examples under 8 conditions stay within a few megabytes.
The result is base64, so the packed text holds no character that HTML reads as markup. Nothing is cut. Prompts are left
out; they are in trajectories.jsonl.
"""

import base64
import json
import zlib
from typing import Any

from matryoshka.core.records import VERDICTS, Trajectory, Turn
from matryoshka.eval.summary import ReportInput


def pack(data: ReportInput) -> str:
    """Return the episodes of checked `data` (see `summary.summarise`) as base64 of deflated JSON.

    The JSON is an object: conditions [[name, label], ...]; before, after: indices of the two conditions whose guidance
    is shown side by side at first; groups [name, ...]; verdicts [name, ...]; texts [...]; and episodes, in which every
    text is an index into `texts`: [id, question, gold, [group index, ...], [record, ...]] with one record a condition:
    [verdict index, prediction, error, [[guidance, cut, feedback, [[reply, cut, outcome], ...]], ...]]. cut is 1 where
    the token limit ended the text.
    """
    texts: dict[str, int] = {}

    def text(value: Any) -> int:
        return texts.setdefault("" if value is None else str(value), len(texts))

    def turn(item: Turn) -> list[Any]:
        calls = [[text(call.sample.text), _cut(call.sample.finish_reason), text(call.outcome)] for call in item.calls]
        return [text(item.action.text), _cut(item.action.finish_reason), text(item.feedback), calls]

    def record(trajectory: Trajectory) -> list[Any]:
        info = trajectory.info
        turns = [turn(item) for item in trajectory.turns]
        return [VERDICTS.index(info.verdict), text(info.prediction), text(info.error), turns]

    by_id = [{t.example_id: t for t in condition.trajectories} for condition in data.conditions]
    members = [frozenset(ids) for ids in data.groups.values()]
    episodes = [
        [
            text(example.id),
            text(example.fields["question"]),
            text(example.fields["answer"]),
            [i for i, ids in enumerate(members) if example.id in ids],
            [record(trajectories[example.id]) for trajectories in by_id],
        ]
        for example in data.examples
    ]
    before, after = _before_and_after(data)
    payload = {
        "conditions": [[condition.name, condition.label] for condition in data.conditions],
        "before": before,
        "after": after,
        "groups": list(data.groups),
        "verdicts": VERDICTS,
        "texts": list(texts),
        "episodes": episodes,
    }
    # ASCII JSON also carries lone surrogates, which UTF-8 cannot
    packed = zlib.compress(json.dumps(payload, ensure_ascii=True, separators=(",", ":")).encode("ascii"), 9)
    return base64.b64encode(packed).decode("ascii")


def _before_and_after(data: ReportInput) -> tuple[int, int]:
    """Return the conditions of the first comparison in which both gave guidance, else the first and the last that did.

    Rows after the trained controller are often controls (gold or wrong guidance), so a comparison says better what
    before and after are. Where fewer than two conditions gave guidance: the first and the last condition.
    """
    names = [c.name for c in data.conditions if any(turn.action.text for t in c.trajectories for turn in t.turns)]
    pairs = [pair for pair in data.comparisons if set(pair) <= set(names)]
    if len(names) < 2:
        return 0, len(data.conditions) - 1
    first, last = pairs[0] if pairs else (names[0], names[-1])
    order = [c.name for c in data.conditions]
    return order.index(first), order.index(last)


def _cut(finish_reason: str) -> int:
    return int(finish_reason == "length")
