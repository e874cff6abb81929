"""The task of a run: its problems by split and its prompts, as [task] in the configuration says."""

import re
from collections.abc import Sequence
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


def make_task(config: RunConfig) -> PALTask:
    """Return the run's task with splits warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    task = config.task
    splits = _words(task, config.seed) if task.name == "words" else _gsm8k(task)
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
        raise ValueError(f"[task] {len(shared)} questions stand in both train_file and test_file; training would see test")
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
    rows = read_jsonl(Path(file))
    return [_with_steps(example, str(row.get("answer", ""))) for example, row in zip(examples[:count], rows, strict=False)]


def _with_steps(example: Example, solution: str) -> Example:
    """Add GSM8K's calculator annotations `<<48/2=24>>` as gold sub-questions; a row without any has none."""
    steps = [f"What is {text}?" for text in re.findall(r"<<([^=<>]+)=[^<>]*>>", solution)]
    return replace(example, fields={**example.fields, "steps": steps}) if steps else example
