"""The five LaMP tasks as data: the wording of the question, the fields of a profile entry, labels, published limits.

A question's own text, which the history is searched for, is found by the fixed words around it and never by quotes,
since titles contain quotes and brackets.
"""

import re
from dataclasses import dataclass

CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
)  # fmt: skip
TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic", "psychology",
    "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One LaMP task.

    number: LaMP's own (its files say "LaMP_2" for news and for movies). labels: every possible answer, () where the
    answer is free text. texts: the fields of an entry that are searched, in order. shown: those of them that the
    controller sees. value: the field of an entry that answers the question for it, "" if there is none. limit: entries
    retrieved, as published. sentence: the wording of the question, `{}` standing for a text in question and `{labels}`
    for the list of labels.
    """

    name: str
    number: int
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    shown: tuple[str, ...]
    value: str
    limit: int
    sentence: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every profile entry must have."""
        return (*self.texts, self.value) if self.value and self.value not in self.texts else self.texts

    def ask(self, *texts: str) -> str:
        """Return the question about `texts` (LaMP-1: title and the two references; otherwise the one text)."""
        first, *rest = self.sentence.replace("{labels}", ", ".join(self.labels)).split("{}")
        return first + "".join(text + words for text, words in zip(texts, rest, strict=True))

    def subjects(self, question: str) -> tuple[str, ...]:
        """Return the texts that `question` is about, `ask`'s inverse; its labels may stand in another order.

        Raises ValueError when it is not this task's sentence.
        """
        pattern = re.escape(self.sentence).replace(re.escape("{labels}"), ".*?").replace(re.escape("{}"), "(.*?)")
        found = re.fullmatch(pattern, question, re.DOTALL)
        if found is None:
            expected = self.sentence.replace("{}", "...").replace("{labels}", "...")
            raise ValueError(f"not a question of LaMP-{self.name}: {question[:80]!r}; expected {expected!r}")
        return found.groups()

    def query(self, question: str) -> str:
        """Return the text that the history is searched for: LaMP-1's two references, otherwise the text in question."""
        return " ".join(self.subjects(question)[-2:])


def _choose(what: str, one: str, many: str, text: str) -> str:
    return (
        f"Which {one} does this {what} relate to among the following {many}? Just answer with the {one} name without "
        f"further explanation. {many}: [{{labels}}] {text}: {{}}"
    )


_KINDS = (
    Kind(
        "1", 1, ("[1]", "[2]"), ("title", "abstract"), ("title",), "", 10_000,
        'For an author who has written the paper with the title "{}", which reference is related? Just answer with [1] '
        'or [2] without explanation. [1]: "{}" [2]: "{}"',
    ),
    Kind(
        "2N", 2, CATEGORIES, ("title", "text"), ("title", "text"), "category", 120,
        _choose("article", "category", "categories", "article"),
    ),
    Kind(
        "2M", 2, TAGS, ("description",), ("description",), "tag", 150, _choose("movie", "tag", "tags", "description"),
    ),
    Kind(
        "3", 3, ("1", "2", "3", "4", "5"), ("text",), ("text",), "score", 30,
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: {}",
    ),
    Kind("4", 4, (), ("title", "text"), ("text",), "title", 50, "Generate a headline for the following article: {}"),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}


def kind_of(name: str) -> Kind:
    """Return the task `name` ("1", "2N", "2M", "3", "4"). Raises ValueError for another."""
    if name not in KINDS:
        raise ValueError(f"LaMP-{name} is unknown; choose from {', '.join(KINDS)}")
    return KINDS[name]
