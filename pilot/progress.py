"""Progress on the terminal: a live line where there is one, a line every few seconds where there is not."""

import sys
import time


class StatusLine:
    """Shows one text after the other on stderr, off a terminal one every 15 s. Use with `with` to end the line."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = -15.0

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self._shown > 0:
            sys.stderr.write("\n")

    def show(self, text: str) -> None:
        """Show `text`."""
        now = time.monotonic()
        if self._live or now - self._shown >= 15:
            self._shown = now
            sys.stderr.write(f"\r\x1b[K{text}" if self._live else text + "\n")
            sys.stderr.flush()


class Progress:
    """Shows `label done/total text`, rate and remaining time on stderr, if it is `shown`. Use with `with`."""

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        self.label = label
        self._is_shown = shown
        self.total = total
        self.started = time.monotonic()
        self._shown = 0.0
        self._done = 0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self._done and self._is_shown:
            sys.stderr.write("\n")

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of the total are done; drawn at most ten times a second, off a terminal every 15 s."""
        now = time.monotonic()
        self._done = done
        last = done >= self.total
        if not self._is_shown or not last and now - self._shown < (0.1 if self._live else 15):
            return
        self._shown = now
        elapsed = now - self.started
        left = elapsed / done * (self.total - done) if done else 0.0
        per_s = done / elapsed if elapsed else 0.0
        rate = f"{per_s:.1f}/s" if per_s >= 1 else f"{60 * per_s:.1f}/min"
        line = f"{self.label} {done}/{self.total} {text} [{elapsed:.0f} s, {rate}, {left:.0f} s left]"
        sys.stderr.write(f"\r\x1b[K{line}" if self._live else line + "\n")
        sys.stderr.flush()
