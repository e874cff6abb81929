"""`matryoshka bench serve`: tokens a second of our sampler and of vLLM, at several numbers of concurrent requests.

Both get the same model, prompts and seeds, and take turns at each level, so that other load of the machine meets both.
Ours is called in this process and vLLM through its server, as in a pilot.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.core.machine import usable_cores
from matryoshka.core.models.load import load_model
from matryoshka.core.records import Message, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import load_adapter, read_config
from matryoshka.pilot.progress import StatusLine
from matryoshka.pilot.training import DTYPES
from matryoshka.tasks.pal import synthetic_problems as words

TARGET = 0.5


@dataclass(frozen=True)
class Config:
    """Tokens a second of our sampler and of vLLM at several numbers of concurrent requests."""

    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    adapter: Path | None = None
    """An adapter folder that both serve."""
    dtype: str = "float32"
    """Data type of the weights."""
    device: str = "cpu"
    """Where to compute: "cpu" or "cuda"."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    """Requests in flight."""
    tokens: int = 64
    """Most tokens of each answer, at temperature 1."""
    waves: int = 2
    """Waves of requests; the best one counts."""
    threads: int = 0
    """CPU threads of our sampler, 0 for as many as there are cores."""
    log: Path = Path("vllm.log")
    """File that takes vLLM's output."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM is started."""


def run(config: Config) -> BenchResult:
    """Return tokens a second of both at each level; ratio: the worst level's, ours over vLLM's."""
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    tokenizer, model = Tokenizer.load(config.model), load_model(config.model, DTYPES[config.dtype], config.device)
    rank = 0 if config.adapter is None else read_config(config.adapter).rank
    if config.adapter is not None:
        load_adapter(model, "adapter", config.adapter)
    most = max(config.concurrency)
    questions = [example.fields["question"] for example in words.load("test", most, 0)]
    prompts = [tokenizer.render((Message("user", text),), add_generation_prompt=True).ids for text in questions]

    async def rate(sampler: TokenSampler, adapter: str | None, count: int, seed: int) -> float:
        sampling = Sampling(temperature=1.0, max_tokens=config.tokens, seed=seed)
        began = time.perf_counter()
        done = await asyncio.gather(*(sampler.generate(ids, sampling, adapter) for ids in prompts[:count]))
        return sum(sample.usage.completion_tokens for sample in done) / (time.perf_counter() - began)

    async def measure() -> dict[tuple[str, int], list[float]]:
        server = VllmServer(config.vllm, config.model, "controller", config.dtype, rank, config.log)
        found: dict[tuple[str, int], list[float]] = {}
        with StatusLine() as line, Sampler(model, tokenizer, most, num_threads=threads) as ours:
            vllm = Vllm(server, tokenizer, rank, line.show)
            name = None if config.adapter is None else vllm.register(config.adapter)
            try:
                pairs: Sequence[tuple[str, TokenSampler, str | None]] = (
                    ("vLLM", vllm, name),
                    ("our sampler", ours, None if config.adapter is None else "adapter"),
                )
                for _, sampler, adapter in pairs:
                    await rate(sampler, adapter, min(2, most), 99)  # costs that only the first request has
                for count in config.concurrency:
                    for wave in range(config.waves):
                        for label, sampler, adapter in pairs:
                            line.show(f"{label}, {count} requests, {wave + 1} of {config.waves}")
                            found.setdefault((label, count), []).append(await rate(sampler, adapter, count, wave))
            finally:
                await vllm.aclose()
        return found

    found = asyncio.run(measure())
    best = {key: max(rates) for key, rates in found.items()}
    rows = [
        Row(f"{label}, {count} requests", best[label, count], "tokens/s", {"all": [round(r, 1) for r in rates]})
        for (label, count), rates in found.items()
    ]
    ratios = [best["our sampler", count] / best["vLLM", count] for count in config.concurrency]
    rows += [
        Row(f"ours over vLLM, {count} requests", ratio, "x")
        for count, ratio in zip(config.concurrency, ratios, strict=True)
    ]
    return BenchResult("serve", rows, min(ratios), TARGET)
