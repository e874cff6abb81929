"""Several endpoints: requests go to the right one, broken ones rest or are retired, and no key is ever shown."""

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Sampling
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generator_config import EndpointConfig
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.pool import Endpoint as PoolEndpoint
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, answer, failure, run

KEY = "sk-planted-4f9a7c21d8e6b350"


def with_endpoints(
    endpoints: list[Endpoint],
    scene: Callable[[OpenAIGenerator], Awaitable[None]],
    others: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> OpenAIGenerator:
    """Let `scene` use one client over all endpoints; `others`: settings of the second and later ones."""

    async def main() -> OpenAIGenerator:
        async with AsyncExitStack() as stack:
            for endpoint in endpoints:
                await stack.enter_async_context(endpoint.up())
            rows = others or [{} for _ in endpoints[1:]]
            more = tuple(EndpointConfig(e.url, **row) for e, row in zip(endpoints[1:], rows, strict=True))
            fixed = {"base_url": endpoints[0].url, "model": "m", "api_key_env": "", "backoff_s": 0.001}
            generator = OpenAIGenerator(GeneratorConfig(**{**fixed, **settings}, endpoints=more))
            try:
                await scene(generator)
            finally:
                await generator.aclose()
            return generator

    return asyncio.run(main())


def draws(generator: OpenAIGenerator, count: int) -> Awaitable[list[Any]]:
    calls = [generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw)) for draw in range(count)]
    return asyncio.gather(*calls)


def test_requests_are_shared_out_by_room() -> None:
    """Oracle: the servers' counts. 12 requests at once over 2 + 4 places: in the end a third and two thirds."""
    small, large = Endpoint(), Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        small.gate = large.gate = asyncio.Event()
        everything = asyncio.ensure_future(draws(generator, 6))
        while small.running + large.running < 6:
            await asyncio.sleep(0.005)
        small.gate.set()
        await everything

    with_endpoints([small, large], scene, [{"concurrency": 4}], concurrency=2)
    assert (small.most_running, large.most_running) == (2, 4)
    assert (len(small.seen), len(large.seen)) == (2, 4)


def test_equal_endpoints_take_turns() -> None:
    """Oracle: one request at a time, so that load decides nothing: three each."""
    endpoints = [Endpoint(), Endpoint()]

    async def scene(generator: OpenAIGenerator) -> None:
        for draw in range(6):
            await generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw))

    with_endpoints(endpoints, scene)
    assert [len(endpoint.seen) for endpoint in endpoints] == [3, 3]


def test_a_wrong_key_retires_one_endpoint_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the refusing server saw one request, the other one all that were wanted; a warning says so."""
    bad, good = Endpoint((401, failure("bad key")), *[(401, failure("bad key"))] * 9), Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        for draw in range(5):
            await generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw))
        assert generator.stats.failures == 0

    with_endpoints([bad, good], scene, max_retries=0)
    assert (len(bad.seen), len(good.seen)) == (1, 5)
    assert "401 bad key" in caplog.text and "goes on with the other endpoints (1 left)" in caplog.text


def test_when_all_are_retired_the_run_stops() -> None:
    """Oracle: one request each, and an error that names both URLs."""
    endpoints = [Endpoint((401, failure("bad key"))), Endpoint((404, failure("no such model")))]

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(ValueError, match="404 no such model"):
            await generator.complete(PROMPT, GREEDY)
        with pytest.raises(ValueError, match="(?s)401 bad key.*404 no such model"):
            await generator.complete(PROMPT[1:], GREEDY)

    with_endpoints(endpoints, scene)
    assert [len(endpoint.seen) for endpoint in endpoints] == [1, 1]


def test_who_asks_to_wait_is_left_alone_meanwhile() -> None:
    """Oracle: the busy server's two requests are as far apart as it asked; the other one takes all in between."""
    busy, idle = Endpoint((429, failure("slow down"), {"Retry-After": "0.6"})), Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        draw = 0
        while len(busy.seen) < 2:
            await generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw))
            draw += 1
            await asyncio.sleep(0.02)
        assert generator.stats.retries == 1 and len(idle.seen) == draw - 1

    with_endpoints([busy, idle], scene)
    assert busy.times[1] - busy.times[0] >= 0.6


def test_a_pause_that_is_asked_for_holds_for_everybody() -> None:
    """Oracle: one endpoint, five calls. After the 429 nothing at all is sent until its Retry-After is over."""
    endpoint = Endpoint((429, failure("slow down"), {"Retry-After": "0.5"}))

    async def scene(generator: OpenAIGenerator) -> None:
        await draws(generator, 5)

    run(endpoint, scene, concurrency=1)
    assert len(endpoint.seen) == 6
    assert endpoint.times[1] - endpoint.times[0] >= 0.5


def test_repeated_failures_pause_one_of_several(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: by STREAK = 3 failures the sick server is left alone for 2 s; all others go to the other one."""
    sick, well = Endpoint(*[(500, failure("boom"))] * 99), Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        for draw in range(8):
            await generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw))

    with_endpoints([sick, well], scene)
    assert (len(sick.seen), len(well.seen)) == (3, 8)
    assert "3 failures in a row; left alone for 2 s" in caplog.text


def test_failures_of_one_burst_are_one_failure() -> None:
    """Oracle: those that were on their way when the endpoint paused do not lengthen its pause."""
    now = [100.0]
    endpoint = PoolEndpoint(EndpointConfig("http://a/v1", "", "m", "openai", "", 8), lambda: now[0])
    for _ in range(40):
        endpoint.failed(sent_at=99.0, retry_after_s=0.0, alone=False)
    assert endpoint.paused_until == 102.0
    now[0] = 103.0
    endpoint.failed(sent_at=102.5, retry_after_s=0.0, alone=False)
    assert endpoint.paused_until == 107.0  # the next one: twice as long
    endpoint.succeeded()
    now[0] = 110.0
    endpoint.failed(sent_at=109.0, retry_after_s=0.0, alone=False)
    assert endpoint.paused_until == 107.0
    endpoint.failed(sent_at=109.0, retry_after_s=9.0, alone=True)
    assert endpoint.paused_until == 119.0


def test_requests_a_minute_are_kept() -> None:
    """Oracle: at 600 a minute ten requests may go at once and then one every 0.1 s (within 2%), so that the sixteenth
    arrives at least 0.59 s after the first could be sent, however slow the way is.
    """
    endpoint, started = Endpoint(), []

    async def scene(generator: OpenAIGenerator) -> None:
        started.append(time.monotonic())
        await draws(generator, 16)

    run(endpoint, scene, requests_per_minute=600)
    assert endpoint.times[15] - started[0] >= 0.55


def test_tokens_a_minute_are_kept_by_what_was_really_used() -> None:
    """Oracle: a request is expected to use about 270 tokens and uses 9; at 6,000 a minute, 100 a second, the first one
    goes on credit, and its correction lets the others go without the 2.7 s that each of five would have had to wait.
    """
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        for draw in range(6):
            await generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw, max_tokens=256))

    started = time.monotonic()
    run(endpoint, scene, tokens_per_minute=6000)
    assert time.monotonic() - started < 10 and len(endpoint.seen) == 6


def test_a_cancelled_waiter_passes_its_place_on() -> None:
    """Oracle: one place, three calls; the second is cancelled while it waits, and the third is answered."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        endpoint.gate = asyncio.Event()
        calls = [
            asyncio.create_task(generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw))) for draw in range(3)
        ]
        while not endpoint.seen:
            await asyncio.sleep(0.005)
        calls[1].cancel()
        endpoint.gate.set()
        await asyncio.wait(calls)
        assert calls[1].cancelled() and calls[2].result().text == "four"

    run(endpoint, scene, concurrency=1)
    assert len(endpoint.seen) == 2


def test_check_retires_what_does_not_serve_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the endpoint whose list lacks the model gets no request for an answer; both lacking it is an error."""
    without, serving = Endpoint(models=("x",)), Endpoint(models=("m",))

    async def scene(generator: OpenAIGenerator) -> None:
        await generator.check()
        await draws(generator, 4)

    with_endpoints([without, serving], scene)
    assert (len(without.seen), len(serving.seen)) == (0, 4) and "'m' is not served at" in caplog.text

    async def neither(generator: OpenAIGenerator) -> None:
        with pytest.raises(ValueError, match="(?s)not served.*not served"):
            await generator.check()

    with_endpoints([Endpoint(models=("x",)), Endpoint(models=("y",))], neither)


def test_each_endpoint_has_its_own_key_model_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the heads and bodies that the servers saw."""
    monkeypatch.setenv("KEY_A", "a1")
    monkeypatch.setenv("KEY_B", "b2")
    one, azure = Endpoint(), Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        await draws(generator, 2)

    others = [{"api_key_env": "KEY_B", "api": "azure", "api_version": "2024-10-21", "model": "deployed"}]
    with_endpoints([one, azure], scene, others, api_key_env="KEY_A")
    assert "authorization: bearer a1" in one.heads[0] and one.seen[0]["model"] == "m"
    assert "api-key: b2" in azure.heads[0] and "/openai/deployments/deployed/chat/completions?" in azure.heads[0]


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "https://user:pass-4f9a7c21d8e6b350@host/v1"},
        {"base_url": f"https://host/v1?key={KEY}"},
        {"api_key_env": KEY},
        {"api_key_env": "4f9a7c21d8e6b3504f9a7c21d8e6b350"},
        {"api_key_env": "f9a7c21d8e6b3504f9a7c21d8e6b350a"},
        {"endpoints": ({"api_key_env": KEY},)},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_unseen(change: dict[str, Any]) -> None:
    """Oracle: a ValueError that holds nothing of the secret."""
    with pytest.raises(ValueError) as caught:
        if "endpoints" in change:
            EndpointConfig(**change["endpoints"][0])
        GeneratorConfig(**{"base_url": "http://127.0.0.1/v1", "model": "m", **change})
    assert "4f9a7c21" not in "".join(traceback.format_exception(caught.value)) and "f9a7c" not in str(caught.value)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_server_that_repeats_the_key_does_not_get_it_into_logs_errors_or_the_cache(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Oracle: the planted key, looked for in every log record, in the whole traceback, in the stats and in the file."""
    monkeypatch.setenv("PLANTED", KEY)
    caplog.set_level(logging.DEBUG)
    body = failure(f"Incorrect API key provided: {KEY}")
    endpoint = Endpoint(*[(status, body if status != 200 else answer(f"your key is {KEY}"))] * 3, models=(500, body))
    seen: list[str] = []

    async def scene(generator: OpenAIGenerator) -> None:
        for call in (generator.check(), generator.complete(PROMPT, GREEDY)):
            try:
                seen.append(repr(await call))
            except (ValueError, GeneratorError) as err:
                seen.extend(traceback.format_exception(err))
        seen.extend((repr(generator.stats), repr(generator.endpoints), repr(vars(generator)), generator.name))

    cache = ResponseCache(tmp_path / "c")
    run(endpoint, scene, cache, api_key_env="PLANTED", max_retries=2)
    cache.close()
    assert f"bearer {KEY}" in endpoint.heads[0]  # it was sent
    assert KEY not in "\n".join([caplog.text, *seen])
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert "[key]" in "".join(seen)


def test_a_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message names the variable, not the key."""
    monkeypatch.setenv("ODD", "sk-\u00e9\nX: y")
    with pytest.raises(ValueError, match="variable ODD holds characters"):
        OpenAIGenerator(GeneratorConfig("http://127.0.0.1/v1", "m", "ODD"))
