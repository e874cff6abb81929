"""Rows in the forms of other trainers and data sets, put into the fields that `dpo/data.py` reads.

Recognised are ShareGPT (`conversations` of {from, value}), Alpaca (`instruction`, `input`, `output`), both with chosen
and rejected answers as LLaMA-Factory has them, and UltraFeedback (a text prompt beside whole chats, and `messages` that
repeat the chosen one). Nothing is dropped: what has no place in our fields stays in the row, where it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from matryoshka.core.json_input import shown

FORMS = {
    "prompt", "chosen", "rejected", "completion", "response", "messages", "system", "conversations", "instruction",
    "input", "output",
}  # fmt: skip
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields in your rows, where they are others than ours; "" stands for ours."""

    prompt: str = ""
    """The field of the prompt: a text or a chat."""
    chosen: str = ""
    """The field of the better answer of a pair."""
    rejected: str = ""
    """The field of the worse answer of a pair."""
    completion: str = ""
    """The field of the answer that a prompt is to be trained on."""
    messages: str = ""
    """The field of a whole chat, for supervised training."""
    system: str = ""
    """The field of a system message, which is put before the prompt."""


OURS = FieldNames()


def in_our_form(row: dict[str, Any], names: FieldNames = OURS) -> dict[str, Any]:
    """Return `row` with our fields. Raises ValueError for a name that the row does not have, and for unknown speakers.
    """
    given = {ours.name: theirs for ours in fields(names) if (theirs := getattr(names, ours.name))}
    if missing := [theirs for theirs in given.values() if theirs not in row]:
        raise ValueError(f"field {missing[0]!r} is missing; the row has {shown(sorted(row))}")
    if clash := [ours for ours, theirs in given.items() if ours in row and ours != theirs]:
        raise ValueError(f"field {clash[0]!r} is there beside {given[clash[0]]!r}, which was named in its place")
    renamed = {theirs: ours for ours, theirs in given.items()}
    # Files that were made of tables have a null in each column that a row does not use.
    row = {renamed.get(key, key): value for key, value in row.items() if value is not None or key not in FORMS}
    for form in (_sharegpt, _alpaca, _ultrafeedback):
        row = form(row)
    return row


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    if "conversations" not in row:
        return row
    rest = {key: value for key, value in row.items() if key != "conversations"}
    chat = _turns(row["conversations"], "conversations")
    if not {"chosen", "rejected"} <= row.keys():
        return _joined(rest, {"messages": chat})
    sides = {name: _turns([rest.pop(name)], name) for name in ("chosen", "rejected")}
    return _joined(rest, {"prompt": chat, **sides})


def _joined(rest: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return both. Raises ValueError for a field that is in both, since one of them would be dropped."""
    if both := sorted(rest.keys() & ours.keys()):
        raise ValueError(f"field {both[0]!r} is {shown(rest[both[0]])} beside another form of it; leave one out")
    return rest | ours


def _turns(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"field {where!r} is {shown(turns)}; expected a list of {{from, value}}")
    chat = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "from" not in turn:
            return turns  # a chat of {role, content} under this name
        speaker = turn["from"] if isinstance(turn["from"], str) else ""
        if speaker not in SPEAKERS or set(turn) - {"from", "value", "weight"}:
            expected = f"expected {{from, value}} with from one of {', '.join(SPEAKERS)}"
            raise ValueError(
                f"{where}[{i}] is {shown(turn)}; {expected}. Write the rows as messages of {{role, content}} with the "
                "roles system, user and assistant"
            )
        weight = {"weight": turn["weight"]} if "weight" in turn else {}
        chat.append({"role": SPEAKERS[speaker], "content": turn.get("value"), **weight})
    return chat


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    if "instruction" not in row:
        return row
    used = ("instruction", "input", "output")
    rest = {key: value for key, value in row.items() if key not in used}
    texts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"fields 'instruction' and 'input' are {shown(texts)}; expected texts")
    prompt = [{"role": "user", "content": "\n".join(filter(None, texts))}]
    if isinstance(row.get("output"), list) and len(row["output"]) == 2:  # an older form of pairs, the better one first
        return _joined(rest, {"prompt": prompt, "chosen": row["output"][0], "rejected": row["output"][1]})
    return _joined(rest, {"prompt": prompt} | ({"completion": row["output"]} if "output" in row else {}))


def _ultrafeedback(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what repeats: a text prompt that both chats begin with, and messages that are the chosen chat."""
    chosen, rejected, prompt = (row.get(name) for name in ("chosen", "rejected", "prompt"))
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return row
    row = {key: value for key, value in row.items() if not (key == "messages" and value == chosen)}
    openings = [_opening(chat) for chat in (chosen, rejected)]
    if isinstance(prompt, str) and openings == [prompt, prompt]:
        del row["prompt"]
    return row


def _opening(chat: list[Any]) -> Any:
    """Return the first question of a chat, None if it begins otherwise."""
    users = [turn.get("content") for turn in chat[:-1] if isinstance(turn, Mapping) and turn.get("role") == "user"]
    return users[0] if users else None
