"""Reads JSON files from elsewhere: whole files and rows, and each number and string of them, with checks.

Every fault ends in a ValueError that names the file, the line or key, the value that came and the expected one. The
standard library ends deep nesting in a RecursionError, keeps the last of two equal keys and takes NaN for a number;
this reader refuses all three.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 100  # no format that is read here needs a tenth of it
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value that `text` writes. where: the file (and line) that errors name."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")  # some editors put a BOM first
    except UnicodeDecodeError as err:
        raise ValueError(f"{where}: not UTF-8 (byte {err.start + 1}); save it in UTF-8") from err
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as err:
        place = f"line {err.lineno}, column {err.colno}" if "\n" in text.strip("\n") else f"column {err.colno}"
        raise ValueError(f"{where}: malformed JSON ({err.msg}, {place})") from err
    except RecursionError:
        raise ValueError(f"{where}: malformed JSON (values are nested more than {MAX_DEPTH} deep)") from None
    except ValueError as err:  # a key that comes twice, NaN, or an integer of thousands of digits
        raise ValueError(f"{where}: malformed JSON ({err})") from err
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"{where}: malformed JSON (values are nested more than {MAX_DEPTH} deep)")
    return value


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Return the JSON object in the file at `path`. purpose: a description of the file, for the error if it is missing.

    Raises FileNotFoundError, and ValueError for anything but one JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {purpose}")
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Fields:
    """The checked values of one JSON object: each method returns the value of a key, or raises ValueError.

    A key that is absent takes the default that the call gives; without one it is an error. null counts as absent only
    where the default is None.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def error(self, name: str, expected: str) -> ValueError:
        if name not in self.data:
            return ValueError(f"{self.where}: {name:.60} is missing; expected {expected}")
        value = self.data[name]
        return ValueError(f"{self.where}: {name:.60} is {shown(value)} ({type(value).__name__}); expected {expected}")

    def integer(self, name: str, default: int | None = None, low: int | None = None, high: int | None = None) -> int:
        value = self.data.get(name, default)
        if type(value) is int and (low is None or value >= low) and (high is None or value <= high):
            return value
        raise self.error(name, "an integer" + _limits(low, high))

    def number(self, name: str, default: float | None = None, low: float | None = None) -> float:
        value = self.data.get(name, default)
        if type(value) in (int, float) and abs(value) < 1e300 and (low is None or value >= low):
            return float(value)
        raise self.error(name, "a finite number" + _limits(low, None))

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self.data.get(name, default)
        if isinstance(value, bool):
            return value
        raise self.error(name, "true or false")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.data.get(name, default)
        if isinstance(value, str):
            return value
        raise self.error(name, "a string")

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.data.get(name)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self.error(name, "a list of strings")


def shown(value: Any) -> str:
    """Return at most 60 characters of a value from a file, for an error message."""
    text = SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} comes twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _limits(low: float | None, high: float | None) -> str:
    parts = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    return f" of {' and '.join(parts)}" if parts else ""
