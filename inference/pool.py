"""Where the black box answers: one endpoint or several (other keys, regions, servers), their limits and their health.

A request leases a place at the endpoint that can take it soonest. An endpoint that asked to wait, or failed again and
again, is left alone for a while; one that refuses everybody (a wrong key) is retired, and the run goes on while one is
left. The invariants: an endpoint never has more requests than its concurrency, its limits a minute hold, and its key is
in its headers and in nothing that is ever shown.
"""

import asyncio
import logging
import math
import re
import time
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from matryoshka.core.redaction import read_secret
from matryoshka.inference.http_client import proxy_for
from matryoshka.inference.limits import MAX_BACKOFF_S, TokenBucket

logger = logging.getLogger(__name__)

STREAK = 3  # failures in a row after which one of several endpoints is left alone
FIRST_PAUSE_S = 2.0
_HIDDEN = "[key]"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class EndpointConfig:
    """One more place that serves the same model. What is left at "" or 0 is as in [generator].

    Limits are this endpoint's own: two endpoints with 500 requests a minute make 1,000.
    """

    base_url: str = ""
    api_key_env: str = ""
    model: str = ""
    api: str = ""
    api_version: str = ""
    concurrency: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def __post_init__(self) -> None:
        check_address(self.base_url, self.api_key_env)
        if min(self.concurrency, self.requests_per_minute, self.tokens_per_minute) < 0:
            raise ValueError(
                f"generator: concurrency {self.concurrency}, requests_per_minute {self.requests_per_minute} and "
                f"tokens_per_minute {self.tokens_per_minute} must not be negative; 0 is no limit, or as in [generator]"
            )


def check_address(base_url: str, api_key_env: str) -> None:
    """Raise ValueError for a URL that is none or carries a secret, and for a key in place of its variable's name.

    The message never repeats what may be a secret: it goes to logs.
    """
    parts = urllib.parse.urlsplit(base_url)
    if base_url and (parts.username or parts.password or parts.query or parts.fragment):
        raise ValueError(
            f"generator: base_url of host {parts.hostname} holds a user, a password or a query (not shown: it may be "
            "secret); give scheme, host and path only, and the key by its environment variable (api_key_env)"
        )
    if base_url and not (parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError(f"generator: base_url {base_url!r} must start with http:// or https:// and name a host")
    has_digits = any(char.isdigit() for char in api_key_env)
    is_like_a_key = len(api_key_env) >= 24 and has_digits and "_" not in api_key_env
    if api_key_env and (is_like_a_key or not _VARIABLE.fullmatch(api_key_env)):
        raise ValueError(
            f"generator: api_key_env has {len(api_key_env)} characters that are no name of an environment variable "
            "(not shown: it may be the key itself); give the variable's name, such as OPENAI_API_KEY"
        )


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
        self.proxy = proxy_for(self.base_url)
        self._key = key = _read_key(config)
        self._clock = clock
        self._streak = 0
        self._paused_at = -math.inf
        self._requests = TokenBucket(config.requests_per_minute, clock)
        self._tokens = TokenBucket(config.tokens_per_minute, clock)
        self.is_azure = azure = config.api == "azure"
        path = f"/openai/deployments/{config.model}" if azure else ""
        query = f"?api-version={config.api_version}" if azure else ""
        self.chat_url = f"{self.base_url}{path}/chat/completions{query}"
        self.models_url = f"{self.base_url}{'/openai' if azure else ''}/models{query}"
        # A server that wants no key may still want to see one.
        secret = {"api-key": key} if azure else {"Authorization": f"Bearer {key or 'none'}"}
        self.headers = {"Content-Type": "application/json", **secret}

    def __repr__(self) -> str:
        return f"{self.base_url} ({self.key_name})" if self.key_name else self.base_url

    def hide(self, text: str) -> str:
        """Return `text` without the key: servers do repeat it in their errors."""
        return text.replace(self._key, _HIDDEN) if self._key and self._key in text else text

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

    def failed(self, sent_at: float, retry_after_s: float, alone: bool) -> None:
        """Note a failure that may pass of a request that was sent at `sent_at`; pause if it was one too many.

        The only endpoint there is pauses only where it asks for it: every request waits for itself.
        """
        now = self._clock()
        if retry_after_s > 0:
            self.paused_until = max(self.paused_until, now + retry_after_s)
        elif sent_at >= self._paused_at and not alone:  # those that were on their way when it paused say nothing new
            self._streak += 1
            if self._streak >= STREAK:
                pause = min(MAX_BACKOFF_S, FIRST_PAUSE_S * 2.0 ** (self._streak - STREAK))
                self._paused_at, self.paused_until = now, max(self.paused_until, now + pause)
                logger.warning("%r: %d failures in a row; left alone for %g s", self, self._streak, pause)


@dataclass
class Lease:
    """A place at an endpoint. used: the tokens that the request turned out to cost, None while not known."""

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
