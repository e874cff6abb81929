"""tasks/lamp/answer_parsing.py: answers in replies, by a table made by hand and against LaMP's own rule for scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.tasks.lamp.answer_parsing import Prediction, parse
from matryoshka.tasks.lamp.task_specs import KINDS


@pytest.mark.parametrize(
    ("name", "reply", "expected"),
    [
        ("1", "[2]", "[2]"),
        ("1", " [2].\n", "[2]"),
        ("1", "The answer is [1]", "[1]"),
        ("1", "2", "[2]"),
        ("1", "[1] or [2]", None),
        ("1", "[3]", None),
        ("2N", "food & drink", "food & drink"),
        ("2N", "**Food & Drink**", "food & drink"),
        ("2N", "The category is Healthy Living.", "healthy living"),
        ("2N", "sports, travel", None),
        ("2N", "[travel]", "travel"),
        ("2N", "traveller", None),
        ("2M", "Dark comedy!", "dark comedy"),
        ("2M", "It is a comedy", "comedy"),
        ("2M", "comedy, or dark comedy", None),
        ("2M", "Thought-provoking", "thought-provoking"),
        ("2M", "", None),
        ("2M", "Thought\u2011provoking.", "thought-provoking"),
        ("2M", "It is sci\u2010fi", "sci-fi"),
        ("3", "4", 4.0),
        ("3", " 4.0\n", 4.0),
        ("3", "Score: 3.", 3.0),
        ("3", "4/5", 4.0),
        ("3", "4 out of 5", 4.0),
        ("3", "4 stars out of 5", 4.0),
        ("3", "**Score:** 4 stars / 5", 4.0),
        ("3", "2 or 3", None),
        ("3", "five", None),
        ("3", "nan", None),
        ("3", "1e999", None),
        ("4", ' "A Headline" ', "A Headline"),
        ("4", "It's \"odd\"", 'It\'s "odd'),
        ("4", " \n", None),
        ("4", "\u201cA Headline\u201d\n", "A Headline"),
    ],
)
def test_a_reply_is_read(name: str, reply: str, expected: Prediction) -> None:
    """Oracle: by hand, from the module's rule."""
    assert parse(KINDS[name], reply) == expected


@pytest.mark.parametrize("name", ["1", "2N", "2M"])
def test_every_label_is_itself_in_any_dress_and_order_decides_nothing(name: str) -> None:
    """Oracle: the label; two labels in one reply are none, whichever comes first."""
    labels = KINDS[name].labels
    for label in labels:
        dressed = (label, label.upper(), f"'{label}'", f"Answer: {label}.", f"{label}\n")
        assert [parse(KINDS[name], reply) for reply in dressed] == [label] * 5
    for one, other in zip(labels, labels[1:], strict=False):
        assert parse(KINDS[name], f"{one}, {other}") is parse(KINDS[name], f"{other}, {one}") is None


@given(st.one_of(st.floats(-9, 9, allow_nan=False).map(str), st.integers(-9, 9).map(str)))
def test_what_lamp_reads_as_a_number_we_read_as_the_same(reply: str) -> None:
    """Oracle: LaMP's evaluation reads a score with `float(reply)`."""
    assert parse(KINDS["3"], reply) == float(reply)
