"""Reads the answer from a reply, by the same rule in collection and evaluation; None means that there is no answer.

Labels: the reply is the label; or it is once case, quotes and punctuation are set aside; or exactly one label occurs in
it as whole words (a label within a longer one that occurs, "comedy" in "dark comedy", does not count). Scores: the
reply is a number; or exactly one number occurs in it, what follows "of" or "/" not counted. So a reply that lists the
labels has none of them, whatever their order.
"""

import math
import re

from matryoshka.tasks.lamp.task_specs import Kind

Prediction = str | int | float | None
QUOTES = "\"'\u201c\u201d\u2018\u2019"
HYPHENS = {0x2010: "-", 0x2011: "-"}  # Unicode's own, which models write in "sci-fi"


def parse(kind: Kind, reply: str) -> Prediction:
    """Return the label, the score (a float, as LaMP's own evaluation reads it) or the headline that `reply` gives."""
    if kind.name == "3":
        return _score(reply)
    if kind.labels:
        return _label(kind.labels, reply)
    return reply.strip().strip(QUOTES).strip() or None


def _label(labels: tuple[str, ...], reply: str) -> str | None:
    if reply.strip() in labels:
        return reply.strip()
    text = _normal(reply)
    by_text = {_normal(label): label for label in labels}
    if text in by_text:
        return by_text[text]
    longest_first = sorted(by_text, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(label)}(?!\w)" for label in longest_first)
    found = set(re.findall(pattern, text))
    return by_text[found.pop()] if len(found) == 1 else None


def _score(reply: str) -> float | None:
    text = re.sub(r"(?<=\d)(?:\s*[Ss]tars?)?\s*(?:/|(?:out\s+)?of)\s*\d+(?:\.\d+)?", "", reply.strip())
    try:
        number = float(text)
    except ValueError:
        found = set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)", text))
        number = float(found.pop()) if len(found) == 1 else math.nan
    return number if math.isfinite(number) else None


def _normal(text: str) -> str:
    """Return `text` in lower case, its words and ampersands alone, one blank between."""
    return " ".join(re.findall(r"[\w&]+(?:[-'][\w&]+)*", text.casefold().translate(HYPHENS).replace("_", " ")))
