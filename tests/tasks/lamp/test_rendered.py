"""The shipped style renders the same bytes as the code that it was once written in."""

import pytest

from matryoshka.core.records import Messages, content_key
from matryoshka.tasks.lamp.prompt_style import Line, answer, summarise
from matryoshka.tasks.lamp.task_specs import KINDS

LINES: list[Line] = [("a {{ b }} body", "sports"), ("another text", "3"), ("no value", "")]
# Keys of every prompt of a task, made by the functions that wrote the style before it became a file.
HASHES = {
    "1": "e577b6da414f9ba9c72ec444957964bd",
    "2N": "7081d675ebf0325fdc3be5e9de6eea04",
    "2M": "2a47ea172c359a1035356dac41dcaf42",
    "3": "76063eb3308baf3c4143ffd3480f285f",
    "4": "e8f9f4bd6d47662729f86dc39d525617",
}


def rendered(name: str) -> list[Messages]:
    """Return the requests for a summary and for an answer, with and without history, question and guidance."""
    kind, found = KINDS[name], []
    question = kind.ask(*(["A {{ title }}", "B", "C"] if name == "1" else ["X y"]))
    for lines in ([], LINES):
        found += [summarise(kind, lines, lambda prompt: 0, 0, shown).prompt for shown in ("", question)]
        found += [answer(kind, question, guidance, lines) for guidance in ("", "topic: sports\n")]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_are_those_of_before(name: str) -> None:
    """Oracle: hashes of what the code of commit b27320d rendered."""
    assert content_key(*rendered(name)) == HASHES[name]
