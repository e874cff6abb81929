"""Log-probs of the same tokens from trainer, sampler and vLLM, with and without an adapter, tempered or not.

Sampler and vLLM draw answers to word problems; the trainer computes their log-probs again, and vLLM reads the answers
of our sampler. A difference beyond the bound of the dtype is a failure: a pilot would refuse to train on such samples.
Answers are drawn at temperature 1 and at 0.7 with top-p 0.9. The trainer knows neither, so that equal log-probs show
that the returned ones are of the whole, untempered distribution.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from matryoshka.core.models.load import load_model
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import completion
from matryoshka.dpo.parity import Difference, difference, trainer_logps
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import load_adapter, read_config
from matryoshka.lora.linear import active
from matryoshka.pilot.config import TaskConfig
from matryoshka.pilot.progress import StatusLine
from matryoshka.pilot.training import DTYPES
from matryoshka.tasks.find import make_task

DRAWN_AT = ((1.0, 1.0), (0.7, 0.9))  # temperature, top-p


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


@dataclass(frozen=True)
class ParityRow:
    """How far two programs are apart on the same tokens. sampling: how these were drawn; source: whose log-probs."""

    adapter: str
    sampling: str
    source: str
    against: str
    difference: Difference


@dataclass(frozen=True)
class _Case:
    """One adapter (None: the base model) under one way to draw, and its answers with their prompts."""

    adapter: Path | None
    sampling: Sampling
    ours: list[Sample]
    scores: list[tuple[float, ...]]
    theirs: list[Sample]


def measure(config: ParityConfig) -> list[ParityRow]:
    """Return a row for each pair of programs, adapter and way to draw."""
    tokenizer, model = Tokenizer.load(config.model), load_model(config.model, DTYPES[config.dtype], config.device)
    adapters: list[Path | None] = [None] if config.adapter is None else [None, config.adapter]
    if config.adapter is not None:
        load_adapter(model, "adapter", config.adapter)
    rank = 0 if config.adapter is None else read_config(config.adapter).rank
    task = TaskConfig()
    setting = TaskSetting(dict.fromkeys(task.sizes, 0) | {"test": config.samples}, config.seed)
    questions = [e.fields["question"] for e in make_task(task.name, task.options, setting).examples("test")]
    prompts = [tokenizer.render((Message("user", text),), add_generation_prompt=True).ids for text in questions]

    async def answers(sampler: TokenSampler, sampling: Sampling, name: str | None) -> list[Sample]:
        return list(await asyncio.gather(*(sampler.generate(ids, sampling, name) for ids in prompts)))

    async def draw() -> list[_Case]:
        server = VllmServer(config.vllm, config.model, "controller", config.dtype, rank, config.log)
        cases = []
        with StatusLine() as line, Sampler(model, tokenizer) as sampler:
            vllm = Vllm(server, tokenizer, rank, line.show)
            try:
                for adapter in adapters:
                    name = None if adapter is None else vllm.register(adapter)
                    for temperature, top_p in DRAWN_AT:
                        sampling = Sampling(temperature, top_p, config.tokens, seed=config.seed)
                        ours = await answers(sampler, sampling, None if adapter is None else "adapter")
                        pairs = zip(prompts, ours, strict=True)
                        reading = (vllm.score(ids, sample.token_ids or (), name) for ids, sample in pairs)
                        scores = list(await asyncio.gather(*reading))
                        cases.append(_Case(adapter, sampling, ours, scores, await answers(vllm, sampling, name)))
            finally:
                await vllm.aclose()
        return cases

    rows = []
    for case in asyncio.run(draw()):
        with active(model, None if case.adapter is None else "adapter"), torch.no_grad():
            trained, trained_theirs = (
                [trainer_logps(model, completion(ids, sample)) for ids, sample in zip(prompts, samples, strict=True)]
                for samples in (case.ours, case.theirs)
            )
        ours, theirs = ([sample.logprobs or () for sample in samples] for samples in (case.ours, case.theirs))
        adapter = "none" if case.adapter is None else case.adapter.name
        sampling = f"temperature {case.sampling.temperature:g}, top-p {case.sampling.top_p:g}"
        for source, against, first, second in (
            ("our sampler, drawing", "trainer", ours, trained),
            ("vLLM, reading (prompt_logprobs)", "trainer", case.scores, trained),
            ("vLLM, reading (prompt_logprobs)", "our sampler, drawing", case.scores, ours),
            ("vLLM, drawing", "trainer", theirs, trained_theirs),
        ):
            found = difference([x for row in first for x in row], [x for row in second for x in row])
            rows.append(ParityRow(adapter, sampling, source, against, found))
    return rows
