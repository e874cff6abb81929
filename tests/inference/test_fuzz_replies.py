"""Replies that no server should send, made by hypothesis for 30 s: each is an answer or one clear error.

The oracle is what may come out at all: a Sample, GeneratorError or ValueError, within a bounded time, with at most ten
times the memory of the reply (and a few MiB for small ones), and accounts that never go down.
"""

import asyncio
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.chat_api import Answer, AttemptError, parse_answer, refusal
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.http_client import Reply
from matryoshka.tests.inference.endpoint import Endpoint, answer, failure, run

SECONDS = 30.0
SMALL_BYTES = 6 * 2**20

odd_texts = st.text(max_size=40) | st.sampled_from(["", "stop", "length", "error", "\ud800", "\x00", "sk-", "a" * 5000])
odd_numbers = st.integers() | st.floats() | st.sampled_from([10**30, -1, 10**400, 1e308, float("inf")])
scalars = st.none() | st.booleans() | odd_numbers | odd_texts
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(odd_texts, v, max_size=4), max_leaves=12
)
FIELDS = {
    "choices", "message", "content", "finish_reason", "usage", "prompt_tokens", "completion_tokens", "total_tokens",
    "completion_tokens_details", "reasoning_tokens", "error", "refusal", "model", "type", "text", "detail", "loc",
    "msg",
    "code", "param", "metadata", "raw", "id", "data",
}  # fmt: skip
ITEMS = ["{}", "[]", '""', "1", "-1.5", '{"a":1}', '"ab"', '"\\ud800"', "null", '"\U0001f600"']
objects = st.dictionaries(st.sampled_from(sorted(FIELDS)) | odd_texts, values, max_size=6)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Return a good reply with one value replaced or removed, an object of known fields, broken JSON, or noise."""
    kind = draw(st.sampled_from(["changed", "fields", "broken", "deep", "repeated", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=300))
    if kind == "fields":
        return json.dumps(draw(objects)).encode()
    if kind == "deep":
        opening = draw(st.sampled_from(["[", '{"a":', '{"error":', '[{"message":', '{"choices":[']))
        return (opening * draw(st.integers(1, 30_000)) + draw(st.sampled_from(["", "1", "]", "}"]))).encode()
    if kind == "repeated":  # what takes the most memory for a byte of JSON
        item = draw(st.sampled_from(ITEMS))
        start, end = draw(st.sampled_from([("[", "]"), ('{"choices":[', "]}"), ('{"usage":[', "]}")]))
        return (start + ",".join([item] * draw(st.integers(1, 400_000))) + end).encode()
    whole = json.loads(draw(st.sampled_from([answer("four"), answer([{"type": "text", "text": "x"}]), failure("no")])))
    if kind == "broken":
        text = json.dumps(whole).encode()
        cut = draw(st.integers(0, len(text)))
        return text[:cut] + draw(st.binary(max_size=5)) + text[cut + draw(st.integers(0, 3)) :]
    place: Any = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.integers(0, 5)) == 0 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = draw(values)
        break
    return json.dumps(whole).encode()


statuses = st.just(200) | st.integers(100, 599)
header_values = st.sampled_from(["1", "-1", "1e999", "nan", "soon", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", ""])


@pytest.mark.slow
def test_replies_are_read_or_refused_with_bounded_time_and_memory() -> None:
    """Oracle: an Answer or an AttemptError of one short line; peak memory of Python's allocator; 20 s of CPU."""
    ends, count = time.monotonic() + SECONDS, 0

    @settings(max_examples=10**9, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies(), statuses, header_values)
    def check(body: bytes, status: int, retry_after: str) -> None:
        nonlocal count
        if time.monotonic() > ends:
            raise KeyboardInterrupt
        reply = Reply(status, {"retry-after": retry_after, "location": retry_after}, body)
        started = time.thread_time()
        tracemalloc.start()
        found: Answer | AttemptError
        try:
            found = parse_answer(body) if status == 200 else refusal(reply, ("model", "messages", "temperature"))
        except AttemptError as err:
            found = err
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        count += 1
        assert time.thread_time() - started < 20.0
        assert peak <= 10 * len(body) + SMALL_BYTES, (peak, len(body))
        if isinstance(found, Answer):
            assert status == 200 and found.sample.finish_reason in ("stop", "length")
            found.sample.text.encode()
        else:
            assert 0 < len(found.reason) < 3000 and 0 <= found.retry_after_s < float("inf")
        usage = found.billed.usage
        assert usage.prompt_tokens >= 0 and usage.completion_tokens >= 0
        json.dumps([usage.prompt_tokens, usage.completion_tokens])

    with pytest.raises(KeyboardInterrupt):
        check()
    assert count > 100


@pytest.mark.slow
@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("count", [19_000, 99_000, 2_000_000])
def test_the_values_that_take_the_most_memory(item: str, count: int) -> None:
    """Oracle: the peak of Python's allocator, for as many values as are read and for more."""
    body = f'{{"choices":[{",".join([item] * count)}]}}'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(AttemptError):
            parse_answer(body)
        assert tracemalloc.get_traced_memory()[1] <= 10 * len(body) + SMALL_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_client_survives_every_reply(tmp_path: Path) -> None:
    """Oracle: each call over a connection is answered or raises GeneratorError or ValueError; accounts only grow."""
    cases: list[tuple[int, bytes]] = []

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies(), st.just(200) | st.sampled_from([400, 422, 429, 500]))
    def collect(body: bytes, status: int) -> None:
        if len(body) < 20_000:
            cases.append((status, body))

    collect()
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        counted = 0
        for number, (status, body) in enumerate(cases):
            endpoint.script[:] = [(status, body.decode("latin-1"))]
            generator.endpoints[0].retired = ""
            try:
                found = await generator.complete((Message("user", str(number)),), Sampling(max_tokens=4))
                assert isinstance(found, Sample)
            except (GeneratorError, ValueError) as err:
                assert str(err)
            spent = generator.account.spending().spent
            assert counted <= (counted := spent.prompt_tokens + spent.completion_tokens)

    async def bounded(generator: OpenAIGenerator) -> None:
        async with asyncio.timeout(120.0):
            await scene(generator)

    run(endpoint, bounded, ResponseCache(tmp_path / "c"), max_retries=1)
    assert len(endpoint.seen) >= len(cases)
