"""A small pilot that is killed at random moments, or whose disk fails at every fsync, ends as the undisturbed one.

The oracle is an undisturbed run of the same configuration: journal, pairs, weights and report, bit for bit; and the
generator's own log, in which no request that was answered and kept comes twice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka.tests.pilot.conftest import Generator, environment
from matryoshka.tests.pilot.test_pilot import Runs, assert_equal_runs, small

NUM_KILLS = int(os.environ.get("MATRYOSHKA_KILLS", "25"))
LONGEST_S = float(os.environ.get("MATRYOSHKA_KILL_S", "6"))  # before a kill; more where the machine is busy

pytest_plugins = ["matryoshka.tests.pilot.conftest"]


def crash(runs: Runs, name: str, controller: Path, mode: str, most: int, seed: int) -> dict[str, int]:
    """Return how often the run was started and how it ended each time; it is done afterwards."""
    config = small(name, controller, runs.generator.url(name))
    command = [sys.executable, "-m", "matryoshka.tests.safety.crash_pilot", str(runs.write(config)), mode]
    errors = runs.root / f"{name}.toml.err"
    command += [str(most), str(seed), str(LONGEST_S)]
    done = subprocess.run(command, cwd=runs.root, env=environment(), capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr[-2000:]
    ends: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert ends.get("exit 0") == 1, errors.read_text()[-3000:]
    asked = runs.generator.asked(name)
    assert len(set(asked)) == runs.num_kept(config)
    assert len(asked) - len(set(asked)) <= ends["starts"]  # at most the one in flight at each end
    return ends


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the undisturbed run; MATRYOSHKA_KILLS makes it more than 25 kills."""
    runs = Runs(tmp_path, generator)
    whole = small("crash-whole", controller_dir, generator.url("crash-whole"))
    runs.finish(whole)
    ends = crash(runs, "crash-kills", controller_dir, "kills", NUM_KILLS, 3)
    assert ends["killed"] >= 3
    assert_equal_runs(tmp_path / "runs" / "crash-kills", runs.folder(whole))
    assert set(generator.asked("crash-kills")) == set(generator.asked("crash-whole"))


@pytest.mark.slow
def test_a_disk_that_fails_again_and_again_changes_nothing(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the undisturbed run; each start meets a fault at another of its operations, the four kinds in turn."""
    runs = Runs(tmp_path, generator)
    whole = small("faults-whole", controller_dir, generator.url("faults-whole"))
    runs.finish(whole)
    ends = crash(runs, "faults", controller_dir, "faults", 40, 0)
    assert ends["exit 2"] >= 3 and ends["killed"] >= 3
    assert_equal_runs(tmp_path / "runs" / "faults", runs.folder(whole))
    assert "No space left on device" in (tmp_path / "faults.toml.err").read_text()
