"""Every black-box answer that was paid for, in one SQLite file that several processes may share.

The invariant: an answer whose `put` returned is found by every later `get`, also after kill -9. The file is in WAL mode
with synchronous=NORMAL: a commit hands its pages to the operating system, which outlives the process, but waits for no
disk, so it takes microseconds of the event loop. What that leaves open is a power cut or a crash of the whole machine:
it may take the last answers, never the file. WAL wants a local disk. Answers are never replaced: the first one stays.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from matryoshka.core.records import Messages, Sample, Sampling, content_key, from_json, to_json

APPLICATION_ID = 0x4D54524B  # in SQLite's header: this file is ours
VERSION = 1
BUSY_S = 30.0


@dataclass(frozen=True)
class CacheTotals:
    """What one generator's answers in the cache have cost."""

    answers: int
    prompt_tokens: int
    completion_tokens: int


def answer_key(endpoint: str, model: str, messages: Messages, sampling: Sampling) -> str:
    """Return the cache key of one draw: equal for equal endpoint, model, messages and sampling (seed and draw too)."""
    exact = replace(sampling, temperature=float(sampling.temperature), top_p=float(sampling.top_p))  # 0 is 0.0
    return content_key("answer", endpoint.rstrip("/"), model, messages, exact)


class ResponseCache:
    """SQLite table of answers by key. One object serves one thread; processes each open their own."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises ValueError, leaving the file as it is, when it is not such a cache."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            with self._errors():
                self._open()
        except ValueError:
            self._db.close()
            raise

    def _open(self) -> None:
        """Check the file, or lay it out if it is empty, under the write lock: two processes may come at once."""
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:  # commits, or rolls back on an error
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (num_tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if num_tables == 0 and application == 0:
                self._db.execute(
                    "CREATE TABLE answers (key TEXT PRIMARY KEY, generator TEXT NOT NULL, sample TEXT NOT NULL,"
                    " created REAL NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
                )
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif application != APPLICATION_ID:
                raise ValueError(f"{self.path}: an SQLite file of another program; choose another path for the cache")
            elif version != VERSION:
                raise ValueError(
                    f"{self.path}: a response cache of version {version}, expected {VERSION}; choose another path"
                )
        (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise ValueError(f"{self.path}: this file system holds no WAL database; put the cache on a local disk")

    def get(self, key: str) -> Sample | None:
        """Return the answer under `key`, or None. Raises ValueError when the file is damaged."""
        with self._errors():
            row = self._db.execute("SELECT sample FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            return from_json(Sample, json.loads(row[0]))
        except ValueError as err:
            raise ValueError(f"{self.path}: the answer under key {key} is damaged: {err}") from err

    def put(self, key: str, sample: Sample, generator: str = "") -> None:
        """Keep the answer durably before returning; an answer that is there already stays.

        `generator` names who answered, for `totals`. Raises ValueError when the file cannot be written.
        """
        text = json.dumps(to_json(sample))
        usage = sample.usage
        row = (key, generator, text, time.time(), usage.prompt_tokens, usage.completion_tokens)
        with self._errors():
            self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def totals(self) -> dict[str, CacheTotals]:
        """Return the number of answers and their tokens by generator."""
        with self._errors():
            rows = self._db.execute(
                "SELECT generator, count(*), sum(prompt_tokens), sum(completion_tokens) FROM answers"
                " GROUP BY generator ORDER BY generator"
            ).fetchall()
        return {generator: CacheTotals(*numbers) for generator, *numbers in rows}

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as err:  # locked, read-only, disk full, a folder
            raise ValueError(f"{self.path}: cannot use the response cache: {err}") from err
        except sqlite3.ProgrammingError:  # closed, or another thread: the caller's mistake, not the file's
            raise
        except sqlite3.DatabaseError as err:
            raise ValueError(
                f"{self.path}: not a readable response cache ({err}); it was left as it is: move it away to start anew"
            ) from err
