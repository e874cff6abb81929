"""`torchrun -m matryoshka.scripts.cli sft` ends clearly when a rank is killed or hangs, or all are stopped."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.core.training.checkpoint import latest_checkpoint
from matryoshka.lora.files import WEIGHTS
from matryoshka.tests.pilot import elastic
from matryoshka.tests.pilot.conftest import environment
from matryoshka.tests.pilot.test_finetune import CHATS, arguments, write
from matryoshka.tests.processes import alive

pytestmark = pytest.mark.slow
STEPS = 120
START_S = 400  # a start and some steps, on a machine that is busy
LIMIT_S = 120  # torchrun gives the others 30 s after SIGTERM, before it kills them; a busy machine takes its time


class Job:
    """A run of 120 steps of two rows on two ranks, with dropout and a checkpoint every second step."""

    def __init__(
        self, out: Path, model: Path, torchrun: str = "", restarts: int = 0, settings: str = ""
    ) -> None:
        """torchrun: its flags; without them the ranks are forks of its agent, with `restarts`."""
        self.out, self.log, self.pids = out, out.with_suffix(".log"), out.with_suffix(".pids")
        self.pids.mkdir(exist_ok=True)
        data = write(out.parent / "rows.jsonl", CHATS)
        more = f"--train.epochs {STEPS // 3} --train.save-every 2 --lora.dropout 0.1 {settings}".split()
        command = ["sft", *arguments(data, model, out, *more)]

        def agent() -> None:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (open(end, "w", buffering=1) for end in (1, 2))  # pytest's own are elsewhere
            # Otherwise torchrun's restarts share one store, and a rank may read there where a dead one listened.
            os.environ |= {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            if torchrun:
                launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *torchrun.split()]
                os.execv(sys.executable, [sys.executable, *launcher, elastic.__file__, str(self.pids), *command])
            elastic.launch(self.pids, restarts, command)

        elastic.warm()
        self.agent = multiprocessing.get_context("fork").Process(target=agent)
        self.agent.start()
        assert self.agent.pid is not None
        self.pid = self.agent.pid

    def ended(self, limit: float) -> int:
        """Return the status of torchrun, which ends within `limit` seconds."""
        self.agent.join(limit)
        assert self.agent.exitcode is not None, f"after {limit} s: {self.log.read_text()[-3000:]}"
        return self.agent.exitcode

    def ranks(self) -> dict[int, int]:
        """Return the process id of each rank that lives."""
        found = {int(path.name): int(path.read_text() or 0) for path in self.pids.iterdir()}
        return {rank: pid for rank, pid in found.items() if pid and alive(pid)}

    def rows(self) -> int:
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until(self, condition: Callable[[], object], limit: float, what: str) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"{what} took longer than {limit} s: {self.log.read_text()[-3000:]}"
            time.sleep(0.005)

    def step(self) -> int:
        newest = latest_checkpoint(self.out)
        return int(newest.name.removeprefix("step-")) if newest else 0


@contextmanager
def job(*arguments: Any, **settings: Any) -> Iterator[Job]:
    run = Job(*arguments, **settings)
    try:
        yield run
    finally:
        run.agent.kill()
        run.agent.join()
        for pid in run.ranks().values():
            os.kill(pid, signal.SIGKILL)


def kill_one(run: Job, draws: random.Random, starting: bool = False) -> int:
    """Kill a rank by SIGKILL at a random moment of its life, wait until both are gone, and return its process id."""
    before, path = run.step(), run.out / "metrics.jsonl"
    old = path.stat().st_ino if path.exists() else None
    run.until(lambda: len(run.ranks()) == 2, START_S, "the start")
    pids = run.ranks()
    if starting:
        time.sleep(draws.uniform(0, 1))
    else:  # a run that starts writes the rows anew that its checkpoint has, and goes on
        run.until(lambda: path.exists() and path.stat().st_ino != old, START_S, "loading")
        resumed = run.rows()
        assert resumed >= before
        steps = draws.randint(1, 8)
        run.until(lambda: run.rows() >= resumed + steps, START_S, "a step")
        time.sleep(draws.uniform(0, 0.03))
    assert alive(pids[0]) and alive(pids[1])
    killed = pids[draws.randrange(2)]
    os.kill(killed, signal.SIGKILL)
    run.until(lambda: not any(map(alive, pids.values())), LIMIT_S, "the end of all ranks")
    assert run.step() >= before
    return killed


def stop_all(run: Job) -> None:
    """Send SIGTERM as a scheduler does, to every process of the job; torchrun passes it on, so ranks get it twice."""
    for pid in (*run.ranks().values(), run.pid):
        os.kill(pid, signal.SIGTERM)
    assert run.ended(LIMIT_S) != 0 and not run.ranks()
    assert 0 < run.step() < STEPS and run.rows() == run.step()
    assert f"stopped by signal after step {run.step()} of {STEPS}; state saved in" in run.log.read_text()


def test_ten_kills_and_a_signal_change_no_bit(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the undisturbed run: the adapter's file to the byte, the metrics but for the time that they took.

    One rank of two is killed ten times, once of them while the ranks start; each time torchrun's agent starts them
    again, which is the elastic restart, and they go on from the last complete checkpoint. Then all get SIGTERM.
    """
    with job(tmp_path / "whole", tiny_dir) as run:
        assert run.ended(START_S) == 0, run.log.read_text()
    out, draws = tmp_path / "part", random.Random(0)
    with job(out, tiny_dir, restarts=10) as run:
        for kill in range(10):
            kill_one(run, draws, starting=kill == 4)
        reached = run.step()
        run.until(lambda: run.step() > reached, START_S, "the last restart")
        stop_all(run)
    with job(out, tiny_dir) as run:
        assert run.ended(START_S) == 0, run.log.read_text()
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path / "whole", out)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    files = [(folder / "adapter" / WEIGHTS).read_bytes() for folder in (tmp_path / "whole", out)]
    assert files[0] == files[1]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "adapter", "metrics.jsonl", f"step-{STEPS}"]


def test_torchrun_starts_again_and_then_reports(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: with --max-restarts 1 the first kill is mended, the second ends torchrun, which names it.

    Both come after five steps or more: the checkpoint of step 4 was begun, so that of step 2 is complete. torchrun
    looks every 0.1 s. Where the other rank has failed by then too, it may list the killed one beside the root cause.
    """
    with job(tmp_path / "out", tiny_dir, torchrun="--standalone --max-restarts 1") as run:
        kill_one(run, random.Random(9))
        killed = kill_one(run, random.Random(7))
        assert run.ended(LIMIT_S) != 0
        report = run.log.read_text().rpartition("FAILED")[2]
        assert f"Signal 9 (SIGKILL) received by PID {killed}" in report and "Root Cause" in report
        assert run.step() > 0


def test_a_rank_that_hangs_ends_the_run_within_the_time_out(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: one rank is stopped; the other fails after 4 s; torchrun kills the stopped one 30 s later."""
    with job(tmp_path / "out", tiny_dir, settings="--train.rank-timeout-s 4") as run:
        run.until(lambda: run.rows() > 3, START_S, "the start")
        pids = run.ranks()
        os.kill(pids[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert run.ended(4 + LIMIT_S) != 0
        assert time.monotonic() - stopped < 4 + LIMIT_S and not any(map(alive, pids.values()))
        report = run.log.read_text().partition("Root Cause")[2]
        assert "rank      : 0" in report and "Timed out" in report
