"""Token buckets, back-off and Retry-After on a clock of ours."""

import random
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.inference.limits import TokenBucket, backoff_s, retry_after_s


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_no_minute_takes_more_than_the_limit(limit: int, arrivals: list[tuple[float, int]]) -> None:
    """Invariant: in every half-open window of 60 s at most `limit`, plus one request's excess over a second's worth."""
    clock = Clock()
    bucket = TokenBucket(limit, clock)
    sent: list[tuple[float, int]] = []
    for pause, amount in arrivals:
        clock.now += pause
        sent.append((clock.now + bucket.take(amount), amount))
    assert [at for at, _ in sent] == sorted(at for at, _ in sent)  # first come, first served
    # In whole units: a limit of 61 has a second's worth of 1, so a request of 20 is let through with 19 on credit.
    excess = max(0, max(amount for _, amount in sent) - max(1, limit // 60))
    for start, _ in sent:
        assert sum(amount for at, amount in sent if start <= at < start + 60 - 1e-6) <= limit + excess


@pytest.mark.parametrize("limit", [1, 30, 60, 600, 5000])
def test_the_limit_is_reached(limit: int) -> None:
    """Oracle: 10 minutes of one request after another take at least 97% of what ten full minutes allow."""
    clock = Clock()
    bucket = TokenBucket(limit, clock)
    count = 0
    while (wait := bucket.wait_s(1)) + clock.now < 1600:
        clock.now += wait
        assert bucket.take(1) < 1e-9
        count += 1
    assert 0.97 * 10 * limit <= count <= 10 * limit + 1


def test_by_hand() -> None:
    """Oracle: 60 a minute is one a second; three at once wait 0, 1 and 2 s; what is put back is there again."""
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert [bucket.take(1) for _ in range(3)] == pytest.approx([0, 1, 2])
    bucket.put_back(1)
    assert bucket.take(1) == pytest.approx(2)
    clock.now += 3
    assert bucket.take(1) == pytest.approx(0)
    clock.now += 100
    assert bucket.take(7) == 0 and bucket.take(1) == pytest.approx(7)  # on credit, and the next one waits for it
    bucket.put_back(-2)
    assert bucket.wait_s(1) == pytest.approx(10)


def test_no_limit_never_waits() -> None:
    """Oracle: by definition of no limit."""
    bucket = TokenBucket(0, Clock())
    assert [bucket.take(10**9) for _ in range(3)] == [0, 0, 0]


def test_backoff_doubles_up_to_a_minute() -> None:
    """Oracle: the interval [0.5, 1] * base * 2^k, cut at 60 s; two requests do not wait the same."""
    jitter = random.Random(0)
    for attempt in range(12):
        whole = min(60.0, 0.5 * 2**attempt)
        waits = {backoff_s(attempt, 0.5, jitter) for _ in range(20)}
        assert len(waits) == 20 and all(whole / 2 <= wait <= whole for wait in waits)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after": "inf"}, 0.0),
        ({"retry-after": "tomorrow"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"}, 0.0),
        ({"retry-after": formatdate(time.time() - 60, usegmt=True)}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    """Oracle: RFC 9110's two forms and OpenAI's milliseconds; nonsense asks for nothing."""
    assert retry_after_s(headers) == seconds


def test_retry_after_as_a_date() -> None:
    """Oracle: a date that lies 60 seconds ahead; dates have whole seconds."""
    assert 58 < retry_after_s({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60
