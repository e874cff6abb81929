"""Typed configuration: frozen dataclasses, filled from a TOML file and then from overrides, written back resolved.

A field is bool, int, float, str, Path, a Literal of strings, a tuple[x, ...] of scalars, an Optional of those (None is
a key that is absent from the TOML, so the default of such a field is None), a nested dataclass (a table), or a
tuple[x, ...] of dataclasses (an array of tables, [[name]]). A field of type `object` holds a dataclass that another
field chooses: its class has a static method `type_of(field, values)`, which returns the type from the fields before it.
A key that a table leaves out takes the default that the enclosing dataclass gives it. No value is coerced but an
integer where a float is expected; `load_toml` of what `to_toml` wrote is the same configuration.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")
SCALARS = (bool, int, float, str, Path)


def load_toml(cls: type[C], path: Path | str, overrides: Mapping[str, Any] | None = None) -> C:
    """Return the `cls` that the file at `path` describes, with `overrides` (dotted key -> value) laid over it.

    Raises FileNotFoundError, and ValueError naming the file (or "override") and the key path when the TOML is
    malformed, a key is unknown or missing, a value has the wrong type, or a dataclass's __post_init__ refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a TOML configuration")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path}: not valid TOML: {err}") from err
    overridden = _lay_over(data, overrides or {})
    return typing.cast(C, _Reader(cls, str(path), overridden).table(cls, data, "", None))


def apply_overrides(config: C, overrides: Sequence[str]) -> C:
    """Return `config` with every "key.path=value" of `overrides` applied, the last one winning.

    A value reads as TOML; strings need no quotes, tuples take TOML lists or comma-separated items, and `none` clears an
    Optional field. Raises ValueError as `load_toml` does.
    """
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {item!r}: expected key.path=value, for example dpo.learning_rate=1e-4")
        values[key.strip()] = text.strip()
    data: dict[str, Any] = {}
    overridden = _lay_over(data, {key: _Text(text) for key, text in values.items()})
    reader = _Reader(type(config), "configuration", overridden)
    return typing.cast(C, reader.table(type(config), data, "", config))


def to_toml(config: Any) -> str:
    """Return `config` as TOML with every resolved value; None is left out.

    Raises ValueError for a None whose default is another value: TOML cannot say it.
    """
    lines = list(_lines(config, "", None))
    return "\n".join(lines).strip("\n") + "\n"


def diff(old: C, new: C) -> list[str]:
    """Return one line for each value that differs, e.g. "dpo.learning_rate: 3e-4 -> 1e-4"; equal configs give []."""
    before, after = dict(_flatten(old, "")), dict(_flatten(new, ""))
    keys = list(before) + [key for key in after if key not in before]
    return [
        f"{key}: {_render(before.get(key))} -> {_render(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


@dataclasses.dataclass(frozen=True)
class _Text:
    """The unparsed right-hand side of an override; the field's type says how it reads."""

    text: str


class _Reader:
    """Turns nested dicts into dataclasses; knows which keys came from where, for the error messages."""

    def __init__(self, root: Any, source: str, overridden: set[str]) -> None:
        self.root, self.source, self.overridden = root, source, overridden
        self.data: Mapping[str, Any] = {}

    def error(self, key: str, problem: str) -> ValueError:
        ours = any(key == k or key.startswith((k + ".", k + "[")) for k in self.overridden)
        source = "override" if ours else self.source
        return ValueError(f"{source}: {key}: {problem}" if key else f"{source}: {problem}")

    def table(self, cls: Any, data: Any, key: str, base: Any) -> Any:
        """Return a `cls`; keys absent from `data` come from `base`, or from the class where there is no base."""
        if not isinstance(data, Mapping):
            raise self.error(key, f"expected a table, got {_describe(data)}")
        if not key:
            self.data = data
        hints = _hints(cls)
        for name in data:
            if name not in hints:
                raise self.error(_join(key, name), f"unknown key; {self.suggest(hints, key, name)}")
        values: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            path = _join(key, f.name)
            default = _default(f) if base is None else getattr(base, f.name)
            if hints[f.name] is object:
                try:
                    kind = cls.type_of(f.name, values)
                except ValueError as err:
                    raise self.error(key, str(err)) from err
                default = default if type(default) is kind else dataclasses.MISSING
                values[f.name] = self.value(kind, data.get(f.name, {}), path, default)
            elif f.name in data:
                values[f.name] = self.value(hints[f.name], data[f.name], path, default)
            elif default is dataclasses.MISSING and not _has_all_defaults(hints[f.name]):
                raise self.error(path, f"the key is missing; expected {_expected(hints[f.name])}")
            else:
                values[f.name] = hints[f.name]() if default is dataclasses.MISSING else default
        try:
            return cls(**values)
        except ValueError as err:
            raise self.error(key, str(err)) from err

    def value(self, kind: Any, data: Any, key: str, default: Any) -> Any:
        inner, optional = _unwrap(kind)
        if isinstance(data, _Text):
            data = self.parse(inner, optional, data.text, key)
        if data is None and optional:
            return None
        if dataclasses.is_dataclass(inner):
            return self.table(inner, data, key, None if default is dataclasses.MISSING else default)
        if typing.get_origin(inner) is tuple:
            if not isinstance(data, list | tuple):
                raise self.error(key, f"expected {_expected(kind)}, got {_describe(data)}")
            item = typing.get_args(inner)[0]
            return tuple(self.value(item, x, f"{key}[{i}]", dataclasses.MISSING) for i, x in enumerate(data))
        if typing.get_origin(inner) is typing.Literal:
            choices = typing.get_args(inner)
            if data not in choices:
                near = difflib.get_close_matches(str(data), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise self.error(key, f"expected {_expected(kind)}, got {_describe(data)}{hint}")
            return data
        if inner is float and type(data) is int:
            data = float(data)
        if inner is Path and isinstance(data, str | Path):
            return Path(data)
        if type(data) is not inner:
            raise self.error(key, f"expected {_expected(kind)}, got {_describe(data)}")
        if inner is float and math.isnan(data):
            raise self.error(key, "nan is not a setting; expected a number")
        return data

    def parse(self, kind: Any, optional: bool, text: str, key: str) -> Any:
        """Return the value that the override `text` stands for, as TOML would have given it."""
        if optional and text == "none":
            return None
        if typing.get_origin(kind) is tuple and not text.startswith("["):
            items = text.split(",") if text else []
            return [self.parse(typing.get_args(kind)[0], False, item.strip(), key) for item in items]
        if (kind in (str, Path) or typing.get_origin(kind) is typing.Literal) and not text.startswith(('"', "'")):
            return text
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError as err:
            raise self.error(key, f"expected {_expected(kind)}, got {text!r}") from err
        if list(parsed) != ["value"]:
            raise self.error(key, f"expected one value, got {text!r}")
        return parsed["value"]

    def suggest(self, names: Mapping[str, Any], key: str, name: str) -> str:
        """Return a hint: the nearest key of this table, else the same name in another one, else all known keys."""
        if near := difflib.get_close_matches(name, names, n=1):
            return f"did you mean '{_join(key, near[0])}'?"
        leaves = list(_paths(self.root, "", self.data))
        if near := difflib.get_close_matches(name, [path.rpartition(".")[2] for path in leaves], n=1, cutoff=0.8):
            found = [path for path in leaves if path.rpartition(".")[2] == near[0]]
            return "did you mean " + " or ".join(f"'{path}'" for path in found) + "?"
        return f"known here: {', '.join(names)}"


def _lay_over(data: dict[str, Any], overrides: Mapping[str, Any]) -> set[str]:
    """Set the dotted keys of `overrides` in the nested dict `data` and return them."""
    for key, value in overrides.items():
        *tables, name = key.split(".")
        where = data
        for depth, table in enumerate(tables, start=1):
            where = where.setdefault(table, {})
            if not isinstance(where, dict):
                raise ValueError(f"override: {key}: {'.'.join(tables[:depth])} is a value, not a table")
        where[name] = value
    return set(overrides)


def _hints(cls: Any) -> dict[str, Any]:
    """Return name -> type of the fields of `cls`. Raises TypeError for a field that TOML could not carry."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        inner, optional = _unwrap(hints[f.name])
        args = typing.get_args(inner)
        is_tuple = typing.get_origin(inner) is tuple and len(args) == 2 and args[1] is Ellipsis
        is_tuple = is_tuple and (args[0] in SCALARS or dataclasses.is_dataclass(args[0]))
        is_literal = typing.get_origin(inner) is typing.Literal and all(isinstance(arg, str) for arg in args)
        if not (inner in (*SCALARS, object) or is_tuple or is_literal or dataclasses.is_dataclass(inner)):
            raise TypeError(f"{cls.__name__}.{f.name}: a configuration cannot hold {hints[f.name]}")
        if optional and _default(f) is not None:
            raise TypeError(f"{cls.__name__}.{f.name}: the default of an Optional must be None")
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """Return (the type without None, whether None was allowed)."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if len(options) == 1:
            return options[0], True
    return kind, False


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _has_all_defaults(kind: Any) -> bool:
    """Whether `kind` is a dataclass that can be made of nothing, so that its table may be absent."""
    if not dataclasses.is_dataclass(kind):
        return False
    hints = _hints(kind)
    return all(
        _default(f) is not dataclasses.MISSING or _has_all_defaults(hints[f.name]) for f in dataclasses.fields(kind)
    )


def _paths(cls: Any, key: str, data: Mapping[str, Any]) -> Iterator[str]:
    for name, kind in _hints(cls).items():
        inner, _ = _unwrap(kind)
        if inner is object:
            given = {f.name: data.get(f.name, _default(f)) for f in dataclasses.fields(cls)}
            inner = cls.type_of(name, {key: getattr(value, "text", value) for key, value in given.items()})
        if dataclasses.is_dataclass(inner):
            below = data.get(name)
            yield from _paths(inner, _join(key, name), below if isinstance(below, Mapping) else {})
        else:
            yield _join(key, name)


def _flatten(config: Any, key: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten(value, _join(key, f.name))
        elif _is_array(value):
            for i, row in enumerate(value):
                yield from _flatten(row, f"{_join(key, f.name)}[{i}]")
        else:
            yield _join(key, f.name), value


def _lines(config: Any, key: str, base: Any) -> Iterator[str]:
    _hints(type(config))
    tables = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = _default(f) if base is None else getattr(base, f.name)
        if dataclasses.is_dataclass(value):
            below = default if type(default) is type(value) else None
            tables.append((f"[{_join(key, f.name)}]", f.name, value, below))
        elif _is_array(value):
            tables += [(f"[[{_join(key, f.name)}]]", f.name, row, None) for row in value]
        elif value is not None:
            yield f"{f.name} = {_render(value)}"
        elif default is not None:
            raise ValueError(f"{_join(key, f.name)}: None cannot be written, since the default is {_render(default)}")
    for header, name, value, default in tables:
        yield f"\n{header}"
        yield from _lines(value, _join(key, name), default)


def _is_array(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def _render(value: Any) -> str:
    """Return a TOML literal that parses to exactly `value`; "none" for None, which only `diff` shows."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # repr is the shortest exact decimal; small ones read better as 3e-4 than as 0.0003.
        return f"{Decimal(repr(value)).normalize():e}" if 0 < abs(value) < 1e-2 else repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_render(item) for item in value) + "]"
    return str(value)


def _expected(kind: Any) -> str:
    inner, optional = _unwrap(kind)
    if dataclasses.is_dataclass(inner):
        return "a table"
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        return "an array of tables" if dataclasses.is_dataclass(item) else f"a list of {item.__name__}"
    if typing.get_origin(inner) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(inner))
    return f"{inner.__name__}{' or none' if optional else ''}"


def _describe(data: Any) -> str:
    if isinstance(data, Mapping):
        return "a table"
    return f"{type(data).__name__} ({data!r:.60})"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
