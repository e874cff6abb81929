"""Ctrl-C once: finish what is in flight and save; twice: stop at once."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WISH = "\nstopping: episodes in flight end and are saved; once more to stop at once\n"
ORDER = "\nstopped at once; what was recorded is kept, and the same command continues\n"


@contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets, saying so on stderr; a second one ends the process there.

    It ends as kill -9 would end it, which everything that is written survives, but with a line and the status that a
    shell gives the signal (130, 143): to raise something in a running event loop would print a traceback for each task.
    Under torchrun there is no second one: it passes its signals on, and a scheduler sends them to the ranks as well.
    To be entered in a running event loop. Signals reach the main thread only: elsewhere the event is never set.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    is_wished = False

    def wish() -> None:
        stop.set()
        sys.stderr.write(WISH)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_wished
        if not is_wished:
            is_wished = True
            loop.call_soon_threadsafe(wish)  # not here, amid whatever the loop is at
        elif "TORCHELASTIC_RUN_ID" not in os.environ:
            os.write(2, ORDER.encode())
            os._exit(128 + number)

    watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
