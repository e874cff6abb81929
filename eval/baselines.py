"""Control schemes that need no trained model: no guidance, fixed guidance, and a generator that guides itself.

They take the place of a trained controller in the same loop, so two rows of a report differ in the guidance alone.
"""

from collections.abc import Mapping
from dataclasses import replace

from matryoshka.core.protocols import Controller, Generator
from matryoshka.core.records import Messages, Sample, Sampling
from matryoshka.core.text.reasoning import without_reasoning


class NoGuidance(Controller):
    """Controller that says nothing: the generator works from the question alone."""

    name = "no-guidance"

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n empty samples."""
        return [Sample("")] * n


class ScriptedGuidance(Controller):
    """Controller with one fixed text for each prompt: gold guidance as a ceiling, wrong guidance as a floor."""

    def __init__(self, name: str, table: Mapping[Messages, str]) -> None:
        self.name = name
        self._table = dict(table)

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n times the text of `prompt`. Raises ValueError if the prompt is not in the table."""
        if prompt not in self._table:
            said = prompt[-1].content if prompt else ""
            raise ValueError(
                f"{self.name}: no guidance is scripted for the prompt that ends in {said[-80:]!r} "
                f"({len(self._table)} prompts are); add it to the table"
            )
        return [Sample(self._table[prompt])] * n


class GeneratorGuidance(Controller):
    """Controller that asks the generator itself: a baseline, and the teacher of a warm-up where no gold is known."""

    def __init__(self, generator: Generator) -> None:
        self.name = f"own-guidance-of-{generator.name}"
        self._generator = generator

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return the generator's answers without their reasoning, draws sampling.draw .. sampling.draw + n - 1.

        A controller may be trained on them, and it should not learn to think aloud.
        """
        drawn = [await self._generator.complete(prompt, replace(sampling, draw=sampling.draw + i)) for i in range(n)]
        return [replace(sample, text=without_reasoning(sample.text)) for sample in drawn]
