"""tasks/lamp/task_specs.py: the sentences of the five tasks, and the texts that a question is about."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.tasks.lamp.task_specs import KINDS, Kind, kind_of

DATA = Path(os.environ.get("MATRYOSHKA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "lamp"
TEXTS = st.text(st.sampled_from('ab "[]1:2,.\n?{}'), max_size=12)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(texts=st.tuples(TEXTS, TEXTS, TEXTS))
def test_a_question_gives_back_its_texts(kind: Kind, texts: tuple[str, str, str]) -> None:
    """Oracle: `subjects` inverts `ask`, with quotes, brackets and line breaks in the texts."""
    asked = texts if kind.name == "1" else texts[:1]
    assert kind.subjects(kind.ask(*asked)) == asked


def test_titles_with_quotes_and_brackets_are_told_apart() -> None:
    """Oracle: by hand; splitting at quotes finds other titles."""
    titles = ('On "why" [1]: a study', 'The "A", the "B" [2] and x', '[1]: "No" [sic]')
    question = KINDS["1"].ask(*titles)
    assert question.endswith('[1]: "The "A", the "B" [2] and x" [2]: "[1]: "No" [sic]"')
    assert KINDS["1"].subjects(question) == titles
    assert KINDS["1"].query(question) == f"{titles[1]} {titles[2]}"


def test_the_query_is_the_text_in_question() -> None:
    """Oracle: the markers of the published query, by hand; labels in another order are the same question."""
    assert KINDS["2N"].query(KINDS["2N"].ask("an article: about tags")) == "an article: about tags"
    assert KINDS["2M"].query(KINDS["2M"].ask("a description: of x]")) == "a description: of x]"
    assert KINDS["3"].query(KINDS["3"].ask("good. review: bad")) == "good. review: bad"
    assert KINDS["4"].query(KINDS["4"].ask("It rained.")) == "It rained."
    reordered = KINDS["2N"].ask("X").replace("[women, religion, ", "[religion, women, ")
    assert KINDS["2N"].subjects(reordered) == ("X",)


def test_another_sentence_is_refused() -> None:
    """Oracle: the error names the task and both sentences."""
    with pytest.raises(ValueError, match="not a question of LaMP-2N: 'Which tag does.*expected 'Which category does"):
        KINDS["2N"].subjects(KINDS["2M"].ask("x"))
    with pytest.raises(ValueError, match="LaMP-5 is unknown; choose from 1, 2N, 2M, 3, 4"):
        kind_of("5")


@pytest.mark.parametrize(
    ("file", "name", "n"),
    [
        ("LaMP_1/train236_top10profile", "1", 236),
        ("LaMP_1/train_full", "1", 5),
        ("LaMP_2-news/train235_top4percat_profile", "2N", 235),
        ("LaMP_2-news/train_full", "2N", 4),
        ("LaMP_2-news/dev_full", "2N", 3),
        ("LaMP_4-derived/loo", "4", 326),
    ],
)
def test_every_real_question_is_the_sentence(file: str, name: str, n: int) -> None:
    """Oracle: the official rows: asked again about the texts found, each question comes out letter for letter."""
    path = DATA / f"{file}_questions.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set MATRYOSHKA_DATA)")
    questions = [row["input"] for row in json.loads(path.read_text())]
    assert len(questions) == n
    assert [KINDS[name].ask(*KINDS[name].subjects(question)) for question in questions] == questions
