"""dpo/row_forms.py: other trainers' rows give the items of our own form, or an error that says what to write."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import read_conversations, read_preferences
from matryoshka.dpo.row_forms import FieldNames, in_our_form
from matryoshka.tests.dpo.test_data import AS_USER, said, write


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_dir)


PAIR = {"prompt": AS_USER, "chosen": said("a"), "rejected": said("b")}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
        {"instruction": "Hi", "input": "", "chosen": "a", "rejected": "b"},
        {"instruction": "Hi", "output": ["a", "b"]},
        {"instruction": "Hi", "output": None, "messages": None, "prompt": None, "chosen": "a", "rejected": "b"},
        {
            "prompt": "Hi", "prompt_id": "x", "chosen": AS_USER + said("a"), "rejected": AS_USER + said("b"),
            "messages": AS_USER + said("a"), "score_chosen": 8.0, "score_rejected": 2.0,
        },
    ],
    ids=["sharegpt", "alpaca", "alpaca list", "nulls of a table", "ultrafeedback"],
)  # fmt: skip
def test_pairs_of_other_trainers(tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any]) -> None:
    """Oracle: the same pair in TRL's form."""
    (found,) = read_preferences(write(tmp_path / "rows.jsonl", row), tokenizer)
    (ours,) = read_preferences(write(tmp_path / "ours.jsonl", PAIR), tokenizer)
    assert found == ours


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"conversations": [HUMAN, GPT]}, {"messages": AS_USER + said("a")}),
        ({"system": "Be", "conversations": [HUMAN, GPT]}, {"system": "Be", "messages": AS_USER + said("a")}),
        ({"instruction": "Hi", "input": "You", "output": "a"},
         {"prompt": [{"role": "user", "content": "Hi\nYou"}], "completion": "a"}),
        ({"conversations": AS_USER + said("a")}, {"messages": AS_USER + said("a")}),
        ({"messages": None, "prompt": "p", "completion": None, "response": "a"}, {"prompt": "p", "completion": "a"}),
    ],
    ids=["sharegpt", "sharegpt system", "alpaca", "messages by another name", "nulls of a table"],
)  # fmt: skip
def test_conversations_of_other_trainers(
    tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any], ours: dict[str, Any]
) -> None:
    """Oracle: the same conversation in our form."""
    found = read_conversations(write(tmp_path / "rows.jsonl", row), tokenizer)
    assert found == read_conversations(write(tmp_path / "ours.jsonl", ours), tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": [{"from": "function", "value": "x"}]}, "expected {from, value} with from one of system"),
        ({"conversations": "text"}, "field 'conversations' is 'text'; expected a list"),
        ({"instruction": 3, "output": "a"}, "expected texts"),
        ({"instruction": "Hi", "output": "a", "history": [["x", "y"]]}, "key 'history' is .* and would be dropped"),
    ],
)
def test_what_has_no_place_is_refused(tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str) -> None:
    """Oracle: the message, with file and line."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{problem}"):
        read_conversations(write(tmp_path / "rows.jsonl", row), tokenizer)


def test_fields_by_other_names() -> None:
    """Oracle: by hand; a name that is not there, and one that stands beside ours."""
    names = FieldNames(prompt="question", chosen="good", rejected="bad")
    row = {"question": "q", "good": "a", "bad": "b", "id": 1}
    assert in_our_form(row, names) == {"prompt": "q", "chosen": "a", "rejected": "b", "id": 1}
    with pytest.raises(ValueError, match="field 'bad' is missing; the row has"):
        in_our_form({"question": "q", "good": "a"}, names)
    with pytest.raises(ValueError, match="field 'chosen' is there beside 'good', which was named in its place"):
        in_our_form({**row, "chosen": "x"}, names)


def test_a_row_with_equal_sides_is_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: by hand."""
    counts: Counter[str] = Counter()
    rows = [PAIR, {**PAIR, "rejected": said("a")}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    assert len(read_preferences(write(tmp_path / "rows.jsonl", *rows), tokenizer, counts=counts)) == 1
    assert counts == {"equal": 2}
