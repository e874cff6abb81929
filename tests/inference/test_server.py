"""The server over a fake engine, driven by the real `openai` client and, where that would not do it, by raw bytes."""

import asyncio
import json
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Message, Messages, Sample, Sampling, Usage
from matryoshka.inference import http_server
from matryoshka.inference import server as server_module
from matryoshka.inference.chat_api import server_seed
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.server import Engine, serve


@dataclass(frozen=True)
class Rendered:
    ids: tuple[int, ...]
    mask: tuple[int, ...]


class ByteTokenizer:
    """One token per UTF-8 byte."""

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> Rendered:
        if messages[0].role == "assistant":
            raise ValueError("the first message must not be the assistant's")
        text = "".join(f"<{message.role}>{message.content}" for message in messages)
        ids = self.encode(text + ("<assistant>" if add_generation_prompt else ""))
        return Rendered(ids, (0,) * len(ids))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    encode_prompt = encode

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")  # ValueError above 255

    def bytes_of(self, id: int, skip_special: bool = True) -> bytes:
        return bytes([id])


class FakeEngine:
    """Answers "<model>/<draw>" + a euro sign with log-probs -1, -2, ...; some words in the prompt make it misbehave."""

    def __init__(self) -> None:
        self.tokenizer: Any = ByteTokenizer()
        self.context_length = 300
        self.calls: list[tuple[str, Sampling, str]] = []
        self.running = self.most_running = self.cancelled = 0
        self.gate = asyncio.Event()
        self.sick = ""

    def illness(self) -> str:
        return self.sick

    def models(self) -> list[str]:
        return ["base", "adapter"]

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        prompt = self.tokenizer.decode(list(prompt_ids))
        self.calls.append((prompt, sampling, model))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if "WAIT" in prompt:
                await self.gate.wait()
            await asyncio.sleep(0)
            if "BOOM" in prompt and sampling.draw == 0:
                raise RuntimeError("the fake engine fell over")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        ids = self.tokenizer.encode(f"{model}/{sampling.draw}\u20ac")
        logprobs = tuple(float("nan") if "NAN" in prompt else -1.0 - i for i in range(len(ids)))
        usage = Usage(len(prompt_ids), len(ids))
        return Sample(self.tokenizer.decode(ids), "length", ids, logprobs, usage=usage)


class Server:
    def __init__(self, engine: FakeEngine, port: int, task: "asyncio.Task[None]") -> None:
        self.engine, self.port, self.task = engine, port, task
        self.client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    async def raw(self, *chunks: bytes) -> bytes:
        """Return everything that the server sends on one connection; our side stays open until it has closed its."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for chunk in chunks:
            writer.write(chunk)
            await asyncio.sleep(0.01)
        data = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return data

    async def post(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        return parse(await self.raw(head.encode() + content))


    async def get(self, path: str, header: str = "", host: str = "localhost") -> tuple[int, dict[str, Any]]:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{header}\r\n"
        return parse(await self.raw(head.encode()))


def parse(reply: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@asynccontextmanager
async def serving(api_key: str | None = None) -> AsyncIterator[Server]:
    engine = FakeEngine()
    checked: Engine = engine  # mypy: the fake has the Protocol's shape
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(checked, "127.0.0.1", 0, api_key, port.set_result))
    server = Server(engine, await port, task)
    try:
        yield server
    finally:
        await server.client.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "base", "messages": HELLO, "max_tokens": 5}


def test_chat_with_the_openai_client() -> None:
    """Oracle: the arguments of the fake engine's calls, and its answer in OpenAI's types."""

    async def main() -> None:
        async with serving() as server:
            answer = await server.client.chat.completions.create(
                model="adapter",
                messages=[
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                ],
                max_completion_tokens=7,
                temperature=0.5,
                top_p=0.25,
                stop=["x", "y"],
                seed=3,
                n=2,
            )
            assert server.engine.calls == [
                ("<system>s<user>ab<assistant>", Sampling(0.5, 0.25, 7, ("x", "y"), 3, draw), "adapter")
                for draw in (0, 1)
            ]
            assert [choice.index for choice in answer.choices] == [0, 1]
            assert [choice.message.content for choice in answer.choices] == ["adapter/0\u20ac", "adapter/1\u20ac"]
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            assert all(choice.logprobs is None for choice in answer.choices)
            assert (answer.model, answer.object) == ("adapter", "chat.completion")
            assert answer.usage is not None
            # 28 bytes of prompt once; two answers of 9 characters, the last one of three bytes
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
                28,
                24,
                52,
            )

    asyncio.run(main())


def test_chat_log_probs_and_token_ids() -> None:
    """Oracle: the fake's ids and log-probs, exactly; a part of a character shows as U+FFFD."""

    async def main() -> None:
        async with serving() as server:
            answer = await server.client.chat.completions.create(model="base", messages=HELLO, logprobs=True)
            (choice,) = answer.choices
            assert choice.logprobs is not None and choice.logprobs.content is not None
            ids = list("base/0\u20ac".encode())
            assert choice.model_extra == {"token_ids": ids}
            assert answer.model_extra is not None
            assert answer.model_extra["prompt_token_ids"] == list(b"<user>hi<assistant>")
            assert [row.token for row in choice.logprobs.content] == [*"base/0", "\ufffd", "\ufffd", "\ufffd"]
            assert [row.bytes for row in choice.logprobs.content] == [[id] for id in ids]
            assert [row.logprob for row in choice.logprobs.content] == [-1.0 - i for i in range(len(ids))]

    asyncio.run(main())


@pytest.mark.parametrize(
    "prompt, seen",
    [("ab", ["ab"]), ([97, 98], ["ab"]), (["ab", "c"], ["ab", "c"]), ([[97], [98, 99]], ["a", "bc"])],
)
def test_completions_with_the_openai_client(prompt: Any, seen: list[str]) -> None:
    """Oracle: every form of prompt reaches the engine as the same tokens, n draws each, answered prompt by prompt."""

    async def main() -> None:
        async with serving() as server:
            answer = await server.client.completions.create(
                model="base", prompt=prompt, n=2, stop="z", logprobs=0, temperature=0.0
            )
            assert [(text, sampling.draw) for text, sampling, _ in server.engine.calls] == [
                (text, draw) for text in seen for draw in (0, 1)
            ]
            assert server.engine.calls[0][1].stop == ("z",)
            assert server.engine.calls[0][1].max_tokens == 16  # OpenAI's default
            assert [choice.text for choice in answer.choices] == ["base/0\u20ac", "base/1\u20ac"] * len(seen)
            assert [choice.index for choice in answer.choices] == list(range(2 * len(seen)))
            for index, choice in enumerate(answer.choices):
                assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
                assert choice.logprobs.token_logprobs[:2] == [-1.0, -2.0]
                assert choice.model_extra == {
                    "token_ids": list(f"base/{index % 2}\u20ac".encode()),
                    "prompt_token_ids": list(seen[index // 2].encode()),
                }
            assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(text) for text in seen)

    asyncio.run(main())


def test_draws_run_at_the_same_time() -> None:
    """Oracle: the engine's own count of what runs at once, over n draws of one request."""

    async def main() -> None:
        async with serving() as server:
            await server.client.chat.completions.create(model="base", messages=HELLO, n=8, temperature=0.0)
            assert server.engine.most_running == 8

    asyncio.run(main())


def test_without_a_seed_requests_differ_and_can_be_repeated() -> None:
    """Oracle: two equal requests get two seeds; each answer names the seed that the engine was given."""

    async def main() -> None:
        async with serving() as server:
            seeds = [(await server.post(CHAT))[1]["seed"] for _ in range(2)]
            assert seeds == [sampling.seed for _, sampling, _ in server.engine.calls]
            assert seeds[0] != seeds[1]
            assert (await server.post({**CHAT, "seed": -7}))[1]["seed"] == -7

    asyncio.run(main())


def test_defaults_and_neutral_values() -> None:
    """Oracle: OpenAI's defaults (temperature and top_p 1, chat fills the context); neutral values change nothing."""

    async def main() -> None:
        async with serving() as server:
            neutral = {
                "stream": False,
                "frequency_penalty": 0,
                "tools": [],
                "user": "me",
                "stop": None,
                "max_tokens": None,
            }
            for extra in ({}, neutral):
                status, _ = await server.post({"model": "base", "messages": HELLO, "seed": 1, **extra})
                assert status == 200
            room = 300 - len("<user>hi<assistant>")
            assert [sampling for _, sampling, _ in server.engine.calls] == [Sampling(1.0, 1.0, room, (), 1, 0)] * 2

    asyncio.run(main())


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"stream": True}, "stream", "only false is supported (answers are sent whole), got true"),
    ({"temperature": "hot"}, "temperature", 'between 0 and 2, got "hot"'),
    ({"temperature": -1}, "temperature", "between 0 and 2, got -1"),
    ({"temperature": float("nan")}, "temperature", "got NaN"),
    ({"temperature": True}, "temperature", "got true"),
    ({"top_p": 0}, "top_p", "got 0"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": 1.5}, "max_tokens", "expected an integer"),
    ({"max_completion_tokens": 6}, "max_tokens", "differs from max_completion_tokens"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"seed": 2**63}, "seed", "between"),
    ({"stop": ""}, "stop", "non-empty string"),
    ({"stop": [1]}, "stop", "non-empty string"),
    ({"logprobs": 1}, "logprobs", "true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "only 0"),
    ({"presence_penalty": 0.5}, "presence_penalty", "only 0"),
    ({"tools": [{}]}, "tools", "tool calls are not implemented"),
    ({"tempreature": 1}, "tempreature", "unknown parameter 'tempreature'"),
    ({"model": 7}, "model", "expected one of base, adapter"),
    ({"messages": []}, "messages", "a list of 1 to 512 messages, got 0 messages"),
    ({"messages": HELLO * 513}, "messages", "got 513 messages"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "5000 characters do not fit the context"),
    ({"stop": ["x"] * 17}, "stop", "at most 16 strings of 1000 characters, got 17 of up to 1"),
    ({"stop": ["x", "y" * 1001]}, "stop", "got 2 of up to 1001"),
    ({"messages": ["hi"]}, "messages[0]", "an object with role and content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", 'got "robot"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "got nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "image_url"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]", "'name' is not supported"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "must not be the assistant's"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogates"),
]


def test_bad_values_are_refused_by_name() -> None:
    """Oracle: each bad value alone gives 400 in OpenAI's format, naming the parameter; the engine is never called."""

    async def main() -> None:
        async with serving() as server:
            for change, param, message in BAD:
                status, reply = await server.post({**CHAT, **change})
                error = reply["error"]
                assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error"), change
                assert message in error["message"], (change, error["message"])
                assert set(error) == {"message", "type", "param", "code"}
            prompts: list[Any] = ["x" * 5000, None, "", [], [[]], [1, "a"], [-1], [256], [True], {"a": 1}, ["\ud800"]]
            for prompt in prompts:
                status, reply = await server.post({"model": "base", "prompt": prompt}, "/v1/completions")
                assert (status, reply["error"]["param"]) == (400, "prompt"), prompt
            assert (await server.post({"model": "base", "prompt": "a", "logprobs": 5}, "/v1/completions"))[0] == 400
            assert (await server.post({"model": "base", "prompt": ["a"] * 9, "n": 128}, "/v1/completions"))[0] == 400
            status, reply = await server.post({"model": "base", "prompt": ["a"] * 1025}, "/v1/completions")
            assert status == 400 and "1025 prompts are more than 1024 answers" in reply["error"]["message"]
            for body in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
                status, reply = await server.post(body)
                assert (status, reply["error"]["code"]) == (400, "invalid_json")
            assert server.engine.calls == []

    asyncio.run(main())


def test_unknown_model_path_and_method() -> None:
    """Oracle: the statuses of the HTTP standard and OpenAI's client classes ; the reply names the served models."""

    async def main() -> None:
        async with serving() as server:
            with pytest.raises(
                openai.NotFoundError, match="'gpt-9' is not served here; served: base, adapter"
            ) as caught:
                await server.client.chat.completions.create(model="gpt-9", messages=HELLO)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.NotFoundError, match="no such path '/v1/embeddings'"):
                await server.client.embeddings.create(model="base", input="x")
            reply = await server.raw(b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert reply.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n") and b"\r\nAllow: POST\r\n" in reply
            assert [model.id async for model in server.client.models.list()] == ["base", "adapter"]
            assert await server.get("/health?x=1") == (200, {"status": "ok"})

    asyncio.run(main())


def test_context_length() -> None:
    """Oracle: with 19 prompt tokens in a context of 300, 281 more fit and 282 do not; both numbers are in the error."""

    async def main() -> None:
        async with serving() as server:
            assert (await server.post({**CHAT, "max_tokens": 281}))[0] == 200
            status, reply = await server.post({**CHAT, "max_tokens": 282})
            assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
            for number in ("19 tokens", "282", "301", "300 tokens"):
                assert number in reply["error"]["message"]
            long = [{"role": "user", "content": "x" * 400}]
            assert (await server.post({"model": "base", "messages": long}))[1]["error"][
                "code"
            ] == "context_length_exceeded"

    asyncio.run(main())


def test_our_client_and_our_server_agree() -> None:
    """Oracle: through both, the engine's text and usage; a too long prompt fails its episode."""

    async def main() -> None:
        async with serving() as server:
            url = f"http://127.0.0.1:{server.port}/v1"
            generator = OpenAIGenerator(GeneratorConfig(url, "adapter", ""))
            await generator.check()
            sampling = Sampling(temperature=1.0, max_tokens=5, seed=4, draw=2)
            sample = await generator.complete((Message("user", "hi"),), sampling)
            assert sample == Sample("adapter/0\u20ac", "length", usage=Usage(19, 12))
            assert server.engine.calls[0][1] == Sampling(1.0, 1.0, 5, (), server_seed(4, 2), 0)
            with pytest.raises(GeneratorError, match="the prompt has 417 tokens"):
                await generator.complete((Message("user", "x" * 400),), sampling)
            await generator.aclose()
            other = OpenAIGenerator(GeneratorConfig(url, "adaptr", ""))
            with pytest.raises(ValueError, match="nearest of 2: adapter"):
                await other.check()
            with pytest.raises(ValueError, match="'adaptr' is not served here"):
                await other.complete((Message("user", "hi"),), sampling)
            await other.aclose()

    asyncio.run(main())


def test_bearer_key() -> None:
    """Oracle: with a key only its bearer gets past /health: 401 without it, with another, and with another scheme."""

    async def main() -> None:
        async with serving(api_key="s3cret\u00e9") as server:
            for header in ("", "Authorization: Bearer wrong\r\n", "Authorization: Basic s3cret\r\n"):
                status, reply = await server.get("/v1/models", header)
                assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            with pytest.raises(openai.AuthenticationError):
                await server.client.models.list()
            assert (await server.get("/v1/models", "authorization: bearer s3cret\u00e9\r\n"))[0] == 200
            assert parse(await server.raw(b"GET /health HTTP/1.0\r\n\r\n"))[0] == 200

    asyncio.run(main())
    with pytest.raises(ValueError, match="the API key is empty"):
        asyncio.run(serve(FakeEngine(), "127.0.0.1", 0, " "))


@pytest.mark.parametrize(
    ("host", "header", "code"),
    [
        ("localhost:8000", "", ""),
        ("127.0.0.1", "", ""),
        ("[::1]:8000", "", ""),
        ("localhost", "Origin: http://localhost:3000\r\n", ""),
        ("evil.example", "", "host_not_allowed"),
        ("127.0.0.1.evil.example", "", "host_not_allowed"),
        ("0.0.0.0:8000", "", "host_not_allowed"),
        ("[::1", "", "host_not_allowed"),
        ("localhost", "Origin: http://evil.example\r\n", "origin_not_allowed"),
        ("localhost", "Origin: null\r\n", "origin_not_allowed"),
        ("localhost", "Origin: http://[\r\n", "origin_not_allowed"),
    ],
)
def test_web_pages_cannot_use_a_server_on_their_readers_machine(host: str, header: str, code: str) -> None:
    """Oracle: by definition: requests that name this machine pass; a page's Origin and a rebound host name do not."""

    async def main() -> None:
        async with serving() as server:
            status, reply = await server.get("/v1/models", header, host)
            assert (status, reply.get("error", {}).get("code", "")) == (403 if code else 200, code)

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org", "localhost.example.org"])
def test_other_machines_reach_no_server_without_a_key(host: str) -> None:
    """Oracle: refused before anything listens; with a key or said so, and on loopback, nothing is refused."""
    with pytest.raises(ValueError, match="can be reached from other machines, and no API key is set"):
        asyncio.run(serve(FakeEngine(), host, 0))
    server_module.check_exposure(host, "key", False)
    server_module.check_exposure(host, None, True)
    for loopback in ("localhost", "127.0.0.1", "127.8.9.1", "::1"):
        server_module.check_exposure(loopback, None, False)


def test_draws_beyond_the_limit_wait_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with 3 of at most 4 draws running, 2 more get 429 and one passes; the count falls when they end."""
    monkeypatch.setattr(server_module, "MAX_DRAWS", 4)

    async def main() -> None:
        async with serving() as server:
            wait = {**CHAT, "messages": [{"role": "user", "content": "WAIT"}]}
            running = asyncio.create_task(server.post({**wait, "n": 3}))
            while server.engine.running < 3:
                await asyncio.sleep(0.005)
            status, reply = await server.post({**CHAT, "n": 2})
            assert (status, reply["error"]["code"]) == (429, "too_many_draws")
            assert (await server.post(CHAT))[0] == 200
            server.engine.gate.set()
            assert (await running)[0] == 200
            assert (await server.post({**CHAT, "n": 4}))[0] == 200

    asyncio.run(main())


def test_an_ill_engine_is_not_called_healthy() -> None:
    """Oracle: 503 with the engine's reason from /health and for requests, where 200 came before."""

    async def main() -> None:
        async with serving() as server:
            assert (await server.get("/health"))[0] == 200
            server.engine.sick = "the device is lost"
            assert await server.get("/health") == (503, {"status": "ill", "reason": "the device is lost"})
            status, reply = await server.post(CHAT)
            assert status == 503 and "the device is lost" in reply["error"]["message"]

    asyncio.run(main())


def test_slow_tokenizing_does_not_stop_the_others() -> None:
    """Oracle: by definition: while one prompt is tokenized the others are answered; its failure is its own 500."""
    others_are_answered = threading.Event()

    async def main() -> None:
        async with serving() as server:
            tokenizer, encode = server.engine.tokenizer, server.engine.tokenizer.encode

            def slow(text: str) -> tuple[int, ...]:
                if text == "slow":
                    assert others_are_answered.wait(60)
                    raise MemoryError("no memory for this text")
                return tuple(encode(text))

            tokenizer.encode_prompt = slow
            call = asyncio.create_task(server.post({"model": "base", "prompt": "slow"}, "/v1/completions"))
            await asyncio.sleep(0.05)
            assert (await server.get("/health"))[0] == 200
            assert (await server.post({"model": "base", "prompt": "quick"}, "/v1/completions"))[0] == 200
            others_are_answered.set()
            status, reply = await call
            assert status == 500 and "no memory for this text" in reply["error"]["message"]

    asyncio.run(main())


def test_messages_as_evaluation_clients_send_them() -> None:
    """Oracle: the prompt that the engine gets. Parts, and a type beside role and content, change nothing."""

    async def main() -> None:
        async with serving() as server:
            parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
            for message in ({"content": parts}, {"content": "hi", "type": "text"}, {"content": parts, "type": "text"}):
                status, _ = await server.post({**CHAT, "messages": [{"role": "user", **message}]})
                assert status == 200
            assert {prompt for prompt, _, _ in server.engine.calls} == {"<user>hi<assistant>"}
            sent_back: dict[str, Any] = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": []}
            chat: list[Any] = [{"role": "developer", "content": "be"}, *HELLO, sent_back, *HELLO]
            assert (await server.post({**CHAT, "messages": chat, "safety_identifier": "me"}))[0] == 200
            assert server.engine.calls[-1][0] == "<developer>be<user>hi<assistant>a<user>hi<assistant>"
            neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 1e-5}
            assert (await server.post({**CHAT, **neutral}))[0] == 200

    asyncio.run(main())


def test_requests_of_lm_evaluation_harness() -> None:
    """Oracle: bodies as lm-eval's local-completions and local-chat-completions send them. Generation is served;
    log-likelihoods need the prompt's scores, which the refusal says."""

    async def main() -> None:
        async with serving() as server:
            shared = {"model": "base", "temperature": 0, "seed": 1234}
            generate = {**shared, "prompt": ["ab", "c"], "max_tokens": 9, "stop": ["\n\n", "Q:"]}
            status, reply = await server.post(generate, "/v1/completions")
            assert status == 200 and [choice["index"] for choice in reply["choices"]] == [0, 1]
            chat = [{"role": "user", "content": "hi", "type": "text"}]
            status, reply = await server.post({**shared, "messages": chat, "max_tokens": 9, "stop": ["<|endoftext|>"]})
            assert status == 200 and reply["choices"][0]["message"]["content"] == "base/0\u20ac"
            score = {**shared, "prompt": [[97, 98]], "max_tokens": 1, "logprobs": 1, "echo": True}
            status, reply = await server.post(score, "/v1/completions")
            assert status == 400 and "log-likelihood tasks" in reply["error"]["message"]

    asyncio.run(main())


def test_an_engine_failure_is_a_500_and_the_server_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the engine's message reaches client and log, the other draws end, and the next request is answered."""

    async def main() -> None:
        async with serving() as server:
            boom: list[Any] = [{"role": "user", "content": "BOOM WAIT"}]
            server.engine.gate.set()
            with pytest.raises(openai.InternalServerError, match="RuntimeError: the fake engine fell over") as caught:
                await server.client.chat.completions.create(model="base", messages=boom, n=3)
            assert caught.value.type == "server_error"
            nan = [{"role": "user", "content": "NAN"}]  # what JSON cannot hold is not sent as if it could
            assert (await server.post({"model": "base", "messages": nan, "logprobs": True}))[0] == 500
            assert (await server.post(CHAT))[0] == 200

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "the fake engine fell over" in caplog.text


def test_a_client_that_leaves_cancels_its_request() -> None:
    """Oracle: the engine's counts: after the disconnect nothing runs, all three draws were cancelled; others go on."""

    async def main() -> None:
        async with serving() as server:
            wait = json.dumps({**CHAT, "messages": [{"role": "user", "content": "WAIT"}], "n": 3}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(wait)}\r\n\r\n"
            writer.write(head.encode() + wait)
            while server.engine.running < 3:
                await asyncio.sleep(0.005)
            assert (await server.post(CHAT))[0] == 200
            writer.close()
            async with asyncio.timeout(60):
                while server.engine.running:
                    await asyncio.sleep(0.005)
            assert server.engine.cancelled == 3
            assert (await server.post(CHAT))[0] == 200

    asyncio.run(main())


def test_a_large_body_gets_its_413_through_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the client reads the 413 although it was still sending; a body at the limit passes."""
    monkeypatch.setattr(http_server, "MAX_BODY_BYTES", 1000)

    async def main() -> None:
        async with serving() as server:
            large: list[Any] = [{"role": "user", "content": "x" * 5_000_000}]
            with pytest.raises(openai.APIStatusError, match="at most 1000 bytes are taken") as caught:
                await server.client.chat.completions.create(model="base", messages=large)
            assert caught.value.status_code == 413
            body = json.dumps(CHAT).encode()
            assert (await server.post(body + b" " * (1000 - len(body))))[0] == 200
            assert (await server.post(body + b" " * (1001 - len(body))))[0] == 413

    asyncio.run(main())


PROGRAM = """
import asyncio
from matryoshka.core.records import Sample
from matryoshka.inference.server import serve

class Tokenizer:
    def encode_prompt(self, text): return list(text.encode())
    def decode(self, ids): return bytes(ids).decode()

class Engine:
    tokenizer, context_length = Tokenizer(), 100
    def models(self): return ["m"]
    def illness(self): return ""
    async def generate(self, prompt_ids, sampling, model):
        print("running", flush=True)
        await asyncio.sleep(0.5)
        return Sample("done")

asyncio.run(serve(Engine(), "127.0.0.1", 0, ready=lambda port: print(port, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_exits_0(number: signal.Signals) -> None:
    """Oracle: a real process: after the signal no connection is taken, and what runs is answered."""

    async def main(process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"model": "m", "prompt": "x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        assert await process.stdout.readline() == b"running\n"
        process.send_signal(number)
        assert await idle.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        reply = await reader.read()
        assert b"\r\nConnection: close\r\n" in reply
        status, answer = parse(reply)
        assert (status, answer["choices"][0]["text"]) == (200, "done")
        idle_writer.close()
        writer.close()
        assert await process.wait() == 0

    async def bounded() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
        )
        try:
            await asyncio.wait_for(main(process), 120)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(bounded())
