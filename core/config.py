"""Typed configuration: frozen dataclasses, filled from a TOML file and then from overrides, written back resolved.

pydantic checks the values, tomllib reads TOML and tomli-w writes it. A field is a scalar, a Path, a Literal, a tuple,
an Optional whose default is None (in TOML its key is absent), a nested dataclass (a table) or a tuple of dataclasses
(an array of tables, [[name]]). A key that a table leaves out takes the default that the enclosing dataclass gives it.
No value is coerced, except an integer where a float is expected. `load_toml` of what `to_toml` wrote gives the same
configuration. A field of type `object` holds a dataclass that another field chooses: its class is given a table, and
its __post_init__ parses that.
"""

import dataclasses
import difflib
import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

C = TypeVar("C")
LONGEST_PROBLEM = 1000  # characters of an error that repeats a value
EXPECTED = {  # pydantic's types of error -> words
    "int_type": "expected an integer",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected a string",
    "tuple_type": "expected a list",
    "dataclass_type": "expected a table",
}


class ConfigError(ValueError):
    """A value that cannot be used. key: its dotted name; problem: the fault, in words."""

    def __init__(self, where: str, key: str, problem: str) -> None:
        super().__init__(f"{where}: {key}: {problem}" if key else f"{where}: {problem}")
        self.key, self.problem = key, problem


def load_toml(cls: type[C], path: Path | str, overrides: Mapping[str, Any] | None = None) -> C:
    """Return the `cls` that the file at `path` describes, with `overrides` (dotted key -> value) laid over it.

    Raises FileNotFoundError, and ValueError naming the file (or "override") and the key path when the TOML is
    malformed, a key is unknown or missing, a value has the wrong type, or a dataclass's __post_init__ refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a TOML configuration")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as err:  # malformed, not UTF-8, or an integer of thousands of digits
        raise ValueError(f"{path}: not valid TOML: {err}") from err
    except RecursionError:
        raise ValueError(f"{path}: not valid TOML: its values are nested too deeply") from None
    _lay_over(data, overrides or {})
    return parse(cls, data, str(path), overrides or {})


def parse(
    cls: type[C], data: Mapping[str, Any], source: str, overridden: Mapping[str, Any] | None = None, prefix: str = ""
) -> C:
    """Return the `cls` that nested tables describe. source: the file that errors name; overridden: keys not from it.

    prefix: the key of the table that `data` is.

    Raises ValueError as `load_toml`.
    """
    try:
        text = json.dumps([_filled(cls, data)], default=_refuse_dates)
        adapter: TypeAdapter[tuple[C]] = _adapter(typing.cast(Any, cls))
        return adapter.validate_json(text)[0]
    except ValidationError as err:
        first = min(err.errors(), key=lambda error: error["type"] == "missing")  # a misspelt key may seem missing
        key, problem = _key(first["loc"][1:]), _problem(cls, first)
        if isinstance(inner := first.get("ctx", {}).get("error"), ConfigError):
            key, problem = _join(key, inner.key), inner.problem
        problem = problem.removeprefix(f"{key}: ")  # a component names its table, too
        ours = any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in overridden or {})
        where = "override" if ours else source
        if len(problem) > LONGEST_PROBLEM:  # it repeats a value, which may be a whole file
            problem = f"{problem[: LONGEST_PROBLEM // 2]} ... {problem[-LONGEST_PROBLEM // 2 :]}"
        raise ConfigError(where, _join(prefix, key) if prefix else key, problem) from err
    except (TypeError, RecursionError) as err:
        raise ValueError(f"{source}: {err}") from err


def check_least(config: object, where: str, **least: float) -> None:
    """Raise ValueError for a field of `config` that is below its value in `least`; a field that is None may be."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            expected = "must not be negative" if low == 0 else f"must be at least {low:g}"
            raise ValueError(f"{where}{name} {value} {expected}")


def to_toml(config: Any) -> str:
    """Return `config` as TOML with every resolved value; None is left out.

    Raises ValueError for a None whose default is another value: TOML cannot say it.
    """
    _check_none(config, "", None)
    return tomli_w.dumps(_plain(config, with_none=False))


def diff(old: C, new: C) -> list[str]:
    """Return one line for each value that differs, e.g. "dpo.epochs: 1 -> 2"; equal configurations give []."""
    before, after = dict(_flatten(_plain(old), "")), dict(_flatten(_plain(new), ""))
    keys = list(before) + [key for key in after if key not in before]
    return [
        f"{key}: {_render(before.get(key))} -> {_render(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    # pydantic takes a configuration for a tuple, and not for a dataclass; the dataclasses inside take it over.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


def _filled(cls: Any, data: Any) -> Any:
    """Return `data` where each table also has the values that the enclosing dataclass's default gives it."""
    if isinstance(data, list):
        return [_filled(cls, row) for row in data]
    if not isinstance(data, Mapping):
        return data
    hints, filled = typing.get_type_hints(cls), dict(data)
    for f in dataclasses.fields(cls):
        kind, default = _dataclass_of(hints[f.name]), _default(f)
        if f.name not in filled or kind is None:
            continue
        value = _filled(kind, filled[f.name])
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            chosen = {key for key, kind in typing.get_type_hints(type(default)).items() if kind is object}
            value = _merged({key: v for key, v in _plain(default).items() if key not in chosen}, value)
        filled[f.name] = value
    return filled


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = under.keys() & over.keys()
    inner = {k: _merged(under[k], over[k]) for k in both if isinstance(under[k], dict) and isinstance(over[k], dict)}
    return under | over | inner


def _plain(config: Any, with_none: bool = True) -> Any:
    """Return a configuration as the nested tables that TOML has, paths as text."""
    if dataclasses.is_dataclass(config):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {key: _plain(value, with_none) for key, value in values.items() if with_none or value is not None}
    if isinstance(config, list | tuple):
        return [_plain(value, with_none) for value in config]
    return str(config) if isinstance(config, Path) else config


def _check_none(config: Any, key: str, base: Any) -> None:
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), _default(f) if base is None else getattr(base, f.name)
        if dataclasses.is_dataclass(value):
            _check_none(value, _join(key, f.name), default if type(default) is type(value) else None)
        elif value is None and default is not None:
            raise ValueError(f"{_join(key, f.name)}: None cannot be written, since the default is {_render(default)}")


def _problem(cls: Any, error: Any) -> str:
    """Return the fault in words, with the nearest known key or choice."""
    kind, got, loc = error["type"], error["input"], error["loc"][1:]
    if kind == "unexpected_keyword_argument":
        return f"unknown key; {_suggestion(cls, loc)}"
    if kind == "missing":
        return "the key is missing"
    if kind == "value_error":  # of a __post_init__
        return str(error["ctx"]["error"])
    described = "a table" if isinstance(got, dict) else f"{type(got).__name__} ({got!r:.60})"
    expected = EXPECTED.get(kind) or error["msg"].replace("Input should be", "expected", 1)
    near = difflib.get_close_matches(str(got), re.findall("'(.*?)'", expected), n=1) if kind == "literal_error" else []
    return f"{expected}, got {described}" + (f"; did you mean {near[0]!r}?" if near else "")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint for an unknown name: the nearest of `known`, else all of them."""
    near = difflib.get_close_matches(name, names := list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"


def _suggestion(cls: Any, loc: tuple[str | int, ...]) -> str:
    """Return a hint: the nearest key of this table, else the same name in another one, else all known keys."""
    table, name = cls, str(loc[-1])
    for part in loc[:-1]:
        table = table if isinstance(part, int) else _dataclass_of(typing.get_type_hints(table)[part])
    names = [f.name for f in dataclasses.fields(table)]
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean '{_join(_key(loc[:-1]), near[0])}'?"
    paths = list(_paths(cls, ""))
    if near := difflib.get_close_matches(name, [path.rpartition(".")[2] for path in paths], n=1, cutoff=0.8):
        found = [path for path in paths if path.rpartition(".")[2] == near[0]]
        return "did you mean " + " or ".join(f"'{path}'" for path in found) + "?"
    return f"known here: {', '.join(names)}"


def _paths(cls: Any, key: str) -> Iterator[str]:
    """Yield the dotted name of every value of a configuration; tables of an array have none."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        inner = _dataclass_of(hints[f.name])
        if inner is not None and typing.get_origin(hints[f.name]) is not tuple:
            yield from _paths(inner, _join(key, f.name))
        else:
            yield _join(key, f.name)


def _dataclass_of(kind: Any) -> Any:
    """Return the dataclass that a type is, allows beside None, or is a tuple of; None where there is none."""
    if dataclasses.is_dataclass(kind):
        return kind
    if typing.get_origin(kind) in (types.UnionType, typing.Union, tuple):
        return next((inner for arg in typing.get_args(kind) if (inner := _dataclass_of(arg)) is not None), None)
    return None


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _lay_over(data: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set the dotted keys of `overrides` in the nested dict `data`."""
    for key, value in overrides.items():
        *tables, name = key.split(".")
        where = data
        for depth, table in enumerate(tables, start=1):
            where = where.setdefault(table, {})
            if not isinstance(where, dict):
                raise ValueError(f"override: {key}: {'.'.join(tables[:depth])} is a value, not a table")
        where[name] = _plain(value)


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, _join(key, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, row in enumerate(value):
            yield from _flatten(row, f"{key}[{index}]")
    else:
        yield key, value


def _render(value: Any) -> str:
    return "none" if value is None else json.dumps(_plain(value), ensure_ascii=False)


def _refuse_dates(value: Any) -> Any:
    raise TypeError(f"{value} is a {type(value).__name__}, and no setting is one; write a text in quotation marks")


def _key(loc: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part:.60}" for part in loc).removeprefix(".")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
