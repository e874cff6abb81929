"""Ctrl-C once asks for an orderly stop: work in flight ends and is saved. Ctrl-C twice stops the process at once.

Signals reach the main thread only: in another thread nothing here has an effect. Under torchrun there is no second
signal: it passes its own signals on and a scheduler sends them to every rank as well, so that each rank gets them
twice; torchrun kills what is still there after its --shutdown-timeout.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "\nstopping: requests that were sent are waited for and saved; once more to stop at once\n"
STOPPED = "\nstopped at once; what was recorded is kept, and the same command continues\n"


class Interrupted(RuntimeError):
    """The run was stopped by SIGINT or SIGTERM: its state is saved, and the same command continues it."""


@contextmanager
def watch_signals(on_first: Callable[[], object], on_second: Callable[[int], None] | None = None) -> Iterator[None]:
    """Within the block, call `on_first` at the first SIGINT or SIGTERM and `on_second` with the number of a later one.

    on_second None: a later signal acts as it did before the block. The handlers of before are back at the end.
    """
    is_asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if not is_asked:
            is_asked = True
            on_first()
        elif "TORCHELASTIC_RUN_ID" not in os.environ:
            if on_second is not None:
                on_second(number)
            else:
                restore(number)
                signal.raise_signal(number)

    def restore(number: int) -> None:
        signal.signal(number, before[number] or signal.SIG_DFL)  # None: not set from Python

    watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {int(number): signal.getsignal(number) for number in watched}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in before:
            restore(number)


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """Yield an event that the first signal sets; a second one acts as it did before the block."""
    stop = threading.Event()
    with watch_signals(stop.set):
        yield stop


@contextmanager
def async_stop_event(stopping: str = STOPPING) -> Iterator[asyncio.Event]:
    """Yield an event of the running loop that the first signal sets, writing `stopping` to stderr.

    A second signal ends the process as kill -9 would, which everything that is written survives, but with a line and
    the status that a shell gives the signal (130, 143): an exception raised in a running event loop would print a
    traceback for each task.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def ask() -> None:
        stop.set()
        sys.stderr.write(stopping)

    def end(number: int) -> None:
        os.write(2, STOPPED.encode())
        os._exit(128 + number)

    # The loop itself sets the event: a signal handler interrupts it at any point.
    with watch_signals(lambda: loop.call_soon_threadsafe(ask), end):
        yield stop
