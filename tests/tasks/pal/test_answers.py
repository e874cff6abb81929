"""Numeric comparison and gold parsing. Oracle: the documented rule, every pair decided by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.tasks.pal.answers import parse_gold, same_answer


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (18, 18.0),
        (18.0, 18),
        (0.1 + 0.2, 0.3),
        (0.3 - 0.1 - 0.2, 0),
        (172 / 3, 57.333333333333336),
        (3244047.1, 3244047.0999999996),
        (12345678 * 1.1 - 12345678, 1234567.8),
        (9.28e12 * 0.1 * 10, 9.28e12),
        (-9867630, -9867630.0),
        (10**13 + 1, 10**13 + 1),
    ],
)
def test_right(value: float | int, gold: float | int) -> None:
    """Oracle: pairs by hand that differ by the rounding of another order of operations at most."""
    assert same_answer(value, gold)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (None, 0),
        (float("nan"), 1),
        (float("inf"), 1),
        (10**400, 1e300),
        (57.33, 57.333333333333336),
        (57.3333, 57.333333333333336),
        (14053029.67, 14053029.666666666),
        (0.001679, 0.0016791648),
        (10**12 + 1, 10**12),
        (1e12 + 1, 1e12),
        (1e12 + 0.25, 1e12),
        (9.28e12 + 1, 9.28e12),
        (9e15 + 1, 9e15),
        (17.999, 18),
        (-18, 18),
    ],
)
def test_wrong(value: float | int | None, gold: float | int) -> None:
    """Oracle: pairs by hand: no number, a rounded one, a truncated one, the next integer, the wrong sign."""
    assert not same_answer(value, gold)


@given(st.integers(-(10**15), 10**15), st.integers(1, 10**6))
def test_integers_are_equal_exactly(gold: int, off: int) -> None:
    """Invariant: an integer answers an integer only by being it, and a float only by being nearer than 1."""
    assert same_answer(gold, gold) and same_answer(float(gold), gold)
    assert not same_answer(gold + off, gold) and not same_answer(float(gold + off), float(gold))


def test_an_infinite_gold_answer_is_an_error() -> None:
    """Oracle: by definition; no answer equals infinity."""
    with pytest.raises(ValueError, match="expected a finite number"):
        same_answer(1, float("inf"))


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("16 - 7 = <<16-7=9>>9 eggs.\n#### 18", 18),
        ("#### 1,234", 1234),
        ("#### 1,234,567", 1234567),
        ("#### -10", -10),
        ("#### 2.5 ", 2.5),
        ("#### 3\nno:\n#### 4", 4),
    ],
)
def test_parse_gold(solution: str, gold: float | int) -> None:
    """Oracle: numbers and their types, by hand."""
    assert parse_gold(solution) == gold and type(parse_gold(solution)) is type(gold)


@pytest.mark.parametrize(
    "solution", ["", "18", "#### ", "#### $5", "#### 1,23", "#### 5 apples", "#### nan", "#### 1e3"]
)
def test_what_is_no_plain_number_is_an_error(solution: str) -> None:
    """Oracle: the message names the expected end of a solution."""
    with pytest.raises(ValueError, match="expected the answer to end with '#### NUMBER'"):
        parse_gold(solution)


@pytest.mark.parametrize("number", ["9" * 400, "9" * 400 + ".5", "9" * 5000])
def test_a_gold_answer_beyond_floats_is_an_error(number: str) -> None:
    """Oracle: the range of floats ends at 1.8e308."""
    with pytest.raises(ValueError, match=r"the answer has \d+ digits, which is beyond the range of floats"):
        parse_gold(f"#### {number}")
