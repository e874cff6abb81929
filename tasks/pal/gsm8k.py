"""Reads word problems with numeric answers from JSONL files that the user has: GSM8K, PAL's form of it, GSM-Hard.

It downloads nothing and skips no row: a row that cannot be read is an error that names its file and line.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Example, content_key
from matryoshka.tasks.pal.answers import parse_gold

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Files:
    """Where a run's word problems are: warm-up, training and validation are cut from `train`; None where none is taken.

    held_out: further test problems of another kind.
    """

    train: Path | None
    test: Path | None
    held_out: Path | None = None


def load_splits(files: Files, sizes: Mapping[str, int], gold_warmup: bool) -> dict[str, Sequence[Example]]:
    """Return the problems of each split in file order.

    gold_warmup: the warm-up takes annotated rows alone, for it teaches their steps; the other splits take the rest.
    A held-out problem whose question is one of the test too (GSM-Hard leaves some of GSM8K's as they are) counts in
    both, with an id of its own.
    Raises FileNotFoundError, or ValueError for files that are malformed, too short or let training see a test problem.
    """
    train_file, test_file = files.train, files.test
    train = _load(train_file, "train_file", sum(sizes[split] for split in ("warmup", "train", "validation")))
    test = _load(test_file, "test_file", sizes["test"])[: sizes["test"]]
    warmup = [example for example in train if "steps" in example.fields or not gold_warmup][: sizes["warmup"]]
    if len(warmup) < sizes["warmup"]:
        where = f"[task.options] train_file {train_file}"
        raise ValueError(f"{where} has {len(warmup)} annotated problems but the warm-up takes {sizes['warmup']}")
    taught = {example.id for example in warmup}
    rest = [example for example in train if example.id not in taught][: sizes["train"] + sizes["validation"]]
    held_out: list[Example] = []
    if count := sizes["held_out"]:
        if files.held_out is None:
            what = f"[task] held_out {count}, but [task.options] held_out_file is empty"
            raise ValueError(f"{what}; name a JSONL file of further test problems, or set held_out = 0")
        held_out = _load(files.held_out, "held_out_file", count)[:count]
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


def _load(path: Path | None, key: str, count: int) -> list[Example]:
    if path is None:
        return []
    examples = load(path)
    if len(examples) < count:
        where = f"[task.options] {key} {path}"
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
