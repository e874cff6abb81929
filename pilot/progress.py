"""Progress on the terminal: a line that is rewritten in place on a terminal, and a line every 15 s elsewhere."""

import math
import sys
import time

LIVE_S, PLAIN_S = 0.1, 15.0  # the least time from one line to the next, on a terminal and elsewhere


class StatusLine:
    """Shows one text after the other on stderr. Use with `with`, which ends the line."""

    def __init__(self, is_shown: bool = True) -> None:
        self._is_shown = is_shown
        self._live = sys.stderr.isatty()
        self._shown_at = -math.inf

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self._shown_at > -math.inf:
            sys.stderr.write("\n")
            self._shown_at = -math.inf

    def show(self, text: str, always: bool = False) -> None:
        """Show `text`, unless the last one is too recent and this one need not be shown `always`."""
        now = time.monotonic()
        is_due = always or now - self._shown_at >= (LIVE_S if self._live else PLAIN_S)
        if self._is_shown and is_due:
            self._shown_at = now
            sys.stderr.write(f"\r\x1b[K{text}" if self._live else text + "\n")
            sys.stderr.flush()


class Progress:
    """Shows `label done/total text`, rate and remaining time on a status line. Use with `with`."""

    def __init__(self, label: str, total: int, is_shown: bool = True) -> None:
        self._label, self._total = label, total
        self._started = time.monotonic()
        self._line = StatusLine(is_shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.__exit__()

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of the total are done; the last update is always shown."""
        elapsed = time.monotonic() - self._started
        left = elapsed / done * (self._total - done) if done else 0.0
        per_s = done / elapsed if elapsed else 0.0
        rate = f"{per_s:.1f}/s" if per_s >= 1 else f"{60 * per_s:.1f}/min"
        times = f"[{elapsed:.0f} s, {rate}, {left:.0f} s left]"
        self._line.show(f"{self._label} {done}/{self._total} {text} {times}", always=done >= self._total)
