"""The task of a run and its problems by split, as [task] in the configuration says; `PROBLEMS` names the tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from matryoshka.core.protocols import Generator, Task
from matryoshka.core.records import Example, Messages
from matryoshka.pilot import alfworld_problems, lamp_problems, pal_problems
from matryoshka.pilot.config import RunConfig, TaskConfig


class Problems(Protocol):
    """What a module of problems exports."""

    def load_splits(self, config: RunConfig) -> dict[str, Sequence[Example]]:
        """Return the problems: warmup, train, validation, test, held_out."""
        ...

    def make_task(
        self, config: RunConfig, splits: Mapping[str, Sequence[Example]], count_tokens: Callable[[Messages], int]
    ) -> Task:
        """Return the task over the problems of `splits`; count_tokens: of a prompt in the controller's context."""
        ...

    def scripted_generator(self, name: str) -> Generator:
        """Return the scripted generator `name`. Raises ValueError naming those that there are."""
        ...


PROBLEMS: dict[str, Problems] = {
    "words": pal_problems,
    "gsm8k": pal_problems,
    "alfworld": alfworld_problems,
    "lamp": lamp_problems,
}


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the problems of the run: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    return PROBLEMS[config.task.name].load_splits(config)


def make_task(
    config: RunConfig,
    splits: Mapping[str, Sequence[Example]],
    count_tokens: Callable[[Messages], int],
    context_length: int,
) -> tuple[Task, dict[str, int]]:
    """Return the task over the problems of `splits` that fit, and how many of each split are left out.

    A problem fits if the controller's first prompt and guidance_tokens fit the context together: the sampler's own
    comparison, made before anything is drawn, so that every condition has the same problems. With overlong = "error"
    the first that does not fit raises ValueError; so does a split that "skip" would leave without problems.
    """
    problems = PROBLEMS[config.task.name]
    task = problems.make_task(config, splits, count_tokens)
    room = context_length - config.rollout.guidance_tokens
    kept: dict[str, Sequence[Example]] = {}
    for split, examples in splits.items():
        sizes = [count_tokens(task.first_prompt(example)) for example in examples]
        kept[split] = [example for example, size in zip(examples, sizes, strict=True) if size <= room]
        if len(kept[split]) < len(examples) and (config.overlong == "error" or not kept[split]):
            raise ValueError(
                f"[task] {split}: {len(examples) - len(kept[split])} of {len(examples)} prompts (the longest has "
                f"{max(sizes)} tokens) and guidance_tokens {config.rollout.guidance_tokens} exceed the controller's "
                f"context of {context_length}; lower guidance_tokens, use shorter problems or set overlong = 'skip'"
            )
    left_out = {split: n for split, examples in splits.items() if (n := len(examples) - len(kept[split]))}
    return problems.make_task(config, kept, count_tokens), left_out


def scripted_generator(task: TaskConfig, name: str) -> Generator:
    """Return the task's scripted generator `name`. Raises ValueError naming those that it has."""
    return PROBLEMS[task.name].scripted_generator(name)
