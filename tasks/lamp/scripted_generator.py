"""Scripted generators: programs, not models, that read a summary literally and answer from it.

A small model would ignore the summary; with these the summary alone decides the answer. They know nothing but its
statements `key: value` (one a line, or between semicolons) whose key occurs in the question. A line `text => value` of
the history is a statement too. Asked for a summary, they count words. There are three of them: "careful" believes the
statement whose key fits best, "hasty" the first one that fits at all, and "talkative" reads as "careful" does and
answers in a sentence.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from matryoshka.core.records import Messages, Sample, Sampling, Usage
from matryoshka.tasks.lamp.answer_parsing import parse
from matryoshka.tasks.lamp.prompt_style import ARROW, PLAIN
from matryoshka.tasks.lamp.task_specs import KINDS, Kind

# The words of the style "plain", by which these readers know what they are asked.
KNOWN, HISTORY, QUESTION = (PLAIN.values[f"{name}_mark"] for name in ("known", "history", "question"))
SUMMARISE, ANSWER = (PLAIN.values[f"{name}_instruction"] for name in ("summarise", "answer"))
READERS = ("careful", "hasty", "talkative")
STATEMENTS = 8  # of a summary, at most
SUBJECT_WORDS = 4
UNKNOWN = "unknown"
STOP_WORDS = frozenset(
    "a about after all also an and are as at be been but by can do for from had has have he her his how i if in into "
    "is it its more my new no not of on one or our out over she so some than that the their them there they this to up "
    "us was we were what when which who why will with you your x".split()
)


class ScriptedReader:
    """A core.protocols.Generator that reads as `manner` says. Raises ValueError for an unknown manner."""

    def __init__(self, manner: str) -> None:
        if manner not in READERS:
            raise ValueError(f"[serve] scripted {manner!r} is unknown; LaMP's scripted generators are {READERS}")
        self.name = f"scripted-{manner}"
        self._manner = manner

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return the answer, or the summary, that `prompt` asks for. Raises ValueError for any other prompt."""
        reply = self._reply(prompt)
        read = sum(len(message.content.split()) for message in prompt)
        return Sample(reply, usage=Usage(read, len(reply.split())))

    def _reply(self, prompt: Messages) -> str:
        text = prompt[-1].content
        for name, instruction in SUMMARISE.items():
            if prompt[0].content == instruction:
                return summary(KINDS[name], text.partition(f"\n{QUESTION}")[0])
        told, _, question = f"\n{text}".rpartition(f"\n{QUESTION}")
        kind = _kind(question.strip())
        known = "\n".join(line for line in told.splitlines() if line not in (ANSWER[kind.name], KNOWN, HISTORY))
        reply = read(kind, known, question, best=self._manner != "hasty")
        return f"The answer is {reply}." if self._manner == "talkative" and kind.labels else reply


def read(kind: Kind, known: str, question: str, best: bool = True) -> str:
    """Return the answer that `known` gives to `question`. Where it gives none: "[1]", "unknown", "3" or the subject.

    best: believe the statement whose key fits best, the first of equals; otherwise the first that fits at all.
    """
    subjects = kind.subjects(question)
    if kind.name == "1":
        first, second = (max((_fit(key, text) for key, _ in _statements(known)), default=0.0) for text in subjects[1:])
        return "[2]" if second > first else "[1]"
    fitting = [(_fit(key, subjects[0]), value) for key, value in _statements(known) if _means(kind, value)]
    fitting = [pair for pair in fitting if pair[0] > 0]
    value = (max(fitting, key=lambda pair: pair[0]) if best else fitting[0])[1] if fitting else ""
    if kind.name == "4":
        subject = " ".join(re.split(r"\s(?:is|was|are|were)\s", subjects[0])[0].split()[:SUBJECT_WORDS])
        return re.sub(r"\bX\b", lambda _: subject, value) or subject
    if kind.name == "3":
        return f"{parse(kind, value) or 3:g}"
    return str(parse(kind, value) or UNKNOWN)


def summary(kind: Kind, history: str) -> str:
    """Return the words that say most about the values of the history's lines, with the value of each.

    A word says more the oftener it comes with its usual value and the seldomer with another, and is left out if earlier
    ones speak of all its lines; LaMP-1's are counted.
    """
    values: dict[str, Counter[str]] = defaultdict(Counter)
    places: dict[str, set[int]] = defaultdict(set)
    for place, line in enumerate(history.strip().splitlines()):
        body, _, value = line.rpartition(ARROW) if kind.value else (line, "", "")
        pattern = _pattern(value, body) if kind.name == "4" else value
        for word in dict.fromkeys(_words(body)):
            values[word][pattern] += 1
            places[word].add(place)

    def weight(word: str) -> int:
        (_, most), *_ = values[word].most_common(1)
        return 2 * most - values[word].total()

    chosen: list[str] = []
    covered: set[int] = set()
    for word in sorted(values, key=weight, reverse=True):
        if len(chosen) < STATEMENTS and (not kind.value or not places[word] <= covered):
            chosen.append(word)
            covered |= places[word]
    if not kind.value:
        return "; ".join(chosen)
    return "\n".join(f"{word}: {values[word].most_common(1)[0][0]}" for word in chosen)


def _kind(question: str) -> Kind:
    for kind in KINDS.values():
        try:
            kind.subjects(question)
        except ValueError:
            continue
        return kind
    raise ValueError(f"scripted reader: {question[:80]!r} is no question of LaMP's")


def _statements(known: str) -> list[tuple[str, str]]:
    """Return (key, value) of each statement; one without a value is a key alone."""
    found = []
    for part in re.split(r"[\n;]", known):
        body, arrow, value = part.rpartition(ARROW)
        if not arrow:
            body, _, value = part.partition(":")
        found.append((body, value.strip()))
    return found


def _means(kind: Kind, value: str) -> bool:
    return bool(value) and (not kind.labels or parse(kind, value) is not None)


def _fit(key: str, text: str) -> float:
    """Return the share of the key's words that `text` has."""
    words, there = set(_words(key)), set(_words(text))
    return len(words & there) / len(words) if words else 0.0


def _pattern(headline: str, body: str) -> str:
    """Return `headline` with one X for each run of words that it takes from `body`; the run's last mark stays."""
    there = set(_words(body))
    words: list[str] = []
    for word in headline.split():
        if (own := _words(word)) and set(own) <= there:
            if words and words[-1].startswith("\0"):
                words.pop()
            word = "\0" + word[len(word.rstrip(",:;?!.")) :]
        words.append(word)
    return " ".join(words).replace("\0", "X")


def _words(text: str) -> Sequence[str]:
    return [word for word in re.findall(r"[^\W_]+", text.casefold()) if word not in STOP_WORDS]
