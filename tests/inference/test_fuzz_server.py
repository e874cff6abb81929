"""Hypothesis against the whole server over a tiny model: clear 4xx errors or answers, and the server stays healthy."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from matryoshka.core.models.load import load_model
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.local_controller import LocalEngine
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.server import serve

BUDGET_S = 10.0  # for each test
CONTEXT = 64
OFTEN = settings(
    max_examples=1000, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([10**30, -(2**63), 2**63, 1e999, "\ud800", "\x1b[2J", "x" * 5000, "<|im_end|>", 0, -1, 1e-5]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=4)}), max_size=3)
ROLES = st.sampled_from(["user", "assistant", "system"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=6) | PARTS})
IDS = st.lists(st.integers(0, 258), min_size=1, max_size=8)
PROMPT = st.text(min_size=1, max_size=9)
SETTINGS = {
    "temperature": st.sampled_from([0, 1e-5, 5e-324, 0.7, 1.0, 2]),
    "top_p": st.sampled_from([1e-6, 0.5, 1]),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
}
TOKENS = {"max_tokens": st.integers(1, 6)}
GOOD: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": st.fixed_dictionaries(
        {"model": st.just("tiny"), "messages": st.lists(MESSAGE, min_size=1, max_size=2), **TOKENS},
        optional={**SETTINGS, "logprobs": st.booleans()},
    ),
    "/v1/completions": st.fixed_dictionaries(
        {"model": st.just("tiny"), "prompt": PROMPT | IDS | st.lists(PROMPT | IDS, min_size=1, max_size=4), **TOKENS},
        optional={**SETTINGS, "logprobs": st.integers(0, 1)},
    ),
}
NAMES = [*SETTINGS, "model", "messages", "prompt", "max_tokens", "logprobs", "stream", "echo", "tools", "user", "odd"]
ODD_MESSAGES = st.lists(MESSAGE | st.fixed_dictionaries({"role": VALUES, "content": VALUES}) | VALUES, max_size=3)
ODD = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2) | st.fixed_dictionaries(
    {}, optional={"messages": ODD_MESSAGES, "prompt": st.lists(PROMPT | IDS | VALUES, max_size=3)}
)
RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"1" * 5000, b'{"seed": ' + b"9" * 5000 + b"}"]),
)


@dataclass(frozen=True)
class Running:
    port: int
    began: dict[str, float] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[Running]:
    """The server in a thread of its own. Its engine claims a short context, so that no answer takes long."""
    ready, stop = threading.Event(), asyncio.Event()
    found: list[Any] = []

    def run(engine: LocalEngine) -> None:
        async def main() -> None:
            def tell(port: int) -> None:
                found.extend((port, asyncio.get_running_loop()))
                ready.set()

            serving = asyncio.create_task(serve(engine, "127.0.0.1", 0, ready=tell))
            await stop.wait()
            serving.cancel()

        asyncio.run(main())

    with Sampler(load_model(tiny_dir), Tokenizer.load(tiny_dir), num_threads=1) as sampler:
        engine = LocalEngine(sampler, {"tiny": None})
        engine.context_length = CONTEXT
        thread = threading.Thread(target=run, args=(engine,))
        thread.start()
        assert ready.wait(60)
        yield Running(found[0])
        found[1].call_soon_threadsafe(stop.set)
        thread.join(60)


def check(server: Running, test: str, path: str, body: bytes) -> tuple[int, Any]:
    """Oracle: an answer or OpenAI's error object with a 4xx status and a message; never a 5xx, a hang or silence."""
    if time.monotonic() > server.began.setdefault(test, time.monotonic()) + BUDGET_S:
        return 200, None  # the time of this test is over
    status, reply = server.ask("POST", path, body)
    if status != 200:
        assert 400 <= status < 500, (status, reply, body[:300])
        assert reply["error"]["message"] and reply["error"]["type"] == "invalid_request_error"
    assert server.ask("GET", "/health") == (200, {"status": "ok"})
    return status, reply


@pytest.mark.slow
@OFTEN
@given(data=st.data(), path=st.sampled_from(list(GOOD)))
def test_good_requests_are_answered(server: Running, data: st.DataObject, path: str) -> None:
    """Oracle: `check`, and 200 for every request that is made of good values, unless it exceeds the short context."""
    body = data.draw(GOOD[path])
    status, reply = check(server, "good", path, json.dumps(body).encode())
    assert status == 200 or reply["error"]["code"] == "context_length_exceeded", (body, reply)


@pytest.mark.slow
@OFTEN
@given(data=st.data(), path=st.sampled_from(list(GOOD)), odd=ODD)
def test_values_of_any_kind(server: Running, data: st.DataObject, path: str, odd: dict[str, Any]) -> None:
    """Oracle: `check`: good requests in which one or two values may be anything."""
    check(server, "odd", path, json.dumps({**data.draw(GOOD[path]), **odd}).encode())


@pytest.mark.slow
@settings(OFTEN, max_examples=200)
@given(path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/%00", "/v1/..%2f"]), body=RAW)
def test_bodies_that_are_no_json(server: Running, path: str, body: bytes) -> None:
    """Oracle: `check`: bytes, deep nesting and endless numbers."""
    check(server, "raw", path, body)
