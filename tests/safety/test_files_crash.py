"""Every function of core/files under every fault at every fsync and rename, each in a process of its own.

The oracle: after the fault a reader finds the old content or the new one, whole; a journal has every row that was
acknowledged, and goes on from there.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from matryoshka.core import files
from matryoshka.core.files import Journal, folder_lock, read_jsonl, write_folder, write_json, write_text
from matryoshka.tests.safety.faults import KINDS, NearlyFull, install

OLD, NEW = "old " * 50, "new " * 80


def under_fault(kind: str, at: int, work: Callable[[], None]) -> tuple[str, bool]:
    """Run `work` in a fork; return how it ended ("done", "killed", or its error), and whether the fault was met."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = "done"
        try:
            count = install(kind, at)
            try:
                work()
            except OSError as err:
                told = str(err)
            os.write(writer, json.dumps([told, count() >= at]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        return "killed", True
    told, is_met = json.loads(found)
    return told, is_met


def write_a_folder(target: Path, text: str) -> None:
    with write_folder(target) as folder:
        folder.mkdir()
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)


WRITERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "text": (write_text, lambda path: path.read_text()),
    "json": (lambda path, text: write_json(path, [text]), lambda path: str(json.loads(path.read_text())[0])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_old_or_new_whatever_happens(name: str, kind: str, tmp_path: Path) -> None:
    """Oracle: the two contents. A later write works, and leaves no temporary file of its own."""
    write, read = WRITERS[name]
    path = tmp_path / "file"
    for at in range(1, 20):
        write(path, OLD)
        told, is_met = under_fault(kind, at, lambda: write(path, NEW))
        assert read(path) in ((OLD, NEW) if is_met else (NEW,))
        if kind == "ENOSPC" and is_met:
            assert "No space left" in told and "MiB are free" in told and str(path) in told
        if kind == "EIO" and is_met:
            assert "Input/output error; mend the disk" in told and str(path) in told
        if not is_met:
            break
    assert 3 <= at < 19  # file, rename and folder were each hit
    write(path, OLD)
    assert read(path) == OLD


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_old_or_new_whatever_happens(
    kind: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder holds two files of one content. It is absent only after a kill between two renames, on a file
    system that cannot exchange names, and then `recover_folder` brings the old content back."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, num_recovered = tmp_path / "folder", 0
    for at in range(1, 20):
        write_a_folder(target, OLD)
        _, is_met = under_fault(kind, at, lambda: write_a_folder(target, NEW))
        if not target.exists():
            assert kind in ("kill", "short") and is_met and not exchanges
            (old,) = tmp_path.glob(".folder.*.old")
            files.recover_folder(old)
            num_recovered += 1
        texts = {(target / name).read_text() for name in ("one", "two")}
        assert texts in ([{OLD}, {NEW}] if is_met else [{NEW}])
        if not is_met:
            break
    assert 5 <= at < 19
    assert num_recovered == (kind in ("kill", "short") and not exchanges)


@pytest.mark.parametrize("kind", KINDS)
def test_a_journal_keeps_what_it_acknowledged(kind: str, tmp_path: Path) -> None:
    """Oracle: the rows whose append returned. The row of the fault may be there or not; torn, it is counted."""
    for at in range(1, 6):
        path = tmp_path / f"{kind}-{at}.jsonl"

        def append_all(path: Path = path) -> None:
            journal = Journal(path)
            for number in range(4):
                journal.append(f"key-{number}", {"text": "x" * 100})
                (path.parent / f"{path.stem}.acknowledged").write_text(str(number + 1))

        _, is_met = under_fault(kind, at, append_all)
        acknowledged = path.parent / f"{path.stem}.acknowledged"
        least = int(acknowledged.read_text()) if acknowledged.exists() else 0
        journal = Journal(path)
        assert list(journal.rows) == [f"key-{n}" for n in range(len(journal.rows))]
        assert least <= len(journal.rows) <= least + 1
        assert journal.torn == (1 if kind == "short" and is_met else 0)
        for number in range(len(journal.rows), 4):
            journal.append(f"key-{number}", {"text": "x" * 100})
        journal.close()
        assert [row["key"] for row in read_jsonl(path)] == [f"key-{n}" for n in range(4)]


def test_a_torn_last_line_is_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a line cut by hand after 10 bytes."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a"}\n{"key": "b')
    journal = Journal(path)
    assert (list(journal.rows), journal.torn) == (["a"], 1)
    assert "dropped 1 torn last line (10 bytes)" in caplog.text
    assert path.read_bytes() == b'{"key": "a"}\n'


def test_a_disk_that_fills_up_within_a_row_leaves_whole_rows(tmp_path: Path) -> None:
    """Oracle: the file after a short write and ENOSPC: the row is taken back, and fits once there is room."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("a", {})
    handle = NearlyFull(path, "a+")
    handle.room = 20
    journal._handle = handle
    with pytest.raises(OSError, match="journal.jsonl: No space left on device; .* MiB are free there; free some space"):
        journal.append("b", {"text": "x" * 50})
    assert path.read_bytes() == b'{"key": "a"}\n' and list(journal.rows) == ["a"]
    handle.room = 1000
    journal.append("b", {"text": "x" * 50})
    assert list(Journal(path).rows) == ["a", "b"]


def test_the_second_process_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    """Oracle: our own process number, in the error of a process that forked from us and opens the folder afresh."""
    with folder_lock(tmp_path / "run"):
        told = ""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with folder_lock(tmp_path / "run"):
                    told = "held"
            except ValueError as err:
                told = str(err)
            os.write(writer, told.encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            told = pipe.read().decode()
        os.waitpid(child, 0)
    assert f"another process (pid {os.getpid()}) is working in this run directory" in told
