"""The black-box client against a scripted loopback server that fails in every way a real endpoint does.

The oracle throughout is the server's own list of requests and their times.
"""

import asyncio
import json
import os
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest

from matryoshka.core.files import Journal
from matryoshka.core.protocols import Generator, GeneratorError, RunStopped
from matryoshka.core.records import Sample, Sampling, Usage
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.chat_api import server_seed
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, answer, failure, run


def test_request_and_answer() -> None:
    """Oracle: the request's JSON written out by hand, and the Sample that the scripted answer stands for."""
    endpoint = Endpoint((200, answer("f\u00fcnf", "length")))

    async def scene(generator: OpenAIGenerator) -> None:
        as_protocol: Generator = generator
        assert as_protocol.name == f"m@{endpoint.url}"
        sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=5, stop=("\n\n",), seed=40, draw=2)
        assert await generator.complete(PROMPT, sampling) == Sample("f\u00fcnf", "length", usage=Usage(7, 2))
        await generator.complete(PROMPT, Sampling(temperature=0.0, seed=40, draw=2))

    generator = run(endpoint, scene)
    assert endpoint.seen[0] == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 5,
        "stop": ["\n\n"],
        "seed": server_seed(40, 2),
    }
    assert "seed" not in endpoint.seen[1] and "stop" not in endpoint.seen[1]
    assert "authorization: bearer none" in endpoint.heads[0]
    stats = generator.stats
    assert (stats.asked, stats.retries, stats.failures, stats.prompt_tokens, stats.completion_tokens) == (
        2,
        0,
        0,
        14,
        4,
    )


def test_what_is_no_unicode_is_replaced(tmp_path: Path) -> None:
    """Oracle: by hand: half a surrogate pair, which JSON can say, is U+FFFD, a whole one a character; a journal has it.
    """
    endpoint = Endpoint((200, answer("a\ud83db \U0001f600 \ude00")))
    journal = Journal(tmp_path / "j")

    async def scene(generator: OpenAIGenerator) -> None:
        journal.append("k", {"text": (await generator.complete(PROMPT, GREEDY)).text})

    run(endpoint, scene)
    journal.close()
    assert Journal(tmp_path / "j").rows["k"]["text"] == "a\ufffdb \U0001f600 \ufffd"


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the header that the server saw; construction without the variable fails and names it."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        await generator.complete(PROMPT, GREEDY)

    monkeypatch.setenv("SOME_KEY", " s3cret\n")
    run(endpoint, scene, api_key_env="SOME_KEY")
    assert "authorization: bearer s3cret" in endpoint.heads[0] and "SOME_KEY" not in os.environ
    run(endpoint, lambda generator: generator.complete(PROMPT, GREEDY), api_key_env="SOME_KEY")
    assert "authorization: bearer s3cret" in endpoint.heads[1]
    monkeypatch.setenv("SOME_KEY", "")
    for variable in ("SOME_KEY", "NEVER_SET"):
        with pytest.raises(ValueError, match=f"variable {variable} holds no key"):
            OpenAIGenerator(GeneratorConfig("http://127.0.0.1:1/v1", "m", variable))


@pytest.mark.parametrize(
    "troubles",
    [
        [(500, failure("boom")), (503, "<html>not JSON</html>"), (502, "")],
        [(429, failure("slow down")), (408, failure("x")), (409, failure("x"))],
        ["drop", "drop"],
        [(200, answer(None)), (200, '{"choices": []}'), (200, "{}"), (200, "[1]"), (200, "half a "), (200, "null")],
        [(200, '{"choices": [{"message": {"role": "assistant"}}]}'), (200, '{"choices": [{"message": null}]}')],
    ],
)
def test_what_may_pass_is_retried(troubles: list[Any]) -> None:
    """Oracle: the request count: every trouble costs exactly one more request, all of them equal."""
    endpoint = Endpoint(*troubles)

    async def scene(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    generator = run(endpoint, scene, max_retries=6)
    assert len(endpoint.seen) == len(troubles) + 1
    assert all(body == endpoint.seen[0] for body in endpoint.seen)
    assert (generator.stats.asked, generator.stats.retries, generator.stats.failures) == (1, len(troubles), 0)


def test_a_hanging_server_is_timed_out() -> None:
    """Oracle: the clock and the request count: one hang costs timeout_s, then the retry answers."""
    endpoint = Endpoint("hang")
    start = time.monotonic()

    async def scene(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    run(endpoint, scene, timeout_s=1.0)
    assert time.monotonic() - start >= 1.0
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize(
    "trouble, reason", [((500, failure("boom")), "500.*boom"), ("drop", "connection broke"), ("hang", "timed")]
)
def test_exhausted_retries_fail_the_episode(trouble: Any, reason: str) -> None:
    """Oracle: max_retries + 1 requests, then GeneratorError with model, count and last reason; nothing in the cache."""
    endpoint = Endpoint(*[trouble] * 3)

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match=f"(?s)m@http.*after 3 attempts.*{reason}"):
            await generator.complete(PROMPT, GREEDY)
        assert len(endpoint.seen) == 3
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"  # a failure is not remembered as an answer

    assert run(endpoint, scene, max_retries=2, timeout_s=0.7).stats.failures == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_out(as_date: bool) -> None:
    """Oracle: the time between the server's two requests is at least what it asked for (a date has whole seconds)."""
    value = formatdate(time.time() + 2, usegmt=True) if as_date else "0.5"
    endpoint = Endpoint((429, failure("slow down"), {"Retry-After": value}))

    async def scene(generator: OpenAIGenerator) -> None:
        await generator.complete(PROMPT, GREEDY)

    run(endpoint, scene)
    assert endpoint.times[1] - endpoint.times[0] >= 0.5


def test_a_server_that_says_when_to_come_back_has_not_failed() -> None:
    """Oracle: the count: with no retry allowed, three 429 with a wait and then an answer are four requests."""
    endpoint = Endpoint(*[(429, failure("slow down"), {"Retry-After": "0.05"})] * 3)

    async def scene(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    run(endpoint, scene, max_retries=0)
    assert len(endpoint.seen) == 4


def test_a_wait_of_hours_fails_at_once() -> None:
    """Oracle: one request, and the server's number in the error."""
    endpoint = Endpoint((429, failure("daily quota"), {"Retry-After": "86400"}))

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match="after 1 attempts.*asks to wait 86400 s"):
            await generator.complete(PROMPT, GREEDY)

    run(endpoint, scene)
    assert len(endpoint.seen) == 1


def test_backoff_doubles_with_seeded_jitter() -> None:
    """Oracle: wait k lies in [0.5, 1] * backoff_s * 2^k (plus time on the wire)."""
    endpoint = Endpoint(*[(500, failure("boom"))] * 3)

    async def scene(generator: OpenAIGenerator) -> None:
        await generator.complete(PROMPT, GREEDY)

    run(endpoint, scene, backoff_s=0.1)
    waits = [after - before for before, after in zip(endpoint.times, endpoint.times[1:], strict=False)]
    for attempt, wait in enumerate(waits):
        assert 0.05 * 2**attempt <= wait < 0.1 * 2**attempt + 0.5


@pytest.mark.parametrize(
    "reply, remedy",
    [
        ((401, failure("bad key", "invalid_api_key")), "check the key in api_key_env"),
        ((403, failure("not yours", "permission_denied")), "may use"),
        ((404, failure("no such model", "model_not_found")), "base_url is right"),
        ((400, failure("temperature is not supported")), "sampling parameters"),
        ((429, failure("pay first", "insufficient_quota")), "no quota left"),
    ],
)
def test_what_fails_every_call_stops_the_run(reply: Any, remedy: str) -> None:
    """Oracle: one request and no retry; a ValueError that names endpoint, model, the server's words and the remedy."""
    endpoint = Endpoint(reply)

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(ValueError, match=remedy) as caught:
            await generator.complete(PROMPT, GREEDY)
        for part in (endpoint.url, "'m'", json.loads(reply[1])["error"]["message"]):
            assert part in str(caught.value)

    run(endpoint, scene)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize(
    "reply",
    [
        (400, failure("too many", "context_length_exceeded")),
        (400, failure("This model's maximum context length is 8192 tokens. However, you requested 9000", "400")),
        (400, failure("filtered", "content_filter")),
        (413, failure("too large")),
    ],
)
def test_a_prompt_that_cannot_be_answered_fails_its_episode(reply: Any) -> None:
    """Oracle: one request, GeneratorError, and the next prompt is answered."""
    endpoint = Endpoint(reply)

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match="the prompt is refused"):
            await generator.complete(PROMPT, GREEDY)
        assert len(endpoint.seen) == 1
        assert (await generator.complete(PROMPT[1:], GREEDY)).text == "four"

    run(endpoint, scene)


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    """Oracle: the server's count stays at 3 while a fresh client over the same file gives the same three answers."""
    endpoint = Endpoint((200, answer("a")), (200, answer("b")), (200, answer("c")))
    samplings = [Sampling(temperature=1.0, draw=draw) for draw in range(3)]
    texts: list[list[str]] = []

    async def main() -> None:
        async with endpoint.up():
            for _ in range(2):
                cache = ResponseCache(tmp_path / "cache.sqlite")
                generator = OpenAIGenerator(GeneratorConfig(endpoint.url, "m", ""), cache)
                texts.append([(await generator.complete(PROMPT, sampling)).text for sampling in samplings])
                await generator.aclose()
                cache.close()
            assert (generator.stats.asked, generator.stats.cache_hits) == (0, 3)

    asyncio.run(main())
    assert texts == [["a", "b", "c"]] * 2
    assert len(endpoint.seen) == 3


def test_an_identity_outlives_the_port(tmp_path: Path) -> None:
    """Oracle: the second server, on another port but under the same identity, is asked nothing."""
    endpoints = [Endpoint(), Endpoint()]

    async def scene(generator: OpenAIGenerator) -> None:
        assert generator.name == "m@local"
        await generator.complete(PROMPT, GREEDY)

    for endpoint in endpoints:
        run(endpoint, scene, ResponseCache(tmp_path / "c"), identity="local")
    assert endpoints[0].url != endpoints[1].url
    assert [len(endpoint.seen) for endpoint in endpoints] == [1, 0]


@pytest.mark.parametrize("cached", [False, True])
def test_equal_requests_at_the_same_time_are_asked_once(cached: bool, tmp_path: Path) -> None:
    """Oracle: the server sees one request for ten equal calls and one for the call that differs in its draw."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        samplings = [Sampling(temperature=1.0)] * 10 + [Sampling(temperature=1.0, draw=1)]
        samples = await asyncio.gather(*(generator.complete(PROMPT, sampling) for sampling in samplings))
        assert {sample.text for sample in samples} == {"four"}

    generator = run(endpoint, scene, ResponseCache(tmp_path / "c") if cached else None)
    assert sorted(body["seed"] for body in endpoint.seen) == sorted(server_seed(0, draw) for draw in range(2))
    assert (generator.stats.asked, generator.stats.shared) == (2, 9)


def test_equal_requests_share_a_failure() -> None:
    """Oracle: both callers get the GeneratorError of the one series of requests."""
    endpoint = Endpoint(*[(500, failure("boom"))] * 2)

    async def scene(generator: OpenAIGenerator) -> None:
        calls = [generator.complete(PROMPT, GREEDY) for _ in range(2)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, GeneratorError) for result in results)

    assert run(endpoint, scene, max_retries=1).stats.failures == 1
    assert len(endpoint.seen) == 2


def test_one_callers_cancellation_is_not_the_others(tmp_path: Path) -> None:
    """Oracle: of two callers of one request the first is cancelled; the second gets the answer of the only request."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        endpoint.gate = asyncio.Event()
        first, second = (asyncio.create_task(generator.complete(PROMPT, GREEDY)) for _ in range(2))
        while not endpoint.seen:
            await asyncio.sleep(0.005)
        first.cancel()
        await asyncio.wait([first])
        endpoint.gate.set()
        assert (await second).text == "four"
        assert first.cancelled()

    run(endpoint, scene, ResponseCache(tmp_path / "c"))
    assert len(endpoint.seen) == 1


def test_a_request_that_nobody_waits_for_is_dropped_and_can_be_asked_again() -> None:
    """Oracle: after its only caller is cancelled, an equal call sends a second request and is answered."""
    endpoint = Endpoint("hang")

    async def scene(generator: OpenAIGenerator) -> None:
        call = asyncio.create_task(generator.complete(PROMPT, GREEDY))
        while not endpoint.seen:
            await asyncio.sleep(0.005)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    run(endpoint, scene, concurrency=1)
    assert len(endpoint.seen) == 2


def test_an_answer_received_is_kept_though_its_caller_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every task is cancelled at the very moment of receipt; the cache holds the answer all the same.

    A cancellation strikes where a task next waits: if the `openai` package or we waited for anything between the last
    byte of the body and `put`, the cache would be empty.
    """
    endpoint, path = Endpoint(), tmp_path / "c"
    read = httpx2.Response.aread
    callers: list[asyncio.Task[Sample]] = []
    ours: list[OpenAIGenerator] = []

    async def read_then_cancel_all(self: httpx2.Response) -> bytes:
        body = await read(self)
        for task in (*callers, *(flight.task for flight in ours[0]._flights.values())):
            task.cancel()
        return body

    async def scene(generator: OpenAIGenerator) -> None:
        ours.append(generator)
        callers.append(asyncio.create_task(generator.complete(PROMPT, GREEDY)))
        await asyncio.wait(callers)
        assert callers[0].cancelled()

    monkeypatch.setattr(httpx2.Response, "aread", read_then_cancel_all)
    run(endpoint, scene, ResponseCache(path))
    monkeypatch.undo()
    assert list(ResponseCache(path).totals()) == [f"m@{endpoint.url}"]

    async def again(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    run(Endpoint(), again, ResponseCache(path), base_url=endpoint.url)  # where nothing listens any more


def test_concurrency_is_bounded() -> None:
    """Oracle: the server's own count of requests that are open at the same time."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        endpoint.gate = asyncio.Event()
        calls = [generator.complete(PROMPT, Sampling(temperature=1.0, draw=draw)) for draw in range(9)]
        everything = asyncio.gather(*calls)
        while endpoint.running < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        endpoint.gate.set()
        await everything

    run(endpoint, scene, concurrency=3)
    assert (endpoint.most_running, len(endpoint.seen)) == (3, 9)


def test_azure_asks_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Azure's documented URL, with the deployment's name in the path, and the key as `api-key`."""
    monkeypatch.setenv("AZURE_KEY", "k")
    endpoint = Endpoint()

    async def main() -> None:
        async with endpoint.up():
            config = GeneratorConfig(
                endpoint.url.removesuffix("/v1"), "gpt-x", "AZURE_KEY", api="azure", api_version="2024-10-21"
            )
            generator = OpenAIGenerator(config)
            await generator.check()  # the list of an Azure resource holds models, not deployments
            assert (await generator.complete(PROMPT, GREEDY)).text == "four"
            await generator.aclose()

    asyncio.run(main())
    assert endpoint.heads[1].startswith("post /openai/deployments/gpt-x/chat/completions?api-version=2024-10-21 ")
    assert "api-key: k" in endpoint.heads[1]


@pytest.mark.parametrize(
    "models, message",
    [
        (("m", "other"), None),
        (("models/m",), None),
        ((404, failure("no such path")), None),
        (("mistral", "m2", "zzz"), r"'m' is not served at http://127.*nearest of 3: m2, mistral, zzz"),
        ((401, failure("bad key")), "401 .*check the key"),
        ((500, failure("down")), "500 .*wait until the server is well"),
        ((200, "<html>hello</html>"), "not with OpenAI's list of models"),
        ("hang", "no answer from http://127.*timed out"),
        ("drop", "no answer from http://127"),
    ],
)
def test_check(models: Any, message: str | None) -> None:
    """Oracle: the scripted list of models: silent when `m` is in it or there is no list, else the stated reason."""
    endpoint = Endpoint(models=models)

    async def scene(generator: OpenAIGenerator) -> None:
        if message is None:
            await generator.check()
        else:
            with pytest.raises(ValueError, match=message):
                await generator.check()

    run(endpoint, scene, timeout_s=0.5)
    assert endpoint.seen == []


def test_server_down() -> None:
    """Oracle: nothing listens on the port: check names the URL; complete fails its episode after its retries."""

    async def main() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        server.close()
        generator = OpenAIGenerator(GeneratorConfig(url, "m", "", max_retries=1, backoff_s=0.0))
        with pytest.raises(ValueError, match=f"no answer from {url}.*is the server running"):
            await generator.check()
        with pytest.raises(GeneratorError, match="after 2 attempts, at last: connection failed"):
            await generator.complete(PROMPT, GREEDY)
        await generator.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_url": "localhost:8000"}, "must start with http"),
        ({"model": ""}, "model is empty"),
        ({"api": "gemini"}, "'openai' or 'azure'"),
        ({"api": "azure"}, "'azure' needs one"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"extra_body": "{"}, "generator: extra_body: malformed JSON"),
        ({"extra_body": '{"a": NaN}'}, "extra_body: malformed JSON .NaN"),
        ({"extra_body": "[1]"}, r"extra_body is \[1\]; expected a JSON object"),
        ({"extra_body": '{"stream": true}', "omit": ("stream",)}, "extra_body holds 'stream', which the run sets"),
        ({"extra_body": '{"max_tokens": 9}'}, "extra_body holds 'max_tokens', which the run sets itself"),
        ({"extra_body": '{"seed": 1}'}, "extra_body holds 'seed', which the run sets itself"),
    ],
)
def test_config_is_checked(change: dict[str, Any], message: str) -> None:
    """Oracle: each bad value alone is refused with its field; a parameter that is left out may be set otherwise."""
    GeneratorConfig("http://127.0.0.1/v1", "m", omit=("seed",), extra_body='{"seed": 1}')
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**{"base_url": "http://127.0.0.1/v1", "model": "m", **change})


def test_a_stop_waits_for_what_was_sent_alone(tmp_path: Path) -> None:
    """Oracle: the server's own list: two of six calls were sent, both are answered and kept, the others refuse at once.
    """
    endpoint, cache = Endpoint((200, answer()), (500, failure("busy"))), ResponseCache(tmp_path / "c")

    async def scene(generator: OpenAIGenerator) -> None:
        endpoint.gate = asyncio.Event()
        draws = [Sampling(temperature=1.0, draw=draw) for draw in range(6)]
        calls = [asyncio.create_task(generator.complete(PROMPT, draw)) for draw in draws]
        while endpoint.running < 2:
            await asyncio.sleep(0.005)
        generator.stop_sending()
        await asyncio.wait(calls[2:])
        assert not any(call.done() for call in calls[:2])
        endpoint.gate.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert ends[0] == Sample("four", usage=Usage(7, 2))
        assert all(isinstance(end, RunStopped) for end in ends[1:])  # the second would have to be sent again
        assert await generator.complete(PROMPT, draws[0]) == ends[0]  # from the cache
        with pytest.raises(RunStopped, match="asked to stop"):
            await generator.complete(PROMPT, draws[5])

    run(endpoint, scene, cache, concurrency=2)
    assert len(endpoint.seen) == 2 and cache.totals()[f"m@{endpoint.url}"].answers == 1
