"""The response cache: every answer that was paid for, and the spending, in one SQLite file for several processes.

The invariant: an answer whose `put` returned is found by every later `get`, also after kill -9, and its tokens are in
`spending`, also when the answer is pruned. The file is in WAL mode with synchronous=NORMAL: a commit hands its pages to
the operating system, which outlives the process, but waits for no disk, so it takes microseconds of the event loop.
A power cut or a crash of the whole machine may therefore lose the last answers, but never the file. WAL needs a local
disk. An answer is never replaced: the first one stays. No request, header or key is ever stored.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from matryoshka.core.database import Schema, database_errors, open_database, transaction, use_wal
from matryoshka.core.records import Messages, Sample, Sampling, Usage, content_key, from_json, to_json
from matryoshka.core.redaction import to_redacted_json
from matryoshka.inference.accounts import FROM_ANSWERS, PRICES, TABLES, Accounts, Spending, add

APPLICATION_ID = 0x4D54524B  # in SQLite's header: this file is ours
VERSION = 3  # 1 had only the answers, 2 no prices

_ANSWERS = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, generator TEXT NOT NULL, sample TEXT NOT NULL,"
    " created REAL NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
)


SCHEMA = Schema(
    name="response cache",
    application_id=APPLICATION_ID,
    statements=(_ANSWERS, *TABLES, PRICES),
    version=VERSION,
    upgrades={1: (*TABLES, FROM_ANSWERS, PRICES), 2: (PRICES,)},
)


@dataclass(frozen=True)
class CacheTotals:
    """The tokens of one generator's answers in the cache, and the Unix times of the first and the last of them."""

    answers: int
    prompt_tokens: int
    completion_tokens: int
    first: float = field(default=0.0, compare=False)
    last: float = field(default=0.0, compare=False)


def answer_key(endpoint: str, model: str, messages: Messages, sampling: Sampling) -> str:
    """Return the cache key of one draw: equal for equal endpoint, model, messages and sampling (seed and draw too)."""
    exact = replace(sampling, temperature=float(sampling.temperature), top_p=float(sampling.top_p))  # 0 is 0.0
    return content_key("answer", endpoint.rstrip("/"), model, messages, exact)


class ResponseCache:
    """An SQLite table of answers by key. One object serves one thread; each process opens its own."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises ValueError, leaving the file as it is, when it is not such a cache."""
        self.path = path
        self._db = open_database(path, SCHEMA)
        self._accounts = Accounts(self._db)
        with self._errors():
            self._db.execute("PRAGMA synchronous = NORMAL")
            is_wal = use_wal(self._db)
        if not is_wal:
            self._db.close()
            raise ValueError(f"{path}: this file system holds no WAL database; put the cache on a local disk")

    def get(self, key: str) -> Sample | None:
        """Return the answer under `key`, or None. Raises ValueError when the file is damaged."""
        with self._errors():
            row = self._db.execute("SELECT sample FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._sample(key, row[0])

    def put(self, key: str, sample: Sample, generator: str = "") -> None:
        """Keep the answer durably and add its tokens to `spending` before returning; it ends a claim of its key.

        An answer that is there already stays. `generator` names the model that answered. Raises ValueError when the
        file cannot be written.
        """
        text = to_redacted_json(to_json(sample))
        usage = sample.usage
        row = (key, generator, text, time.time(), usage.prompt_tokens, usage.completion_tokens)
        with self._errors(), transaction(self._db):
            self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
            self._accounts.answered(generator, usage)
            self._accounts.release(key)

    # Requests on their way and spending; see accounts.py.

    def claim(self, key: str, generator: str = "") -> bool:
        """Claim `key` for this process and return True, or return False while a living process is asking it."""
        with self._errors(), transaction(self._db):
            return self._accounts.claim(key, generator)

    def release(self, key: str) -> None:
        """End the claim of `key`."""
        with self._errors():
            self._accounts.release(key)

    def hold(self, key: str, generator: str, most: Usage, fits: Callable[[dict[str, Usage]], bool]) -> Usage | None:
        """Hold `most` for the claimed `key` and return None if `fits` returns True for the sum with all that is spent
        and held, by generator.

        Otherwise hold nothing and return the tokens that other requests hold; none means that no request is on its way
        that could turn out to cost less than it holds.
        """
        with self._errors(), transaction(self._db):
            self._accounts.end_dead_claims()
            committed = self._accounts.committed()
            if not fits({**committed, generator: add(committed.get(generator, Usage()), most)}):
                return self._accounts.held()
            self._accounts.hold(key, most)
        return None

    def end_hold(self, key: str, generator: str, cost: Usage) -> None:
        """End the hold of `key` and count `cost`, the most that its attempt can have cost, as lost."""
        with self._errors(), transaction(self._db):
            if cost != Usage():
                self._accounts.lost(generator, cost)
            self._accounts.hold(key, Usage())

    def spending(self, generator: str) -> Spending:
        """Return the account of `generator`; the holds of killed processes count as lost."""
        with self._errors(), transaction(self._db):
            self._accounts.end_dead_claims()
            return self._accounts.spending(generator)

    def committed(self) -> dict[str, Usage]:
        """Return the tokens that are spent and held, by generator."""
        with self._errors(), transaction(self._db):
            self._accounts.end_dead_claims()
            return self._accounts.committed()

    def prices(self) -> dict[str, tuple[float, float]]:
        """Return the last known prices by generator: US dollars for a million tokens read, and written."""
        with self._errors():
            rows = self._db.execute("SELECT generator, input, output FROM prices").fetchall()
        return {generator: (read, written) for generator, read, written in rows}

    def set_price(self, generator: str, read: float, written: float) -> None:
        """Keep the prices of `generator`, so that a budget over several generators knows each one's cost."""
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO prices VALUES (?, ?, ?)", (generator, read, written))

    # Several machines: each has a file of its own, since a WAL database is for the processes of one.

    def take_in(self, path: Path) -> None:
        """Add the answers and accounts of the cache `path`, which no process uses any more. A second call with the same
        file would count its spending twice.
        """
        ResponseCache(path).close()  # it is one, and of our version
        with self._errors():
            self._db.execute("ATTACH ? AS other", (str(path),))
            try:
                with transaction(self._db):
                    self._db.execute("INSERT OR IGNORE INTO answers SELECT * FROM other.answers")
                    self._accounts.take_in("other")
            finally:
                self._db.execute("DETACH other")

    def copy_answers(self, path: Path) -> None:
        """Write a cache with the same answers, and accounts that begin with nothing, to `path`, which must not exist.
        """
        with self._errors():
            self._db.execute("VACUUM INTO ?", (str(path),))
        copy = ResponseCache(path)
        try:
            with copy._errors(), transaction(copy._db):
                for table in ("spent", "claims"):
                    copy._db.execute(f"DELETE FROM {table}")
            copy._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            copy.close()

    def totals(self) -> dict[str, CacheTotals]:
        """Return the number of answers, their tokens and their times by generator."""
        with self._errors():
            rows = self._db.execute(
                "SELECT generator, count(*), sum(prompt_tokens), sum(completion_tokens), min(created), max(created)"
                " FROM answers GROUP BY generator ORDER BY generator"
            ).fetchall()
        return {generator: CacheTotals(*numbers) for generator, *numbers in rows}

    def generators(self) -> list[str]:
        """Return the names of all generators that were asked, including those that gave no answer."""
        with self._errors():
            rows = self._db.execute("SELECT generator FROM spent UNION SELECT generator FROM answers ORDER BY 1")
            return [name for (name,) in rows.fetchall()]

    def rows(self, generator: str | None = None) -> Iterator[tuple[str, str, float, Sample]]:
        """Yield (key, generator, Unix time, answer), oldest first; of one generator if one is named."""
        where, values = ("", ()) if generator is None else (" WHERE generator = ?", (generator,))
        with self._errors():
            columns = "key, generator, created, sample"
            found = self._db.execute(f"SELECT {columns} FROM answers{where} ORDER BY created, key", values)
            for key, name, created, text in found:
                yield key, name, created, self._sample(key, text)

    def prune(self, before: float, generator: str | None = None) -> int:
        """Delete the answers that came before the Unix time `before`, give the space back and return their number.

        Their cost stays in `spending`.
        """
        where, values = "created < ?", [before, *([] if generator is None else [generator])]
        where += "" if generator is None else " AND generator = ?"
        with self._errors():
            count = self._db.execute(f"DELETE FROM answers WHERE {where}", values).rowcount
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def close(self) -> None:
        self._db.close()

    def _sample(self, key: str, text: str) -> Sample:
        try:
            return from_json(Sample, json.loads(text))
        except ValueError as err:
            raise ValueError(f"{self.path}: the answer under key {key} is damaged: {err}") from err

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.path, SCHEMA)
