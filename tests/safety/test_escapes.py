"""Programs that try to get out of the sandbox: each does harm where nothing stops it, and none behind the boundary.

The oracle is the effect of a program, not its word: a planted number that it returned, a folder that changed, a server
that heard from it, a process that ended or stopped, a process that is left. See `harness.py` and `escapes.py`.
"""

import json
import os
import platform
import subprocess
import sys
from collections import Counter

import pytest

from matryoshka.tasks.sandbox_backends import SCRIPT, LocalSandbox
from matryoshka.tests.pilot.conftest import environment
from matryoshka.tests.safety.escapes import ESCAPES

IS_ROOT = os.getuid() == 0
USERS = ["user", pytest.param("root", marks=pytest.mark.skipif(not IS_ROOT, reason="the tests do not run as root"))]
TIME_S = 900.0  # for all programs of a mode on a busy machine


def results(user: str, mode: str, chosen: str) -> dict[str, dict[str, object]]:
    """Return what the harness tells of each program."""
    command = [sys.executable, "-m", "matryoshka.tests.safety.harness", user, mode, chosen]
    variables = {name: value for name, value in environment().items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_S, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


def boundary() -> None:
    """Skip where the kernel has no boundary to test."""
    sandbox = LocalSandbox("auto")
    holds = sandbox.start(SCRIPT)
    sandbox.close()
    if not (holds["landlock"] and holds["seccomp"]):
        pytest.skip(f"no boundary here: {holds['problems']}")


def test_there_are_enough_programs_of_every_kind() -> None:
    """Oracle: the count that the project promises, 80 at least."""
    kinds = Counter(escape.kind for escape in ESCAPES)
    assert len(ESCAPES) >= 130 and min(kinds.values()) >= 3
    assert len({(escape.kind, escape.name) for escape in ESCAPES}) == len(ESCAPES)


def test_every_third_program_is_contained() -> None:
    """Oracle: no effect of any program, as the user who runs the tests."""
    boundary()
    found = results("root" if IS_ROOT else "user", "solution", "some")
    assert len(found) >= 40
    assert {name: told for name, told in found.items() if told["harm"]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("mode", ["solution", "household", "direct"])
def test_every_program_is_contained(user: str, mode: str) -> None:
    """Oracle: no effect of any program; "direct" is the boundary without bubblewrap's namespaces."""
    boundary()
    found = results(user, mode, "all")
    assert len(found) == sum(user in escape.users for escape in ESCAPES)
    assert {name: told for name, told in found.items() if told["harm"]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
def test_every_program_works_where_nothing_stops_it(user: str) -> None:
    """Oracle: the effect itself. A program may need what this machine lacks, which `needs` names; at most ten do."""
    found = results(user, "bare", "all")
    harmless = [name for name, told in found.items() if not told["effect"]]
    for name in list(harmless):  # a busy machine may have taken the time that it needed
        if results(user, "bare", name)[name]["effect"]:
            harmless.remove(name)
    needs = {f"{escape.kind}: {escape.name}": escape.needs for escape in ESCAPES}
    missing = [name for name in harmless if needs[name] and (needs[name] != "x86_64" or platform.machine() != "x86_64")]
    assert sorted(harmless) == sorted(missing) and len(missing) <= 10
