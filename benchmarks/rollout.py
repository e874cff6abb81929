"""`matryoshka bench rollout`: the driver of episodes and the generator's client against a slow server on this machine.

Episodes are real ones as far as driver, journal, cache and client go; the controller answers at once and nothing is
executed, so what is measured is how well waiting is overlapped. Little's law gives the ideal: concurrency / latency
episodes a second. A second run meets errors, hangs and bursts of 429; a third one, over its cache, must ask nothing.
The last rows are requests a second that one process sustains without any latency, with our client and with others.
"""

import asyncio
import json
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.benchmarks import loopback
from matryoshka.benchmarks.loopback import Loopback
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.core.files import Journal
from matryoshka.core.protocols import Controller, Generator, Task, TaskSetting
from matryoshka.core.records import (
    Example,
    Message,
    Messages,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
)
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generator_config import EndpointConfig, GeneratorConfig
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.openai_transport import OpenAITransport
from matryoshka.tasks.episode import Episode
from matryoshka.tasks.rollout import Job, Setup, job_key, run_rollouts

MEMORY_LIMIT_MIB = 400
# About the length of a PAL prompt; the question comes last.
PREAMBLE = "Write nothing but the result. " * 60
NAMES = {"ours": "openai over aiohttp (ours)", "aiohttp": "aiohttp alone", "openai": "openai over httpx"}
CLIENTS = tuple(NAMES)
CONNECTIONS = 1024


@dataclass(frozen=True)
class Config:
    """Episodes a second against a slow loopback server, with and without faults; requests a second without latency."""

    concurrency: int = 512
    """Requests in flight."""
    latency_s: float = 5.0
    """Seconds that the server takes for an answer."""
    waves: int = 10
    """Episodes are waves x concurrency; the more there are, the less the start weighs."""
    fault_waves: int = 4
    """Waves of the run with faults, 0 to leave it out."""
    error_share: float = 0.02
    """Share of the attempts that end in an error."""
    hang_share: float = 0.01
    """Share of the attempts that hang."""
    burst_every: int = 400
    """Requests from one burst of refusals to the next."""
    burst: int = 50
    """Requests in a row that get a 429."""
    hang_timeout_s: float = 3.0
    """Seconds beyond the latency after which an attempt is given up."""
    clients: tuple[str, ...] = CLIENTS
    """Clients whose rates are measured."""
    rate_requests: int = 2048
    """Requests of each of them."""
    rate_concurrency: int = 64
    """Requests of them in flight."""

    def __post_init__(self) -> None:
        if unknown := set(self.clients) - set(CLIENTS):
            raise ValueError(f"bench: client {sorted(unknown)[0]!r} is unknown; choose from {', '.join(CLIENTS)}")
        if min(self.concurrency, self.waves, self.rate_requests, self.rate_concurrency) < 1 or self.latency_s < 0:
            raise ValueError("bench: concurrency, waves, rate_requests and rate_concurrency must be at least 1")


class Additions(Task):
    """A task of one controller turn and one black-box call; right if the answer is the sum."""

    name = "additions"

    def examples(self, split: str) -> Sequence[Example]:
        return []

    def first_prompt(self, example: Example) -> Messages:
        return (Message("user", example.fields["question"]),)

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        episode = Episode(self.name, example, controller, generator, settings)
        prompt, right = self.first_prompt(example), False
        with episode:
            guidance = await episode.propose(prompt)
            reply = await episode.complete((Message("system", PREAMBLE + guidance.text), *prompt))
            right = reply.text == str(example.fields["answer"])
        return episode.trajectory(float(right), "right" if right else "wrong")


class AtOnce(Controller):
    """A core.protocols.Controller that always writes the same guidance."""

    name = "at-once"

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        return [Sample("Add the two numbers.")] * n


def run(config: Config) -> BenchResult:
    """Return episodes a second, memory, what became of the faults, and the clients' rates; ratio is over ideal."""
    ideal = config.concurrency / config.latency_s if config.latency_s else None
    with tempfile.TemporaryDirectory() as folder:
        clean = _episodes(config, config.waves, Loopback(config.latency_s), Path(folder) / "clean")
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows = [
            Row("episodes a second", clean["rate"], "1/s", {"ideal": ideal, **clean["details"]}),
            Row(
                "peak memory of the process",
                peak_mib,
                "MiB",
                {"limit": MEMORY_LIMIT_MIB, "holds": peak_mib < MEMORY_LIMIT_MIB, "note": "torch imported, no model"},
            ),
        ]
        if config.fault_waves:
            rows += _with_faults(config, Path(folder) / "faults")
    rows += [_rate(config, client) for client in config.clients]
    ratio = clean["rate"] / ideal if ideal else None
    return BenchResult("rollout", rows, ratio, target=0.95, packages=("aiohttp",))


def _with_faults(config: Config, folder: Path) -> list[Row]:
    faults = Loopback(config.latency_s, config.error_share, config.hang_share, config.burst_every, config.burst)
    faulty = _episodes(config, config.fault_waves, faults, folder, again=True)
    details = faulty["details"]
    asked_twice = details["asked again"] + details["asked on resume"]
    details["holds"] = details["right"] == details["episodes"] and asked_twice == 0
    return [Row("episodes a second with faults", faulty["rate"], "1/s", details)]


def _episodes(config: Config, waves: int, server: Loopback, folder: Path, again: bool = False) -> dict[str, Any]:
    """Return rate and details of running waves x concurrency episodes; `again`: and once more over the same cache."""
    task, controller, count = Additions(None, TaskSetting({})), AtOnce(), waves * config.concurrency
    examples = [
        Example(str(i), {"question": loopback.question(i, 7 * i), "answer": 8 * i}) for i in range(1, count + 1)
    ]
    settings = RolloutSettings(generator=Sampling(max_tokens=16))
    with loopback.running(server) as url:

        async def drive(name: str) -> tuple[float, list[Trajectory], OpenAIGenerator]:
            cache, journal = ResponseCache(folder / "cache.sqlite"), Journal(folder / f"{name}.jsonl")
            generator = OpenAIGenerator(_generator_config(config, url), cache)
            keys = [job_key(task, example, settings, controller, generator) for example in examples]
            jobs = [Job(key, example, settings) for key, example in zip(keys, examples, strict=True)]
            await generator.check()  # as a pilot does
            try:
                started = time.perf_counter()
                done = await run_rollouts(Setup(task, controller, generator), jobs, journal, config.concurrency)
                return time.perf_counter() - started, done, generator
            finally:
                await generator.aclose()
                journal.close()
                cache.close()

        cpu = time.process_time()
        seconds, done, generator = asyncio.run(drive("first"))
        cpu = time.process_time() - cpu
        details: dict[str, Any] = {
            "episodes": count,
            "concurrency": config.concurrency,
            "latency_s": config.latency_s,
            "seconds": seconds,
            "cpu_ms_per_episode": 1000 * cpu / count,
            "right": sum(trajectory.reward == 1.0 for trajectory in done),
            "retries": generator.stats.retries,
        }
        counts = loopback.stats(url)
        details |= {f"server: {name}": number for name, number in sorted(counts.items()) if name != "asked again"}
        details["asked again"] = counts.get("asked again", 0)
        if again:
            asyncio.run(drive("second"))
            details["asked on resume"] = loopback.stats(url)["requests"] - counts["requests"]
    return {"rate": count / seconds, "details": details}


def _generator_config(config: Config, url: str) -> GeneratorConfig:
    return GeneratorConfig(
        url,
        loopback.MODEL,
        "",
        concurrency=config.concurrency,
        timeout_s=config.latency_s + config.hang_timeout_s,
        identity="loopback",
    )


def _rate(config: Config, client: str) -> Row:
    """Return the requests a second that one process gets answered by a server that answers at once."""
    body = {"model": loopback.MODEL, "messages": [{"role": "user", "content": PREAMBLE}], "max_tokens": 16}
    with loopback.running(Loopback()) as url:

        async def measure() -> tuple[float, float]:
            async with _client(client, url, body) as ask:
                await ask()
                wall, cpu = time.perf_counter(), time.process_time()
                share = config.rate_requests // config.rate_concurrency or 1

                async def some() -> None:
                    for _ in range(share):
                        await ask()

                await asyncio.gather(*(some() for _ in range(config.rate_concurrency)))
                count = share * config.rate_concurrency
                return count / (time.perf_counter() - wall), 1000 * (time.process_time() - cpu) / count

        rate, cpu_ms = asyncio.run(measure())
    return Row(f"client {NAMES[client]}", rate, "1/s", {"cpu_ms_per_request": cpu_ms, "per_core": 1000 / cpu_ms})


@asynccontextmanager
async def _client(client: str, url: str, body: dict[str, Any]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Yield a function that asks once and reads the answer."""
    data, path = json.dumps(body).encode(), f"{url}/chat/completions"
    if client == "ours":
        transport = OpenAITransport(EndpointConfig(url, "", loopback.MODEL, "openai", "", CONNECTIONS), "")

        async def ask() -> None:
            json.loads((await transport.chat(data, 60.0)).body)["choices"]

        try:
            yield ask
        finally:
            await transport.aclose()
    elif client == "aiohttp":
        import aiohttp

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:

            async def ask_aiohttp() -> None:
                async with session.post(path, data=data, headers={"Content-Type": "application/json"}) as reply:
                    json.loads(await reply.read())["choices"]

            yield ask_aiohttp
    else:
        import openai

        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60.0) as peer:

            async def ask_peer() -> None:
                await peer.chat.completions.create(**body)

            yield ask_peer
