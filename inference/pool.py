"""Where the black box answers: one endpoint or several (other keys, regions, servers), their limits and their health.

A request leases a place at the endpoint that can take it soonest. An endpoint that asked to wait, or failed again and
again, is left alone for a while; one that refuses everybody (a wrong key) is retired, and the run goes on while one is
left. The invariants: an endpoint never has more requests than its concurrency, and its limits a minute hold.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from matryoshka.core.redaction import read_secret
from matryoshka.inference.generator_config import EndpointConfig
from matryoshka.inference.limits import MAX_BACKOFF_S, TokenBucket
from matryoshka.inference.openai_transport import OpenAITransport

logger = logging.getLogger(__name__)

STREAK = 3  # failures in a row after which one of several endpoints is left alone
FIRST_PAUSE_S = 2.0
MANY_PROMPTS = 3  # refused in a row without a clear reason: then it is not the prompts


def _read_key(config: EndpointConfig) -> str:
    """Return the key, "" for an endpoint that wants none."""
    key = read_secret(config.api_key_env) if config.api_key_env else ""
    if config.api_key_env and not key:
        raise ValueError(
            f"generator: environment variable {config.api_key_env} holds no key for {config.base_url}; set it, "
            'or set api_key_env to "" for a server that needs none'
        )
    if not key.isascii() or not key.isprintable():
        raise ValueError(
            f"generator: environment variable {config.api_key_env} holds characters that no HTTP header can carry; "
            "it should hold the key alone"
        )
    return key


@dataclass
class EndpointStats:
    """Counts since construction: attempts that were sent, and those of them without an answer."""

    sent: int = 0
    failed: int = 0


class Endpoint:
    """One place that answers. It shows itself by URL and the name of the key's variable, never by the key."""

    def __init__(self, config: EndpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a complete configuration. Raises ValueError when the variable that should hold the key does not."""
        self.base_url = config.base_url.rstrip("/")
        self.model = config.model
        self.key_name = config.api_key_env
        self.concurrency = config.concurrency
        self.stats = EndpointStats()
        self.in_flight = 0
        self.last_used = 0
        self.paused_until = -math.inf
        self.retired = ""
        self.is_azure = config.api == "azure"
        self.transport = OpenAITransport(config, "" if config.token_command else _read_key(config))
        self._clock = clock
        self._streak = 0
        self._paused_at = -math.inf
        self._unclear: set[str] = set()
        self._requests = TokenBucket(config.requests_per_minute, clock)
        self._tokens = TokenBucket(config.tokens_per_minute, clock)

    def __repr__(self) -> str:
        return f"{self.base_url} ({self.key_name})" if self.key_name else self.base_url

    @property
    def is_free(self) -> bool:
        return not self.retired and self.in_flight < self.concurrency

    def wait_s(self, tokens: int) -> float:
        """Return how long a request of about `tokens` would have to wait for the limits a minute."""
        return max(self._requests.wait_s(1), self._tokens.wait_s(tokens))

    def take(self, tokens: int) -> float:
        """Count a request of about `tokens` against the limits and return how long it has to wait for them."""
        return max(self._requests.take(1), self._tokens.take(tokens))

    def correct(self, expected: int, used: int, sent: bool = True) -> None:
        """Replace the tokens that a request was expected to use by those that it did use."""
        self._tokens.put_back(expected - used)
        if not sent:
            self._requests.put_back(1)

    def succeeded(self) -> None:
        self._streak = 0
        self._unclear.clear()

    def refused_many(self, prompt_key: str) -> bool:
        """Note that a prompt was refused without a clear reason; return whether MANY_PROMPTS different ones were since
        the last answer.
        """
        self._unclear.add(prompt_key)
        return len(self._unclear) >= MANY_PROMPTS

    def failed(self, sent_at: float, retry_after_s: float, alone: bool) -> None:
        """Note that a request that was sent at `sent_at` failed in a way that may pass; pause after STREAK failures.

        An endpoint that is `alone` pauses only when it asks for it, since each request waits by itself before a retry.
        """
        now = self._clock()
        if retry_after_s > 0:
            self.paused_until = max(self.paused_until, now + retry_after_s)
        elif sent_at >= self._paused_at and not alone:  # requests that were on their way when it paused are old news
            self._streak += 1
            if self._streak >= STREAK:
                pause = min(MAX_BACKOFF_S, FIRST_PAUSE_S * 2.0 ** (self._streak - STREAK))
                self._paused_at, self.paused_until = now, max(self.paused_until, now + pause)
                logger.warning("%r: %d failures in a row; left alone for %g s", self, self._streak, pause)


@dataclass
class Lease:
    """A place at an endpoint. used: the tokens that the request cost, None while that is not known."""

    endpoint: Endpoint
    used: int | None = field(default=None)


class Pool:
    """The endpoints of one generator. One object lives in one event loop."""

    def __init__(self, endpoints: Sequence[Endpoint], clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoints = tuple(endpoints)
        self._clock = clock
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._turn = 0

    @property
    def alive(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if not endpoint.retired]

    @asynccontextmanager
    async def lease(self, tokens: int) -> AsyncIterator[Lease]:
        """Wait for a place that may take a request of about `tokens`, and give it back afterwards.

        Raises ValueError when every endpoint is retired, with the reason of the last.
        """
        endpoint = await self._take(tokens)
        lease = Lease(endpoint)
        try:
            yield lease
        finally:
            if lease.used is not None:
                endpoint.correct(tokens, lease.used)
            self._give_back(endpoint)

    def retire(self, endpoint: Endpoint, reason: str) -> None:
        """Never use `endpoint` again."""
        if not endpoint.retired:
            endpoint.retired = reason
            if left := len(self.alive):
                logger.warning("%s; the run goes on with the other endpoints (%d left)", reason, left)
            for waiter in self._waiters:  # to choose another one, or to hear that there is none
                if not waiter.done():
                    waiter.set_result(None)

    async def _take(self, tokens: int) -> Endpoint:
        while True:
            endpoint = self._soonest(tokens)
            if endpoint is None:
                await self._change()
                continue
            endpoint.in_flight += 1
            self._turn += 1
            endpoint.last_used = self._turn
            wait = endpoint.take(tokens)
            try:
                if wait > 0:
                    await asyncio.sleep(wait)
            except asyncio.CancelledError:
                endpoint.correct(tokens, 0, sent=False)
                self._give_back(endpoint)
                raise
            if wait == 0 or (not endpoint.retired and endpoint.paused_until <= self._clock()):
                return endpoint
            endpoint.correct(tokens, 0, sent=False)  # it paused, or was retired, in the meantime
            self._give_back(endpoint)

    def _soonest(self, tokens: int) -> Endpoint | None:
        """Return the endpoint with a place that can send first, the least loaded of equals, or None."""
        now = self._clock()
        if not self.alive:
            raise ValueError("\n".join(endpoint.retired for endpoint in self.endpoints))
        ready = [endpoint for endpoint in self.alive if endpoint.is_free and endpoint.paused_until <= now]
        return min(
            ready, key=lambda e: (e.wait_s(tokens), e.in_flight / e.concurrency, e.last_used), default=None
        )

    async def _change(self) -> None:
        """Return when a place became free, an endpoint was retired, or a pause ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        ends = [endpoint.paused_until for endpoint in self.alive if endpoint.is_free]
        timeout = max(0.0, min(ends) - self._clock()) if ends else None
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # the place that we were told of goes to the next
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _give_back(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
