"""scripts/data.py: LaMP's files over a real HTTP server on loopback: whole, broken off, resumed, changed, damaged."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from matryoshka.pilot.download import MANIFEST, fetch
from matryoshka.scripts.cli import main
from matryoshka.tasks.lamp.sources import sources

FILES = ["train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json"]


class Site(ThreadingHTTPServer):
    """Serves `files` by path with ranges; `break_after` cuts one answer's body; `asked` lists (path, Range)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}/LaMP"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        start = 0
        if self.server.ranges and wanted and self.headers["If-Range"] == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end, self.server.break_after = self.server.break_after, None
        self.wfile.write(body[start : len(body) if end is None else end])


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    for name in FILES:
        server.files[f"/LaMP/LaMP_2/new/{name.partition('_')[0]}/{name}"] = f"{name} ".encode() * 5000
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_come_whole_once_and_their_checksums_are_recorded(site: Site, tmp_path: Path) -> None:
    """Oracle: the bytes served; a second call asks for nothing; SHA-256 by hashlib."""
    paths = fetch(sources("2M", site.url), tmp_path)
    assert [path.name for path in paths] == FILES and {path.parent.name for path in paths} == {"LaMP_2M"}
    assert [path.read_bytes() for path in paths] == list(site.files.values())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [row["sha256"] for row in manifest.values()] == [hashlib.sha256(b).hexdigest() for b in site.files.values()]
    assert fetch(sources("2M", "http://127.0.0.1:1"), tmp_path) == paths and len(site.asked) == 4
    assert not list(tmp_path.rglob("*.part*"))


def test_a_broken_download_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    """Oracle: the Range asked for is what had come; the file is the one served."""
    site.break_after = 30_000
    with pytest.raises(OSError, match="30000 of 105000 bytes came; run the command again to go on"):
        fetch(sources("2M", site.url), tmp_path)
    assert not (tmp_path / "LaMP_2M" / FILES[0]).exists()
    assert [path.read_bytes() for path in fetch(sources("2M", site.url), tmp_path)] == list(site.files.values())
    assert [wanted for _, wanted in site.asked] == [None, "bytes=30000-", None, None, None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_starts_again(site: Site, tmp_path: Path, ranges: bool) -> None:
    """Oracle: no file is pieced together from two versions, whether the server knows ranges or not."""
    site.break_after = 30_000
    with pytest.raises(OSError):
        fetch(sources("2M", site.url), tmp_path)
    path = next(iter(site.files))
    site.files[path], site.ranges = b"another file " * 9000, ranges
    assert fetch(sources("2M", site.url), tmp_path)[0].read_bytes() == site.files[path]


def test_a_download_that_was_whole_but_not_renamed_starts_again(site: Site, tmp_path: Path) -> None:
    """Oracle: the server answers 416 to a range behind the end; the bytes are those served."""
    site.break_after = 104_999
    with pytest.raises(OSError):
        fetch(sources("2M", site.url), tmp_path)
    part = tmp_path / "LaMP_2M" / f"{FILES[0]}.part"
    part.write_bytes(next(iter(site.files.values())))
    assert fetch(sources("2M", site.url), tmp_path)[0].read_bytes() == next(iter(site.files.values()))


def test_other_bytes_than_the_manifest_says_are_refused(site: Site, tmp_path: Path) -> None:
    """Oracle: a user's own checksum and address; the message names both digests."""
    body = b"mine"
    site.files["/mine"] = body
    mine = {"LaMP_2M/train_questions.json": {"url": site.url.replace("/LaMP", "/mine"), "sha256": "0" * 64}}
    (tmp_path / MANIFEST).write_text(json.dumps(mine))
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 is {digest}, but .* says {'0' * 64}; delete the file"):
        fetch(sources("2M", site.url), tmp_path)
    mine["LaMP_2M/train_questions.json"]["sha256"] = digest
    (tmp_path / MANIFEST).write_text(json.dumps(mine))
    assert fetch(sources("2M", site.url), tmp_path)[0].read_bytes() == body


def test_damaged_manifests_and_missing_files(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the command ends with status 2 and one line that names the file, the entry or the address."""
    run = ["data", "lamp", "--task", "3", "--out", str(tmp_path), "--site", site.url]
    assert main(run) == 2
    assert "/LaMP/LaMP_3/train/train_questions.json: the server answered 404" in capsys.readouterr().err
    for text, what in (("{", "malformed JSON"), ('{"a": {"url": 1}}', "entry 'a'"), ("[]", "entry ''")):
        (tmp_path / MANIFEST).write_text(text)
        assert main(run) == 2
        assert what in capsys.readouterr().err


def test_the_command_prints_the_files(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the four paths, one a line."""
    assert main(["data", "lamp", "--task", "2M", "--out", str(tmp_path), "--site", site.url]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "LaMP_2M" / name) for name in FILES]


def test_what_has_no_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the messages; nothing is asked and nothing is written."""
    assert main(["data", "alfword", "--out", str(tmp_path / "out")]) == 2
    assert main(["data", "lamp", "--task", "7", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "benchmark 'alfword' has no files to fetch; choose from lamp" in error
    assert "LaMP has no task '7'; choose from 1, 2N, 2M, 3, 4" in error and not (tmp_path / "out").exists()
