"""core/files.py: writes are atomic, a journal survives a kill, and malformed rows are named."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from matryoshka.core.files import Journal, file_digest, folder_lock, read_jsonl, write_text


def test_a_folder_may_be_renamed_as_soon_as_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no error, and the file in the folder's new place: so a checkpoint's first rank waits for the others'."""
    replace = os.replace

    def replace_then_rename(source: Path, target: Path) -> None:
        replace(source, target)
        os.rename(tmp_path / "half", tmp_path / "whole")

    monkeypatch.setattr(os, "replace", replace_then_rename)
    write_text(tmp_path / "half" / "rank-1.json", "{}")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["rank-1.json"]


def test_a_new_run_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Oracle: the permission bits under the usual umask; a folder that is there keeps its own."""
    before = os.umask(0o022)
    try:
        (tmp_path / "old").mkdir()
        for name, bits in (("new", 0o700), ("old", 0o755)):
            with folder_lock(tmp_path / "runs" / name if name == "new" else tmp_path / name):
                pass
            folder = tmp_path / "runs" / name if name == "new" else tmp_path / name
            assert folder.stat().st_mode & 0o777 == bits
    finally:
        os.umask(before)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """Oracle: the pipe, which stands for /dev/null and other devices, and the folder are there after the refusal; a
    link still names its file, which has the new text.
    """
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, there in (("pipe", Path.is_fifo), ("folder", Path.is_dir)):
        with pytest.raises(ValueError, match=f"{name}: is no regular file"):
            write_text(tmp_path / name, "text")
        assert there(tmp_path / name)
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_file_in_the_place_of_a_run_folder_is_named(tmp_path: Path) -> None:
    """Oracle: the message, for the folder itself and for one below the file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{path}: there is a file in the place"), folder_lock(path):
            pass


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """Oracle: the rows as they were given; some editors put these three bytes before a UTF-8 text."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_a_journal_is_cut_where_a_kill_cut_it(tmp_path: Path) -> None:
    """Oracle: the bytes on the disk: half a row is gone, the next one stands alone on its line."""
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.append("a", {"text": "one line\u2028for JSON\r"})
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "te')
    again = Journal(path)
    assert again.rows == {"a": {"key": "a", "text": "one line\u2028for JSON\r"}} and path.read_bytes() == whole
    again.append("c", {})
    again.close()
    assert [json.loads(line)["key"] for line in path.read_bytes().split(b"\n")[:-1]] == ["a", "c"]


@pytest.mark.parametrize("row", [b'{"key"', b"[]", b"7", b"{}", b'{"key": "\xff"}', b""])
def test_a_row_that_is_none_is_named(row: bytes, tmp_path: Path) -> None:
    """Oracle: the number of the line that this test broke."""
    (tmp_path / "journal.jsonl").write_bytes(b'{"key": "a"}\n' + row + b'\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"journal\.jsonl:2: not a journal row \(.*\); expected an object with 'key'"):
        Journal(tmp_path / "journal.jsonl")


def test_a_file_is_known_by_its_hash(tmp_path: Path) -> None:
    """Oracle: hashlib over the whole file, which is longer than a block."""
    (tmp_path / "file").write_bytes(data := bytes(range(256)) * 2000)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
