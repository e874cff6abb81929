"""synthetic_users.py: users whose histories decide the answer, measured by the scripted reader; disjoint splits."""

import statistics
from collections import Counter

import pytest

from matryoshka.tasks.lamp.prompt_style import line
from matryoshka.tasks.lamp.retrieval import bm25
from matryoshka.tasks.lamp.rewards import judge
from matryoshka.tasks.lamp.scripted_generator import read
from matryoshka.tasks.lamp.splits import make_example
from matryoshka.tasks.lamp.synthetic_users import HABITS, SPLITS, Fixture, fixtures
from matryoshka.tasks.lamp.task_specs import KINDS, Kind

N = 60


def score(kind: Kind, fixture: Fixture, known: str) -> float:
    judged = judge(kind, read(kind, known, fixture.item.question), fixture.item.gold)
    return judged.reward if judged.score is None else judged.score


@pytest.mark.parametrize("name", KINDS)
def test_the_history_decides_and_nothing_else(name: str) -> None:
    """Oracle: the reader, which knows only the summary: all right with a user's own habits, lost with another's."""
    kind = KINDS[name]
    if name == "4":
        pytest.importorskip("rouge_score")
    made = fixtures(kind, "test", N, 0)
    summaries = [row.summary([line(kind, entry, 99)[0] for entry in row.item.profile]) for row in made]
    gold = [score(kind, row, known) for row, known in zip(made, summaries, strict=True)]
    none = [score(kind, row, "") for row in made]
    wrong = [score(kind, row, known) for row, known in zip(made, [*summaries[1:], summaries[0]], strict=True)]
    assert set(gold) == {1.0}
    ceiling = {"1": 0.7, "2N": 0.05, "2M": 0.1, "3": 0.8, "4": 0.75}[name]
    assert statistics.mean(none) < ceiling and statistics.mean(wrong) < ceiling


@pytest.mark.parametrize("name", KINDS)
def test_a_habit_is_the_majority_of_its_entries(name: str) -> None:
    """Oracle: the entries counted by the key that their text holds; a stray one is fewer than the habit's."""
    kind = KINDS[name]
    for fixture in fixtures(kind, "train", N, 1):
        assert len(fixture.habits) == HABITS
        for key, value in fixture.habits:
            texts = [" ".join(entry[field] for field in kind.texts) for entry in fixture.item.profile]
            same = [entry for entry, text in zip(fixture.item.profile, texts, strict=True) if key in text]
            if name == "1":
                assert len(same) >= 2
            elif name != "4":
                (usual, most), *others = Counter(entry[kind.value] for entry in same).most_common()
                assert usual == value and all(count < most for _, count in others)


@pytest.mark.parametrize("name", KINDS)
def test_users_of_two_splits_are_different_and_a_seed_is_a_draw(name: str) -> None:
    """Oracle: set intersection over habits; equal calls are equal."""
    habits = {split: {row.habits for row in fixtures(KINDS[name], split, N, 0)} for split in SPLITS}
    assert all(len(users) == N for users in habits.values())
    assert not habits["train"] & habits["test"] and not habits["train"] & habits["validation"]
    assert not habits["validation"] & habits["test"]
    again = fixtures(KINDS[name], "train", N, 0)
    assert again == fixtures(KINDS[name], "train", N, 0) != fixtures(KINDS[name], "train", N, 1)
    ids = [entry["id"] for row in again for entry in row.item.profile]
    assert len(set(ids)) == len(ids)


def test_prompts_are_compact() -> None:
    """Oracle: words counted, arrows too: histories of about 150 tokens, summaries well below 48."""
    for kind in KINDS.values():
        for fixture in fixtures(kind, "test", N, 2):
            example = make_example(kind, fixture.item, bm25)
            shown = example.fields["entries"]
            assert sum(len(f"{body} => {value}".split()) for body, value in shown) <= 150
            assert len(fixture.summary(shown).split()) <= 24


def test_an_unknown_split_is_refused() -> None:
    """Oracle: the message lists the splits."""
    with pytest.raises(ValueError, match="split 'dev' is unknown; choose from \\('train', 'validation', 'test'\\)"):
        fixtures(KINDS["3"], "dev", 1, 0)
