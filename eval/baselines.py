"""Control schemes that need no model: no guidance at all, and guidance fixed in advance.

They stand where a trained controller would and run through the same loop, so what separates two rows of a report is
the guidance alone. Neither ever calls a model, and neither answers a prompt that it was not made for.
"""

from collections.abc import Mapping

from matryoshka.core.records import Messages, Sample, Sampling


class NoGuidance:
    """Controller that says nothing: the generator works from the question alone."""

    name = "no-guidance"

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n empty samples."""
        return [Sample("")] * n

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return None: there is no tokenizer."""
        return None

    def count_tokens(self, prompt: Messages) -> int:
        """Return 0: nothing reads the prompt."""
        return 0


class ScriptedGuidance:
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

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return None: there is no tokenizer."""
        return None

    def count_tokens(self, prompt: Messages) -> int:
        """Return 0: nothing reads the prompt."""
        return 0
