"""Every flag of every command has a sentence of help."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tyro

from matryoshka.benchmarks.command import BENCHES
from matryoshka.scripts import cli


def flags_without_help(target: Callable[..., Any]) -> list[str]:
    """Return the flags of the parser that tyro makes of `target` whose help is nothing but the default."""
    with pytest.warns(DeprecationWarning):
        parser = tyro.extras.get_parser(target)
    helps = {action.option_strings[0]: action.help or "" for action in parser._actions if action.option_strings}
    # tyro appends "(default: ...)", "(required)", "(optional)" or "(sets: ...)".
    appended = re.compile(r"\((default|required|optional|sets)\b.*", flags=re.DOTALL)
    return [flag for flag, text in helps.items() if not re.search(r"[a-zA-Z]{2}", appended.sub("", text))]


def target_of(name: str) -> Callable[..., Any]:
    """Return what tyro makes the flags of a command from: its configuration, or the command itself."""
    bench, _, benchmark = name.partition(" ")
    if bench == "bench":
        config: Callable[..., Any] = importlib.import_module(f"matryoshka.benchmarks.{benchmark}").Config
        return config
    command = cli.load_command(name)
    kinds = [parameter.annotation for parameter in inspect.signature(command).parameters.values()]
    return kinds[0] if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) else command  # type: ignore[return-value]


NAMES = [*(name for name in cli.COMMANDS if name != "bench"), *(f"bench {name}" for name in BENCHES)]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_has_a_sentence(name: str) -> None:
    """Oracle: the parser itself, which prints these texts."""
    assert flags_without_help(target_of(name)) == []


@dataclass(frozen=True)
class Bare:
    """A configuration with one flag that says nothing."""

    told: int = 0
    """How often it was told."""
    untold: int = 0


def test_the_walk_sees_a_flag_without_one() -> None:
    """Oracle: the class above."""
    assert flags_without_help(Bare) == ["--untold"]
