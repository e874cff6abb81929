"""When the next request may be sent: token buckets for limits a minute, waits after a failure, the Retry-After header.

Nothing here sleeps or sends; times are seconds on a monotonic clock that the caller may replace. The invariant of a
bucket: no 60 s, wherever they begin, take more than the limit (a single request larger than a second's worth is let
through on credit, and the next request waits for it).
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

WINDOW_S = 60.0
MAX_BACKOFF_S = 60.0


class TokenBucket:
    """A limit of `per_minute` units (requests or tokens), 0 for none. Unused allowance is kept for one second."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._capacity = max(1.0, per_minute / WINDOW_S)
        # A full bucket and 60 s of filling, in whole units, make exactly the limit.
        self._per_s = (per_minute - self._capacity + 1.0) / WINDOW_S if per_minute else math.inf
        self._level = self._capacity
        self._at = clock()

    def wait_s(self, amount: float) -> float:
        """Return how long a `take` of `amount` would have to wait now."""
        self._fill()
        missing = min(amount, self._capacity) - self._level
        return max(0.0, missing / self._per_s)

    def take(self, amount: float) -> float:
        """Take `amount` and return how long to wait before using it. Callers are served in the order of their calls."""
        wait = self.wait_s(amount)
        if self._per_s < math.inf:
            self._level -= amount
        return wait

    def put_back(self, amount: float) -> None:
        """Give back an amount that was taken and not used; a negative `amount` takes more, without a wait."""
        self._fill()
        if self._per_s < math.inf:
            self._level = min(self._capacity, self._level + amount)

    def _fill(self) -> None:
        now = self._clock()
        if self._per_s < math.inf:
            self._level = min(self._capacity, self._level + (now - self._at) * self._per_s)
        self._at = now


def backoff_s(attempt: int, base_s: float, jitter: random.Random) -> float:
    """Return the wait after failed attempt 0, 1, ...: base_s doubled each time, times 0.5 to 1 by chance."""
    return min(MAX_BACKOFF_S, base_s * 2.0**attempt) * jitter.uniform(0.5, 1.0)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that a reply asks to wait (`retry-after-ms`, Retry-After as a number or date), or 0."""
    try:
        seconds = float(headers["retry-after-ms"]) / 1000.0
    except (KeyError, ValueError):
        value = headers.get("retry-after", "")
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, OverflowError):  # no date, or none that a calendar has
                return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
