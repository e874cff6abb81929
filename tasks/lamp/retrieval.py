"""Ranks the entries of a user's history: by BM25 as published, by date, or by embeddings.

A retriever is a function from the query, the documents (one a profile entry) and their dates to a ranking of all
entries; the caller cuts it. Rankings are stable: equal scores keep the order of the profile. An embedding is asked for
once and kept in a file.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matryoshka.core.database import Schema, open_database, transaction
from matryoshka.core.redaction import read_secret, redact
from matryoshka.tasks.lamp.options import LampOptions

Retriever = Callable[[str, Sequence[str], Sequence[str]], list[int]]
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
AT_ONCE = 256  # texts in a request; OpenAI takes 2,048, and histories are longer
_SCHEMA = Schema(
    "cache of embeddings",
    0x4D656D62,
    ("CREATE TABLE embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)",),
)


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


class Embeddings:
    """Vectors (float64, as long as the model makes them) by endpoint, model and text, kept in the SQLite file
    `embeddings_cache` ("": in memory), which processes may share.

    Raises ValueError for settings that are missing and for a file that is not a cache of embeddings.
    """

    def __init__(self, lamp: LampOptions) -> None:
        if not lamp.embeddings_url or not lamp.embeddings_model:
            raise ValueError("[task.options] retrieval 'dense' needs embeddings_url and embeddings_model")
        import openai

        variable = lamp.embeddings_key_env
        self._key = read_secret(variable) if variable else "none"
        if not self._key:
            raise ValueError(f"[task.options] environment variable {variable} holds no key for the embeddings")
        self._lamp = lamp
        self._client = openai.OpenAI(base_url=lamp.embeddings_url, api_key=self._key)
        self._database = open_database(Path(lamp.embeddings_cache or ":memory:"), _SCHEMA)

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return the vector of each text. Raises ValueError when the endpoint fails; earlier answers are kept."""
        found = {text: self._stored(text) for text in texts}
        missing = [text for text, vector in found.items() if vector is None]
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            came = dict(zip(some, self._asked(some), strict=True))
            rows = [(self._key_of(text), vector.tobytes()) for text, vector in came.items()]
            with transaction(self._database):  # one for each request
                self._database.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)
            found |= came
        return [vector.tolist() for text in texts if (vector := found[text]) is not None]

    def _asked(self, texts: Sequence[str]) -> list[NDArray[np.float64]]:
        import openai

        lamp = self._lamp
        try:
            filled = [text or " " for text in texts]  # OpenAI refuses a text without any character
            answer = self._client.embeddings.create(model=lamp.embeddings_model, input=filled, encoding_format="float")
            rows = sorted(answer.data, key=lambda row: row.index)
            vectors = np.array([row.embedding for row in rows], dtype=np.float64)
            if vectors.shape[:1] != (len(texts),) or vectors.ndim != 2 or not np.isfinite(vectors).all():
                raise ValueError(f"vectors of the shape {vectors.shape} for {len(texts)} texts, or not finite")
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as err:
            # From None: servers repeat keys, and a traceback would show this one. A 200 may hold anything.
            what = redact(str(err))
            raise ValueError(f"[task.options] the embeddings of {lamp.embeddings_url} failed: {what}") from None
        return list(vectors)

    def _stored(self, text: str) -> NDArray[np.float64] | None:
        row = self._database.execute("SELECT vector FROM embeddings WHERE key = ?", (self._key_of(text),)).fetchone()
        return None if row is None else np.frombuffer(row[0], np.float64)

    def _key_of(self, text: str) -> bytes:
        lamp = self._lamp
        return hashlib.sha256(f"{lamp.embeddings_url}\0{lamp.embeddings_model}\0{text}".encode()).digest()
