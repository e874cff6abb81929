"""Ctrl-C once sets the event, twice ends the process with a line; afterwards signals act as they did before."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from matryoshka.core.signals import SIGNALS, STOPPED, STOPPING, async_stop_event
from matryoshka.tests.pilot.conftest import environment


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_for_an_orderly_stop(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the event; the coroutine goes on, and the handlers are the process's own again."""
    before = [signal.getsignal(n) for n in SIGNALS]

    async def work() -> str:
        with async_stop_event() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            await asyncio.wait_for(stop.wait(), 60)
            return "went on"

    with asyncio.Runner() as runner:
        assert runner.run(work()) == "went on"
    assert "once more to stop at once" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in SIGNALS] == before


# Tasks, an executor's thread and a loop that does not come to its turn: none of them may hold up the end, or speak.
WORK = """
import asyncio, os, signal, sys, time
from matryoshka.core.signals import async_stop_event

async def work():
    with async_stop_event() as stop:
        tasks = [asyncio.create_task(asyncio.sleep(900)), asyncio.create_task(asyncio.to_thread(time.sleep, 900))]
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), int(sys.argv[1]))
        await stop.wait()
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(1)
        print("went on", flush=True)
        os._exit(0)

asyncio.run(work())
"""


def twice(number: signal.Signals, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(int(number))], env={**environment(), **variables}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    """Oracle: a shell's exit status for a process that this signal ended, and stderr's two lines, no traceback."""
    assert twice(number) == (128 + number, "", STOPPING + STOPPED)


def test_torchrun_sends_each_signal_twice() -> None:
    """Oracle: the process goes on; a rank gets a scheduler's signal from it and from its launcher."""
    assert twice(signal.SIGTERM, TORCHELASTIC_RUN_ID="none") == (0, "went on\n", STOPPING)
