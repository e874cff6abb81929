"""scripts/data.py: LaMP's files over a real HTTP server on loopback: whole, broken off, resumed, changed, damaged."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from matryoshka.core.files import folder_lock
from matryoshka.core.records import RemoteFile
from matryoshka.pilot.download import MANIFEST, fetch
from matryoshka.scripts.cli import main
from matryoshka.tasks.alfworld import sources as alfworld
from matryoshka.tasks.lamp import sources as lamp
from matryoshka.tasks.pal import sources as pal

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


def files(site: Site | str) -> list[RemoteFile]:
    """Return LaMP-2M's files at another site."""
    return [replace(file, site=getattr(site, "url", str(site))) for file in lamp.sources("lamp", "2M")]


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


def test_files_come_whole_once_and_their_checksums_are_recorded(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the bytes served; a second call asks for nothing; SHA-256 by hashlib, which the first download says, as
    none is known of LaMP's files. A folder with that manifest alone, as on another machine, refuses other bytes.
    """
    paths = fetch(files(site), tmp_path)
    assert [path.name for path in paths] == FILES and {path.parent.name for path in paths} == {"LaMP_2M"}
    assert [path.read_bytes() for path in paths] == list(site.files.values())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [row["sha256"] for row in manifest.values()] == [hashlib.sha256(b).hexdigest() for b in site.files.values()]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and all(row["sha256"] in line for row, line in zip(manifest.values(), said, strict=True))
    assert "no checksum of this file is known" in said[2] and "reported to have had 9,493,217 bytes" in said[2]
    assert "reported" not in said[0] and "it has 105,000 bytes" in said[0]
    assert fetch(files("http://127.0.0.1:1"), tmp_path) == paths and len(site.asked) == 4 and len(caplog.records) == 4
    assert not list(tmp_path.rglob("*.part*"))
    other = tmp_path / "other machine"
    other.mkdir()
    (other / MANIFEST).write_bytes((tmp_path / MANIFEST).read_bytes())
    assert [path.read_bytes() for path in fetch(files(site), other)] == list(site.files.values())
    assert len(caplog.records) == 4
    (other / "LaMP_2M" / FILES[0]).unlink()
    site.files[next(iter(site.files))] = b"other bytes"
    with pytest.raises(ValueError, match=rf"SHA-256 is \w+, but .* says {manifest[f'LaMP_2M/{FILES[0]}']['sha256']}"):
        fetch(files(site), other)


def test_a_file_is_held_against_its_id_in_git(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the id that git itself gives to b"hello\\n"; no word of an unknown checksum; other bytes are refused."""
    site.files["/a"] = b"hello\n"
    root = site.url.removesuffix("/LaMP")
    file = RemoteFile("a", "a", root, git_blob="ce013625030ba8dba906f756967f9e9ca394464a")
    assert fetch([file], tmp_path)[0].read_bytes() == b"hello\n" and not caplog.records
    site.files["/a"] = b"hallo\n"
    with pytest.raises(ValueError, match="its id as a git blob is .*, but the site's repository has ce0136"):
        fetch([file], tmp_path / "other")


def test_two_processes_do_not_fill_one_folder(site: Site, tmp_path: Path) -> None:
    """Oracle: the refusal while another holds the folder's lock; a new folder is for every user of the machine."""
    out = tmp_path / "new"
    fetch(files(site), out)
    with folder_lock(out), pytest.raises(ValueError, match="another process .* is working in this"):
        fetch(files(site), out)
    os.umask(umask := os.umask(0))
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_broken_download_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    """Oracle: the Range asked for is what had come; the file is the one served."""
    site.break_after = 30_000
    with pytest.raises(OSError, match="30000 of 105000 bytes came; run the command again to go on"):
        fetch(files(site), tmp_path)
    assert not (tmp_path / "LaMP_2M" / FILES[0]).exists()
    assert [path.read_bytes() for path in fetch(files(site), tmp_path)] == list(site.files.values())
    assert [wanted for _, wanted in site.asked] == [None, "bytes=30000-", None, None, None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_starts_again(site: Site, tmp_path: Path, ranges: bool) -> None:
    """Oracle: no file is pieced together from two versions, whether the server knows ranges or not."""
    site.break_after = 30_000
    with pytest.raises(OSError):
        fetch(files(site), tmp_path)
    path = next(iter(site.files))
    site.files[path], site.ranges = b"another file " * 9000, ranges
    assert fetch(files(site), tmp_path)[0].read_bytes() == site.files[path]


def test_a_download_that_was_whole_but_not_renamed_starts_again(site: Site, tmp_path: Path) -> None:
    """Oracle: the server answers 416 to a range behind the end; the bytes are those served."""
    site.break_after = 104_999
    with pytest.raises(OSError):
        fetch(files(site), tmp_path)
    part = tmp_path / "LaMP_2M" / f"{FILES[0]}.part"
    part.write_bytes(next(iter(site.files.values())))
    assert fetch(files(site), tmp_path)[0].read_bytes() == next(iter(site.files.values()))


def test_other_bytes_than_the_manifest_says_are_refused(site: Site, tmp_path: Path) -> None:
    """Oracle: a user's own checksum and address; the message names both digests."""
    body = b"mine"
    site.files["/mine"] = body
    mine = {"LaMP_2M/train_questions.json": {"url": site.url.replace("/LaMP", "/mine"), "sha256": "0" * 64}}
    (tmp_path / MANIFEST).write_text(json.dumps(mine))
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 is {digest}, but .* says {'0' * 64}; delete the file"):
        fetch(files(site), tmp_path)
    mine["LaMP_2M/train_questions.json"]["sha256"] = digest
    (tmp_path / MANIFEST).write_text(json.dumps(mine))
    assert fetch(files(site), tmp_path)[0].read_bytes() == body


def test_damaged_manifests_and_missing_files(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the command ends with status 2 and one line that names the file, the entry or the address."""
    monkeypatch.setattr(lamp, "SITE", site.url)
    run = ["data", "lamp", "--task", "3", "--out", str(tmp_path)]
    assert main(run) == 2
    assert "/LaMP/LaMP_3/train/train_questions.json: the server answered 404" in capsys.readouterr().err
    for text, what in (("{", "malformed JSON"), ('{"a": {"url": 1}}', "entry 'a'"), ("[]", "entry ''")):
        (tmp_path / MANIFEST).write_text(text)
        assert main(run) == 2
        assert what in capsys.readouterr().err


def test_the_command_prints_the_files(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the four paths, one a line."""
    assert main(["data", "lamp", "--task", "2M", "--out", str(tmp_path), "--mirror", site.url]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "LaMP_2M" / name) for name in FILES]


def test_what_has_no_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the messages; nothing is asked and nothing is written."""
    assert main(["data", "alfword", "--out", str(tmp_path / "out")]) == 2
    assert main(["data", "lamp", "--task", "7", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "benchmark 'alfword' has no files to fetch; choose from alfworld, gsm-hard, gsm8k, lamp" in error
    assert main(["data", "gsm8k", "--task", "3", "--out", str(tmp_path / "out")]) == 2
    assert "gsm8k has no part '3'; leave --task out, or take 'socratic'" in capsys.readouterr().err
    assert "LaMP has no task '7'; choose from 1, 2N, 2M, 3, 4" in error and not (tmp_path / "out").exists()


def test_a_mirror_is_tried_first_and_its_bytes_are_checked(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file with the known checksum is taken, from whichever address has it, and the manifest says which."""
    good, other = b'{"question": "?"}\n', b"another file\n"
    site.files |= {"/good/test.jsonl": good, "/bad/test.jsonl": other}
    root = site.url.removesuffix("/LaMP")
    digest = hashlib.sha256(good).hexdigest()
    monkeypatch.setattr(pal, "SHA256", dict.fromkeys(pal.SHA256, digest))
    monkeypatch.setattr(pal, "GSM8K", f"{root}/good")
    (file,) = [file for file in pal.sources("gsm8k", "") if file.path == "test.jsonl"]
    mirrors = ["http://127.0.0.1:1", f"{root}/none", f"{root}/bad/"]
    (path,) = fetch([file], tmp_path, mirrors)
    assert path.read_bytes() == good
    entry = {"url": f"{root}/good/test.jsonl", "sha256": digest}
    assert json.loads((tmp_path / MANIFEST).read_text()) == {"test.jsonl": entry}
    assert caplog.text.count("trying the next address") == 3 and f"expected {digest}" in caplog.text
    monkeypatch.setattr(pal, "GSM8K", f"{root}/bad")
    (file,) = [file for file in pal.sources("gsm8k", "") if file.path == "test.jsonl"]
    with pytest.raises(ValueError, match="delete the file to fetch it again"):
        fetch([file], tmp_path / "other")


def archive(members: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, body in members.items():
            opened.writestr(name, body)
    return buffer.getvalue()


def test_alfworld_is_unpacked_as_its_own_command_does(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the members by hand; a second call fetches nothing, even when the archives are deleted; a member that is
    missing in part is put right after a new archive came.
    """
    root = site.url.removesuffix("/LaMP")
    games = {f"json_2.1.1/train/a/b/{name}": name.encode() for name in ("game.tw-pddl", "traj_data.json")}
    for place, name in zip(alfworld.ARCHIVES, games, strict=True):
        site.files[f"/{place}"] = archive({"json_2.1.1/": b"", name: games[name]})
    site.files |= {f"/{name}": name.encode() for name in alfworld.LOGIC}
    monkeypatch.setattr(alfworld, "LOGIC", {name: hashlib.sha256(name.encode()).hexdigest() for name in alfworld.LOGIC})
    pinned = dict.fromkeys(alfworld.ARCHIVES, "")
    monkeypatch.setattr(alfworld, "ARCHIVES", pinned)
    run = ["data", "alfworld", "--out", str(tmp_path), "--mirror", root]
    assert main(run) == 0
    assert {name: (tmp_path / name).read_bytes() for name in games} == games
    assert (tmp_path / "logic" / "alfred.pddl").read_text() == "alfred.pddl"
    for path in tmp_path.glob("*.zip"):
        path.unlink()
    asked = len(site.asked)
    assert main(run) == 0 and len(site.asked) == asked == 4
    # An archive that is damaged, and one that leads out of the folder.
    faults = {"not a whole zip archive": b"PK no zip", "leads out of the folder": archive({"../out": b""})}
    for said, body in faults.items():
        site.files[f"/{next(iter(pinned))}"] = body
        run[3] = str(tmp_path / said)
        assert main(run) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_the_files_go(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the paths that the shipped configurations name."""
    root = site.url.removesuffix("/LaMP")
    wanted = ["train.jsonl", "test.jsonl", "train_socratic.jsonl", "test_socratic.jsonl", "gsmhardv2.jsonl"]
    site.files |= {f"/{name}": name.encode() for name in wanted}
    monkeypatch.setattr(pal, "SHA256", {})
    monkeypatch.setattr(pal, "GIT_BLOBS", {})
    monkeypatch.chdir(tmp_path)
    for arguments in (["gsm8k"], ["gsm8k", "--task", "socratic"], ["gsm-hard"]):
        assert main(["data", *arguments, "--mirror", root]) == 0
    assert sorted(path.name for path in (tmp_path / "data" / "gsm8k").glob("*.jsonl")) == sorted(wanted)


def test_the_known_checksums_are_those_of_real_files() -> None:
    """Oracle: GSM8K's own training file, where the real data are at hand. Something is known of all files but LaMP's.
    """
    for benchmark, part in (("gsm8k", ""), ("gsm8k", "socratic"), ("gsm-hard", "")):
        assert all(file.sha256 or file.git_blob for file in pal.sources(benchmark, part))
    assert all(file.sha256 for file in alfworld.sources("alfworld", ""))
    path = Path(os.environ.get("MATRYOSHKA_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pal.SHA256["train.jsonl"]
