"""An OpenAI-compatible server over a local engine: chat and text completions, whole answers, log-probs and token ids.

It holds no model and draws nothing: it awaits one `Engine.generate` per answer. Log-probs are the drawn tokens' own,
without alternatives. Extensions to OpenAI's format: `token_ids` and `prompt_token_ids` where log-probs are asked for,
and `seed`, the seed that was used, so that an answer to a request without one can be drawn again.
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from matryoshka.core.records import Sample, Sampling
from matryoshka.inference.http1 import HttpError, Request, Response, json_response, serve_http
from matryoshka.inference.openai_request import Job, chat_job, completion_job, read_json

if TYPE_CHECKING:
    from matryoshka.core.text.tokenizer import Tokenizer


class Engine(Protocol):
    """What the server serves: one base model with its adapters, on one tokenizer."""

    tokenizer: "Tokenizer"
    context_length: int

    def models(self) -> list[str]:
        """Return the names that `generate` takes: the base model and its adapters."""
        ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        """Return one draw, with token ids and log-probs. Cancelling it must end its work."""
        ...


async def serve(
    engine: Engine, host: str, port: int, api_key: str | None = None, ready: Callable[[int], None] | None = None
) -> None:
    """Serve `engine` until SIGTERM or SIGINT, finish what runs (bounded), and return.

    Port 0 takes any free one; `ready` gets the real port. With `api_key`, everything but /health wants it as a bearer
    token. Raises ValueError when it cannot listen or the key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("serve: api_key is empty; give a key, or None to serve without one")
    await serve_http(partial(_route, engine, api_key), host, port, ready)


async def _route(engine: Engine, api_key: str | None, request: Request) -> Response:
    if api_key is not None and request.path != "/health":
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
            message = "the API key is wrong" if given else "no API key came; send 'Authorization: Bearer KEY'"
            raise HttpError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    routes: dict[str, tuple[str, Callable[[Engine, Request], Awaitable[dict[str, Any]]]]] = {
        "/health": ("GET", _health),
        "/v1/models": ("GET", _models),
        "/v1/chat/completions": ("POST", _chat),
        "/v1/completions": ("POST", _complete),
    }
    if request.path not in routes:
        raise HttpError(404, f"no such path {request.path[:200]!r}; served: {', '.join(routes)}", code="unknown_url")
    method, handle = routes[request.path]
    if request.method != method:
        message = f"{request.path} takes {method}, not {request.method[:20]}"
        raise HttpError(405, message, code="method_not_allowed", headers={"Allow": method})
    return json_response(200, await handle(engine, request))


async def _health(engine: Engine, request: Request) -> dict[str, Any]:
    return {"status": "ok"}


async def _models(engine: Engine, request: Request) -> dict[str, Any]:
    common = {"object": "model", "created": 0, "owned_by": "matryoshka", "max_model_len": engine.context_length}
    return {"object": "list", "data": [{"id": name, **common} for name in engine.models()]}


async def _chat(engine: Engine, request: Request) -> dict[str, Any]:
    job = chat_job(engine, read_json(request.body))
    samples = await _draw(engine, job)
    choices = []
    for index, sample in enumerate(samples):
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "finish_reason": sample.finish_reason,
            "logprobs": None,
        }
        if job.logprobs:
            ids, token_bytes, token_logprobs = _scored_tokens(engine, sample)
            content = [
                {"token": _text(token), "logprob": logprob, "bytes": list(token), "top_logprobs": []}
                for token, logprob in zip(token_bytes, token_logprobs, strict=True)
            ]
            choice |= {"logprobs": {"content": content, "refusal": None}, "token_ids": ids}
        choices.append(choice)
    answer = _answer("chatcmpl", "chat.completion", job, samples, choices)
    return answer | ({"prompt_token_ids": list(job.prompts[0])} if job.logprobs else {})


async def _complete(engine: Engine, request: Request) -> dict[str, Any]:
    job = completion_job(engine, read_json(request.body))
    samples = await _draw(engine, job)
    choices = []
    for index, sample in enumerate(samples):
        choice: dict[str, Any] = {
            "index": index,
            "text": sample.text,
            "finish_reason": sample.finish_reason,
            "logprobs": None,
        }
        if job.logprobs:
            ids, token_bytes, token_logprobs = _scored_tokens(engine, sample)
            # A character may be spread over tokens, so they have no offsets in the text.
            scores = {"tokens": [_text(token) for token in token_bytes], "token_logprobs": token_logprobs}
            choice["logprobs"] = scores | {"top_logprobs": None, "text_offset": None}
            choice |= {"token_ids": ids, "prompt_token_ids": list(job.prompts[index // job.n])}
        choices.append(choice)
    return _answer("cmpl", "text_completion", job, samples, choices)


async def _draw(engine: Engine, job: Job) -> list[Sample]:
    """Return all answers of `job`, drawn at the same time; the first failure, or a cancellation, ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(engine.generate(prompt, replace(job.sampling, draw=draw), job.model))
                for prompt in job.prompts
                for draw in range(job.n)
            ]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


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
