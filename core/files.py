"""Files that survive a kill at any moment: atomic writes, append-only JSONL journals, one lock per folder.

Texts go through `redact`, so no file that is written here holds a known secret.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from matryoshka.core.json_input import parse_json
from matryoshka.core.redaction import redact, to_redacted_json

FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EIO, errno.EROFS)
_log = logging.getLogger(__name__)


@contextmanager
def explains_disk_errors(path: Path) -> Iterator[None]:
    """Let an error of a disk say where it was met and how to go on; of a full one, how much is free."""
    try:
        yield
    except OSError as err:
        if err.errno not in FULL + BROKEN:
            raise
        remedy = "mend the disk, or move the folder to another one,"
        if err.errno in FULL:
            free = shutil.disk_usage(path.parent).free
            remedy = f"{free / 2**20:.1f} MiB are free there; free some space, or raise the quota,"
        what = f"{path}: {os.strerror(err.errno)}; {remedy} and give the same command again: what is recorded is kept"
        raise OSError(err.errno, what) from err


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then fsync and rename it: `path` is whole or untouched.

    A link stays, and what it names is replaced. Raises ValueError for a device, such as /dev/null, and for a folder: a
    rename would put a file in its place.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file; give the path of a file, which is written as a whole")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder = os.open(path.parent, os.O_RDONLY)  # now: a process that waits for the file may rename the folder
    try:
        with explains_disk_errors(path):
            write(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            os.fsync(folder)
    finally:
        os.close(folder)
        temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield the path of a folder to make, which becomes `target`, fsynced, when the block ends without an error.

    `target` is complete or as it was; the block makes the folder itself. A folder that is there at the end is an
    OSError where `replace` is False. Otherwise it is replaced in one step where the file system can exchange two names,
    and in two renames elsewhere; `recover_folder` undoes the first one if the process is killed before the second.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    recover_folder(old)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explains_disk_errors(target):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                fsync(path)
            if not replace or not target.exists():
                os.rename(temporary, target)
            elif not _exchange(temporary, target):
                os.rename(target, old)
                os.rename(temporary, target)
            fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(old)


def recover_folder(old: Path) -> None:
    """Give `old`, a folder `.NAME.PID.old` that `write_folder` left, its name back, or remove it if NAME is taken."""
    target = old.with_name(old.name[1:].rsplit(".", 2)[0])
    with suppress(OSError):  # it is not there, or the name is taken
        if not target.exists():
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    here = -100  # AT_FDCWD: relative paths begin in the current folder
    if renameat2 is None:
        return False
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0:  # RENAME_EXCHANGE
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(redact(text), encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    write_text(path, to_redacted_json(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[Any]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(to_redacted_json(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: Any) -> None:
    """Add one JSON object to the end of `path`; a kill in here may leave a part of its line."""
    with explains_disk_errors(path), path.open("a", encoding="utf-8") as handle:
        handle.write(to_redacted_json(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Return the JSON objects of `path`, one a line.

    Raises FileNotFoundError, and ValueError naming file and line for an empty file, an empty row, malformed JSON or
    bytes that are not UTF-8.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected JSONL, one JSON object a line")
    rows = []
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                raise ValueError(f"{path}:{number}: the row is empty; expected one JSON object a line")
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file is empty; expected one JSON object a line")
    return rows


class Journal:
    """Append-only JSONL file keyed by content: a recorded row is never recorded again.

    A last line without its newline is left by a kill: it is cut off when the journal is opened, and `torn`
    counts it. Any other unreadable line is an error that names its number.
    """

    torn: int = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle: IO[bytes] = path.open("a+b", buffering=0)
        self._handle.seek(0)
        data = self._handle.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self.torn = 1
            _log.warning("%s: dropped 1 torn last line (%d bytes), which a kill left", path, len(data) - whole)
            self._handle.truncate(whole)
        self.rows.update(_journal_rows(path, data[:whole], 1))

    def append(self, key: str, row: dict[str, Any], sync: bool = True) -> None:
        """Record `row` under `key` durably. Raises ValueError if the key is there already.

        Without `sync` a power cut may still take it until `sync()` is called; a kill may not.
        """
        if key in self.rows:
            raise ValueError(f"{self.path}: key {key} is recorded already")
        row = {"key": key, **row}
        line = to_redacted_json(row, ensure_ascii=False).encode() + b"\n"
        whole = os.fstat(self._handle.fileno()).st_size
        try:
            with explains_disk_errors(self.path):
                while line:
                    line = line[self._handle.write(line) :]  # a disk that is nearly full takes a part
        except OSError:
            with suppress(OSError):  # where this fails, the torn line is dropped at the next start
                self._handle.truncate(whole)
            raise
        self.rows[key] = row
        if sync:
            self.sync()

    def sync(self) -> None:
        """Return when the disk holds all appended rows; it may run in another thread than `append`."""
        with explains_disk_errors(self.path):
            os.fsync(self._handle.fileno())

    def refresh(self) -> None:
        """Take in what other processes recorded; no other process writes to this journal."""

    def close(self) -> None:
        self._handle.close()


class UnwrittenJournal(Journal):
    """A journal in memory alone, for episodes that another process records."""

    def __init__(self) -> None:
        self.rows = {}

    def append(self, key: str, row: dict[str, Any], sync: bool = True) -> None:
        """Keep `row` under `key`."""
        self.rows[key] = row

    def sync(self) -> None:
        """Do nothing: there is no file."""


class SharedJournal(Journal):
    """The journal of one of several processes: appends to its own file, knows the rows of all files of a pattern.

    A last line without its newline in another's file may still be being written: it is left for later.
    """

    def __init__(self, path: Path, pattern: str) -> None:
        super().__init__(path)
        self._pattern = pattern
        self._taken: dict[Path, tuple[int, int]] = {}  # of each other file: bytes and lines
        self.refresh()

    def refresh(self) -> None:
        """Take in the rows that the other files have gained."""
        for path in sorted(self.path.parent.glob(self._pattern)):
            if path == self.path:
                continue
            size, count = self._taken.get(path, (0, 0))
            with path.open("rb") as handle:
                handle.seek(size)
                data = handle.read()
            data = data[: data.rfind(b"\n") + 1]
            for key, row in _journal_rows(path, data, count + 1).items():
                self.rows.setdefault(key, row)
            self._taken[path] = (size + len(data), count + data.count(b"\n"))


def _journal_rows(path: Path, data: bytes, first: int) -> dict[str, dict[str, Any]]:
    """Return the rows of whole lines by key; `first` is the number of the first one."""
    rows = {}
    for number, line in enumerate(data.splitlines(), start=first):
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as err:  # malformed JSON, or not UTF-8
            raise ValueError(f"{path}:{number}: not a journal row ({err}); expected an object with 'key'") from err
    return rows


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the one lock of a run directory. Raises ValueError when another process holds it, and for a file.

    A new directory is for its owner alone: prompts, answers and logs may hold a user's private data.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise ValueError(f"{folder}: there is a file in the place of this folder; give another folder") from err
    with (folder / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise ValueError(
                f"{folder}: another process (pid {holder}) is working in this run directory; wait for it or stop it"
            ) from err
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield


EMBEDDED_MODEL = "`matryoshka convert --out FOLDER` makes one of the embedded SmolLM2-135M-Instruct"


def check_model_folder(folder: Path) -> None:
    """Raise FileNotFoundError, which says how to get one, where there is no model folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a Hugging Face model folder; {EMBEDDED_MODEL}")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; it is read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Return when the disk holds the contents of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
