"""Ranks the entries of a user's history: by BM25 as published, by date, or by embeddings.

A retriever is a function from the query, the documents (one a profile entry) and their dates to a ranking of all
entries; the caller cuts it. Rankings are stable: equal scores keep the order of the profile.
"""

import math
from collections.abc import Callable, Sequence

Retriever = Callable[[str, Sequence[str], Sequence[str]], list[int]]
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]


def bm25(query: str, documents: Sequence[str], dates: Sequence[str]) -> list[int]:
    """Return the indices of `documents` by BM25 (Okapi) over the words between blanks, as published.

    Raises ValueError without the package rank-bm25.
    """
    try:
        from rank_bm25 import BM25Okapi
    except ImportError as err:
        raise ValueError("BM25 needs rank-bm25: pip install 'matryoshka-pilot[lamp]'") from err
    words = [document.split() for document in documents]
    if not any(words):  # BM25's mean document length would be 0
        return list(range(len(documents)))
    scores = BM25Okapi(words).get_scores(query.split())
    return _by_score([float(score) for score in scores])


def recency(query: str, documents: Sequence[str], dates: Sequence[str]) -> list[int]:
    """Return the indices from the newest to the oldest date (ISO texts; those of LaMP's time-based split are).

    Raises ValueError where an entry has no date.
    """
    if "" in dates:
        raise ValueError(
            f"retrieval by recency: profile entry {dates.index('')} has no 'date'; only LaMP's time-based files have "
            "dates: take those, or retrieval = 'bm25'"
        )
    return sorted(range(len(documents)), key=lambda i: dates[i], reverse=True)


def dense(embed: Embed) -> Retriever:
    """Return a retriever by the cosine of embeddings; `embed` gets the query and the documents in one call."""

    def rank(query: str, documents: Sequence[str], dates: Sequence[str]) -> list[int]:
        if not documents:
            return []
        first, *rest = embed([query, *documents])
        if len(rest) != len(documents):
            raise ValueError(f"embeddings: {len(rest) + 1} vectors for {len(documents) + 1} texts")
        return _by_score([_cosine(first, vector) for vector in rest])

    return rank


def _by_score(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norm = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0
