"""docs/controllers.md: its worked example is a file that keeps the contract, and its table lists every family."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka.core.models.load import architecture_files

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "controllers.md"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A folder of one's own with the two blocks of the guide."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (settings,) = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "arcee.py").write_text(code)
    (tmp_path / "arcee.json").write_text(settings)
    return tmp_path


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
    command += ["-m", "not slow and not gpu", str(ROOT / "tests/core/models/test_controllers.py")]
    return subprocess.run(
        [*command, "--controller", str(folder)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_worked_example_keeps_the_contract(example: Path) -> None:
    """Oracle: the contract, in a process of its own."""
    done = contract(example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (("torch.relu(x).square()", "torch.relu(x)"), "clause 2: logits differ"),
        (('fields.fixed(hidden_act="relu2")', "pass"), r"read_config neither heeds nor refuses \['hidden_act'\]"),
        (('"up_proj", "down_proj")', '"down_proj")'), "clause 1: LORA_TARGETS"),
    ],
    ids=["another activation", "a setting that is ignored", "a forgotten target"],
)
def test_a_violation_names_the_clause(change: tuple[str, str], clause: str, example: Path) -> None:
    """Oracle: the example with one line broken."""
    code = (example / "arcee.py").read_text()
    assert change[0] in code
    (example / "arcee.py").write_text(code.replace(*change))
    done = contract(example)
    assert done.returncode == 1 and re.search(clause, done.stdout), done.stdout + done.stderr


def test_the_guide_lists_every_family() -> None:
    """Oracle: the files of core/models/; both tables have a row for each."""
    rows = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted([*architecture_files()] * 2)
