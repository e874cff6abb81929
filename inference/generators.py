"""The black box behind an OpenAI-compatible endpoint: cached, retried, asked once.

A request goes out only if its answer is neither in the cache nor on its way. What may pass (busy, overloaded, cut off)
is retried within bounds and then fails its episode with GeneratorError; what would fail every call (a wrong key, model
or parameter) is a ValueError and stops the run. The invariant: an answer that was received is in the cache before
anything else can run, so neither a cancellation nor a kill makes it be paid for twice.
"""

import asyncio
import difflib
import json
import logging
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Messages, Sample, Sampling, Usage
from matryoshka.inference.cache import ResponseCache, answer_key

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 600.0  # a server that asks for more (a spent daily quota) fails the call at once
CHECK_TIMEOUT_S = 20.0

# A 400 about this one prompt fails its episode only. OpenAI and Azure give a code, other servers only words.
_PROMPT_CODES = {"context_length_exceeded", "string_above_max_length", "invalid_prompt", "content_filter"}
_PROMPT_WORDS = ("context length", "context size", "context window", "prompt is too long", "input token count")


@dataclass(frozen=True)
class GeneratorConfig:
    """Where the black box answers and how patiently it is asked.

    model: its name there; on Azure the name of the deployment. api_key_env: the environment variable that holds the
    key, "" for a server that wants none. timeout_s: one attempt, from request to whole answer. backoff_s: the first
    wait, doubled each time. concurrency: requests at a time, those that wait for a retry included. identity: what the
    answers are kept under instead of base_url, for a server whose port is another one each time.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    api: str = "openai"
    api_version: str = ""
    max_retries: int = 5
    timeout_s: float = 120.0
    concurrency: int = 64
    backoff_s: float = 0.5
    identity: str = ""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"generator: base_url {self.base_url!r} must start with http:// or https://")
        if not self.model:
            raise ValueError("generator: model is empty; give the name that the endpoint serves")
        if self.api not in ("openai", "azure"):
            raise ValueError(f"generator: api {self.api!r} is unknown; choose 'openai' or 'azure'")
        if (self.api == "azure") != bool(self.api_version):
            raise ValueError(
                f"generator: api {self.api!r} with api_version {self.api_version!r}; 'azure' needs one, such as "
                "'2024-10-21', and 'openai' has none"
            )
        if self.max_retries < 0 or self.concurrency < 1 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError(
                f"generator: max_retries {self.max_retries} and backoff_s {self.backoff_s} must not be negative, "
                f"concurrency {self.concurrency} and timeout_s {self.timeout_s} must be positive"
            )


@dataclass
class GeneratorStats:
    """Counts since construction. HTTP requests sent = asked + retries; calls = asked + shared + cache_hits."""

    asked: int = 0
    shared: int = 0
    cache_hits: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Flight:
    """A request on its way and how many callers wait for it."""

    task: asyncio.Task[Sample]
    waiters: int = 0


class _BadAnswerError(Exception):
    """A 200 that holds no answer."""


class OpenAIGenerator:
    """A core.protocols.Generator over one endpoint. One object lives in one event loop."""

    def __init__(self, config: GeneratorConfig, cache: ResponseCache | None = None, seed: int = 0) -> None:
        """Make the client; nothing is sent. `seed` drives the jitter of the waits.

        Raises ValueError when the environment variable that should hold the key is missing or empty.
        """
        key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else "none"
        if not key:
            raise ValueError(
                f"generator: environment variable {config.api_key_env} holds no key for {config.base_url}; set it, "
                'or set api_key_env to "" for a server that needs none'
            )
        self.config = config
        self.name = f"{config.model}@{config.identity or config.base_url}"
        self.stats = GeneratorStats()
        self._cache = cache
        self._jitter = random.Random(seed)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._flights: dict[str, _Flight] = {}
        self._client: AsyncOpenAI
        if config.api == "azure":
            self._client = AsyncAzureOpenAI(
                azure_endpoint=config.base_url,
                api_version=config.api_version,
                api_key=key,
                max_retries=0,
                timeout=config.timeout_s,
            )
        else:
            self._client = AsyncOpenAI(base_url=config.base_url, api_key=key, max_retries=0, timeout=config.timeout_s)

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return the answer to `prompt`: from the cache, from an equal request on its way, or from the endpoint.

        The endpoint gets seed = sampling.seed + sampling.draw if temperature > 0, and no seed if it is 0. Raises
        GeneratorError when this prompt cannot be answered, and ValueError when no prompt can: a wrong key or model.
        """
        key = answer_key(self.config.identity or self.config.base_url, self.config.model, prompt, sampling)
        if self._cache is not None and (found := self._cache.get(key)) is not None:
            self.stats.cache_hits += 1
            return found
        flight = self._flights.get(key)
        if flight is None:
            self.stats.asked += 1
            flight = self._flights[key] = _Flight(asyncio.create_task(self._ask(key, prompt, sampling)))
        else:
            self.stats.shared += 1
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)  # one caller's cancellation is not the others'
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                flight.task.cancel()  # does nothing to a finished one
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def check(self) -> None:
        """Return if the endpoint answers, takes the key and serves the model.

        An endpoint without a list of models (404, 405 or 501) passes, and on Azure, whose list holds no deployments,
        only the key is checked. Raises ValueError naming the endpoint otherwise.
        """
        try:
            async with asyncio.timeout(min(CHECK_TIMEOUT_S, self.config.timeout_s)):
                raw = await self._client.models.with_raw_response.list()
        except openai.APIStatusError as err:
            if err.status_code in (404, 405, 501):
                return
            raise ValueError(self._refusal(err)) from err
        except (openai.APIConnectionError, TimeoutError) as err:
            raise ValueError(
                f"generator: no answer from {self.config.base_url} ({_reason(err)}); is the server running, and is "
                "base_url right?"
            ) from err
        if self.config.api == "azure":
            return
        try:
            served = [row["id"] for row in json.loads(raw.http_response.text)["data"]]
            names = {str(name).removeprefix("models/") for name in served}  # Gemini lists models/NAME and takes NAME
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(
                f"generator: {self.config.base_url} answers, but not with OpenAI's list of models; base_url usually "
                "ends in /v1"
            ) from err
        if self.config.model.removeprefix("models/") not in names:
            nearest = difflib.get_close_matches(self.config.model, sorted(names), n=5, cutoff=0.0)
            raise ValueError(
                f"generator: model {self.config.model!r} is not served at {self.config.base_url}; nearest of "
                f"{len(names)}: {', '.join(nearest) or 'none'}"
            )

    async def aclose(self) -> None:
        """Cancel what is on its way and close the connections."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _ask(self, key: str, prompt: Messages, sampling: Sampling) -> Sample:
        """Return the endpoint's answer after putting it in the cache; see `complete` for what is raised."""
        # A request keeps its slot while it waits for a retry: an overloaded endpoint is then asked less, not more.
        async with self._slots:
            for attempt in range(self.config.max_retries + 1):
                try:
                    async with asyncio.timeout(self.config.timeout_s):
                        raw = await self._send(prompt, sampling)
                        # No await from here to the return: what was received is kept before anything can cancel us.
                        sample = _parse_answer(raw.http_response.text)
                        self._keep(key, sample)
                        return sample
                except openai.APIStatusError as err:
                    self._raise_if_final(err)
                    reason, asked_wait_s = f"{err.status_code} {err.message}", _retry_after_s(err.response.headers)
                except (openai.APIConnectionError, TimeoutError, _BadAnswerError) as err:
                    reason, asked_wait_s = _reason(err), 0.0
                if attempt == self.config.max_retries or asked_wait_s > MAX_RETRY_AFTER_S:
                    break
                wait_s = min(MAX_BACKOFF_S, self.config.backoff_s * 2.0**attempt) * self._jitter.uniform(0.5, 1.0)
                wait_s += asked_wait_s
                logger.info("%s: %s; retry %d in %.1f s", self.name, reason, attempt + 1, wait_s)
                self.stats.retries += 1
                await asyncio.sleep(wait_s)
            self.stats.failures += 1
            wait = f"; the server asks to wait {asked_wait_s:g} s" if asked_wait_s > MAX_RETRY_AFTER_S else ""
            raise GeneratorError(f"{self.name}: no answer after {attempt + 1} attempts, at last: {reason}{wait}")

    async def _send(self, prompt: Messages, sampling: Sampling) -> Any:
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        if sampling.temperature > 0:
            request["seed"] = sampling.seed + sampling.draw
        return await self._client.chat.completions.with_raw_response.create(**request)

    def _keep(self, key: str, sample: Sample) -> None:
        self.stats.prompt_tokens += sample.usage.prompt_tokens
        self.stats.completion_tokens += sample.usage.completion_tokens
        if self._cache is not None:
            self._cache.put(key, sample, self.name)

    def _raise_if_final(self, err: openai.APIStatusError) -> None:
        """Raise what a retry cannot mend: GeneratorError about this prompt, ValueError about every call."""
        status = err.status_code
        passing = status in (408, 409, 429) or status >= 500
        if passing and err.code != "insufficient_quota":  # OpenAI's 429 for an account without money
            return
        self.stats.failures += 1
        about_prompt = err.code in _PROMPT_CODES or any(word in err.message.lower() for word in _PROMPT_WORDS)
        if status == 413 or (status == 400 and about_prompt):
            raise GeneratorError(f"{self.name}: the prompt is refused: {status} {err.message}") from err
        raise ValueError(self._refusal(err)) from err

    def _refusal(self, err: openai.APIStatusError) -> str:
        remedies = {
            401: f"check the key in {self.config.api_key_env or 'api_key_env (none is set)'}",
            403: f"check what the key in {self.config.api_key_env or 'api_key_env (none is set)'} may use",
            404: "check that base_url is right (it usually ends in /v1) and that the model is served there",
            429: "the account has no quota left: add to it, then start again",
        }
        remedy = remedies.get(err.status_code, "check base_url, model and the sampling parameters")
        if err.status_code >= 500:
            remedy = "wait until the server is well and start again"
        return (
            f"generator: {self.config.base_url} refused model {self.config.model!r}: {err.status_code} "
            f"{err.message}; {remedy}"
        )


def _parse_answer(text: str) -> Sample:
    """Return the Sample that a 200's body holds. Raises _BadAnswerError when it holds none."""
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = data.get("usage") or {}
        tokens = Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as err:
        raise _BadAnswerError(f"the answer holds no choice with a message ({text[:200]!r})") from err
    if not isinstance(content, str):
        raise _BadAnswerError(f"the message has no content (finish_reason {finish_reason!r})")
    return Sample(content, str(finish_reason), usage=tokens)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that Retry-After asks for, as a number or as a date; 0 without it."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _reason(err: BaseException) -> str:
    if isinstance(err, TimeoutError | openai.APITimeoutError):
        return "timed out"
    if isinstance(err, openai.APIConnectionError):  # its own text is only "Connection error."
        return f"connection failed: {err.__cause__ or err}"
    return str(err)
