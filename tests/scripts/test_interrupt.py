"""Ctrl-C once sets the event, twice interrupts; afterwards signals act as they did before."""

import asyncio
import os
import signal

import pytest

from matryoshka.scripts.interrupt import SIGNALS, stop_on_signal


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the event; the coroutine goes on, and the handlers are the process's own again."""
    before = [signal.getsignal(n) for n in SIGNALS]

    async def work() -> str:
        with stop_on_signal() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            await asyncio.wait_for(stop.wait(), 5)
            return "went on"

    with asyncio.Runner() as runner:
        assert runner.run(work()) == "went on"
    assert "once more to stop at once" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_second_one_is_an_order() -> None:
    """Oracle: KeyboardInterrupt out of the runner, though the coroutine would sleep for a minute."""

    async def work() -> None:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            await stop.wait()
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
