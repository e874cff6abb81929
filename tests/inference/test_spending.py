"""Budgets hold for the largest possible answers, not for usual ones; accounts survive kills and pruning.

The oracle is the endpoint's own sum of its bills.
"""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matryoshka.core.protocols import RunStopped
from matryoshka.core.records import Message, Sample, Sampling, Usage
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.accounts import Spending
from matryoshka.inference.cache import ResponseCache, answer_key
from matryoshka.inference.chat_api import most_tokens
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.prices import Price
from matryoshka.inference.spending import Budget, GeneratorAccount, total
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, run
from matryoshka.tests.processes import alive

MOST = most_tokens(PROMPT, GREEDY)
BOUND = MOST.prompt_tokens + MOST.completion_tokens
PER_ANSWER = 9  # what the endpoint says that an answer cost: 7 + 2 tokens


def draw(number: int) -> Sampling:
    return Sampling(temperature=1.0, max_tokens=8, draw=number)


@pytest.mark.parametrize("at_once", [1, 8])
def test_the_line_is_not_crossed_and_a_larger_budget_goes_on(at_once: int, tmp_path: Path) -> None:
    """Oracle: by hand. Requests of 9 tokens go out as long as what is spent and one upper bound fit the budget: then
    n = floor((budget - bound) / 9) + 1 of them, however many are tried at once. Nothing is asked twice later.
    """
    budget = 20 * PER_ANSWER + BOUND - 1
    expected = (budget - BOUND) // PER_ANSWER + 1
    endpoint, path = Endpoint(), tmp_path / "c"

    async def spend(generator: OpenAIGenerator) -> None:
        answered = 0
        while True:
            calls = [generator.complete(PROMPT, draw(answered + i)) for i in range(at_once)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            answered += sum(isinstance(result, Sample) for result in results)
            if stops := [result for result in results if isinstance(result, BaseException)]:
                assert all(isinstance(stop, RunStopped) for stop in stops)
                assert f"of at most {BOUND} tokens, could cross the budget of {budget:,} tokens" in str(stops[0])
                return

    run(endpoint, spend, ResponseCache(path), Budget(tokens=budget), identity="same")
    assert len(endpoint.seen) == expected and PER_ANSWER * expected <= budget
    endpoint = Endpoint()

    async def go_on(generator: OpenAIGenerator) -> None:
        for i in range(expected + 2):
            await generator.complete(PROMPT, draw(i))
        assert generator.account.spending().usage == Usage(7 * (expected + 2), 2 * (expected + 2))

    run(endpoint, go_on, ResponseCache(path), Budget(tokens=10 * budget), identity="same")
    assert len(endpoint.seen) == 2


def test_dollars_are_tokens_times_prices(tmp_path: Path) -> None:
    """Oracle: by hand: 7 tokens at 1000 and 2 at 2000 dollars a million are 0.011 dollars an answer."""
    prices = tmp_path / "prices.toml"
    prices.write_text("m = { input = 1000, output = 2000 }\n")
    endpoint = Endpoint()
    bound = (MOST.prompt_tokens * 1000 + MOST.completion_tokens * 2000) / 1e6
    budget = Budget(usd=0.011 * 3 + bound - 0.0001)

    async def scene(generator: OpenAIGenerator) -> None:
        for i in range(3):
            await generator.complete(PROMPT, draw(i))
        assert generator.account.usd() == pytest.approx(0.033)
        assert generator.account.shown() == "0.0330 USD"
        with pytest.raises(RunStopped, match="27 tokens, 0.0330 USD"):
            await generator.complete(PROMPT, draw(3))

    run(endpoint, scene, ResponseCache(tmp_path / "c"), budget, prices=str(prices))
    assert len(endpoint.seen) == 3


def test_one_budget_is_over_all_generators(tmp_path: Path) -> None:
    """Oracle: by hand. 7 tokens at 1000 and 2 at 2000 dollars a million are 0.011 dollars an answer of the first model,
    twice that of the second; what the first has spent is no longer there for the second, and its prices are known.
    """
    path, most = tmp_path / "c", Price(2000.0, 4000.0).usd(MOST)
    prices = tmp_path / "p.toml"
    prices.write_text("m = { input = 1000, output = 2000 }\nmodel-b = { input = 2000, output = 4000 }\n")
    settings = {"identity": "same", "prices": str(prices)}

    async def three(generator: OpenAIGenerator) -> None:
        for i in range(3):
            await generator.complete(PROMPT, draw(i))

    async def two(generator: OpenAIGenerator) -> None:
        for i in range(2):
            await generator.complete(PROMPT, draw(i))
        with pytest.raises(RunStopped, match="budget: m@same and model-b@same used 45 tokens, 0.0770 USD"):
            await generator.complete(PROMPT, draw(2))

    run(Endpoint(), three, ResponseCache(path), Budget(usd=1.0), **settings)
    budget = Budget(usd=3 * 0.011 + 0.022 + most + 0.001)
    run(endpoint := Endpoint(), two, ResponseCache(path), budget, model="model-b", **settings)
    assert len(endpoint.seen) == 2
    tokens = Budget(tokens=5 * PER_ANSWER + BOUND - 1)

    async def none(generator: OpenAIGenerator) -> None:
        with pytest.raises(RunStopped, match="could cross the budget of"):
            await generator.complete(PROMPT, draw(9))

    run(endpoint := Endpoint(), none, ResponseCache(path), tokens, model="other", identity="same")
    assert endpoint.seen == []
    assert total(ResponseCache(path)) == pytest.approx((0.077, 45))


def test_a_budget_is_divided_among_machines() -> None:
    """Oracle: by hand: 10 dollars and 100 tokens, of which 4 and 40 are spent; 3 and 30 are left for each of two."""
    spent = [(1.0, 10), (3.0, 30)]
    assert [Budget(10.0, 100).part(i, spent) for i in range(2)] == [Budget(4.0, 40), Budget(6.0, 60)]
    assert Budget().part(0, spent) == Budget()
    (none,) = {Budget(3.0, 30).part(0, [(0.0, 0), spent[1]])}  # nothing left is not "no limit"
    assert 0 < none.usd < 1e-9 and none.tokens == 1


def test_requests_wait_for_others_that_may_cost_less(tmp_path: Path) -> None:
    """Oracle: the budget has room for one upper bound and a half. Two calls at once are both answered, one by one."""
    endpoint = Endpoint()

    async def scene(generator: OpenAIGenerator) -> None:
        await asyncio.gather(*(generator.complete(PROMPT, draw(i)) for i in range(2)))

    run(endpoint, scene, ResponseCache(tmp_path / "c"), Budget(tokens=BOUND * 3 // 2))
    assert (endpoint.most_running, len(endpoint.seen)) == (1, 2)


def test_an_attempt_that_may_have_been_billed_counts(tmp_path: Path) -> None:
    """Oracle: a dropped request counts with its bound, so that the retry no longer fits; a cancelled one as well."""
    cache, endpoint = ResponseCache(tmp_path / "c"), Endpoint("drop")

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(RunStopped, match="1 attempts that brought no answer"):
            await generator.complete(PROMPT, GREEDY)
        assert generator.account.spending() == Spending(0, Usage(), 1, MOST, Usage())

    run(endpoint, scene, cache, Budget(tokens=2 * BOUND - 1))
    assert len(endpoint.seen) == 1

    async def cancelled(generator: OpenAIGenerator) -> None:
        endpoint.gate = asyncio.Event()
        call = asyncio.create_task(generator.complete(PROMPT, draw(1)))
        while len(endpoint.seen) < 2:
            await asyncio.sleep(0.005)
        call.cancel()
        await asyncio.wait([call])
        assert generator.account.spending().lost_usage == MOST

    run(endpoint, cancelled, cache)


def test_a_killed_process_may_have_been_billed_and_its_claim_is_free(tmp_path: Path) -> None:
    """Oracle: a process claims, holds and kills itself with SIGKILL; its hold counts as spent, its key can be asked."""
    path = tmp_path / "c"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom matryoshka.core.records import Usage\n"
        "from matryoshka.inference.cache import ResponseCache\nc = ResponseCache(Path(sys.argv[1]))\n"
        "assert c.claim('k', 'g') and c.hold('k', 'g', Usage(100, 8), lambda usage: True) is None\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL
    cache = ResponseCache(path)
    assert cache.spending("g") == Spending(lost=1, lost_usage=Usage(100, 8))
    assert cache.claim("k", "g") and not cache.claim("k", "g")


@pytest.mark.parametrize("contents", [("four", "four"), (None, "four")])
def test_an_answer_that_does_not_say_what_it_cost_counts_as_the_most(
    contents: tuple[str | None, str], tmp_path: Path
) -> None:
    """Oracle: by hand: two upper bounds fit the budget, and a third does not, though the server tells of no tokens."""
    texts = [json.dumps({"choices": [{"message": {"content": content}}]}) for content in contents]
    endpoint, answers = Endpoint(*((200, text) for text in texts)), 2 - contents.count(None)

    async def spend(generator: OpenAIGenerator) -> None:
        for number in range(answers):
            assert (await generator.complete(PROMPT, draw(number))).usage == Usage()
        with pytest.raises(RunStopped, match="could cross the budget"):
            await generator.complete(PROMPT, draw(2))
        most = Usage(2 * MOST.prompt_tokens, 2 * MOST.completion_tokens)
        assert generator.account.spending() == Spending(answers=answers, lost=2, lost_usage=most)

    run(endpoint, spend, ResponseCache(tmp_path / "c"), Budget(tokens=3 * BOUND - 1))
    assert len(endpoint.seen) == 2


def test_a_killed_process_that_nobody_waits_for_is_dead(tmp_path: Path) -> None:
    """Oracle: the kernel's state Z: it stays in the table of processes until its parent asks, which may be never."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom matryoshka.inference.cache import ResponseCache\n"
        "assert ResponseCache(Path(sys.argv[1])).claim('k', 'g')\nprint('claimed', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"claimed\n"
        cache = ResponseCache(tmp_path / "c")
        assert not cache.claim("k", "g")
        os.kill(process.pid, signal.SIGKILL)
        while alive(process.pid):
            time.sleep(0.01)
        assert cache.claim("k", "g")


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    """Oracle: claims written by hand: of a process number that no longer is, and of another machine, new and old."""
    cache = ResponseCache(tmp_path / "c")
    assert cache.claim("mine", "g")
    with sqlite3.connect(tmp_path / "c") as db:
        (owner,) = db.execute("SELECT owner FROM claims").fetchone()
        space = owner.rsplit(" ", 2)[0]
        now = time.time()
        for key, who, since in (
            ("dead", f"{space} 4194999 1", now),
            ("recycled", f"{space} {os.getpid()} 1", now),
            ("far", "elsewhere pid:[1] 1 1", now),
            ("far and old", "elsewhere pid:[1] 1 1", now - 4000),
        ):
            db.execute("INSERT INTO claims VALUES (?, 'g', ?, ?, 5, 5)", (key, who, since))
    db.close()
    asked = {key: cache.claim(key, "g") for key in ("mine", "dead", "recycled", "far", "far and old")}
    assert asked == {"mine": False, "dead": True, "recycled": True, "far": False, "far and old": True}
    assert cache.spending("g") == Spending(lost=3, lost_usage=Usage(15, 15), held=Usage(5, 5))


def test_two_processes_ask_the_same_once(tmp_path: Path) -> None:
    """Oracle: the server's count. Another connection to the file has claimed the request and answers it later."""
    endpoint, path = Endpoint(), tmp_path / "c"
    other = ResponseCache(path)

    async def scene(generator: OpenAIGenerator) -> None:
        key = answer_key(generator.config.where, "m", PROMPT, draw(2))
        assert other.claim(key, generator.name)
        waiting = asyncio.create_task(generator.complete(PROMPT, draw(2)))
        await asyncio.sleep(0.1)
        assert not waiting.done() and not endpoint.seen
        other.put(key, Sample("theirs"), generator.name)
        assert (await waiting).text == "theirs"
        key = answer_key(generator.config.where, "m", PROMPT, draw(3))
        assert other.claim(key, generator.name)
        waiting = asyncio.create_task(generator.complete(PROMPT, draw(3)))
        await asyncio.sleep(0.1)
        other.release(key)  # it failed there; now it is ours to ask
        assert (await waiting).text == "four"

    run(endpoint, scene, ResponseCache(path))
    assert len(endpoint.seen) == 1


def test_budgets_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    """Oracle: each message, by hand; a token budget needs no price."""
    cache = ResponseCache(tmp_path / "c")
    with pytest.raises(ValueError, match="response cache; give the generator one"):
        GeneratorAccount("m", None, Price(1, 1), Budget(tokens=1))
    with pytest.raises(ValueError, match="no price of m is known.*--budget-tokens"):
        GeneratorAccount("m", cache, None, Budget(usd=1))
    with pytest.raises(ValueError, match="must not be negative"):
        Budget(usd=-1)
    assert GeneratorAccount("m", cache, None, Budget(tokens=5)).shown() == "0 tokens"


@pytest.mark.parametrize("text", ["", "a" * 1000, "\u4f60\u597d" * 100, "\U0001f600" * 50, "1+2=3\n\t" * 40])
def test_the_upper_bound_is_one(text: str, smollm2: Tokenizer) -> None:
    """Oracle: a tokenizer whose chat template adds a system prompt of its own makes no more tokens than the bound."""
    for prompt in ((Message("user", text),), (Message("system", text), Message("user", text))):
        size = len(smollm2.render(prompt, add_generation_prompt=True).ids)
        assert size <= most_tokens(prompt, GREEDY).prompt_tokens
