"""An OpenAI-compatible endpoint in front of the controller, for agents that exist already, in any language.

Each call carries an episode's id, in the header X-Episode-Id or behind a colon in the model's name. It is recorded with
the drawn ids and log-probs before it is answered. `POST /v1/episodes/ID` ends the episode with a reward. An episode
goes on under the policy that it began with; a new one takes the newest that `matryoshka train-from` has made.
"""

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from aiohttp import web

from matryoshka.core.files import folder_lock
from matryoshka.core.machine import usable_cores
from matryoshka.core.models.load import load_model
from matryoshka.core.records import Sample, Sampling, content_key, stable_seed
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.http_server import HttpError, json_response
from matryoshka.inference.openai_request import Job, chat_job, read_json, read_messages
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.server import Api
from matryoshka.lora.files import load_adapter
from matryoshka.pilot.gateway_record import (
    Call,
    Conflict,
    GatewayConfig,
    Record,
    claim,
    newest_stage,
    policy_name,
    read_ending,
    stage_folder,
)
from matryoshka.pilot.training import DTYPES, QUANTIZATIONS

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HEADER = "X-Episode-Id"
RETRY = "X-Stainless-Retry-Count"  # OpenAI's clients send it: above 0, the request was sent before
ONCE = "Idempotency-Key"  # calls of an episode with one key are one call


class PolicyEngine:
    """The engine of the gateway: one base model and the adapters of its policies, loaded when they are asked for.

    `generate` takes a policy's stage as its model. A policy is loaded between draws, while no sampler is open.
    """

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        controller = config.controller
        self._config, self._folder = config, folder
        self._threads = controller.threads or usable_cores()
        torch.set_num_threads(self._threads)
        path = controller.folder
        dtype, device = DTYPES[controller.dtype], torch.device(controller.device)
        self._model = load_model(path, dtype, device, QUANTIZATIONS[controller.quantization])
        self.tokenizer = Tokenizer.load(path)
        self.context_length = self._model.config.max_position_embeddings
        self._labels: dict[str, str | None] = {}  # stage -> the adapter's name in the model
        self._sampler: Sampler | None = None
        self._drawing = 0
        self._changed = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._loads: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def models(self) -> list[str]:
        return [self._config.model]

    def illness(self) -> str:
        return self._sampler.illness if self._sampler is not None else ""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        """Return one draw of the policy of the stage `model`."""
        if model not in self._labels:
            loading = asyncio.ensure_future(self._load(model))
            self._loads.add(loading)
            loading.add_done_callback(self._loads.discard)
            await asyncio.shield(loading)  # a client that leaves does not break it off: others wait for the model
        async with self._loading:
            sampler = self._sampler or self._open()
            self._drawing += 1
        try:
            return await sampler.generate(prompt_ids, sampling, self._labels[model])
        finally:
            self._drawing -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _load(self, stage: str) -> None:
        """Load the policy of `stage`, once the draws that run have ended; no draw begins meanwhile."""
        async with self._loading:
            if stage in self._labels:
                return
            folder = stage_folder(self._folder, self._config, stage)
            if folder is None:
                self._labels[stage] = None
                return
            async with self._changed:
                await self._changed.wait_for(lambda: self._drawing == 0)
            await asyncio.to_thread(self.close)
            label = f"policy{len(self._labels)}"
            await asyncio.to_thread(load_adapter, self._model, label, folder)
            self._labels[stage] = label

    def _open(self) -> Sampler:
        controller = self._config.controller
        self._sampler = Sampler(
            self._model, self.tokenizer, controller.max_rows, controller.deterministic, self._threads
        )
        return self._sampler


class GatewayApi(Api):
    """The handlers of a gateway: chat calls that belong to episodes, and the ends of episodes."""

    def __init__(
        self, config: GatewayConfig, engine: PolicyEngine, record: Record, key: str | None, loopback: bool,
        threads: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        super().__init__(engine, key, loopback, threads)
        self._config, self._record = config, record
        self._in_flight: Counter[str] = Counter()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def routes(self) -> list[web.RouteDef]:
        """Return what is served by which handler."""
        return [
            web.route("GET", "/health", self.health),
            web.route("GET", "/v1/models", self.models),
            web.route("POST", "/v1/chat/completions", self.chat),
            web.route("GET", "/v1/episodes", self.episodes),
            web.route("GET", "/v1/episodes/{id}", self.episode),
            web.route("POST", "/v1/episodes/{id}", self.end),
        ]

    async def chat(self, request: web.Request) -> web.Response:
        """Answer a call of an episode, once it is recorded; with `stream` as server-sent events, whose one delta of
        content is the whole text, since the record comes before the answer.

        A call that is made again, since the client did not get its answer, is answered with what was drawn then: a call
        with the same idempotency key, or a retry of the call before. Calls of one episode are answered one after the
        other.
        """
        data = read_json(await request.read())
        episode, form = self._episode_of(request, data), _taken_form(data)
        self._in_flight[episode] += 1
        try:
            async with self._locks[episode]:
                answer = await self._call(episode, data, request.headers.get(ONCE, ""), _is_retry(request))
            return json_response(answer) if form == "whole" else _events(answer, form == "stream with usage")
        finally:
            self._in_flight[episode] -= 1
            if not self._in_flight[episode]:
                del self._in_flight[episode], self._locks[episode]

    async def _call(self, episode: str, data: dict[str, Any], once: str, is_retry: bool) -> dict[str, Any]:
        if self._record.ending(episode) is not None:
            raise HttpError(409, f"episode {episode!r} has ended; take another id", code="episode_ended")
        if self._config.temperature is not None:
            data = {**data, "temperature": self._config.temperature}
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(self.threads, lambda: chat_job(self.engine, data))
        calls, request = self._record.calls.get(episode, []), content_key(data)
        again = next((call for call in calls if once and call.once == once), None)
        if again is not None and again.request != request:
            message = f"call {again.number} of episode {episode!r} had the {ONCE} {once[:80]!r}, with other contents"
            raise HttpError(409, message, code="idempotency_key_reused")
        if again is None and is_retry and calls and calls[-1].request == request:
            again = calls[-1]
        if again is not None:
            return self._answered(job, again)
        stage = calls[0].stage if calls else newest_stage(self._record.folder)
        number = calls[-1].number + 1 if calls else 1
        seed = stable_seed("gateway", self._config.seed, data.get("seed"), episode, number)
        job = replace(job, sampling=replace(job.sampling, seed=seed))
        samples = await self._draw(replace(job, model=stage))
        call = Call(episode, number, stage, request, read_messages(data), job.prompts[0], tuple(samples), once)
        self._record.add(call)
        await asyncio.to_thread(self._record.sync)
        return self._answered(job, call)

    def _answered(self, job: Job, call: Call) -> dict[str, Any]:
        answer = self._chat_answer(job, list(call.samples))
        known = {"id": f"chatcmpl-{call.episode}-{call.number}", "episode": call.episode, "call": call.number}
        return {**answer, **known, "policy": call.stage or "untrained"}

    def _episode_of(self, request: web.Request, data: dict[str, Any]) -> str:
        """Return the id of the call's episode and leave the model's bare name in `data`. Raises HttpError 400."""
        header, model = request.headers.get(HEADER), data.get("model")
        named = None
        if isinstance(model, str) and model.partition(":")[0] == self._config.model and ":" in model:
            data["model"], _, named = model.partition(":")
        if header is not None and named is not None and header != named:
            message = f"the header {HEADER} and the model's name give two ids, {header[:80]!r} and {named[:80]!r}"
            raise HttpError(400, message, "model", "invalid_episode")
        episode = header if header is not None else named
        if episode is None:
            how = f"send the header {HEADER}, or the model as {self._config.model}:ID"
            got = f"; its model is {model[:80]!r}" if isinstance(model, str) else ""
            raise HttpError(400, f"the call names no episode; {how}{got}", "model", "invalid_episode")
        return _checked_id(episode)

    async def episodes(self, request: web.Request) -> web.Response:
        """List the open episodes."""
        opened = self._record.open_episodes()
        rows = [{"id": episode, "calls": len(self._record.calls[episode])} for episode in opened]
        return json_response({"object": "list", "data": rows, "newest": newest_stage(self._record.folder)})

    async def episode(self, request: web.Request) -> web.Response:
        """Describe one episode, so that an agent that was restarted can go on with it."""
        return json_response(self._state(self._known(request)))

    async def end(self, request: web.Request) -> web.Response:
        """End an episode. The same end twice is one end; another end is refused."""
        episode = self._known(request)
        try:
            ending = read_ending(read_json(await request.read()))
        except ValueError as err:
            raise HttpError(400, str(err), code="invalid_value") from err
        if self._in_flight[episode]:
            message = f"a call of episode {episode!r} is being answered; end the episode after it"
            raise HttpError(409, message, code="episode_busy")
        given = self._record.ending(episode)
        if given is not None and given != ending:
            message = f"episode {episode!r} has ended with rewards {list(given.rewards)} already; an end is for good"
            raise HttpError(409, message, code="episode_ended")
        if given is None:
            stage = self._record.calls[episode][0].stage
            try:
                self._record.end(episode, ending, policy_name(self._record.folder, self._config, stage))
            except Conflict as err:
                raise HttpError(409, str(err), code="invalid_value") from err
        await asyncio.to_thread(self._record.sync)
        return json_response(self._state(episode))

    def _known(self, request: web.Request) -> str:
        episode = _checked_id(request.match_info["id"])
        if episode not in self._record.calls:
            raise HttpError(404, f"episode {episode!r} has no call; nothing is known of it", code="episode_not_found")
        return episode

    def _state(self, episode: str) -> dict[str, Any]:
        calls, ending = self._record.calls[episode], self._record.ending(episode)
        row: dict[str, Any] = {"id": episode, "calls": len(calls), "policy": calls[0].stage or "untrained"}
        if ending is not None:
            row |= {"rewards": list(ending.rewards), "note": ending.note, "problem": ending.problem}
        return {**row, "ended": ending is not None}


@contextmanager
def open_gateway(config: GatewayConfig, folder: Path) -> Iterator[tuple[PolicyEngine, Callable[..., GatewayApi]]]:
    """Open the record in `folder` and the controller; yield the engine and what makes the handlers of a server.

    Raises ValueError for a folder that is in use or was started with another configuration.
    """
    with folder_lock(folder):
        claim(config, folder)
        record, engine = Record(folder), PolicyEngine(config, folder)
        try:
            yield engine, lambda _, key, loopback, threads: GatewayApi(config, engine, record, key, loopback, threads)
        finally:
            engine.close()
            record.close()


def _checked_id(episode: str) -> str:
    if not ID.fullmatch(episode):
        what = "expected 1 to 128 letters, digits, dots, hyphens and underscores, beginning with a letter or digit"
        raise HttpError(400, f"episode id {episode[:80]!r}: {what}", code="invalid_episode")
    return episode


def _taken_form(data: dict[str, Any]) -> Literal["whole", "stream", "stream with usage"]:
    """Return how the answer to `data` is to be sent, and take that out of `data`.

    A call that is made again is the same call, whichever way it wants its answer. Raises HttpError 400.
    """
    wanted, options = data.pop("stream", False), data.pop("stream_options", None)
    if not isinstance(wanted, bool):
        raise HttpError(400, f"stream: expected true or false, got {json.dumps(wanted)[:80]}", "stream")
    if options is None:
        return "stream" if wanted else "whole"
    if not wanted:
        raise HttpError(400, "stream_options: they are for stream = true alone", "stream_options")
    usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if not isinstance(usage, bool) or set(options) - {"include_usage"}:
        what = f'expected {{"include_usage": true}} or false, got {json.dumps(options)[:80]}'
        raise HttpError(400, f"stream_options: {what}", "stream_options")
    return "stream with usage" if usage else "stream"


def _events(answer: dict[str, Any], with_usage: bool) -> web.Response:
    """Return a chat answer as the server-sent events in which OpenAI streams it: chunks, then [DONE]."""
    common = {name: value for name, value in answer.items() if name not in ("choices", "usage")}
    common |= {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})
    chunks: list[dict[str, Any]] = []
    for choice in answer["choices"]:
        unsaid = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": None}
        text = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}
        for change in (
            {"delta": {"role": "assistant", "content": "", "refusal": None}},
            {**text, "delta": {"content": choice["message"]["content"]}},
            {"finish_reason": choice["finish_reason"]},
        ):
            chunks.append({**common, "choices": [unsaid | change]})
    if with_usage:
        chunks.append({**common, "choices": [], "usage": answer["usage"]})
    rows = [*(json.dumps(chunk, allow_nan=False) for chunk in chunks), "[DONE]"]
    body = "".join(f"data: {row}\n\n" for row in rows).encode()
    headers = {"Cache-Control": "no-cache"}
    return web.Response(body=body, headers=headers, content_type="text/event-stream", charset="utf-8")


def _is_retry(request: web.Request) -> bool:
    return request.headers.get(RETRY, "0") not in ("", "0")
