"""Tries each row of the table in docs/generators.md: the client's reaction to a fault of the server.

The oracle is the endpoint's own count of requests, the exception, and the losses in the accounts.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Usage
from matryoshka.inference.accounts import Spending
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.chat_api import most_tokens
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, answer, failure, run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generators.md"
MOST = most_tokens(PROMPT, GREEDY)
TIMEOUT_S = 0.3
AGAIN, EPISODE, RUN = "asked again", "the episode fails", "the run stops"


@dataclass(frozen=True)
class Fault:
    """One row: the server's fault, its outcome, and the usage that counts as perhaps billed."""

    server: str
    reply: Any
    outcome: str
    lost: Usage = Usage()
    note: str = ""
    least_s: float = 0.0

    def row(self) -> str:
        counted = {Usage(): "nothing", MOST: "its upper bound"}.get(self.lost, "the answer's tokens")
        requests = 2 if self.outcome == AGAIN else 1
        return f"| {self.server} | {self.outcome}{self.note and '; ' + self.note} | {requests} | {counted} |"


def refused(words: str) -> str:
    whole = json.loads(answer(None))
    whole["choices"][0]["message"]["refusal"] = words
    return json.dumps(whole)


def thought(words: str) -> str:
    whole = json.loads(answer(None))
    whole["choices"][0]["message"]["reasoning"] = words
    return json.dumps(whole)


BACKOFF = "after the back-off"
FAULTS = [
    Fault("drops the connection before it answers", "drop", AGAIN, MOST, BACKOFF),
    Fault("drops the connection in the middle of the body", "half", AGAIN, MOST, BACKOFF),
    Fault("never answers", "hang", AGAIN, MOST, "given up after `timeout_s`", 0.5 * TIMEOUT_S),
    Fault("sends the body a byte at a time", "trickle", AGAIN, MOST, "given up after `timeout_s`", 0.5 * TIMEOUT_S),
    Fault("sends JSON that breaks off", (200, answer()[:60]), AGAIN, MOST, BACKOFF),
    Fault("sends a page that is no JSON, with status 200", (200, "<html>hello</html>"), AGAIN, MOST, BACKOFF),
    Fault("sends no choices", (200, '{"choices": []}'), AGAIN, MOST, BACKOFF),
    Fault("sends a message without content", (200, answer(None)), AGAIN, Usage(7, 2), BACKOFF),
    Fault(
        "says that the answer ended by an error (any `finish_reason` that is not known)",
        (200, answer("half", "error")),
        AGAIN,
        Usage(7, 2),
        BACKOFF,
    ),
    Fault("sends an error object anywhere in a reply with status 200", (200, failure("lost")), AGAIN, MOST, BACKOFF),
    Fault("spends all tokens on thinking", (200, answer("", "length")), EPISODE, Usage(7, 2), "raise its max_tokens"),
    Fault(
        "ends by itself with a thought alone",
        (200, thought("It is 4.")),
        EPISODE,
        Usage(7, 2),
        "look at the server's reasoning parser",
    ),
    Fault("filters its answer, or a part of it", (200, answer("par", "content_filter")), EPISODE, Usage(7, 2)),
    Fault(
        "refuses in the message's `refusal`",
        (200, refused("I cannot help.")),
        EPISODE,
        Usage(7, 2),
        "its words are shown",
    ),
    Fault(
        "answers from another model",
        (200, answer(model="other")),
        RUN,
        Usage(7, 2),
        "both models are named; `served_model` says which one is meant",
    ),
    Fault(
        "429 with Retry-After",
        (429, failure("slow down"), {"Retry-After": "0.5"}),
        AGAIN,
        Usage(),
        "no request goes there before that time",
        0.5,
    ),
    Fault("429 without Retry-After", (429, failure("slow down")), AGAIN, Usage(), BACKOFF),
    Fault(
        "429 with a Retry-After beyond `total_timeout_s`",
        (429, failure("daily quota"), {"Retry-After": "86400"}),
        EPISODE,
        Usage(),
        "at once",
    ),
    Fault("429 `insufficient_quota`", (429, failure("pay first", "insufficient_quota")), RUN),
    Fault("429 whose words say that the account has no money", (429, failure("Insufficient balance")), RUN),
    Fault(
        "429 for a prompt of more tokens than a minute allows, or 424 that names the prompt",
        (429, failure("Request too large for m on tokens per min")),
        EPISODE,
    ),
    Fault("500, 503 and other 5xx", (503, failure("overloaded")), AGAIN, Usage(), BACKOFF),
    Fault("408, 499, 502, 504, 520, 524 (a gateway gave up)", (502, "<html>bad gateway</html>"), AGAIN, MOST, BACKOFF),
    Fault("409, 421, 424, 425, 498 (busy, or a worker failed)", (424, failure("conflict")), AGAIN, Usage(), BACKOFF),
    Fault("401, 402, 407 (the key, the account or a proxy's password)", (401, failure("bad key")), RUN),
    Fault("403 that names the key, the account or the model", (403, failure("your API key may not do this")), RUN),
    Fault(
        "403 with a page (a firewall that dislikes one prompt), or with words that name nothing",
        (403, "<html>blocked</html>"),
        EPISODE,
        Usage(),
        "the third different prompt in a row stops the run",
    ),
    Fault("404, 405, 410 (the URL or the model)", (404, failure("no such model")), RUN),
    Fault(
        "any other 4xx that names the prompt (too long, against a rule)",
        (422, failure("inputs tokens > 4096")),
        EPISODE,
    ),
    Fault("413", (413, failure("too large")), EPISODE),
    Fault("any other 4xx that names a parameter, the key or the model", (400, failure("top_p is not supported")), RUN),
    Fault(
        "any other 4xx that names none of these",
        (400, failure("no")),
        EPISODE,
        Usage(),
        "the third different prompt in a row stops the run",
    ),
    Fault("a redirect", (307, "", {"Location": "http://127.0.0.1:1/"}), RUN, Usage(), "redirects are not followed"),
]
REFUSES = "| refuses connections | the episode fails; after `max_retries` more tries, with back-off | 0 | nothing |"
HEAD = ["| the server | the client | requests | counted as perhaps billed |", "|---|---|---|---|"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.server)
def test_fault(fault: Fault, tmp_path: Path) -> None:
    """Oracle: requests that the endpoint saw, the kind of exception, the time between requests, the accounts."""
    endpoint, cache = Endpoint(fault.reply), ResponseCache(tmp_path / "c")

    async def scene(generator: OpenAIGenerator) -> None:
        if fault.outcome == AGAIN:
            assert (await generator.complete(PROMPT, GREEDY)).text == "four"
            assert endpoint.times[1] - endpoint.times[0] >= fault.least_s
        elif fault.outcome == EPISODE:
            with pytest.raises(GeneratorError):
                await generator.complete(PROMPT, GREEDY)
        else:
            with pytest.raises(ValueError, match="^generator: http"):
                await generator.complete(PROMPT, GREEDY)
        known = cache.spending(generator.name)
        assert known.lost_usage == fault.lost and known.lost == (fault.lost != Usage())
        assert known.answers == (fault.outcome == AGAIN) and known.held == Usage()

    run(endpoint, scene, cache, timeout_s=TIMEOUT_S if fault.reply in ("hang", "trickle") else 60.0)
    assert len(endpoint.seen) == (2 if fault.outcome == AGAIN else 1)
    assert endpoint.seen[0] == endpoint.seen[-1]


def test_refused_connections(tmp_path: Path) -> None:
    """Oracle: nothing listens on the port, so nothing can be billed; max_retries + 1 tries are told of."""

    async def main() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        server.close()
        cache = ResponseCache(tmp_path / "c")
        generator = OpenAIGenerator(GeneratorConfig(url, "m", "", max_retries=2, backoff_s=0.001), cache)
        with pytest.raises(GeneratorError, match="after 3 attempts, at last: connection failed"):
            await generator.complete(PROMPT, GREEDY)
        assert cache.spending(generator.name).spent == Usage()
        await generator.aclose()

    asyncio.run(main())


def test_total_time_bounds_the_call() -> None:
    """Oracle: the clock and the count. Of seven attempts of 0.3 s that all hang, no more than three begin in 0.7 s."""
    endpoint = Endpoint(*["hang"] * 9)
    started = time.monotonic()

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match="timed out after 0.*total_timeout_s"):
            await generator.complete(PROMPT, GREEDY)

    run(endpoint, scene, timeout_s=0.3, total_timeout_s=0.7, backoff_s=0.01)
    assert time.monotonic() - started > 0.3 and len(endpoint.seen) <= 3


def test_a_turn_that_comes_too_late_is_not_taken_and_costs_nothing(tmp_path: Path) -> None:
    """Oracle: one request a second, and half a second in all: the retry of a refusal is not sent, nor accounted for."""
    endpoint, cache = Endpoint((500, failure("boom"))), ResponseCache(tmp_path / "c")

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match="its turn came when its time was over.*total_timeout_s \\(0.5 s\\)"):
            await generator.complete(PROMPT, GREEDY)
        assert generator.account.spending() == Spending()

    generator = run(endpoint, scene, cache, requests_per_minute=60, total_timeout_s=0.5)
    assert len(endpoint.seen) == 1 == generator.endpoints[0].stats.sent
    cache.close()


def test_the_table_in_the_docs_is_this_one() -> None:
    """Oracle: the rows above, which the tests hold; on a difference, paste what is printed."""
    table = "\n".join([*HEAD, REFUSES, *(fault.row() for fault in FAULTS)])
    print(table)
    assert table in DOCS.read_text()
