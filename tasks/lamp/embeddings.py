"""Embeddings of texts from an OpenAI-compatible endpoint. Each is asked for once and kept in a file."""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matryoshka.core.redaction import read_secret, redact
from matryoshka.tasks.lamp.options import LampOptions

AT_ONCE = 256  # texts in a request; OpenAI takes 2,048, and histories are longer
BUSY_S = 30.0


class Embeddings:
    """Vectors (float64, as long as the model makes them) by endpoint, model and text, kept in the SQLite file
    `embeddings_cache` ("": in memory), which processes may share.

    Raises ValueError for settings that are missing and a file that is no SQLite file.
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
        path = lamp.embeddings_cache or ":memory:"
        if lamp.embeddings_cache:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_S)
            self._db.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        except sqlite3.Error as err:
            raise ValueError(f"[task.options] embeddings_cache {path} cannot be used ({err}); name another") from err

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return the vector of each text. Raises ValueError when the endpoint fails; earlier answers are kept."""
        found = {text: self._stored(text) for text in texts}
        missing = [text for text, vector in found.items() if vector is None]
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            came = dict(zip(some, self._asked(some), strict=True))
            rows = [(self._key_of(text), vector.tobytes()) for text, vector in came.items()]
            with self._db:  # one transaction a request
                self._db.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)
            found |= came
        return [vector.tolist() for text in texts if (vector := found[text]) is not None]

    def _asked(self, texts: Sequence[str]) -> list[NDArray[np.float64]]:
        import openai

        lamp = self._lamp
        try:
            filled = [text or " " for text in texts]  # OpenAI refuses a text without any character
            answer = self._client.embeddings.create(model=lamp.embeddings_model, input=filled, encoding_format="float")
        except openai.OpenAIError as err:  # from None: servers repeat keys, and a traceback would show this one
            what = redact(str(err))
            raise ValueError(f"[task.options] the embeddings of {lamp.embeddings_url} failed: {what}") from None
        if len(answer.data) != len(texts):
            what = f"{len(answer.data)} vectors for {len(texts)} texts"
            raise ValueError(f"[task.options] the embeddings of {lamp.embeddings_url}: {what}")
        rows = sorted(answer.data, key=lambda row: row.index)
        return [np.asarray(row.embedding, dtype=np.float64) for row in rows]

    def _stored(self, text: str) -> NDArray[np.float64] | None:
        row = self._db.execute("SELECT vector FROM embeddings WHERE key = ?", (self._key_of(text),)).fetchone()
        return None if row is None else np.frombuffer(row[0], np.float64)

    def _key_of(self, text: str) -> bytes:
        lamp = self._lamp
        return hashlib.sha256(f"{lamp.embeddings_url}\0{lamp.embeddings_model}\0{text}".encode()).digest()
