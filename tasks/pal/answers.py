"""Decides whether a number is the right answer, and reads the answer from a GSM8K solution.

The tolerance absorbs floating-point rounding (another order of the same operations) and nothing else: an answer that
was rounded to cents, truncated or off by one is wrong, up to the largest targets of GSM-Hard (9.3e12).
"""

import math
import re
from fractions import Fraction

# Rounding error of sums and products whose intermediate values reach about 1e8 (spacing of floats there: 1.5e-8).
ABSOLUTE = 1e-7
# 450 units in the last place: enough for hundreds of operations, below 1 for every gold answer up to 1e13.
RELATIVE = 1e-13
# Above 5e12 neighbouring integers must still differ.
LARGEST = 0.5

_IN_TEXT = re.compile(
    r"(?<![\w.])(-?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)(?:/0*([1-9]\d{0,8}))?(?!\w|\.\d)"
)
# Other signs for a minus and for the comma between thousands: Unicode's minus, blanks that do not break, LaTeX's.
_PLAIN = {"\u2212": "-", "\xa0": ",", "\u202f": ",", "\u2009": ",", "{,}": ",", "\\,": ",", "\\$": "$"}
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


def same_answer(value: float | int | None, gold: float | int) -> bool:
    """Return whether |value - gold| <= min(0.5, max(1e-7, 1e-13 |gold|)), in exact arithmetic.

    Two integers must be equal. None, nan and infinities are never right. The rule is strict: 57.33 is not 172 / 3.
    Raises ValueError if `gold` is not finite.
    """
    if not math.isfinite(gold):
        raise ValueError(f"answers: the gold answer is {gold}; expected a finite number")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return False
    if isinstance(value, int) and Fraction(gold).denominator == 1:
        return value == gold
    return abs(Fraction(value) - Fraction(gold)) <= min(LARGEST, max(ABSOLUTE, RELATIVE * abs(gold)))


def read_answer(prediction: float | int | str | None) -> float | int | None:
    """Return the number that an answer from elsewhere gives, None where there is none.

    A number is itself. Of a text it is the number behind the last `####`, or else the last number that stands in it:
    marks between thousands, a currency sign before it and a full stop or per cent sign behind it do not count. 3/4 is
    one number.
    """
    if prediction is None or isinstance(prediction, int | float):
        return None if isinstance(prediction, bool) else prediction
    _, mark, tail = prediction.rpartition("####")
    text = tail if mark else prediction
    for form, plain in _PLAIN.items():
        text = text.replace(form, plain)
    found = _IN_TEXT.findall(text)
    if not found:
        return None
    digits, below = found[0] if mark else found[-1]
    value = _number(digits.replace("$", ""))
    return value / int(below) if below and value is not None else value


def parse_gold(solution: str) -> float | int:
    """Return the number after the last `####` of a GSM8K solution: `#### 1,234` gives 1234.

    Raises ValueError when there is no `####` or no plain number behind it.
    """
    _, mark, tail = solution.rpartition("####")
    text = tail.strip()
    if not mark or not _NUMBER.fullmatch(text):
        raise ValueError(f"expected the answer to end with '#### NUMBER', got {solution[-40:]!r}")
    if (value := _number(text)) is None:
        raise ValueError(f"the answer has {len(text)} digits, which is beyond the range of floats")
    return value


def _number(digits: str) -> float | int | None:
    """Return the number that `digits` write, None if it is beyond the range of floats."""
    digits = digits.replace(",", "")
    value = float(digits)
    if not math.isfinite(value):
        return None
    return value if re.search(r"[.eE]", digits) else int(digits)
