"""The black box behind OpenAI-compatible endpoints: cached, limited, budgeted, retried, asked once.

A request goes out only if its answer is neither in the cache nor on its way, from this process or another one that
shares the cache. A failure that may pass (busy, overloaded, cut off) is retried within bounds and then fails its
episode with GeneratorError; a failure that every call would meet (a wrong key, model or parameter) is a ValueError and
stops the run. The invariant: an answer that was received is in the cache before anything else can run, so neither a
cancellation nor a kill makes it be paid for twice. docs/generators.md has the table of what happens at each fault.
"""

import asyncio
import difflib
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matryoshka.core.json_values import as_text, parse_reply
from matryoshka.core.protocols import GeneratorError, RunStopped
from matryoshka.core.records import Messages, Sample, Sampling, Usage, content_key
from matryoshka.core.redaction import redact
from matryoshka.inference.cache import ResponseCache, answer_key
from matryoshka.inference.chat_api import (
    NOTHING,
    UNKNOWN,
    Answer,
    AttemptError,
    chat_body,
    likely_tokens,
    most_tokens,
    parse_answer,
    refusal,
    remedy,
)
from matryoshka.inference.generator_config import GeneratorConfig as GeneratorConfig
from matryoshka.inference.http_client import Reply, TransportError
from matryoshka.inference.limits import backoff_s
from matryoshka.inference.pool import MANY_PROMPTS, Endpoint, Pool
from matryoshka.inference.prices import is_same_model, load_prices, price_of
from matryoshka.inference.spending import Budget, GeneratorAccount

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 20.0
CLAIM_POLL_S = 0.2  # how often to look whether another process has its answer


@dataclass
class GeneratorStats:
    """Counts since construction. HTTP requests sent = asked + retries; calls = asked + shared + cache_hits.

    reasons: how often an attempt failed, by the kind of failure.
    """

    asked: int = 0
    shared: int = 0
    cache_hits: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass
class _Flight:
    """A request on its way and how many callers wait for it."""

    task: asyncio.Task[Sample]
    waiters: int = 0


class OpenAIGenerator:
    """A core.protocols.Generator over one endpoint or several. One object lives in one event loop."""

    def __init__(
        self, config: GeneratorConfig, cache: ResponseCache | None = None, seed: int = 0, budget: Budget | None = None
    ) -> None:
        """Make the client; nothing is sent. `seed` drives the jitter of the waits.

        Raises ValueError when an environment variable that should hold a key is missing or empty, or when the budget
        cannot be kept; FileNotFoundError for a file of prices that is not there.
        """
        self.config = config
        self.name = config.name
        self.stats = GeneratorStats()
        prices = load_prices(Path(config.prices) if config.prices else None)
        self.price = price_of(prices, config.served_model or config.model)
        self.account = GeneratorAccount(self.name, cache, self.price, budget or Budget())
        self.endpoints = tuple(Endpoint(endpoint) for endpoint in (config.first_endpoint, *config.other_endpoints))
        self._cache = cache
        self._extra = config.extra
        self._jitter = random.Random(seed)
        self._flights: dict[str, _Flight] = {}
        self._sent: set[str] = set()  # keys whose request is at an endpoint
        self._is_stopped = False
        self._pool = Pool(self.endpoints)

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return the answer to `prompt`: from the cache, from an equal request on its way, or from an endpoint.

        The endpoint gets `chat_api.server_seed` of seed and draw if temperature > 0, and no seed if it is 0. Raises
        GeneratorError when this prompt cannot be answered, ValueError when no prompt can (a wrong key or model), and
        RunStopped when the answer could cross the budget.
        """
        key = answer_key(self.config.where, self.config.model, prompt, sampling)
        if (found := self._find(key)) is not None:
            return found
        flight = self._flights.get(key)
        if flight is None:
            self._refuse_if_stopped()
            flight = self._flights[key] = _Flight(asyncio.create_task(self._answer(key, prompt, sampling)))
        else:
            self.stats.shared += 1
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)  # one caller's cancellation is not the others'
        except asyncio.CancelledError:
            if flight.task.cancelled():
                self._refuse_if_stopped()
            raise
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                flight.task.cancel()  # does nothing to a finished one
                if self._flights.get(key) is flight:
                    del self._flights[key]

    def stop_sending(self) -> None:
        """Send no further request: calls that wait for their turn raise RunStopped at once, those sent are answered."""
        self._is_stopped = True
        for key, flight in self._flights.items():
            if key not in self._sent:
                flight.task.cancel()

    def _refuse_if_stopped(self) -> None:
        if self._is_stopped:
            raise RunStopped(f"{self.name}: no request is sent any more, since the run was asked to stop")

    async def check(self) -> None:
        """Return if an endpoint answers, takes the key and serves the model; those that do not are retired.

        An endpoint without a list of models (404, 405 or 501) passes, and on Azure, whose list holds no deployments,
        only the key is checked. Raises ValueError naming the endpoints if none is left.
        """
        problems = await asyncio.gather(*(self._problem(endpoint) for endpoint in self.endpoints))
        if all(problems):
            raise ValueError("\n".join(problems))
        for endpoint, problem in zip(self.endpoints, problems, strict=True):
            if problem:
                self._pool.retire(endpoint, problem)

    async def aclose(self) -> None:
        """Cancel requests in flight and close the connections."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.transport.aclose()

    async def _answer(self, key: str, prompt: Messages, sampling: Sampling) -> Sample:
        """Return the answer, asked for by us or by another process that shares the cache; raises as `complete` does."""
        if self._cache is None:
            return await self._ask(key, prompt, sampling)
        while not self._cache.claim(key, self.name):
            await asyncio.sleep(CLAIM_POLL_S)
            if (found := self._find(key)) is not None:
                return found
        try:
            if (found := self._find(key)) is None:  # it may have come between our look and our claim
                return await self._ask(key, prompt, sampling)  # an answer that is kept ends the claim
        except BaseException:
            self._cache.release(key)
            raise
        self._cache.release(key)
        return found

    async def _ask(self, key: str, prompt: Messages, sampling: Sampling) -> Sample:
        """Return an endpoint's answer after putting it in the cache; raises as `complete` does."""
        self.stats.asked += 1
        tokens, deadline = likely_tokens(prompt, sampling), math.inf
        attempts = failures = 0
        while True:
            # A request keeps its place while it waits for a retry: an overloaded endpoint is asked less, not more.
            async with self._pool.lease(tokens) as lease:
                endpoint = lease.endpoint
                deadline = min(deadline, time.monotonic() + self.config.total_timeout_s)
                attempts += 1
                try:
                    sample = await self._attempt(endpoint, key, prompt, sampling, deadline)
                    lease.used = sample.usage.prompt_tokens + sample.usage.completion_tokens
                    return sample
                except AttemptError as err:
                    self.stats.reasons[f"HTTP {err.status}" if err.status else err.reason.partition(":")[0]] += 1
                    refuses_all = err.blame == "endpoint"
                    if err.blame == "unclear":
                        refuses_all = endpoint.refused_many(content_key(prompt))
                    if refuses_all:
                        self._pool.retire(endpoint, self._refused(endpoint, err))
                        if self._pool.alive:
                            self.stats.retries += 1
                            continue  # another one takes it, and it counts as no failure of the request
                    if err.blame != "passing":
                        self.stats.failures += 1
                        if refuses_all or err.blame == "request":
                            raise ValueError(self._refused(endpoint, err)) from err
                        raise GeneratorError(f"{self.name}: the prompt is refused: {err.reason}") from err
                    self._refuse_if_stopped()
                    # A server that says when to come back is obeyed until total_timeout_s; it has not failed.
                    failures += err.retry_after_s == 0
                    wait = backoff_s(max(0, failures - 1), self.config.backoff_s, self._jitter)
                    others = any(other.is_free for other in self._pool.alive if other is not endpoint)
                    whole_wait = wait if others else max(wait, err.retry_after_s)
                    is_late = whole_wait > deadline - time.monotonic()
                    if is_late or failures > self.config.max_retries:
                        self.stats.failures += 1
                        raise GeneratorError(self._exhausted(attempts, err, is_late)) from err
                    logger.info("%s: %s; retry %d in %.1f s", self.name, err.reason, attempts, whole_wait)
                    await asyncio.sleep(wait)  # the rest of what the server asked for, the pool waits
            self.stats.retries += 1

    async def _attempt(
        self, endpoint: Endpoint, key: str, prompt: Messages, sampling: Sampling, deadline: float
    ) -> Sample:
        """Return the answer to one request and keep it. Raises AttemptError after accounting for its possible cost."""
        config, most = self.config, most_tokens(prompt, sampling)
        request = chat_body(endpoint.model, prompt, sampling, config.length_key, config.omit, self._extra)
        await self.account.hold(key, most)
        sent_at = time.monotonic()
        if (timeout_s := min(config.timeout_s, deadline - sent_at)) <= 0:
            self.account.settle(key, Usage())
            raise AttemptError("its turn came when its time was over", "passing")
        endpoint.stats.sent += 1
        self._sent.add(key)
        try:
            reply = await endpoint.transport.chat(json.dumps(request).encode(), timeout_s)
            # No await from here to the return: a received answer is kept before anything can cancel us.
            answer = self._answer_of(endpoint, reply, request)
        except TransportError as err:
            error = AttemptError(str(err), "passing", UNKNOWN if err.sent else NOTHING)
            self._failed(endpoint, error, key, most, sent_at)
            raise error from err
        except AttemptError as err:
            self._failed(endpoint, err, key, most, sent_at)
            raise
        except asyncio.CancelledError:
            self.account.settle(key, most)  # it was sent, and may be billed though no caller waits for it any more
            raise
        finally:
            self._sent.discard(key)
        sample, cost = answer.sample, answer.billed.at_most(most)
        endpoint.succeeded()
        if not answer.billed.is_exact:  # it counts with the most that it can have cost
            self.account.settle(key, cost)
        self.stats.prompt_tokens += sample.usage.prompt_tokens
        self.stats.completion_tokens += sample.usage.completion_tokens
        if self._cache is not None:
            self._cache.put(key, sample, self.name)
        self.account.answered(key, most, cost)
        return sample

    def _find(self, key: str) -> Sample | None:
        found = None if self._cache is None else self._cache.get(key)
        self.stats.cache_hits += found is not None
        return found

    def _answer_of(self, endpoint: Endpoint, reply: Reply, request: Mapping[str, object]) -> Answer:
        """Return the answer that `reply` holds. Raises AttemptError for anything but an answer of our model."""
        if reply.status != 200:
            raise refusal(reply, request.keys())
        answer = parse_answer(reply.body)
        names = [name for name in (self.config.served_model, endpoint.model) if name]
        # A deployment's name on Azure says nothing about its model.
        is_ours = endpoint.is_azure and not self.config.served_model
        is_ours = is_ours or not answer.model or any(is_same_model(name, answer.model) for name in names)
        if not is_ours:
            reason = f"the answer is from model {answer.model[:200]!r}"
            raise AttemptError(reason, "endpoint", answer.billed, status=200)
        return answer

    def _failed(self, endpoint: Endpoint, err: AttemptError, key: str, most: Usage, sent_at: float) -> None:
        """Account for an attempt without an answer: its cost, and its endpoint's health."""
        self.account.settle(key, err.billed.at_most(most))
        endpoint.stats.failed += 1
        if err.blame == "passing":
            # A wait that no call could sit out (a spent daily quota) is no pause: each call fails by itself.
            pause_s = err.retry_after_s if err.retry_after_s <= self.config.total_timeout_s else 0.0
            endpoint.failed(sent_at, pause_s, alone=len(self._pool.alive) == 1)

    def _exhausted(self, attempts: int, err: AttemptError, is_late: bool) -> str:
        text = f"{self.name}: no answer after {attempts} attempts, at last: {err.reason}"
        if is_late:
            asks = f"the server asks to wait {err.retry_after_s:g} s, and " if err.retry_after_s else ""
            text += f"; {asks}the next attempt would begin after total_timeout_s ({self.config.total_timeout_s:g} s)"
        return text

    def _refused(self, endpoint: Endpoint, err: AttemptError) -> str:
        what = f"refused model {endpoint.model!r}: {err.reason}; {remedy(err.status, endpoint.key_name)}"
        if err.blame == "unclear":
            what = f"refused {MANY_PROMPTS} different prompts in a row without a clear reason and {what}"
        if err.status == 200:
            what = f"was asked for model {endpoint.model!r}, but {err.reason}; "
            what += "if that is the one that you mean, set [generator] served_model to its name"
        return f"generator: {endpoint.base_url} {what}"

    async def _problem(self, endpoint: Endpoint) -> str:
        """Return why `endpoint` cannot answer, "" if it can as far as its list of models tells."""
        try:
            reply = await endpoint.transport.models(min(CHECK_TIMEOUT_S, self.config.timeout_s))
        except TransportError as err:
            what = f"no answer from {endpoint.base_url} ({err})"
            return f"generator: {what}; is the server running, and is base_url right?"
        if reply.status in (404, 405, 501):
            return ""
        if reply.status != 200:
            return self._refused(endpoint, refusal(reply))
        if endpoint.is_azure:
            return ""
        try:
            served = [row["id"] for row in parse_reply(reply.body)["data"]]
        except (ValueError, KeyError, TypeError):
            what = "answers, but not with OpenAI's list of models; base_url usually ends in /v1"
            return f"generator: {endpoint.base_url} {what}"
        # Gemini lists models/NAME and takes NAME.
        names = {redact(name).removeprefix("models/") for name in map(as_text, served) if name is not None}
        if endpoint.model.removeprefix("models/") in names:
            return ""
        nearest = difflib.get_close_matches(endpoint.model, sorted(names), n=5, cutoff=0.0)
        return (
            f"generator: model {endpoint.model!r} is not served at {endpoint.base_url}; nearest of {len(names)}: "
            f"{', '.join(name[:200] for name in nearest) or 'none'}"
        )
