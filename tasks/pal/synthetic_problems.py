"""Makes multi-step word problems with gold steps and gold programs from templates and a seed.

Families are in `problem_templates.toml`. Training and test are kept apart: every wording (opening, event and question
together) and every (family, numbers) tuple belongs to one split, by its hash, and two families are held out whole. So
no wording and no (family, numbers) tuple of the test occurs in training. Single clauses do, so a test problem is a new
combination.
"""

import random
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.core.records import Example, content_key, stable_seed

SPLITS = ("train", "validation", "test", "held_out")


@dataclass(frozen=True)
class Family:
    """Problems of one kind. numbers: the choices for each; clauses: those of opening, event and question."""

    name: str
    numbers: Mapping[str, Sequence[int]]
    clauses: tuple[Sequence[str], ...]
    steps: Sequence[str]
    expressions: Sequence[str]
    new_divisor: bool = False
    """R is neither P nor Q."""

    def fits(self, values: Mapping[str, int]) -> bool:
        """Return whether the result of each step is a positive whole number."""
        found = results(text.format(**values) for text in self.expressions)
        is_new = values["R"] not in (values["P"], values["Q"])
        return all(value > 0 and value.is_integer() for value in found) and (is_new or not self.new_divisor)


def _family(data: dict[str, Any], clauses: Mapping[str, Sequence[str]]) -> Family:
    numbers = {
        name: range(found["first"], found["last"] + 1) if "first" in found else found["of"]
        for name, found in data["numbers"].items()
    }
    chosen = tuple(clauses[name] for name in data["clauses"])
    return Family(**data | {"numbers": numbers, "clauses": chosen})


_DATA = tomllib.loads(Path(__file__).with_name("problem_templates.toml").read_text(encoding="utf-8"))
NAMES, ITEMS, HELD_OUT = _DATA["names"], _DATA["items"], _DATA["held_out"]
FAMILIES = tuple(_family(data, _DATA["clauses"]) for data in _DATA["families"])


@dataclass(frozen=True)
class Problem:
    """One word problem. steps: gold sub-questions, one per program line. expressions: "4 * 6", "a - 5", ..."""

    family: str
    numbers: tuple[int, ...]
    question: str
    steps: tuple[str, ...]
    expressions: tuple[str, ...]
    answer: float

    @property
    def program(self) -> str:
        return program(self.expressions)

    def example(self) -> Example:
        fields = {
            "question": self.question,
            "answer": self.answer,
            "steps": list(self.steps),
            "program": self.program,
            "family": self.family,
            "numbers": list(self.numbers),
        }
        return Example(content_key("words", self.question), fields)


def program(expressions: Iterable[str]) -> str:
    """Return the `solution()` that computes the expressions line by line into a, b, c, ... and returns the last."""
    lines = [f"    {chr(ord('a') + i)} = {text}" for i, text in enumerate(expressions)]
    return "\n".join(["def solution():", *lines, f"    return {lines[-1].strip()[0]}"])


def partition(*parts: object) -> str:
    """Return the split that owns these numbers or this wording: 60% train, 10% validation, 30% test, by hash."""
    bucket = stable_seed("partition", *parts) % 10
    return "train" if bucket < 6 else "validation" if bucket < 7 else "test"


def problems(split: str, n: int, seed: int) -> list[Problem]:
    """Return n different problems of `split`, families in turn, a pure function of (split, n, seed).

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"words: unknown split {split!r}; choose from {list(SPLITS)}")
    families = [f for f in FAMILIES if (f.name in HELD_OUT) == (split == "held_out")]
    wording_split = "test" if split == "held_out" else split
    draws = random.Random(stable_seed("words", split, seed))
    found: dict[str, Problem] = {}
    while len(found) < n:
        family = families[len(found) % len(families)]
        problem = draw(family, wording_split, draws)
        if problem is not None:
            found.setdefault(problem.question, problem)
    return list(found.values())


def load_splits(sizes: Mapping[str, int], seed: int) -> dict[str, Sequence[Example]]:
    """Return the problems of each split of a run; warm-up and training problems are different ones of "train"."""
    both = load("train", sizes["warmup"] + sizes["train"], seed)
    others = {split: load(split, sizes[split], seed) for split in ("validation", "test", "held_out")}
    return {"warmup": both[: sizes["warmup"]], "train": both[sizes["warmup"] :], **others}


def load(split: str, n: int, seed: int) -> list[Example]:
    """Return `problems` as examples with fields question, answer, steps, program, family, numbers."""
    return [problem.example() for problem in problems(split, n, seed)]


def draw(family: Family, split: str, draws: random.Random) -> Problem | None:
    """Return one problem, or None if its numbers do not fit or it belongs to another split."""
    values = {key: draws.choice(choices) for key, choices in family.numbers.items()}
    if not family.fits(values) or partition(family.name, tuple(values.values())) != split:
        return None
    clauses = tuple(draws.choice(choices) for choices in family.clauses)
    if partition(family.name, clauses) != split:
        return None
    name, other = draws.sample(NAMES, 2)
    item, second = draws.sample(ITEMS, 2)
    words = {**values, "name": name, "other": other, "item": item, "second": second}
    expressions = tuple(text.format(**words) for text in family.expressions)
    return Problem(
        family=family.name,
        numbers=tuple(values.values()),
        question=" ".join(clauses).format(**words),
        steps=tuple(text.format(**words) for text in family.steps),
        expressions=expressions,
        answer=results(expressions)[-1],
    )


def results(expressions: Iterable[str]) -> list[float]:
    """Return the values of "left op right" expressions over integers and earlier results a, b, c, ..."""
    values: list[float] = []
    for text in expressions:
        left, op, right = text.split(" ")
        x, y = (values[ord(word) - ord("a")] if word.isalpha() else float(word) for word in (left, right))
        values.append({"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else float("nan")}[op])
    return values
