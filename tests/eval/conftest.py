"""A small report input: four examples, three conditions, every verdict, one retry."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from matryoshka.core.records import Call, EpisodeInfo, Example, Message, Sample, Trajectory, Turn, Verdict
from matryoshka.eval.report import Condition, ReportInput

MakeInput = Callable[..., ReportInput]


def trajectory(example_id: str, verdict: Verdict, guidance: str, protocol: str = "label_free") -> Trajectory:
    """Return one episode; an "error" episode has two attempts."""
    asked = (Message("user", example_id),)
    call = Call(asked, Sample(f"def solution():\n    return {len(guidance)}"), f"value {len(guidance)}.0")
    calls = (call, call) if verdict == "error" else (call,)
    answered = verdict in ("right", "wrong")
    info = EpisodeInfo(
        verdict,
        protocol,
        "c",
        "g",
        prediction=len(guidance) if answered else None,
        error=None if answered else f"{verdict}: no answer",
    )
    return Trajectory("pal", example_id, (Turn(asked, None, Sample(guidance), calls),), float(verdict == "right"), info)


def condition(name: str, verdicts: Sequence[Verdict], guidance: str, protocol: str = "label_free") -> Condition:
    """Return a condition over examples e0, e1, ..., one verdict each."""
    episodes = [trajectory(f"e{i}", verdict, guidance, protocol) for i, verdict in enumerate(verdicts)]
    return Condition(name, name.title(), episodes, seconds=2.5, calls=len(episodes) + 1, tokens=1234)


@pytest.fixture
def make_input() -> MakeInput:
    """Return a maker of ReportInput whose fields can be replaced by name."""

    def make(**replaced: Any) -> ReportInput:
        fields: dict[str, Any] = {
            "title": "A small report",
            "command": "matryoshka evaluate --config small.toml",
            "config": {"dpo": {"beta": 0.1}, "seed": 3},
            "hardware": {"cpu": "two cores"},
            "versions": {"python": "3.11"},
            "conditions": [
                condition("none", ["right", "wrong", "error", "wrong"], ""),
                condition("untrained", ["right", "right", "failed", "wrong"], "plan A"),
                condition("trained", ["wrong", "right", "right", "right"], "plan B, better"),
            ],
            "examples": [Example(f"e{i}", {"question": f"Question {i}?", "answer": i}) for i in range(4)],
            "groups": {"held-out families": ["e2", "e3"]},
            "comparisons": [("none", "trained"), ("untrained", "trained")],
            "training": {"round 1": [{"step": 1, "loss": 0.6931}, {"step": 2, "loss": 0.5}]},
            "notes": ["Nothing was tuned on these examples."],
            "counts": {"pairs": 12, "cut by length": 0},
        }
        return ReportInput(**{**fields, **replaced})

    return make
