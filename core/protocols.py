"""The three interfaces that meet in a rollout: white-box controller, black-box generator, task."""

from collections.abc import Sequence
from typing import Protocol

from matryoshka.core.records import (
    Example,
    Messages,
    Metric,
    PairRule,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
)


class Controller(Protocol):
    """White-box policy: writes guidance."""

    name: str

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n completions of `prompt`; completion i is draw `sampling.draw + i` of `sampling.seed`."""
        ...

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return the ids that `propose` is conditioned on, or None where the model is not ours to see."""
        ...

    def count_tokens(self, prompt: Messages) -> int:
        """Return how many tokens `prompt` takes in this controller's context."""
        ...


class Generator(Protocol):
    """Black box: text in, text out, nothing else."""

    name: str

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return one completion. Raises GeneratorError when retries are exhausted, RunStopped when the budget is."""
        ...


class GeneratorError(RuntimeError):
    """A black-box call that failed for good: it fails its episode, which is recorded with the reason, never the run."""


class RunStopped(RuntimeError):
    """The run ends here by intent, a spent budget or the user's wish; what it has is kept and it can be continued."""


class ContextError(ValueError):
    """A prompt and its completion that do not fit the model's context together."""


class Task(Protocol):
    """A benchmark: its problems, its loop, its scores.

    main_metric: the name in `score` that choices are made by, higher being better. Every episode's info has protocol,
    verdict ("right", "wrong", "error", "failed"), calls, prompt_tokens and completion_tokens; every example's fields
    have "question" and "answer", which the report shows.
    """

    name: str
    version: int
    pair_rule: PairRule
    main_metric: str

    def examples(self, split: str) -> Sequence[Example]: ...

    def first_prompt(self, example: Example) -> Messages:
        """Return what the controller sees first; it decides whether the example fits the context."""
        ...

    def gold_guidance(self, example: Example) -> str | None:
        """Return guidance known to be right, for warm-up and as the ceiling of the report; None where none is known."""
        ...

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory: ...

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]: ...
