"""tasks/lamp/scripted_generator.py: the scripted generators' answers to a summary, by hand."""

import asyncio

import pytest

from matryoshka.core.records import Message, Messages, Sampling
from matryoshka.tasks.lamp.prompt_style import answer, summarise
from matryoshka.tasks.lamp.scripted_generator import READERS, ScriptedReader, read, summary
from matryoshka.tasks.lamp.task_specs import KINDS

NEWS, PAPERS, REVIEWS, HEADLINES = (KINDS[name] for name in ("2N", "1", "3", "4"))


def ask(manner: str, prompt: Messages) -> str:
    return asyncio.run(ScriptedReader(manner).complete(prompt, Sampling())).text


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("yoga: women\ntaxes: crime", "crime"),
        ("yoga: women; taxes: crime", "crime"),
        ("Taxes: Crime.", "crime"),
        ("A note on taxes => crime", "crime"),
        ("taxes: crimes", "unknown"),
        ("taxes crime", "unknown"),
        ("yoga: women", "unknown"),
        ("", "unknown"),
        ("old taxes: women\nnew taxes in town: crime\ntaxes: travel", "travel"),  # the key that fits best
        ("taxes: travel\ntaxes: crime", "travel"),
    ],
)
def test_a_statement_is_believed_if_its_key_is_in_question(known: str, expected: str) -> None:
    """Oracle: by hand."""
    assert read(NEWS, known, NEWS.ask("Everyone talks about taxes now.")) == expected


def test_the_other_tasks() -> None:
    """Oracle: by hand."""
    papers = PAPERS.ask("A note", "Fast graph colouring", "Fast image search")
    assert read(PAPERS, "image search; speech", papers) == "[2]"
    assert read(PAPERS, "graph colouring", papers) == read(PAPERS, "", papers) == "[1]"
    review = REVIEWS.ask("The tent is fine.")
    assert (read(REVIEWS, "fine: 5", review), read(REVIEWS, "poor: 1", review)) == ("5", "3")
    article = HEADLINES.ask("Onion Soup is new in food.")
    assert read(HEADLINES, "food: X: What We Know", article) == "Onion Soup: What We Know"
    assert read(HEADLINES, "travel: Goodbye, X", article) == "Onion Soup"


def test_three_manners_of_reading() -> None:
    """Oracle: by hand; each is another generator by name, and a sentence is read as its label (test_labels)."""
    prompt = answer(NEWS, NEWS.ask("Cheap wine from old islands"), "old trains: travel\nwine: food & drink")
    said = {manner: ask(manner, prompt) for manner in READERS}
    assert said == {"careful": "food & drink", "hasty": "travel", "talkative": "The answer is food & drink."}
    assert len({ScriptedReader(manner).name for manner in READERS}) == 3
    with pytest.raises(ValueError, match="scripted 'x' is unknown; LaMP's scripted generators are"):
        ScriptedReader("x")
    with pytest.raises(ValueError, match="'hello' is no question of LaMP's"):
        ask("careful", (Message("user", "hello"),))


def test_guidance_and_retrieved_entries_are_both_known() -> None:
    """Oracle: by hand: the summary says nothing of the topic, an entry does."""
    question = NEWS.ask("All about tea")
    history = [("Notes on tea", "crime")]
    assert ask("careful", answer(NEWS, question, "wine: travel", history)) == "crime"
    assert ask("careful", answer(NEWS, question, "", history)) == "crime"
    assert ask("careful", answer(NEWS, question, "")) == "unknown"


def test_a_request_for_a_summary_is_answered_by_counting() -> None:
    """Oracle: by hand: tea comes thrice with crime and once without; patterns have X for the words of the text."""
    lines = [("Tea again", "crime"), ("More tea", "travel"), ("On tea", "crime"), ("Tea", "crime"), ("Fish", "women")]
    (first, *_) = ask("careful", summarise(NEWS, lines, lambda prompt: 0, 0, "").prompt).splitlines()
    assert first == "tea: crime"
    said = "Red Shoes is new in music. => Is Red Shoes Worth It?\nOld Town is new in music. => Is Old Town Worth It?"
    assert summary(HEADLINES, said).splitlines()[0] == "music: Is X Worth It?"
    assert summary(HEADLINES, "Old Town is new in food. => Old Town, Explained").startswith("old: X, Explained")
    assert summary(PAPERS, "Fast graph search\nOn graph colouring\nGraph mining").startswith("graph; ")
    assert summary(NEWS, "(no history)") == ""
