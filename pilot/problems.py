"""The task of a run, and those of its problems that fit the controller's context."""

from collections.abc import Callable, Mapping, Sequence

from matryoshka.core.protocols import Task, TaskSetting
from matryoshka.core.records import Example, Messages
from matryoshka.pilot.config import SPLITS, RunConfig, rollout_settings
from matryoshka.tasks.find import task_class

Problems = Mapping[str, Sequence[Example]]


def open_task(config: RunConfig, count_tokens: Callable[[Messages], int]) -> Task:
    """Return the task that [task] names. count_tokens: of a prompt in the controller's context.

    Raises ValueError for options or settings that the task does not have.
    """
    wants_gold = config.warmup.source == "gold" or config.warmup.gold_per_group > 0
    setting = TaskSetting(config.task.sizes, config.seed, count_tokens, wants_gold)
    task = task_class(config.task.name)(config.task.options, setting)
    for greedy in (False, True):
        task.check(rollout_settings(config, greedy))
    return task


def load_problems(task: Task) -> Problems:
    """Return the problems of each split: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    return {split: task.examples(split) for split in SPLITS}


def fitting_problems(
    config: RunConfig, task: Task, problems: Problems, context_length: int
) -> tuple[Problems, dict[str, int]]:
    """Return the problems that fit the context, and how many of each split are left out.

    A problem fits if the controller's first prompt and guidance_tokens fit the context together. That is the sampler's
    own comparison, made before anything is drawn, so that every condition has the same problems. With overlong =
    "error" the first one that does not fit raises ValueError; so does a split that "skip" would leave without problems.
    """
    guidance_tokens = max(rollout_settings(config, greedy).controller.max_tokens for greedy in (False, True))
    room = context_length - guidance_tokens
    kept: dict[str, Sequence[Example]] = {}
    for split, examples in problems.items():
        sizes = [task.setting.count_tokens(task.first_prompt(example)) for example in examples]
        kept[split] = [example for example, size in zip(examples, sizes, strict=True) if size <= room]
        if len(kept[split]) < len(examples) and (config.overlong == "error" or not kept[split]):
            raise ValueError(
                f"[task] {split}: {len(examples) - len(kept[split])} of {len(examples)} prompts (the longest has "
                f"{max(sizes)} tokens) and guidance_tokens {guidance_tokens} exceed the controller's "
                f"context of {context_length}; lower guidance_tokens, use shorter problems or set overlong = 'skip'"
            )
    return kept, {split: n for split, examples in problems.items() if (n := len(examples) - len(kept[split]))}
