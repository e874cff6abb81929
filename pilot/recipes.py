"""The configurations that this package carries, each a starting point for a user's own."""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from matryoshka.core.config import nearest
from matryoshka.pilot.config import RunConfig

RECIPES = Path(__file__).resolve().parents[1] / "configs"


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def commented_recipe(name: str) -> str:
    """Return the TOML of the recipe `name` with a comment above each key.

    Raises ValueError naming the nearest recipe for a name that is none.
    """
    names = recipe_names()
    if name not in names:
        raise ValueError(f"init: unknown recipe {name!r}; {nearest(name, names)}")
    lines: list[str] = []
    table: Any = RunConfig
    for line in (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if header := re.match(r"\[([\w.]+)\]", line):
            table = _table(RunConfig, header[1])
        elif (key := re.match(r"(\w+)\s*=", line)) and table is not None and key[1] in (said := field_help(table)):
            lines.append(f"# {said[key[1]]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _table(cls: Any, path: str) -> Any:
    """Return the dataclass of the table at a dotted path, None where a dataclass does not say which it is."""
    for name in path.split("."):
        cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
    return cls if dataclasses.is_dataclass(cls) else None


def field_help(cls: Any) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found
