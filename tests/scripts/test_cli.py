"""scripts/cli.py: dispatch, TOML before flags, and errors that a user can read."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from matryoshka.core.protocols import GeneratorError
from matryoshka.scripts import cli


@dataclass(frozen=True)
class Train:
    learning_rate: float = 1e-5
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs {self.epochs} must be at least 1")


@dataclass(frozen=True)
class Config:
    """A command's configuration."""

    name: str
    seed: int = 0
    train: Train = Train()


def add_command(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., None]) -> None:
    """Make `function` the command `name`, in a module of its own."""
    module = ModuleType(f"matryoshka.scripts.{name}")
    setattr(module, name, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, name, "help")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Return the configurations that the command `take` was called with."""
    taken: list[Config] = []

    def take(config: Config) -> None:
        taken.append(config)

    add_command(monkeypatch, "take", take)
    return taken


def test_flags_override_the_file(seen: list[Config], tmp_path: Path) -> None:
    """Oracle: the configurations written by hand."""
    path = tmp_path / "run.toml"
    path.write_text('name = "file"\nseed = 1\n[train]\nepochs = 3\n')
    assert cli.main(["take", "--seed", "2", "--config", str(path), "--train.learning-rate", "0.5"]) == 0
    assert cli.main(["take", f"--config={path}"]) == 0
    assert cli.main(["take", "--name", "flag"]) == 0
    assert seen == [
        Config(name="file", seed=2, train=Train(learning_rate=0.5, epochs=3)),
        Config(name="file", seed=1, train=Train(epochs=3)),
        Config(name="flag"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pilt"], "error: matryoshka: unknown command 'pilt'; did you mean 'pilot'?"),
        (["take", "--config"], "error: --config: expected a TOML file after it"),
        (["take", "--config", "absent.toml"], "error: absent.toml: no such file; expected a TOML configuration"),
    ],
)
def test_a_users_error_is_one_line(
    seen: list[Config], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the line on stderr, the exit status 2, no call."""
    assert cli.main(arguments) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and "Traceback" not in complaint
    assert seen == []


def test_a_bad_flag_is_refused_by_name(seen: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the same status 2, through the flag parser's own exit."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["take", "--name", "n", "--train.epochs", "0"])
    assert exit_.value.code == 2
    assert "epochs 0 must be at least 1" in capsys.readouterr().err
    assert seen == []


def test_a_pilot_without_a_configuration_lists_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the four required keys of a run, in the flag parser's own message."""
    with pytest.raises(SystemExit):
        cli.main(["pilot"])
    complaint = capsys.readouterr().err
    required = ("--name", "--controller.path", "--generator.base-url", "--generator.model")
    assert all(flag in complaint for flag in required)


def test_a_file_with_a_byte_order_mark_is_read(seen: list[Config], tmp_path: Path) -> None:
    """Oracle: the same configuration as without the three bytes that some editors put first."""
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "n"\r\n')
    assert cli.main(["take", "--config", str(path)]) == 0
    assert seen == [Config(name="n")]


def test_an_unknown_key_names_the_nearest(
    seen: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: all of stderr, by hand."""
    path = tmp_path / "run.toml"
    path.write_text('name = "n"\n[train]\nepoch = 3\n')
    assert cli.main(["take", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: train.epoch: unknown key; did you mean 'train.epochs'?\n"


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError("x"), GeneratorError("x")])
def test_debug_keeps_the_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the very exception comes out when asked for, and 2 when not."""

    def fail() -> None:
        raise error

    add_command(monkeypatch, "fail", fail)
    assert cli.main(["fail"]) == 2
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(type(error), match="x"):
        cli.main(["fail"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an exception that is no user's error is not swallowed."""

    def fail() -> None:
        raise ZeroDivisionError

    add_command(monkeypatch, "fail", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_help_lists_every_command_without_torch() -> None:
    """Oracle: the modules that a fresh process has loaded after printing it."""
    code = "import sys; from matryoshka.scripts import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    path = str(Path(__file__).resolve().parents[2] / ".ns")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout and text in done.stdout for name, text in cli.COMMANDS.items())
