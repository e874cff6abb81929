"""A benchmark's files from their own site, checked and resumable.

`manifest.json` in the target folder, which its user may edit, holds each file's address and checksum. Where no checksum
is known, the first download warns and records the checksum of what came; every later download must have the same one,
also on another machine to which the manifest is copied. The invariant: a file under its final name is complete and has
the manifest's checksum; a partial one is in `.part`.
"""

import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from matryoshka.core.files import file_digest, folder_lock, write_atomic, write_json
from matryoshka.core.records import RemoteFile
from matryoshka.pilot.progress import Progress

MANIFEST = "manifest.json"
UNPACKED = "unpacked"  # key of a manifest: the checksum of the archive whose members are all there
PIECE_BYTES = 2**20
TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


def fetch(files: Sequence[RemoteFile], out: Path, mirrors: Sequence[str] = ()) -> list[Path]:
    """Return the paths of `files` in the folder `out`, after fetching and unpacking the missing ones.

    mirrors: tried in turn before a file's own site. An address in the manifest counts before them all. An archive that
    is unpacked may be deleted. Raises ValueError for a damaged manifest, an answer that is no file, bytes of another
    checksum, and a folder that another process is filling; OSError when the connection fails: what was received stays
    for the next call.
    """
    if not out.exists():
        out.mkdir(parents=True)  # for everybody, unlike the folder of a run, which `folder_lock` would make
    with folder_lock(out):
        return _fetched(files, out, mirrors)


def _fetched(files: Sequence[RemoteFile], out: Path, mirrors: Sequence[str]) -> list[Path]:
    manifest = _read_manifest(out / MANIFEST)
    paths = []
    for file in files:
        path = out / file.path
        paths.append(path)
        if manifest.get(file.path, {}).get(UNPACKED) and not path.exists():
            continue
        urls = [f"{site.rstrip('/')}/{file.place}" for site in (*mirrors, file.site)]
        entry = manifest.setdefault(file.path, {"url": "", "sha256": file.sha256})
        if not path.exists():
            entry["url"] = _download_first([entry["url"]] if entry["url"] else urls, path, entry["sha256"])
        digest = file_digest(path)
        if entry["sha256"] and digest != entry["sha256"]:
            raise ValueError(
                f"{path}: SHA-256 is {digest}, but {out / MANIFEST} says {entry['sha256']}; delete the file to fetch "
                "it again, or correct the manifest if the new file is the right one"
            )
        if file.git_blob and not file.sha256 and (found := _git_blob(path)) != file.git_blob:
            what = f"its id as a git blob is {found}, but the site's repository has {file.git_blob}"
            raise ValueError(f"{path}: {what}; delete the file to fetch it again")
        if not entry["sha256"] and not file.git_blob:
            _say_unknown(path, digest, file.reported_bytes)
        entry["sha256"] = digest
        write_json(out / MANIFEST, manifest)
        if file.unpack and entry.get(UNPACKED) != digest:
            _unpack(path, out)
            entry[UNPACKED] = digest
            write_json(out / MANIFEST, manifest)
    return paths


def _say_unknown(path: Path, digest: str, reported: int) -> None:
    size = path.stat().st_size
    report = f" (another download is reported to have had {reported:,} bytes)" if reported else ""
    logger.warning(
        "%s: no checksum of this file is known, so that it cannot be checked%s; it has %s bytes and SHA-256 %s, which "
        "the manifest keeps: copy %s into another machine's folder, and its download must be the same",
        path, report, f"{size:,}", digest, MANIFEST,
    )  # fmt: skip


def _git_blob(path: Path) -> str:
    """Return the id that git gives to the file's bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _download_first(urls: Sequence[str], path: Path, sha256: str) -> str:
    """Fetch the file from the first address that gives it whole and right, and return that address."""
    for url in urls[:-1]:
        try:
            _download(url, path)
            if not sha256 or (digest := file_digest(path)) == sha256:
                return url
            path.unlink()
            logger.warning("%s: SHA-256 is %s, expected %s; trying the next address", url, digest, sha256)
        except (ValueError, OSError) as err:
            logger.warning("%s; trying the next address", err)
    _download(urls[-1], path)
    return urls[-1]


def _unpack(archive: Path, out: Path) -> None:
    """Put the members of a zip archive into `out`; those that are there in full are left alone."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            with Progress(f"unpack {archive.name}", len(members)) as progress:
                for number, member in enumerate(members, start=1):
                    target = out / member.filename
                    if not target.resolve().is_relative_to(out.resolve()):
                        raise ValueError(f"{archive}: member {member.filename!r} leads out of the folder")
                    if not target.is_file() or target.stat().st_size != member.file_size:
                        write_atomic(target, partial(Path.write_bytes, data=opened.read(member)))
                    progress.update(number, "files")
    except (zipfile.BadZipFile, EOFError, zlib.error) as err:
        raise ValueError(f"{archive}: not a whole zip archive ({err}); delete it to fetch it again") from err


def _read_manifest(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    expected = '{"<file>": {"url": ..., "sha256": ... or ""}}'
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: malformed JSON ({err}); expected {expected}") from err
    for file, row in rows.items() if isinstance(rows, dict) else [("", None)]:
        if not isinstance(row, dict) or {type(row.get(key, "")) for key in ("url", "sha256", UNPACKED)} != {str}:
            raise ValueError(f"{path}: entry {file!r} is {row!r}; expected {expected}")
    return dict(rows)


def _download(url: str, path: Path) -> None:
    """Fetch `url` into `path`, going on where an earlier call stopped if the server still has the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, mark = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    known = json.loads(mark.read_text()) if mark.exists() and part.exists() else {}
    have = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={have}-", "If-Range": known["version"]} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            have = have if answer.status == 206 else 0
            total = have + _length(answer, url)
            # Without a version a second request could join two different files: then it starts again.
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if version and not version.startswith("W/"):
                write_json(mark, {"version": version})
            else:
                mark.unlink(missing_ok=True)
            with part.open("r+b" if have else "wb") as handle, Progress(path.name, total) as progress:
                handle.seek(have)
                while piece := answer.read(PIECE_BYTES):
                    handle.write(piece)
                    progress.update(handle.tell(), f"{handle.tell() / 2**20:.0f} MiB")
                handle.flush()
                os.fsync(handle.fileno())
                got = handle.tell()
    except urllib.error.HTTPError as err:
        if err.code == 416:  # our part is as long as the file, or longer: it was not renamed, or has changed
            mark.unlink(missing_ok=True)
            return _download(url, path)
        raise ValueError(f"{url}: the server answered {err.code} {err.reason}; the manifest names the address") from err
    except (HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as err:
        raise OSError(f"{url}: no connection, or it broke ({err!r}); run the command again to go on") from err
    if got != total:
        raise OSError(f"{url}: {got} of {total} bytes came; run the command again to go on")
    os.replace(part, path)
    mark.unlink(missing_ok=True)


def _length(answer: HTTPResponse, url: str) -> int:
    length = answer.headers.get("Content-Length")
    if length is None:
        raise ValueError(f"{url}: the server sends no Content-Length, without which a broken download goes unnoticed")
    return int(length)
