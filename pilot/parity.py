"""`matryoshka parity`: log-probs of the same tokens from trainer, sampler and vLLM, with and without an adapter.

Each of the two draws answers to word problems; the trainer computes their log-probs again, and vLLM reads those that
our sampler drew. What is beyond the bound of the dtype fails: with such samples a pilot would refuse to train.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka.core.models.load import load_model
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import completion
from matryoshka.dpo.parity import Difference, difference, trainer_logps
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import load_adapter, read_config
from matryoshka.lora.linear import active
from matryoshka.pilot.progress import StatusLine
from matryoshka.pilot.training import DTYPES
from matryoshka.tasks.pal import synthetic_problems as words


@dataclass(frozen=True)
class ParityConfig:
    """Which log-probs are compared: of trainer, sampler and vLLM, for the same tokens."""

    model: Path
    """A Hugging Face folder."""
    adapter: Path | None = None
    """An adapter folder; by default the base model alone is compared."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of all three."""
    device: str = "cpu"
    """Where trainer and sampler compute: "cpu" or "cuda"."""
    samples: int = 6
    """Answers to draw."""
    tokens: int = 40
    """Most tokens of each answer."""
    seed: int = 0
    """Seed of prompts and sampling."""
    log: Path = Path("vllm.log")
    """File that takes vLLM's output."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM is started."""


Drawn = list[tuple[tuple[int, ...], Sample]]


def measure(config: ParityConfig) -> list[dict[str, Any]]:
    """Return a row for each pair of programs and adapter: who against whom, and how far apart in nats."""
    tokenizer, model = Tokenizer.load(config.model), load_model(config.model, DTYPES[config.dtype], config.device)
    places: list[Path | None] = [None] if config.adapter is None else [None, config.adapter]
    if config.adapter is not None:
        load_adapter(model, "adapter", config.adapter)
    rank = 0 if config.adapter is None else read_config(config.adapter).rank
    questions = [example.fields["question"] for example in words.load("test", config.samples, config.seed)]
    prompts = [tokenizer.render((Message("user", text),), add_generation_prompt=True).ids for text in questions]
    sampling = Sampling(temperature=1.0, max_tokens=config.tokens, seed=config.seed)

    async def ours() -> list[Drawn]:
        with Sampler(model, tokenizer) as sampler:
            names = [None if place is None else "adapter" for place in places]
            return [[(ids, await sampler.generate(ids, sampling, name)) for ids in prompts] for name in names]

    async def theirs(drawn: Sequence[Drawn]) -> tuple[list[list[tuple[float, ...]]], list[Drawn]]:
        server = VllmServer(config.vllm, config.model, "controller", config.dtype, rank, config.log)
        with StatusLine() as line:
            vllm = Vllm(server, tokenizer, rank, line.show)
            try:
                names = [None if place is None else vllm.register(place) for place in places]
                scores, samples = [], []
                for name, rows in zip(names, drawn, strict=True):
                    scoring = (vllm.score(ids, sample.token_ids or (), name) for ids, sample in rows)
                    scores.append(list(await asyncio.gather(*scoring)))
                    drawing = (vllm.generate(ids, sampling, name) for ids in prompts)
                    samples.append(list(zip(prompts, await asyncio.gather(*drawing), strict=True)))
                return scores, samples
            finally:
                await vllm.aclose()

    local = asyncio.run(ours())
    scores, remote = asyncio.run(theirs(local))
    rows = []
    for place, drawn, scored, served in zip(places, local, scores, remote, strict=True):
        with active(model, None if place is None else "adapter"), torch.no_grad():
            trained = [trainer_logps(model, completion(ids, sample)) for ids, sample in drawn]
            trained_served = [trainer_logps(model, completion(ids, sample)) for ids, sample in served]
        sampled = [sample.logprobs or () for _, sample in drawn]
        for name, against, first, second in (
            ("our sampler, drawing", "trainer", sampled, trained),
            ("vLLM, reading (prompt_logprobs)", "trainer", scored, trained),
            ("vLLM, reading (prompt_logprobs)", "our sampler, drawing", scored, sampled),
            ("vLLM, drawing", "trainer", [sample.logprobs or () for _, sample in served], trained_served),
        ):
            found = _all(first, second)
            adapter = "none" if place is None else place.name
            rows.append({"adapter": adapter, "log-probs": name, "against": against, **asdict(found)})
    return rows


def _all(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    return difference([x for row in first for x in row], [x for row in second for x in row])
