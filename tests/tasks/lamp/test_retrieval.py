"""tasks/lamp/retrieval.py: rankings against the formulas written out, ties, dates, and what may be empty."""

import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest

from matryoshka.tasks.lamp.retrieval import bm25, dense, recency


def okapi(query: str, documents: Sequence[str]) -> list[float]:
    """BM25 as rank-bm25 documents it: k1 1.5, b 0.75, negative idf replaced by a quarter of the mean idf."""
    words = [Counter(document.split()) for document in documents]
    mean = sum(count.total() for count in words) / len(words)
    terms = sorted({word for count in words for word in count})
    idf = {}
    for term in terms:
        n = sum(term in count for count in words)
        idf[term] = math.log(len(words) - n + 0.5) - math.log(n + 0.5)
    floor = 0.25 * sum(idf.values()) / len(idf)
    idf = {term: floor if value < 0 else value for term, value in idf.items()}
    return [
        sum(
            idf.get(term, 0) * count[term] * 2.5 / (count[term] + 1.5 * (0.25 + 0.75 * count.total() / mean))
            for term in query.split()
        )
        for count in words
    ]


def test_bm25_ranks_as_the_formula() -> None:
    """Oracle: the formula, written out above, on random texts; equal scores keep the order of the profile."""
    draws = random.Random(0)
    for _ in range(20):
        documents = [" ".join(draws.choices("abcdefgh", k=draws.randint(1, 9))) for _ in range(draws.randint(2, 12))]
        query = " ".join(draws.choices("abcdefghz", k=4))
        scores = okapi(query, documents)
        ranking = bm25(query, documents, [""] * len(documents))
        assert sorted(ranking) == list(range(len(documents)))
        found = [scores[i] for i in ranking]
        assert found == pytest.approx(sorted(scores, reverse=True), abs=1e-9)


def test_ties_keep_the_profile_s_order_and_nothing_is_an_empty_ranking() -> None:
    """Oracle: by hand; documents without a word have no mean length, so they are ties too."""
    assert bm25("z", ["a", "b", "c"], [""] * 3) == [0, 1, 2]
    assert bm25("a", ["", "  "], [""] * 2) == [0, 1]
    assert bm25("a", [], []) == recency("a", [], []) == dense(lambda texts: [[1.0]])("a", [], []) == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the package taken away; the message says what to install."""
    monkeypatch.setitem(cast(Any, sys.modules), "rank_bm25", None)
    with pytest.raises(ValueError, match="BM25 needs rank-bm25: pip install 'matryoshka-pilot\\[lamp\\]'"):
        bm25("a", ["a"], [""])


def test_recency_is_newest_first_and_wants_dates() -> None:
    """Oracle: by hand."""
    assert recency("", ["a", "b", "c"], ["2020-01-02", "2021-01-01", "2020-01-10"]) == [1, 2, 0]
    with pytest.raises(ValueError, match="profile entry 1 has no 'date'.*retrieval = 'bm25'"):
        recency("", ["a", "b"], ["2020-01-02", ""])


def test_dense_ranks_by_cosine_and_asks_once() -> None:
    """Oracle: cosines by hand: lengths do not count, a zero vector has cosine 0."""
    vectors = {"q": [1.0, 0.0], "a": [0.0, 2.0], "b": [9.0, 9.0], "c": [0.1, 0.0], "d": [0.0, 0.0], "e": [-1.0, 0.0]}
    asked: list[Sequence[str]] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(texts)
        return [vectors[text] for text in texts]

    assert dense(embed)("q", ["a", "b", "c", "d", "e"], [""] * 5) == [2, 1, 0, 3, 4]
    assert asked == [["q", "a", "b", "c", "d", "e"]]
    with pytest.raises(ValueError, match="1 vectors for 2 texts"):
        dense(lambda texts: [[1.0]])("q", ["a"], [""])
