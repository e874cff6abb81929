"""The task of a run: its problems by split and its prompts, as [task] in the configuration says."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Example, Messages, PairRule
from matryoshka.scripts.run_config import RunConfig, TaskConfig
from matryoshka.tasks.pal import gsm8k, words
from matryoshka.tasks.pal.compact import COMPACT
from matryoshka.tasks.pal.prompts import FULL
from matryoshka.tasks.pal.task import PALTask

STYLES = {"compact": COMPACT, "full": FULL}


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the problems of the run: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    return _words(config.task, config.seed) if config.task.name == "words" else _gsm8k(config.task)


def make_task(
    config: RunConfig,
    splits: Mapping[str, Sequence[Example]],
    count_tokens: Callable[[Messages], int],
    context_length: int,
) -> tuple[PALTask, dict[str, int]]:
    """Return the task over the problems of `splits` that fit, and how many of each split are left out.

    A problem fits if the controller's first prompt and guidance_tokens fit the context together: the sampler's own
    comparison, made before anything is drawn, so that every condition has the same problems. With overlong = "error"
    the first that does not fit raises ValueError; so does a split that "skip" would leave without problems.
    """
    task, style = config.task, STYLES[config.task.prompts]
    room = context_length - config.rollout.guidance_tokens
    kept: dict[str, Sequence[Example]] = {}
    for split, examples in splits.items():
        sizes = [count_tokens(style.guidance(example.fields["question"])) for example in examples]
        kept[split] = [example for example, size in zip(examples, sizes, strict=True) if size <= room]
        if len(kept[split]) < len(examples) and (config.overlong == "error" or not kept[split]):
            raise ValueError(
                f"[task] {split}: {len(examples) - len(kept[split])} of {len(examples)} prompts (the longest has "
                f"{max(sizes)} tokens) and guidance_tokens {config.rollout.guidance_tokens} exceed the controller's "
                f"context of {context_length}; lower guidance_tokens, use shorter problems or set overlong = 'skip'"
            )
    left_out = {split: n for split, examples in splits.items() if (n := len(examples) - len(kept[split]))}
    rule = PairRule("binary", cap=config.dpo.pairs_per_example)
    return PALTask(kept, style, task.timeout_s, task.memory_mb * 2**20, rule), left_out


def _words(task: TaskConfig, seed: int) -> dict[str, Sequence[Example]]:
    both = words.load("train", task.warmup + task.train, seed)
    return {
        "warmup": both[: task.warmup],
        "train": both[task.warmup :],
        "validation": words.load("validation", task.validation, seed),
        "test": words.load("test", task.test, seed),
        "held_out": words.load("held_out", task.held_out, seed),
    }


def _gsm8k(task: TaskConfig) -> dict[str, Sequence[Example]]:
    needed = task.warmup + task.train + task.validation
    train, test = _read(task.train_file, "train_file", needed), _read(task.test_file, "test_file", task.test)
    if shared := {example.id for example in train} & {example.id for example in test}:
        where = "both train_file and test_file; training would see test"
        raise ValueError(f"[task] {len(shared)} questions stand in {where}")
    warmup, rest = train[: task.warmup], train[task.warmup :]
    return {
        "warmup": warmup,
        "train": rest[: task.train],
        "validation": rest[task.train :],
        "test": test,
        "held_out": [],
    }


def _read(file: str, key: str, count: int) -> list[Example]:
    if not file:
        raise ValueError(f"[task] {key} is empty; give the path of a GSM8K or GSM-Hard JSONL file")
    examples = gsm8k.load(Path(file))
    if len(examples) < count:
        raise ValueError(f"[task] {key} {file} has {len(examples)} problems but the configuration takes {count}")
    solutions = [str(row.get("answer", "")) for row in read_jsonl(Path(file))]
    return [_with_steps(*pair) for pair in zip(examples[:count], solutions, strict=False)]


def _with_steps(example: Example, solution: str) -> Example:
    """Add GSM8K's calculator annotations `<<48/2=24>>` as gold sub-questions; a row without any has none."""
    steps = [f"What is {text}?" for text in re.findall(r"<<([^=<>]+)=[^<>]*>>", solution)]
    return replace(example, fields={**example.fields, "steps": steps}) if steps else example
