"""A sampler in its two roles: the white-box controller of a rollout, and the engine behind the HTTP server."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from matryoshka.core.records import Messages, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.sampler import Sampler


class TokenSampler(Protocol):
    """A sampler of a white-box model's tokens: `inference.sampler.Sampler`, or `inference.vllm.Vllm`."""

    tokenizer: Tokenizer

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Sample:
        """Return one draw with token ids and log-probs; the seed is a function of prompt, seed and draw."""
        ...


class LocalController:
    """A core.protocols.Controller: `sampler`'s model under `adapter` (None: the base model).

    name must change when the weights change, because recorded episodes are found by it.
    """

    def __init__(self, sampler: TokenSampler, adapter: str | None, name: str) -> None:
        self.name = name
        self._sampler = sampler
        self._adapter = adapter

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n completions, draws sampling.draw .. sampling.draw + n - 1."""
        ids = self.prompt_ids(prompt)
        draws = [replace(sampling, draw=sampling.draw + i) for i in range(n)]
        return list(await asyncio.gather(*(self._sampler.generate(ids, draw, self._adapter) for draw in draws)))

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...]:
        return self._sampler.tokenizer.render(prompt, add_generation_prompt=True).ids

    def count_tokens(self, prompt: Messages) -> int:
        return len(self.prompt_ids(prompt))


class LocalEngine:
    """The engine of `inference/server.py`: it maps served names to the sampler's adapters (None: the base model)."""

    def __init__(self, sampler: Sampler, adapters: Mapping[str, str | None]) -> None:
        self.tokenizer = sampler.tokenizer
        self.context_length = sampler.context_length
        self._sampler = sampler
        self._adapters = dict(adapters)

    def models(self) -> list[str]:
        return list(self._adapters)

    def illness(self) -> str:
        return self._sampler.illness

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        """Return one draw of `model`, which must be one of `models()`."""
        return await self._sampler.generate(prompt_ids, sampling, self._adapters[model])
