"""Reads word problems with numeric answers from JSONL files that the user has: GSM8K, PAL's form of it, GSM-Hard.

It downloads nothing and skips no row: a row that cannot be read is an error that names its file and line.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Example, content_key
from matryoshka.tasks.pal.answers import parse_gold
from matryoshka.tasks.pal.options import PalOptions

LARGEST = sys.float_info.max


def load_splits(options: PalOptions, setting: TaskSetting) -> dict[str, Sequence[Example]]:
    """Return the problems of each split in file order; warm-up, training and validation are cut from train_file.

    A warm-up on gold takes annotated rows alone, for it teaches their steps; the other splits take the rest.
    A held-out problem whose question is one of the test too (GSM-Hard leaves some of GSM8K's as they are) counts in
    both, with an id of its own.
    Raises FileNotFoundError, or ValueError for files that are malformed, too short or let training see a test problem.
    """
    sizes = setting.sizes
    train = _load(options, "train_file", sum(sizes[split] for split in ("warmup", "train", "validation")))
    test = _load(options, "test_file", sizes["test"])[: sizes["test"]]
    held_out = _load(options, "held_out_file", sizes["held_out"])[: sizes["held_out"]]
    warmup = [example for example in train if "steps" in example.fields or not setting.gold_warmup][: sizes["warmup"]]
    if len(warmup) < sizes["warmup"]:
        where = f"[task.options] train_file {options.train_file}"
        raise ValueError(f"{where} has {len(warmup)} annotated problems but the warm-up takes {sizes['warmup']}")
    taught = {example.id for example in warmup}
    rest = [example for example in train if example.id not in taught][: sizes["train"] + sizes["validation"]]
    known = taught | {example.id for example in rest}
    for name, examples in (("test_file", test), ("held_out_file", held_out)):
        if shared := known & {example.id for example in examples}:
            where = f"both train_file and {name}; training would see test"
            raise ValueError(f"[task.options] {len(shared)} questions stand in {where}")
    in_test = {example.id for example in test}
    held_out = [replace(e, id=content_key(e.id, "held_out")) if e.id in in_test else e for e in held_out]
    train, validation = rest[: sizes["train"]], rest[sizes["train"] :]
    return {"warmup": warmup, "train": train, "validation": validation, "test": test, "held_out": held_out}


def load(path: Path) -> list[Example]:
    """Return the problems of `path` in file order: {"question": str, "answer": int | float} and perhaps "steps".

    Rows are {"question", "answer"} with an answer that ends `#### N` (GSM8K), or {"input", "target"} with a number as
    target (PAL; GSM-Hard adds "code", which is not read). In GSM8K's Socratic form, whose lines are `QUESTION ** step`,
    the gold steps are these questions; in its plain form the calculator annotations `<<48/2=24>>` become the steps
    "What is 48/2?"; a row without either has none. The id is a key of the question's text, the same in every file; a
    question that comes again in one file gets an id of its own, so that every row counts.
    Raises FileNotFoundError, or ValueError naming file and line.
    """
    if not path.is_file():
        fetch = "`matryoshka data gsm8k` and `matryoshka data gsm-hard` fetch the published files"
        raise FileNotFoundError(f"{path}: no such file; expected word problems as JSONL; {fetch}")
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            fields = _parse(row)
        except ValueError as err:
            raise ValueError(f"{path}:{number}: {err}") from err
        question = fields["question"]
        key = content_key(question, seen[question]) if seen[question] else content_key(question)
        seen[question] += 1
        examples.append(Example(key, fields))
    return examples


def _load(options: PalOptions, name: str, count: int) -> list[Example]:
    """Return the problems of the file that the option `name` names, [] where the splits take none of it."""
    if not count:
        return []
    file = getattr(options, name)
    if not file:
        what = f"[task] takes {count} problems, but [task.options] {name} is empty"
        raise ValueError(f"{what}; give the path of a GSM8K or GSM-Hard JSONL file, or take no problems of it")
    examples = load(Path(file))
    if len(examples) < count:
        where = f"[task.options] {name} {file}"
        raise ValueError(f"{where} has {len(examples)} problems but the configuration takes {count}")
    return examples


def _parse(row: dict[str, Any]) -> dict[str, Any]:
    steps: list[str] = []
    if {"question", "answer"} <= row.keys():
        question, solution = row["question"], row["answer"]
        if not isinstance(solution, str):
            raise ValueError(f"'answer' is {type(solution).__name__}; expected a text that ends with '#### NUMBER'")
        answer: Any = parse_gold(solution)
        steps = re.findall(r"^(.*\S) \*\* ", solution, re.MULTILINE)
        steps = steps or [f"What is {text}?" for text in re.findall(r"<<([^=<>]+)=[^<>]*>>", solution)]
    elif {"input", "target"} <= row.keys():
        question, answer = row["input"], row["target"]
        if isinstance(answer, bool) or not isinstance(answer, int | float) or not abs(answer) <= LARGEST:
            raise ValueError(f"'target' is {answer!r}; expected a finite number")
    else:
        raise ValueError(
            f"the row has the keys {sorted(row)}; expected 'question' and 'answer', or 'input' and 'target'"
        )
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}; expected a text")
    return {"question": question, "answer": answer, **({"steps": steps} if steps else {})}
