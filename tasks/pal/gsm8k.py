"""Reads word problems with numeric answers from JSONL files that the user has: GSM8K, PAL's form of it, GSM-Hard.

Nothing is downloaded and nothing is skipped: a row that cannot be read is an error with its file and line.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Example, content_key
from matryoshka.tasks.pal.answers import parse_gold

LARGEST = sys.float_info.max


def load(path: Path) -> list[Example]:
    """Return the problems of `path` in file order, with fields {"question": str, "answer": int | float}.

    Rows are {"question", "answer"} with an answer that ends `#### N` (GSM8K), or {"input", "target"} with a number as
    target (PAL; GSM-Hard adds "code", which is not read). The id is a key of the question's text, the same in every
    file; a question that comes again in one file gets an id of its own, so that every row counts.
    Raises FileNotFoundError, or ValueError naming file and line.
    """
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            question, answer = _parse(row)
        except ValueError as err:
            raise ValueError(f"{path}:{number}: {err}") from err
        key = content_key(question, seen[question]) if seen[question] else content_key(question)
        seen[question] += 1
        examples.append(Example(key, {"question": question, "answer": answer}))
    return examples


def _parse(row: dict[str, Any]) -> tuple[str, float | int]:
    if {"question", "answer"} <= row.keys():
        question, solution = row["question"], row["answer"]
        if not isinstance(solution, str):
            raise ValueError(f"'answer' is {type(solution).__name__}; expected a text that ends with '#### NUMBER'")
        answer: Any = parse_gold(solution)
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
    return question, answer
