"""Ctrl-C once: finish what is in flight and save; twice: stop at once."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets, saying so on stderr; a second one acts as ever.

    To be entered in a running event loop. Signals reach the main thread only: elsewhere the event is never set.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()

    def unwatch() -> None:
        for number in watched:
            loop.remove_signal_handler(number)

    def on_signal() -> None:
        stop.set()
        unwatch()
        sys.stderr.write("\nstopping: episodes in flight end and are saved; once more to stop at once\n")

    for number in watched:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        unwatch()
