"""pilot/environment.py: the command line as its user typed it, quoted for a shell."""

import os
import shlex
import sys

import pytest

from matryoshka.pilot.environment import TYPED, typed_command


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["/env/bin/python3", "/env/bin/matryoshka", "pilot", "--name", "a b"], "matryoshka pilot --name 'a b'"),
        (["/usr/bin/python3", "-m", "matryoshka.scripts.cli", "dpo"], "python3 -m matryoshka.scripts.cli dpo"),
        (["python", "own.py"], "python own.py"),
        (["python", "caf\udce9.py"], "python 'caf?.py'"),
    ],
)
def test_the_command_is_the_one_that_was_typed(words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand; an installed command is a script beside the interpreter of its first line."""
    monkeypatch.delenv(TYPED, raising=False)
    monkeypatch.setattr(sys, "orig_argv", words)
    assert typed_command() == typed
    monkeypatch.setenv(TYPED, "bash scripts/demo.sh --seed 1")
    assert typed_command() == "bash scripts/demo.sh --seed 1"


def test_under_torchrun_the_launcher_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: this process's own words, taken for the launcher's."""
    own = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    monkeypatch.delenv(TYPED, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "worker"])
    assert shlex.split(typed_command())[-len(own) + 1 :] == own[1:]
