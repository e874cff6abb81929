"""PAL's problems by split, made from the seed ("words") or read from GSM8K files ("gsm8k"), and the task over them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka.core.files import read_jsonl
from matryoshka.core.protocols import Generator
from matryoshka.core.records import Example, Messages, PairRule
from matryoshka.pilot.config import RunConfig, TaskConfig
from matryoshka.tasks.pal import gsm8k
from matryoshka.tasks.pal import synthetic_problems as words
from matryoshka.tasks.pal.compact import COMPACT
from matryoshka.tasks.pal.prompts import FULL
from matryoshka.tasks.pal.task import PALTask
from matryoshka.tasks.sandbox_backends import SCRIPT, sandbox_of

STYLES = {"compact": COMPACT, "full": FULL}


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the problems: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    return _words(config.task, config.seed) if config.task.name == "words" else _gsm8k(config)


def make_task(
    config: RunConfig, splits: Mapping[str, Sequence[Example]], count_tokens: Callable[[Messages], int]
) -> PALTask:
    """Return the task over the problems of `splits`."""
    task = config.task
    rule = PairRule("binary", cap=config.dpo.pairs_per_example)
    sandbox = sandbox_of(task.isolation, task.sandbox_command)
    sandbox.start(SCRIPT)
    memory_bytes = task.memory_mb * 2**20
    return PALTask(splits, STYLES[task.prompts], task.timeout_s, memory_bytes, rule, sandbox=sandbox)


def scripted_generator(name: str) -> Generator:
    """Raise ValueError: programs are written by models only."""
    raise ValueError(f"[serve] scripted {name!r}: the tasks 'words' and 'gsm8k' have no scripted generator")


def _words(task: TaskConfig, seed: int) -> dict[str, Sequence[Example]]:
    both = words.load("train", task.warmup + task.train, seed)
    return {
        "warmup": both[: task.warmup],
        "train": both[task.warmup :],
        "validation": words.load("validation", task.validation, seed),
        "test": words.load("test", task.test, seed),
        "held_out": words.load("held_out", task.held_out, seed),
    }


def _gsm8k(config: RunConfig) -> dict[str, Sequence[Example]]:
    task, gold = config.task, config.warmup.source == "gold"
    needed = task.warmup + task.train + task.validation
    train = _read(task.train_file, "train_file", needed)
    test = _read(task.test_file, "test_file", task.test)[: task.test]
    # A warm-up problem teaches its steps, so rows without annotations are left to the other splits.
    warmup = [example for example in train if "steps" in example.fields or not gold][: task.warmup]
    if len(warmup) < task.warmup:
        where = f"[task] train_file {task.train_file}"
        raise ValueError(f"{where} has {len(warmup)} annotated problems but the warm-up takes {task.warmup}")
    taught = {example.id for example in warmup}
    rest = [example for example in train if example.id not in taught][: task.train + task.validation]
    if shared := (taught | {example.id for example in rest}) & {example.id for example in test}:
        where = "both train_file and test_file; training would see test"
        raise ValueError(f"[task] {len(shared)} questions stand in {where}")
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
    return [_with_steps(*pair) for pair in zip(examples, solutions, strict=True)]


def _with_steps(example: Example, solution: str) -> Example:
    """Add GSM8K's calculator annotations `<<48/2=24>>` as gold sub-questions; a row without any has none."""
    steps = [f"What is {text}?" for text in re.findall(r"<<([^=<>]+)=[^<>]*>>", solution)]
    return replace(example, fields={**example.fields, "steps": steps}) if steps else example
