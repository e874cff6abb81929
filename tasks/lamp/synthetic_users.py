"""Makes users in LaMP's format, for all five tasks, whose questions can be answered from their histories alone.

A user has habits: keys (a topic, a theme, a word of judgement, a research area) and the usual value of each (a
category, a tag, a score, a pattern of headlines), drawn at random. Most entries of the history follow them and some do
not, so a habit is the majority of its entries; the question is about one of the keys and its answer is the habit.
Training and test are kept apart: a user's habits belong to one split, by their hash.
"""

import random
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from matryoshka.core.records import stable_seed
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.prompt_style import Line
from matryoshka.tasks.lamp.task_specs import CATEGORIES, TAGS, Kind

SPLITS = ("train", "validation", "test")
HABITS = 3
STRAY = 0.5  # share of the habits that one entry of the history goes against

_WORDS = SimpleNamespace(**tomllib.loads(Path(__file__).with_name("synthetic_users.toml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Fixture:
    """One question of a made-up user, and the habits that decide it: key -> usual value."""

    item: Item
    habits: tuple[tuple[str, str], ...]

    def summary(self, lines: Sequence[Line]) -> str:
        """Return the habits as a summary of `lines`, in the order in which the lines speak of them."""
        texts = [body.casefold() for body, _ in lines]
        first = {key: next((i for i, text in enumerate(texts) if key in text), len(texts)) for key, _ in self.habits}
        ordered = sorted(self.habits, key=lambda habit: first[habit[0]])
        if not ordered[0][1]:
            return "; ".join(key for key, _ in ordered)
        return "\n".join(f"{key}: {value}" for key, value in ordered)


def fixtures(kind: Kind, split: str, n: int, seed: int) -> list[Fixture]:
    """Return n questions of n different users of `split`, a pure function of (task, split, n, seed).

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"LaMP fixtures: split {split!r} is unknown; choose from {SPLITS}")
    draws = random.Random(stable_seed("lamp", kind.name, split, seed))
    users: dict[tuple[tuple[str, str], ...], Fixture] = {}
    while len(users) < n:
        habits = _HABITS[kind.name](draws)
        if habits not in users and _split_of(kind, habits) == split:
            users[habits] = Fixture(_item(kind, f"{split}_{len(users)}", habits, draws), habits)
    return list(users.values())


def _split_of(kind: Kind, habits: object) -> str:
    bucket = stable_seed("lamp user", kind.name, habits) % 10
    return "train" if bucket < 6 else "validation" if bucket < 7 else "test"


Habits = tuple[tuple[str, str], ...]


def _any(keys: Sequence[str], values: Sequence[str]) -> Callable[[random.Random], Habits]:
    def draw(draws: random.Random) -> Habits:
        return tuple(zip(sorted(draws.sample(keys, HABITS)), draws.sample(values, HABITS), strict=True))

    return draw


def _scale(draws: random.Random) -> Habits:
    """Return words of rising quality with rising scores: a harsh or a generous user, never a contrary one."""
    words = [draws.choice(_WORDS.qualities[level]) for level in sorted(draws.sample(range(5), HABITS))]
    return tuple(zip(words, map(str, sorted(draws.sample(range(1, 6), HABITS))), strict=True))


def _interests(draws: random.Random) -> Habits:
    return tuple((area, "") for area in sorted(draws.sample(_WORDS.areas, HABITS)))


_HABITS = {
    "1": _interests,
    "2N": _any(_WORDS.topics, CATEGORIES),
    "2M": _any(_WORDS.themes, TAGS),
    "3": _scale,
    "4": _any(_WORDS.beats, _WORDS.patterns),
}


def _item(kind: Kind, id: str, habits: Habits, draws: random.Random) -> Item:
    values = [value for _, value in habits]
    asked, answer = draws.choice(habits)
    history = [habit for habit in habits for _ in range(draws.choice((2, 3)))]
    other = ""
    if kind.name == "1":  # an area with a single paper is no interest
        other, another = draws.sample([area for area in _WORDS.areas if (area, "") not in habits], 2)
        history += [(other, ""), (another, "")]
    else:
        strays = [key for key, _ in habits if draws.random() < STRAY]
        majority = {key: value for key, value in habits}
        history += [(key, draws.choice([v for v in values if v != majority[key]])) for key in strays]
        history += [habit for habit in habits if habit[0] in strays and history.count(habit) < 3]  # no tie, ever
    draws.shuffle(history)
    profile = [_entry(kind, key, value, draws) for key, value in history]
    dated = [{**row, "id": f"{id}-{i}", "date": f"2020-01-{i + 1:02}"} for i, row in enumerate(profile)]
    question, gold = _question(kind, asked, answer, other, draws)
    return Item(id, question, dated, gold)


def _entry(kind: Kind, key: str, value: str, draws: random.Random) -> dict[str, str]:
    if kind.name == "1":
        return {"title": f"{draws.choice(_WORDS.studies)} {key}", "abstract": f"We study {key}."}
    if kind.name == "2N":
        return {"title": "", "text": f"{draws.choice(_WORDS.leads)} {key}", "category": value}
    if kind.name == "2M":
        text = f"{draws.choice(_WORDS.manners)} {key} film for {draws.choice(_WORDS.audiences)}."
        return {"description": text, "tag": value}
    if kind.name == "3":
        return {"text": f"The {draws.choice(_WORDS.goods)} is {key}.", "score": value}
    subject = draws.choice(_WORDS.subjects)
    return {"text": f"{subject} is new in {key}.", "title": value.replace("X", subject)}


def _question(kind: Kind, key: str, value: str, other: str, draws: random.Random) -> tuple[str, str]:
    """Return a question about `key` and its gold answer; in LaMP-1 `other` is the area of the wrong reference."""
    if kind.name == "1":
        references = [f"{draws.choice(_WORDS.studies)} {key}", f"{draws.choice(_WORDS.studies)} {other}"]
        gold = draws.choice(kind.labels)
        return kind.ask(draws.choice(_WORDS.neutral), *(references if gold == "[1]" else references[::-1])), gold
    if kind.name == "2N":
        return kind.ask(f"Everyone in town talks about {key} now."), value
    row = _entry(kind, key, value, draws)
    return kind.ask(row[kind.texts[-1]]), row[kind.value]
