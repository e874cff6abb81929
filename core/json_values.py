"""Reads the JSON of a server's reply: a value or one clear ValueError, in bounded time and memory.

Files are read by `json_input.py`, which is stricter. Numbers that no field of ours can hold (1e999, NaN, a thousand
digits) become infinity or NaN here, so that a reply with one odd number can still be read; fields that count something
are read with `as_count`.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DIGITS = 20  # an integer with more digits counts nothing that exists
# Python keeps a list of two bytes in 64 bytes, an object with a key in 184 and a text of one emoji in 88: with these
# bounds a value takes less than ten times its text, and a few MiB where it is small.
MAX_CONTAINERS = 20_000
MAX_VALUES = 100_000
MAX_COUNT = 10**12
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_reply(data: bytes | str) -> Any:
    """Return the value that `data`, UTF-8, holds. Raises ValueError naming the fault if that is not JSON, is
    nested too deeply or holds too many values.
    """
    text = data if isinstance(data, str) else data.decode("latin-1")  # a byte is a character, so that one can count
    if text.count("[") + text.count("{") > MAX_CONTAINERS or text.count(",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_CONTAINERS:,} objects and lists, or {MAX_VALUES:,} values")
    try:
        return json.loads(data, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as err:
        raise ValueError(f"not UTF-8 (byte {err.start + 1})") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"malformed JSON ({err.msg}, line {err.lineno}, column {err.colno})") from None


def as_count(value: Any) -> int | None:
    """Return `value` as a number of things, None if it is none: negative, a fraction, not finite, too large, no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return int(value) if value == int(value) else None


def as_text(value: Any) -> str | None:
    """Return `value` if it is a text, with U+FFFD for each half of a surrogate pair, which no file can hold."""
    return _LONE_SURROGATE.sub("\ufffd", value) if isinstance(value, str) else None


def all_values(value: Any, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every object in `value`, however deep; nothing of what stands under a key in `skip`."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as found:
                rows = [(key, item) for key, item in found.items() if key not in skip]
                yield from rows
                waiting += [item for _, item in rows]
            case list() as items:
                waiting += items


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)
