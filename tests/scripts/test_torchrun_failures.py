"""What becomes of `torchrun -m matryoshka.scripts.cli sft` when a rank is killed or hangs, or all are stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from matryoshka.core.checkpoint import latest_checkpoint
from matryoshka.core.files import read_jsonl
from matryoshka.lora.files import WEIGHTS
from matryoshka.tests.scripts.conftest import environment
from matryoshka.tests.scripts.test_finetune import CHATS, arguments, write

pytestmark = pytest.mark.slow
STEPS = 240
START_S = 180  # imports, on a machine that is busy
LIMIT_S = 40  # torchrun gives the others 30 s after SIGTERM, before it kills them


class Job:
    """A run under torchrun: 240 steps of two rows on two ranks, with dropout, a checkpoint every second step."""

    def __init__(self, out: Path, model: Path, torchrun: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> None:
        self.out = out
        data = write(out.parent / "rows.jsonl", CHATS)
        more = f"--train.epochs {STEPS // 3} --train.save-every 2 --lora.dropout 0.1".split()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *torchrun]
        command = [*launcher, "-m", "matryoshka.scripts.cli", "sft", *arguments(data, model, out, *more, *settings)]
        self.log = out.with_suffix(".log")
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)

    def ranks(self) -> dict[int, int]:
        """Return the process id of each rank that lives."""
        found = {}
        for children in Path(f"/proc/{self.agent.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                try:
                    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                found |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=") and alive(int(child))}
        return found

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


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def job(*arguments: Path, torchrun: str = "", settings: str = "") -> Iterator[Job]:
    run = Job(*arguments, tuple(torchrun.split()), tuple(settings.split()))
    try:
        yield run
    finally:
        for pid in (*run.ranks().values(), run.agent.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        run.agent.wait()


def kill_one(run: Job, draws: random.Random, starting: bool) -> None:
    """Kill a rank by SIGKILL at a random moment of its life, and wait until both are gone."""
    before = run.step()
    run.until(lambda: len(run.ranks()) == 2, START_S, "the start")
    pids = run.ranks()
    path = run.out / "metrics.jsonl"
    if starting:
        time.sleep(draws.uniform(0, 4))
    else:  # a run that starts writes the rows anew that its checkpoint has, and goes on
        old = path.stat().st_ino if path.exists() else None
        run.until(lambda: path.exists() and path.stat().st_ino != old, START_S, "loading")
        resumed = run.rows()
        assert resumed >= before
        steps = draws.randint(1, 12)
        run.until(lambda: run.rows() >= resumed + steps, 60, "a step")
        time.sleep(draws.uniform(0, 0.03))
    assert alive(pids[0]) and alive(pids[1])
    os.kill(pids[draws.randrange(2)], signal.SIGKILL)
    run.until(lambda: not any(map(alive, pids.values())), LIMIT_S, "the end of all ranks")
    assert run.step() >= before


def test_ten_kills_and_a_signal_change_no_bit(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the undisturbed run: the adapter's file to the byte, the metrics but for the time that they took.

    One rank of two is killed ten times: once torchrun ends with an error that names it; nine times (one of them while
    the ranks start) it starts them again by itself, which is the elastic restart. Then SIGTERM comes to torchrun and
    the ranks, as from a scheduler, and torchrun passes it on, so that every rank gets it twice: the state is saved.
    """
    with job(tmp_path / "whole", tiny_dir) as run:
        assert run.agent.wait(START_S + 60) == 0, run.log.read_text()
    out, draws = tmp_path / "part", random.Random(0)
    with job(out, tiny_dir) as run:
        kill_one(run, draws, starting=False)
        assert run.agent.wait(LIMIT_S) != 0
        assert "Signal 9 (SIGKILL) received by PID" in run.log.read_text()
    with job(out, tiny_dir, torchrun="--max-restarts 9") as run:
        for kill in range(9):
            kill_one(run, draws, starting=kill == 4)
        reached = run.step()
        run.until(lambda: run.step() > reached, START_S, "the last restart")
        for pid in (*run.ranks().values(), run.agent.pid):
            os.kill(pid, signal.SIGTERM)
        assert run.agent.wait(LIMIT_S) != 0 and not run.ranks()
        assert 0 < run.step() < STEPS, "the run was over before it was killed ten times"
        assert f"stopped by signal after step {run.step()} of {STEPS}; state saved in" in run.log.read_text()
        assert run.rows() == run.step()
    with job(out, tiny_dir) as run:
        assert run.agent.wait(START_S + 60) == 0, run.log.read_text()
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path / "whole", out)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    files = [(folder / "adapter" / WEIGHTS).read_bytes() for folder in (tmp_path / "whole", out)]
    assert files[0] == files[1]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "metrics.jsonl", f"step-{STEPS}"]


def test_a_rank_that_hangs_ends_the_run_within_the_time_out(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: one rank is stopped; the other fails after 4 s, and torchrun kills the stopped one after 2 s."""
    with job(
        tmp_path / "out", tiny_dir, torchrun="--shutdown-timeout 2", settings="--train.rank-timeout-s 4"
    ) as run:  # fmt: skip
        run.until(lambda: run.rows() > 3, START_S, "the start")
        pids = run.ranks()
        os.kill(pids[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert run.agent.wait(LIMIT_S) != 0
        assert time.monotonic() - stopped < 4 + 2 + 10 and not any(map(alive, pids.values()))
        assert "[rank0]: Traceback" in run.log.read_text()
        assert "Root Cause" in run.log.read_text() and "rank      : 0" in run.log.read_text()
