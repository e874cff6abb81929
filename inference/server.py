"""An OpenAI-compatible server over a local engine: chat and text completions, whole answers, log-probs and token ids.

It holds no model and draws nothing: it awaits one `Engine.generate` for each answer. Log-probs are those of the drawn
tokens, without alternatives. Extensions to OpenAI's format: `token_ids` and `prompt_token_ids` where log-probs are
asked for, and `seed`, the seed that was used, so that an answer to a request without a seed can be drawn again.
"""

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from matryoshka.core.records import Sample
from matryoshka.inference.http_server import HttpError, json_response, serve_http
from matryoshka.inference.openai_request import Engine as Engine
from matryoshka.inference.openai_request import Job, chat_job, completion_job, read_json

MAX_DRAWS = 8192  # answers that are being drawn or wait for it, over all requests
TOKENIZING_THREADS = 2


async def serve(
    engine: Engine,
    host: str,
    port: int,
    api_key: str | None = None,
    ready: Callable[[int], None] | None = None,
    allow_anonymous: bool = False,
    make: "Callable[[Engine, str | None, bool, ThreadPoolExecutor], Api] | None" = None,
) -> None:
    """Serve `engine` until SIGTERM or SIGINT, finish the requests that run (bounded), and return.

    make: returns the handlers and their routes, by default an `Api`.

    Port 0 takes any free one; `ready` gets the real port. With `api_key`, everything but /health wants it as a bearer
    token. Raises ValueError when the server cannot listen, when the key is empty, and for a host beyond loopback
    without a key, unless allow_anonymous says that this is meant.
    """
    check_exposure(host, api_key, allow_anonymous)
    with ThreadPoolExecutor(TOKENIZING_THREADS, "tokenizing") as threads:
        api = (make or Api)(engine, api_key, is_loopback(host), threads)
        await serve_http(api.routes(), host, port, ready, api.check)


def check_exposure(host: str, api_key: str | None, allow_anonymous: bool) -> None:
    """Raise ValueError for an empty key, and for a server that other machines could use without one."""
    if api_key is not None and not api_key.strip():
        raise ValueError("serve: the API key is empty; give a key, or none to serve without one")
    if api_key is None and not allow_anonymous and not is_loopback(host):
        raise ValueError(
            f"serve: host {host!r} can be reached from other machines, and no API key is set; set one (--api-key-env), "
            "listen on 127.0.0.1, or say --allow-anonymous if every machine of that network may use the model"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`: localhost or a loopback address. "" means every interface."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Api:
    """The handlers. loopback: whether the server listens for this machine alone."""

    def __init__(self, engine: Engine, api_key: str | None, loopback: bool, threads: ThreadPoolExecutor) -> None:
        self.engine, self.api_key, self.loopback, self.threads = engine, api_key, loopback, threads
        self.draws = 0  # being drawn, or waiting for it

    def routes(self) -> list[web.RouteDef]:
        """Return what is served by which handler."""
        return [
            web.route("GET", "/health", self.health),
            web.route("GET", "/v1/models", self.models),
            web.route("POST", "/v1/chat/completions", self.chat),
            web.route("POST", "/v1/completions", self.complete),
        ]

    def check(self, request: web.Request) -> None:
        """Raise HttpError for a request that a web page sent behind its reader's back, or that lacks the key.

        A page cannot read our answers, but its requests reach a server on its reader's machine. A browser names the
        page in Origin; where the page's own host name was made to point here (DNS rebinding), Host shows that name.
        """
        host, origin = _hostname(f"//{request.headers.get('Host', '')}"), request.headers.get("Origin")
        if self.loopback and host and not is_loopback(host):
            raise HttpError(403, f"Host {host[:200]!r} is not this machine; use localhost", code="host_not_allowed")
        if origin is not None and self.api_key is None and (not host or _hostname(origin) != host):
            raise HttpError(403, f"requests of the web page {origin[:200]!r} are refused", code="origin_not_allowed")
        if self.api_key is not None and request.path != "/health":
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            raw = given.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(raw, self.api_key.encode()):
                message = "the API key is wrong" if given else "no API key came; send 'Authorization: Bearer KEY'"
                raise HttpError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def health(self, request: web.Request) -> web.Response:
        if illness := self.engine.illness():
            return json_response({"status": "ill", "reason": illness}, 503)
        return json_response({"status": "ok"})

    async def models(self, request: web.Request) -> web.Response:
        common = {"object": "model", "created": 0, "owned_by": "matryoshka"}
        common["max_model_len"] = self.engine.context_length
        return json_response({"object": "list", "data": [{"id": name, **common} for name in self.engine.models()]})

    async def chat(self, request: web.Request) -> web.Response:
        job = await self._job(chat_job, await request.read())
        return json_response(self._chat_answer(job, await self._draw(job)))

    def _chat_answer(self, job: Job, samples: list[Sample]) -> dict[str, Any]:
        """Return the answer to a chat request, in OpenAI's form."""
        choices = []
        for index, sample in enumerate(samples):
            choice: dict[str, Any] = {
                "index": index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "finish_reason": sample.finish_reason,
                "logprobs": None,
            }
            if job.logprobs:
                ids, token_bytes, token_logprobs = _scored_tokens(self.engine, sample)
                content = [
                    {"token": _text(token), "logprob": logprob, "bytes": list(token), "top_logprobs": []}
                    for token, logprob in zip(token_bytes, token_logprobs, strict=True)
                ]
                choice |= {"logprobs": {"content": content, "refusal": None}, "token_ids": ids}
            choices.append(choice)
        answer = _answer("chatcmpl", "chat.completion", job, samples, choices)
        return answer | ({"prompt_token_ids": list(job.prompts[0])} if job.logprobs else {})

    async def complete(self, request: web.Request) -> web.Response:
        job = await self._job(completion_job, await request.read())
        samples = await self._draw(job)
        choices = []
        for index, sample in enumerate(samples):
            choice: dict[str, Any] = {
                "index": index,
                "text": sample.text,
                "finish_reason": sample.finish_reason,
                "logprobs": None,
            }
            if job.logprobs:
                ids, token_bytes, token_logprobs = _scored_tokens(self.engine, sample)
                # A character may be spread over tokens, so they have no offsets in the text.
                scores = {"tokens": [_text(token) for token in token_bytes], "token_logprobs": token_logprobs}
                choice["logprobs"] = scores | {"top_logprobs": None, "text_offset": None}
                choice |= {"token_ids": ids, "prompt_token_ids": list(job.prompts[index // job.n])}
            choices.append(choice)
        return json_response(_answer("cmpl", "text_completion", job, samples, choices))

    async def _job(self, build: Callable[[Engine, dict[str, Any]], Job], body: bytes) -> Job:
        """Return the checked request. A long text takes seconds to tokenize, so this happens off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: build(self.engine, read_json(body)))

    async def _draw(self, job: Job) -> list[Sample]:
        """Return all answers of `job`, drawn at the same time; the first failure or a cancellation ends the others."""
        if illness := self.engine.illness():
            raise HttpError(503, f"the engine is ill: {illness}", code="engine_ill")
        wanted = len(job.prompts) * job.n
        if self.draws + wanted > MAX_DRAWS:
            message = f"{self.draws} answers are being drawn; with {wanted} more there would be over {MAX_DRAWS}"
            raise HttpError(429, f"{message}; try again later", code="too_many_draws", headers={"Retry-After": "1"})
        self.draws += wanted
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.engine.generate(prompt, replace(job.sampling, draw=draw), job.model))
                    for prompt in job.prompts
                    for draw in range(job.n)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self.draws -= wanted
        return [task.result() for task in tasks]


def _hostname(url: str) -> str:
    """Return the host of `url` in lower case, "" where it has none, "?" where it is malformed."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "?"


def _scored_tokens(engine: Engine, sample: Sample) -> tuple[list[int], list[bytes], list[float]]:
    if sample.token_ids is None or sample.logprobs is None:
        raise RuntimeError("the engine returned no token ids or log-probs")
    ids = list(sample.token_ids)
    return ids, [engine.tokenizer.bytes_of(token, skip_special=False) for token in ids], list(sample.logprobs)


def _text(token: bytes) -> str:
    """Return a token's text; part of a character becomes U+FFFD."""
    return token.decode("utf-8", "replace")


def _answer(prefix: str, kind: str, job: Job, samples: list[Sample], choices: list[dict[str, Any]]) -> dict[str, Any]:
    prompt_tokens = sum(len(prompt) for prompt in job.prompts)  # once each, as OpenAI counts, however large n is
    completion_tokens = sum(sample.usage.completion_tokens for sample in samples)
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": job.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "seed": job.sampling.seed,
    }
