"""The accounts of a response cache, in the same file and the same transactions: claims, holds and spending.

A claim says that a process is asking a request, so that no other process asks it too. A hold is the most that a claimed
request can cost. Spending is added up by generator and stays when answers are pruned. The invariant: at any moment,
also after kill -9, `spent` + `held` of a generator is at least what its provider can bill for requests that were sent
under a hold. Methods run in the caller's transaction.
"""

import os
import sqlite3
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matryoshka.core.records import Usage

FOREIGN_CLAIM_S = 3600.0  # a claim whose owner cannot be seen from here (another container) counts as dead after this

TABLES = (
    "CREATE TABLE spent (generator TEXT PRIMARY KEY, answers INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,"
    " completion_tokens INTEGER NOT NULL, lost INTEGER NOT NULL, lost_prompt_tokens INTEGER NOT NULL,"
    " lost_completion_tokens INTEGER NOT NULL)",
    "CREATE TABLE claims (key TEXT PRIMARY KEY, generator TEXT NOT NULL, owner TEXT NOT NULL, since REAL NOT NULL,"
    " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)",
)
PRICES = "CREATE TABLE prices (generator TEXT PRIMARY KEY, input REAL NOT NULL, output REAL NOT NULL)"
# For a cache of version 1, which had only answers.
FROM_ANSWERS = (
    "INSERT INTO spent SELECT generator, count(*), sum(prompt_tokens), sum(completion_tokens), 0, 0, 0"
    " FROM answers GROUP BY generator"
)
_SPEND = (
    "INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (generator) DO UPDATE SET"
    " answers = answers + excluded.answers, prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
    " completion_tokens = completion_tokens + excluded.completion_tokens, lost = lost + excluded.lost,"
    " lost_prompt_tokens = lost_prompt_tokens + excluded.lost_prompt_tokens,"
    " lost_completion_tokens = lost_completion_tokens + excluded.lost_completion_tokens"
)
_HELD = "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM claims WHERE generator = ?"
_COMMITTED = (
    "SELECT generator, sum(p), sum(c) FROM (SELECT generator, prompt_tokens + lost_prompt_tokens AS p,"
    " completion_tokens + lost_completion_tokens AS c FROM spent"
    " UNION ALL SELECT generator, prompt_tokens, completion_tokens FROM claims) GROUP BY generator"
)


@dataclass(frozen=True)
class Spending:
    """The account of one generator since the file was made, pruned answers included.

    usage: the tokens of the answers. lost: the number of attempts that may have been billed although they brought no
    answer, or an answer that does not say what it cost; lost_usage: the most that these cost. held: the most that the
    requests that are on their way now will cost.
    """

    answers: int = 0
    usage: Usage = Usage()
    lost: int = 0
    lost_usage: Usage = Usage()
    held: Usage = Usage()

    @property
    def spent(self) -> Usage:
        """The tokens that count against a budget: those of answers, and those that may have been billed."""
        return add(self.usage, self.lost_usage)


def add(a: Usage, b: Usage) -> Usage:
    """Return the tokens of both."""
    return Usage(a.prompt_tokens + b.prompt_tokens, a.completion_tokens + b.completion_tokens)


class Accounts:
    """The tables `spent` and `claims` behind one connection."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def claim(self, key: str, generator: str) -> bool:
        """Claim `key` for this process and return True, or return False while a living process, this one included, is
        asking it.

        The claim of a process that died is taken over, and its hold counts as lost.
        """
        row = self._db.execute("SELECT owner, since FROM claims WHERE key = ?", (key,)).fetchone()
        if row is not None and _is_alive(*row):
            return False
        self._end_dead_claim(key, generator)
        values = (key, generator, _owner(os.getpid()), time.time())
        self._db.execute("INSERT INTO claims VALUES (?, ?, ?, ?, 0, 0)", values)
        return True

    def release(self, key: str) -> None:
        """End the claim of `key`, if there is one, and its hold."""
        self._db.execute("DELETE FROM claims WHERE key = ?", (key,))

    def hold(self, key: str, most: Usage) -> None:
        """Hold `most` for the claimed `key`, in place of its earlier hold."""
        values = (most.prompt_tokens, most.completion_tokens, key)
        self._db.execute("UPDATE claims SET prompt_tokens = ?, completion_tokens = ? WHERE key = ?", values)

    def answered(self, generator: str, usage: Usage) -> None:
        """Add an answer that cost `usage`."""
        self._db.execute(_SPEND, (generator, 1, usage.prompt_tokens, usage.completion_tokens, 0, 0, 0))

    def lost(self, generator: str, most: Usage) -> None:
        """Add an attempt that may have cost `most`."""
        self._db.execute(_SPEND, (generator, 0, 0, 0, 1, most.prompt_tokens, most.completion_tokens))

    def end_dead_claims(self) -> None:
        """End the claims of processes that died; their holds count as lost."""
        owners = self._db.execute("SELECT owner, max(since) FROM claims GROUP BY owner").fetchall()
        for owner in [owner for owner, since in owners if not _is_alive(owner, since)]:
            keys = self._db.execute("SELECT key, generator FROM claims WHERE owner = ?", (owner,))
            for key, generator in keys.fetchall():
                self._end_dead_claim(key, generator)

    def committed(self) -> dict[str, Usage]:
        """Return the tokens that are spent and held, by generator."""
        return {generator: Usage(*tokens) for generator, *tokens in self._db.execute(_COMMITTED)}

    def held(self) -> Usage:
        """Return the tokens that are held for all generators together."""
        return Usage(*self._db.execute(_HELD.replace("generator = ?", "1")).fetchone())

    def take_in(self, other: str) -> None:
        """Add the accounts of the attached database `other`, whose processes have all ended."""
        for row in self._db.execute(f"SELECT * FROM {other}.spent").fetchall():
            self._db.execute(_SPEND, row)
        held = f"SELECT generator, prompt_tokens, completion_tokens FROM {other}.claims"
        for generator, *most in self._db.execute(f"{held} WHERE prompt_tokens + completion_tokens > 0").fetchall():
            self.lost(generator, Usage(*most))
        self._db.execute(f"INSERT OR IGNORE INTO prices SELECT * FROM {other}.prices")

    def spending(self, generator: str) -> Spending:
        """Return the account of `generator`."""
        row = self._db.execute("SELECT * FROM spent WHERE generator = ?", (generator,)).fetchone()
        held = Usage(*self._db.execute(_HELD, (generator,)).fetchone())
        if row is None:
            return Spending(held=held)
        _, answers, prompt, completion, lost, lost_prompt, lost_completion = row
        return Spending(answers, Usage(prompt, completion), lost, Usage(lost_prompt, lost_completion), held)

    def _end_dead_claim(self, key: str, generator: str) -> None:
        row = self._db.execute("SELECT prompt_tokens, completion_tokens FROM claims WHERE key = ?", (key,)).fetchone()
        if row is not None and row != (0, 0):
            self.lost(generator, Usage(*row))
        self.release(key)


@cache
def _owner(pid: int) -> str:
    """Return a name of process `pid` that no later process has: its PID namespace, its number and its start time."""
    return f"{_pid_namespace()} {pid} {_start_time(pid)}"


def _is_alive(owner: str, since: float) -> bool:
    space, pid, started = owner.rsplit(" ", 2)
    if space != _pid_namespace():
        return time.time() - since < FOREIGN_CLAIM_S
    return _start_time(int(pid)) == started


def _pid_namespace() -> str:
    """Return a name of the host and PID namespace, within which a process number is unique."""
    try:
        return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a sandboxed kernel may not show it
        return os.uname().nodename


def _start_time(pid: int) -> str:
    """Return the clock tick at which process `pid` started, "" if it does not exist or has ended (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
