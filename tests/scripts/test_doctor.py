"""scripts/doctor.py reports the machine's parts, and only the presence of a key."""

import io
import json
import platform
import re
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from matryoshka.pilot.environment import ROOT, RUNTIME, _commit
from matryoshka.scripts import doctor


@contextmanager
def answering(body: bytes) -> Iterator[int]:
    """Serve `body` to every GET on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_report_is_json_and_tells_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: platform, importlib.metadata and the folders made here; the key's value must be nowhere."""
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.setenv("MATRYOSHKA_DATA", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "key-value-7391")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    report = doctor.inspect_machine()
    assert json.loads(json.dumps(report)) == report
    assert report["environment"]["python"] == platform.python_version()
    assert report["environment"]["versions"]["torch"] == version("torch")
    assert report["optional"]["transformers"] == version("transformers")
    assert report["data"] == {"folder": str(tmp_path), "gsm8k": True, "alfworld": False, "lamp": False}
    assert (report["keys"]["OPENAI_API_KEY"], report["keys"]["WANDB_API_KEY"]) == (True, False)
    text = io.StringIO()
    doctor.show(report, Console(file=text, width=200))
    assert "key-value-7391" not in json.dumps(report) + text.getvalue()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the brackets of the extra survive rich, which would take them for markup."""
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "cuda"})
    text = io.StringIO()
    doctor.show(doctor.inspect_machine(), Console(file=text, width=200))
    assert "no_such_package  no; pip install 'matryoshka-pilot[cuda]'" in text.getvalue()


def test_every_optional_package_is_in_the_extra_that_is_named() -> None:
    """Oracle: pyproject.toml: the message of a missing package must bring it, and nothing of run time is optional."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {extra: {re.split(r"[<>=\[;]", row)[0] for row in rows} for extra, rows in
             project["optional-dependencies"].items()}  # fmt: skip
    for module, extra in doctor.OPTIONAL.items():
        assert module.replace("_", "-") in names[extra], (module, extra)
    needed = {re.split(r"[<>=\[;]", row)[0] for row in project["dependencies"]}
    assert not needed & {module.replace("_", "-") for module in doctor.OPTIONAL} and set(RUNTIME) <= needed


def test_a_server_is_found_by_its_models() -> None:
    """Oracle: a server made here; one that speaks another language, or none, is not one of ours."""
    with answering(b'{"object": "list", "data": [{"id": "generator"}, {"id": "lora"}]}') as port:
        assert doctor._served_models(port) == ["generator", "lora"]
    assert doctor._served_models(port) is None
    with answering(b"<html>") as port:
        assert doctor._served_models(port) is None
    with answering(b"[]") as port:
        assert doctor._served_models(port) is None


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    """Oracle: git itself; a folder inside somebody else's repository has no commit of ours."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert _commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert _commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "inside").mkdir()
    assert _commit(tmp_path / "inside") is None
