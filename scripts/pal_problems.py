"""PAL's problems by split, made from the seed ("words") or read from GSM8K files ("gsm8k"), and the task over them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Example, PairRule
from matryoshka.scripts.run_config import RunConfig, TaskConfig
from matryoshka.tasks.pal import gsm8k, words
from matryoshka.tasks.pal.compact import COMPACT
from matryoshka.tasks.pal.prompts import FULL
from matryoshka.tasks.pal.task import PALTask

STYLES = {"compact": COMPACT, "full": FULL}


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the problems: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    return _words(config.task, config.seed) if config.task.name == "words" else _gsm8k(config.task)


def make_task(config: RunConfig, splits: Mapping[str, Sequence[Example]]) -> PALTask:
    """Return the task over the problems of `splits`."""
    task = config.task
    rule = PairRule("binary", cap=config.dpo.pairs_per_example)
    return PALTask(splits, STYLES[task.prompts], task.timeout_s, task.memory_mb * 2**20, rule)


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
