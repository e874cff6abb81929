"""How the controller is asked for a summary and the generator for an answer; the texts are in `prompts/*.toml`.

The controller's prompt holds as many entries of the history, best first, as its token budget allows. The whole prompt
is counted by the controller's own tokenizer, and the entries left out are counted too. As published, it does not
contain the question, unless the options ask for it.

Templates see `name` (the LaMP task, "2N" for one), `question` ("" where it is not shown), `lines` (pairs of an entry's
text and the user's own label, score or title, "" for LaMP-1), `history` (the same as text, an entry a line) and
`guidance` ("" for none).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka.core.records import Messages
from matryoshka.tasks.lamp.data import Entry
from matryoshka.tasks.lamp.task_specs import Kind
from matryoshka.tasks.prompt_files import PromptFile

ARROW = " => "

Line = tuple[str, str]  # an entry's text, and the user's own label, score or title for it


def line(kind: Kind, entry: Entry, limit: int) -> tuple[Line, bool]:
    """Return the entry's line, each part on one line and cut to `limit` characters, and whether it was cut."""
    body = ". ".join(text for name in kind.shown if (text := _plain(entry[name])))
    value = _plain(entry[kind.value]) if kind.value else ""
    return (body[:limit], value[:limit]), len(body) > limit or len(value) > limit


def joined(lines: Sequence[Line]) -> str:
    """Return the lines as text."""
    return "\n".join(f"{body}{ARROW}{value}" if value else body for body, value in lines)


@dataclass(frozen=True)
class Fitted:
    """A controller's prompt within its budget: how many entries it left out and whether it cut the first of them."""

    prompt: Messages
    dropped: int
    cut: bool


def open_prompts(prompts: str) -> PromptFile:
    """Return a shipped style of prompts or a user's own file. Raises as `PromptFile`."""
    return PromptFile(prompts, Path(__file__).with_name("prompts"), ("summarise", "answer"))


PLAIN = open_prompts("plain")


def answer(
    kind: Kind, question: str, guidance: str, history: Sequence[Line] = (), prompts: PromptFile = PLAIN
) -> Messages:
    """Return the request for an answer."""
    values = {"lines": history, "history": joined(history), "question": question, "guidance": guidance}
    return prompts.render("answer", name=kind.name, **values)


def summarise(
    kind: Kind,
    lines: Sequence[Line],
    count_tokens: Callable[[Messages], int],
    budget: int,
    question: str = "",
    prompts: PromptFile = PLAIN,
) -> Fitted:
    """Return the request for a summary of `lines` that takes at most `budget` tokens.

    The last lines are dropped first; where not even the first fits, its text is cut. question: shown if not "".
    Raises ValueError when the request takes more than `budget` without any line.
    """

    def request(kept: Sequence[Line]) -> Messages:
        return prompts.render("summarise", name=kind.name, lines=kept, history=joined(kept), question=question)

    def fits(kept: Sequence[Line]) -> bool:
        return count_tokens(request(kept)) <= budget

    def most(n: int, kept: Callable[[int], Sequence[Line]]) -> int:
        """Return a number of at most n with which `kept` fits, the largest if more text never takes fewer tokens."""
        return n if fits(kept(n)) else bisect_right(range(n), 0, key=lambda i: not fits(kept(i))) - 1

    count = most(len(lines), lambda i: lines[:i])
    if count < 0:
        bare = count_tokens(request(()))
        raise ValueError(
            f"LaMP-{kind.name}: the request for a summary takes {bare} tokens "
            f"without any history, more than prompt_tokens {budget}; raise it"
        )
    kept, cut = tuple(lines[:count]), False
    if lines and not count:
        body, value = lines[0]
        size = most(len(body), lambda i: [(body[:i], value)])
        kept, cut = ((body[:size], value),) if size > 0 else (), True
    return Fitted(request(kept), len(lines) - len(kept), cut)


def _plain(text: str) -> str:
    return " ".join(text.split())
