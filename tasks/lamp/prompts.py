"""The prompts: the controller gets a user's history to sum up, the generator a question with the summary.

A profile entry is one line, `text => the user's own label, score or title` (LaMP-1: the title alone). The controller's
prompt holds as many lines, best first, as its token budget allows. The whole prompt is counted by the controller's own
tokenizer, and the lines left out are counted too. As published, it does not contain the question, unless the options
ask for it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.lamp.data import Entry
from matryoshka.tasks.lamp.task_specs import Kind

ARROW = " => "
KNOWN = "Known of the user:"
HISTORY = "From the user's history:"
QUESTION = "The question is: "

SUMMARISE = {
    "1": "From the titles of an author's papers list the research topics, separated by semicolons.",
    "2N": "From a user's articles and their categories list each topic and its usual category, one a line, as "
    "`topic: category`.",
    "2M": "From a user's movies and their tags list each theme and its usual tag, one a line, as `theme: tag`.",
    "3": "From a user's reviews and their scores list each word of judgement and its usual score, one a line, as "
    "`word: score`.",
    "4": "From a user's articles and their headlines list each topic and the usual pattern of its headlines, X for the "
    "subject, one a line, as `topic: pattern`.",
}
ANSWER = {
    "1": "Answer from what is known of the author. Output only [1] or [2].",
    "2N": "Answer from what is known of the user. Output only the category.",
    "2M": "Answer from what is known of the user. Output only the tag.",
    "3": "Answer from what is known of the user. Output only 1, 2, 3, 4 or 5.",
    "4": "Answer from what is known of the user. Output only the headline.",
}

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


def summarise(
    kind: Kind, lines: Sequence[Line], count_tokens: Callable[[Messages], int], budget: int, question: str = ""
) -> Fitted:
    """Return the request for a summary of `lines` that takes at most `budget` tokens.

    The last lines are dropped first; where not even the first fits, its text is cut. question: shown if not "".
    Raises ValueError when the request takes more than `budget` without any line.
    """

    def fits(kept: Sequence[Line]) -> bool:
        return count_tokens(_request(kind, kept, question)) <= budget

    def most(n: int, kept: Callable[[int], Sequence[Line]]) -> int:
        """Return a number of at most n with which `kept` fits, the largest if more text never takes fewer tokens."""
        return n if fits(kept(n)) else bisect_right(range(n), 0, key=lambda i: not fits(kept(i))) - 1

    count = most(len(lines), lambda i: lines[:i])
    if count < 0:
        raise ValueError(
            f"LaMP-{kind.name}: the request for a summary takes {count_tokens(_request(kind, (), question))} tokens "
            f"without any history, more than prompt_tokens {budget}; raise it"
        )
    kept, cut = tuple(lines[:count]), False
    if lines and not count:
        body, value = lines[0]
        size = most(len(body), lambda i: [(body[:i], value)])
        kept, cut = ((body[:size], value),) if size > 0 else (), True
    return Fitted(_request(kind, kept, question), len(lines) - len(kept), cut)


def answer(kind: Kind, question: str, guidance: str, history: Sequence[Line] = ()) -> Messages:
    """Return the generator's prompt; without guidance and history it is the question alone."""
    parts = [ANSWER[kind.name]] if guidance or history else []
    parts += [KNOWN, guidance] if guidance else []
    parts += [HISTORY, joined(history)] if history else []
    return (Message("user", "\n".join([*parts, f"{QUESTION}{question}"])),)


def _request(kind: Kind, lines: Sequence[Line], question: str) -> Messages:
    history = joined(lines) or "(no history)"
    asked = f"{history}\n{QUESTION}{question}" if question else history
    return Message("system", SUMMARISE[kind.name]), Message("user", asked)


def _plain(text: str) -> str:
    return " ".join(text.split())
