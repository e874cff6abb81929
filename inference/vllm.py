"""A vLLM server as the controller's sampler: prompts go as token ids, drawn tokens come back as ids and log-probs.

Everything happens when it is needed: the server starts with the first request, and an adapter is loaded, under a name
that carries its content hash, with the first request for it. A reused name would be served from the prefix cache of
other weights (vllm#42125). The invariant: each request is answered by the adapter that it named or not at all, through
hot swaps, a server that is killed and started again, and an adapter that the server lost.
"""

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.json_values import as_text
from matryoshka.core.records import Sample, Sampling, Usage, stable_seed
from matryoshka.core.text.tokenizer import TextStream, Tokenizer
from matryoshka.inference.http_client import HttpClient, Reply, TransportError
from matryoshka.inference.limits import backoff_s, retry_after_s
from matryoshka.inference.sampler_request import check_context, check_sampling
from matryoshka.inference.vllm_adapter import check_adapter
from matryoshka.inference.vllm_server import VllmServer
from matryoshka.lora.files import adapter_hash

logger = logging.getLogger(__name__)

ATTEMPTS = 6  # of one request; a server that died for good ends the run sooner, by max_restarts
BACKOFF_S = 0.5
LOAD_TIMEOUT_S = 300.0


class _Passing(Exception):
    """A failure that another attempt may mend."""


class Vllm:
    """Draws completions from vLLM under registered adapters. One object lives in one event loop; close it with aclose.

    context_length, base: the server's limit in tokens and its name of the base model, known once it runs.
    """

    def __init__(
        self, server: VllmServer, tokenizer: Tokenizer, rank: int, show: Callable[[str], None] = logger.info
    ) -> None:
        """rank: of the adapters to come, which the server was told. show: gets progress lines while it starts."""
        self.server = server
        self.tokenizer = tokenizer
        self.context_length = 0
        self.base = ""
        self.num_restarts = 0
        self._rank, self._show = rank, show
        self._client = HttpClient()
        self._lock = asyncio.Lock()  # held while the server starts or an adapter is loaded or unloaded
        self._scoring = asyncio.Lock()
        self._runs = 0  # starts so far; a request that fails knows by it whether somebody has mended the server since
        self._is_up = False
        self._folders: dict[str, Path] = {}
        self._loaded: set[str] = set()
        self._retired: set[str] = set()
        self._flying: Counter[str] = Counter()
        self._jitter = random.Random(0)

    def register(self, folder: Path) -> str:
        """Return the name that `generate` takes for the adapter in `folder`, whose files must stay as they are.

        Raises ValueError or FileNotFoundError for an adapter that vLLM would not serve as it was trained.
        """
        check_adapter(folder, self._rank)
        name = f"adapter-{adapter_hash(folder)}"
        self._folders[name] = folder.absolute()
        self._retired.discard(name)
        return name

    def retire_others(self, *names: str) -> None:
        """Take no more requests for any other adapter; the server drops each when its requests have ended."""
        self._retired = self._folders.keys() - set(names)

    def use(self, folder: Path) -> str:
        """Register the adapter in `folder` and retire all others; return its name."""
        name = self.register(folder)
        self.retire_others(name)
        return name

    def use_model(self, folder: Path) -> None:
        """Answer requests for the base model with the weights in `folder` from now on; none may be under way.

        The server, which must be ours, is started again with the next one.
        """
        if self.server.take(folder):
            self._is_up = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Sample:
        """Return one completion of `prompt_ids` under `adapter` (None: the base model, on a server without adapters).

        vLLM 0.32 on CPUs gives requests for the base model the adapter of its last slot, where there is one (its index
        for none is -1, and its kernels index with it): serve the base model as an adapter whose B is zero.

        The seed is a function of (seed, draw, prompt); equal ones draw equal tokens as far as vLLM's batches allow.
        Raises ValueError for requests that the server refuses, a name that was not registered, and a server that does
        not come up; ContextError where prompt and max_tokens do not fit; ConnectionError when attempts are exhausted.
        """
        check_sampling(sampling)
        prompt = tuple(prompt_ids)
        request: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": stable_seed("sampler", sampling.seed, sampling.draw, prompt),
            "stop": list(sampling.stop),
            "stop_token_ids": list(self.tokenizer.stop_ids),
            "logprobs": 0,
            # A server that was started by somebody else may have other defaults.
            **{"n": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
        }
        choice = await self._complete(prompt, request, adapter)
        return self._sample(prompt, sampling, choice)

    async def score(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], adapter: str | None = None
    ) -> tuple[float, ...]:
        """Return the log-prob of each completion token as vLLM's forward pass over the whole text sees it.

        One at a time, and nothing else should be under way: on CPUs, vLLM 0.32 with LoRA dies of prompt log-probs that
        are asked for in a batch with other requests (its LoRA head takes one row a request, and gets one a token).
        """
        ids = (*prompt_ids, *completion_ids)
        request = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        async with self._scoring:
            choice = await self._complete(ids, request, adapter)
        try:
            rows = choice["prompt_logprobs"][len(prompt_ids) :]
            return tuple(float(row[str(id)]["logprob"]) for row, id in zip(rows, completion_ids, strict=True))
        except (KeyError, TypeError, ValueError) as err:
            what = f"no log-prob for each token of the prompt ({err!r:.200})"
            raise ValueError(f"vllm: {self.server.url} sent {what}; a newer vLLM is needed") from err

    async def aclose(self) -> None:
        """Stop the server if it is ours, else take our adapters off it; close the connections."""
        if not self.server.is_ours and self._is_up:
            for name in self._loaded:
                try:
                    await self._post("unload_lora_adapter", {"lora_name": name})
                except TransportError as err:
                    logger.warning("vllm: %s stays loaded at %s: %s", name, self.server.url, err)
        await self._client.aclose()
        await self.server.stop()

    async def _complete(self, prompt: tuple[int, ...], request: dict[str, Any], adapter: str | None) -> dict[str, Any]:
        """Return the one choice of the answer to `request`, asked as often as it takes; raises as `generate` does."""
        name = adapter or ""
        if name and (name not in self._folders or name in self._retired):
            raise ValueError(f"vllm: adapter {name!r} is not registered, or retired; register its folder first")
        self._flying[name] += 1
        failure = ""
        try:
            for attempt in range(ATTEMPTS):
                await self._prepare(name)
                check_context(len(prompt), request["max_tokens"], self.context_length)
                run = self._runs
                body = {"model": name or self.base, "prompt": list(prompt), "return_token_ids": True, **request}
                try:
                    try:
                        reply = await self._post("completions", body, self.server.config.timeout_s)
                        return self._choice(reply, prompt, name)
                    except TransportError as err:
                        raise _Passing(str(err)) from err
                except _Passing as err:
                    failure = str(err)
                    logger.warning("vllm: %s; attempt %d of %d", failure, attempt + 1, ATTEMPTS)
                    await self._mend(run, failure)
                    await asyncio.sleep(backoff_s(attempt, BACKOFF_S, self._jitter))
            raise ConnectionError(f"vllm: no answer from {self.server.url} after {ATTEMPTS} attempts: {failure}")
        finally:
            self._flying[name] -= 1
            if name in self._retired and not self._flying[name]:
                async with self._lock:
                    await self._drop_retired()

    async def _prepare(self, name: str) -> None:
        """Return when the server runs and has the adapter `name` ("": none)."""
        if self._is_up and (not name or name in self._loaded):
            return
        async with self._lock:
            if not self._is_up:
                await self._start()
            if name and name not in self._loaded:
                await self._load(name)
            await self._drop_retired()

    async def _start(self) -> None:
        await self.server.start(self._client, self._show)
        self._runs += 1
        try:
            reply = await self._request("GET", "models", None, 60.0)
        except TransportError as err:
            raise ConnectionError(f"vllm: no answer from {self.server.url}: {err}") from err
        rows = _json(reply).get("data") if reply.status == 200 else None
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        first: dict[str, Any] = next((row for row in rows if not row.get("parent")), {})
        name, length = first.get("id"), first.get("max_model_len")
        if not isinstance(name, str) or not isinstance(length, int):
            where = f"{self.server.url}/v1/models answers {reply.status} {reply.text[:300]}"
            raise ValueError(f"vllm: {where}; expected vLLM's list of models (and its key in api_key_env)")
        self.base, self.context_length = name, length
        # A server of somebody else's may have them from before: same hash, same weights.
        self._loaded = self._folders.keys() & {as_text(row.get("id")) for row in rows}
        self._is_up = True

    async def _load(self, name: str) -> None:
        folder = self._folders[name]
        try:
            reply = await self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except TransportError as err:  # the request that wants it finds out, and mends the server
            logger.warning("vllm: %s was not loaded: %s", name, err)
            return
        if reply.status == 404 and "adapter" not in reply.text:
            raise ValueError(
                f"vllm: {self.server.url} loads no adapters at run time; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            )
        if reply.status != 200 and "already been loaded" not in reply.text:
            raise ValueError(
                f"vllm: {folder} was not loaded: {reply.status} {_message(reply)}; the server must see this folder, "
                f"and take rank {self._rank}"
            )
        self._loaded.add(name)

    async def _drop_retired(self) -> None:
        """Unload the retired adapters that no request is under way for; the lock is held."""
        for name in [name for name in self._retired & self._loaded if not self._flying[name]]:
            self._loaded.discard(name)
            try:
                reply = await self._post("unload_lora_adapter", {"lora_name": name})
            except TransportError as err:  # a server that is gone has no adapter
                logger.warning("vllm: %s was not unloaded: %s", name, err)
                continue
            if reply.status not in (200, 404):
                logger.warning("vllm: %s was not unloaded: %d %s", name, reply.status, _message(reply))

    async def _mend(self, run: int, failure: str) -> None:
        """Return when the server is well again after a request that was sent in its run number `run` failed."""
        async with self._lock:
            if run != self._runs or await self.server.is_healthy(self._client):
                return
            self._is_up = False
            self._loaded.clear()
            if self.num_restarts >= self.server.config.max_restarts:
                tail = "\n".join(self.server.tail())
                what = f"vllm: the server died after {self.num_restarts} restarts ({failure}), which is max_restarts; "
                what += "mend the cause and run again to go on from here"
                raise ValueError(f"{what}. {self.server.log} ends:\n{tail}")
            self.num_restarts += 1
            logger.warning("vllm: the server does not answer; restart %d", self.num_restarts)
            await self._start()

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float = LOAD_TIMEOUT_S) -> Reply:
        return await self._request("POST", path, json.dumps(body).encode(), timeout_s)

    async def _request(self, method: str, path: str, data: bytes | None, timeout_s: float) -> Reply:
        server = self.server
        reply = await self._client.request(method, f"{server.url}/v1/{path}", server.headers, data, timeout_s)
        return replace(reply, body=server.hide(reply.text).encode())

    def _choice(self, reply: Reply, prompt: tuple[int, ...], name: str) -> dict[str, Any]:
        """Return the choice that `reply` holds. Raises _Passing where another attempt may help, else ValueError."""
        status = reply.status
        if status == 404 and name:
            self._loaded.discard(name)  # a server that was started again by somebody else has lost it
        if status in (404, 408, 409, 429) or status >= 500:
            asked = retry_after_s(reply.headers)
            raise _Passing(f"{status} {_message(reply)}" + (f" (asks to wait {asked:g} s)" if asked else ""))
        if status != 200:
            raise ValueError(f"vllm: {self.server.url} refuses the request: {status} {_message(reply)}")
        data = _json(reply)
        try:
            (choice,) = data["choices"]
            model, read = data["model"], list(choice["prompt_token_ids"] or ())
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as err:
            raise _Passing(f"the answer holds no choice with token ids ({reply.text[:200]!r})") from err
        if model != (name or self.base):
            raise ValueError(f"vllm: {name or self.base} was asked, {model!r} answered; is {self.server.url} vLLM?")
        if tuple(read) != prompt:
            raise ValueError(f"vllm: {self.server.url} read another prompt than was sent; a vLLM that takes token ids "
                             "and return_token_ids is needed (0.10 or newer)")
        if reason not in ("stop", "length"):  # "abort": the server is going down
            raise _Passing(f"the answer ended by {reason!r}")
        result: dict[str, Any] = choice
        return result

    def _sample(self, prompt: tuple[int, ...], sampling: Sampling, choice: dict[str, Any]) -> Sample:
        """Return the sample of a choice; its text is made here, as the local sampler makes it from ids."""
        ids, scores = choice.get("token_ids"), choice.get("logprobs")
        logprobs = scores.get("token_logprobs") if isinstance(scores, dict) else None
        if not (isinstance(ids, list) and isinstance(logprobs, list) and len(ids) == len(logprobs) > 0) or (
            None in logprobs or any(type(id) is not int for id in ids)
        ):
            raise ValueError(f"vllm: {self.server.url} sent no log-prob for each token; a newer vLLM is needed")
        if not all(isinstance(logp, int | float) and abs(logp) < 1e300 for logp in logprobs):
            raise ValueError(
                f"vllm: {self.server.url} sent log-probs that are not finite; the weights of model or adapter hold "
                "NaN or infinity, or its numbers overflow the dtype"
            )
        stream = TextStream(self.tokenizer)
        for id in ids[:-1] if ids[-1] in self.tokenizer.stop_ids else ids:
            stream.push(id)
        text = stream.text
        if cuts := [text.find(stop) for stop in sampling.stop if stop in text]:
            text = text[: min(cuts)]
        usage = Usage(len(prompt), len(ids))
        return Sample(text, choice["finish_reason"], tuple(ids), tuple(map(float, logprobs)), None, usage)


def _json(reply: Reply) -> dict[str, Any]:
    try:
        data = json.loads(reply.text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _message(reply: Reply) -> str:
    error = _json(reply).get("error", _json(reply))
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or reply.text.strip())[:500]
