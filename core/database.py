"""SQLite files of ours: laid out once, however many processes come at once, and never those of another program."""

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BUSY_S = 30.0  # how long a statement waits for another process's lock
RETRY_S = 0.01


@dataclass(frozen=True)
class Schema:
    """The content of one kind of file."""

    name: str
    """The kind, as error messages name it."""
    application_id: int
    """The number in SQLite's header that says that a file is of this kind."""
    statements: tuple[str, ...]
    """They lay out an empty file."""
    version: int = 0
    upgrades: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Earlier version -> the statements that bring its file to `version`."""


def open_database(path: Path, schema: Schema) -> sqlite3.Connection:
    """Open or create the file at `path`; transactions are the caller's to begin (`transaction`).

    Raises ValueError, leaving the file as it is, when it is of another kind or version or cannot be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with database_errors(path, schema):
        database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        with database_errors(path, schema), transaction(database):
            _prepare(database, path, schema)
    except ValueError:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Check the file, or lay it out if it is empty."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if num_tables == 0 and application == 0:
        statements = schema.statements
    elif application != schema.application_id:
        raise ValueError(f"{path}: an SQLite file of another program; choose another path for the {schema.name}")
    elif version == schema.version:
        return
    elif version in schema.upgrades:
        statements = schema.upgrades[version]
    else:
        raise ValueError(
            f"{path}: a {schema.name} of version {version}, expected {schema.version}; choose another path"
        )
    for statement in statements:
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {schema.application_id}")
    database.execute(f"PRAGMA user_version = {schema.version}")


def use_wal(database: sqlite3.Connection) -> bool:
    """Switch the file to write-ahead logging; return False where its file system cannot hold such a file.

    SQLite's own waiting does not cover this switch: it fails at once while another process holds the write lock, as
    happens when several open a new file together. So it is tried again for as long as a statement would wait.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
            return bool(mode == "wal")
        except sqlite3.OperationalError as err:
            if err.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(RETRY_S)


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; commit at the end of the block, or roll back on an error."""
    database.execute("BEGIN IMMEDIATE")
    with database:
        yield


@contextmanager
def database_errors(path: Path, schema: Schema) -> Iterator[None]:
    """Turn SQLite's complaints about the file into a ValueError; the caller's own mistakes pass as they are."""
    try:
        yield
    except sqlite3.OperationalError as err:  # locked, read-only, disk full, a folder
        raise ValueError(f"{path}: cannot use the {schema.name}: {err}") from err
    except sqlite3.ProgrammingError:  # closed, or used by another thread
        raise
    except sqlite3.DatabaseError as err:
        raise ValueError(
            f"{path}: not a readable {schema.name} ({err}); it was left as it is: move it away to start anew"
        ) from err
