"""A run that is stopped twice by Ctrl-C ends at once and keeps its records."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.core.signals import STOPPED, STOPPING
from matryoshka.pilot.config import WarmupConfig
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import Runs, small


def wait_for(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_collection_stops_at_once(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: status 130 while requests hang, all of stderr, and the records and payments from before."""
    runs = Runs(tmp_path, generator)
    config = small("stalling", controller_dir, generator.url("stalling"))
    controller = replace(config.controller, deterministic=False)  # several episodes at a time
    config = replace(config, controller=controller, warmup=WarmupConfig("none"))
    process, errors = runs.start(config), tmp_path / "stalling.err"
    wait_for(lambda: len(generator.asked("stalling")) > 5 and runs.num_kept(config) == 3)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: STOPPING in errors.read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    assert process.stdout is not None
    process.stdout.close()
    assert errors.read_text().endswith(STOPPING + STOPPED) and "Traceback" not in errors.read_text()
    assert runs.num_kept(config) == 3
    rows = (runs.folder(config) / "trajectories.jsonl").read_text().split("\n")
    assert rows[-1] == "" and all(json.loads(row)["trajectory"] for row in rows[:-1])
