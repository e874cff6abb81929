"""A control scheme of your own in one file: the shortest of three guidances that the policy draws.

    matryoshka pilot --config FILE --controller.scheme examples/own_scheme.py:ShortestOfThree

The scheme stands between the task and every policy of the run, in collection as in evaluation. It returns the policy's
own samples, token for token, so pairs are made of them and the policy is trained on them.
"""

from dataclasses import replace

from matryoshka.core.protocols import Controller
from matryoshka.core.records import Messages, Sample, Sampling


class ShortestOfThree:
    """A controller that asks another one three times. Its name ends with that of the policy, whose samples it gives."""

    def __init__(self, policy: Controller) -> None:
        self.policy = policy
        self.name = f"shortest-of-three-{policy.name}"

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n guidances, each the shortest of three draws."""
        drawn = await self.policy.propose(prompt, 3 * n, replace(sampling, draw=3 * sampling.draw))
        return [min(drawn[i : i + 3], key=lambda sample: len(sample.text)) for i in range(0, 3 * n, 3)]

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return the ids that the policy is conditioned on."""
        return self.policy.prompt_ids(prompt)

    def count_tokens(self, prompt: Messages) -> int:
        """Return the length of `prompt` in the policy's tokens."""
        return self.policy.count_tokens(prompt)
