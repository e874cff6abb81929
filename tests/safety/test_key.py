"""A planted key is nowhere after a run: not in its folder, its output, its cache, nor in any process below it.

The oracle is a search for the key's own letters, and for ten spellings of it, made here and not by `core/redaction.py`.
"""

import base64
import html
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from matryoshka.core.config import to_toml
from matryoshka.tests.pilot.conftest import command, environment
from matryoshka.tests.pilot.test_pilot import small
from matryoshka.tests.processes import command_line, descendants

pytest_plugins = ["matryoshka.tests.pilot.conftest"]

KEY = "sk-planted-Zq7Kd93hLm20XvTbW5"
SPELLINGS = {
    "plain": KEY,
    "quoted": json.dumps(KEY),
    "JSON escapes": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "percent": "".join(f"%{ord(c):02X}" for c in KEY),
    "URL": urllib.parse.quote(KEY, safe=""),
    "HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML named": html.escape(KEY),
    "hexadecimal": KEY.encode().hex(),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "backwards": KEY[::-1],
    "spaced": " ".join(KEY),
    "upper case": KEY.upper(),
}
# Programs that the server hands out besides answers with a spelling in them.
PROGRAMS = (
    "def solution():\n    return 1",
    "import os\ndef solution():\n    raise ValueError(open(f'/proc/{os.getppid()}/environ').read())",
    "import os\ndef solution():\n    raise ValueError(str(dict(os.environ)))",
    "import glob\ndef solution():\n    raise ValueError(''.join(open(p).read() for p in glob.glob('/proc/*/environ')))",
)


class Echo(BaseHTTPRequestHandler):
    """Answers with the key that came, in one spelling and one place after another."""

    protocol_version = "HTTP/1.1"
    count = 0
    fails_from = 10**9

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Echo.count += 1
        key = self.headers["Authorization"].removeprefix("Bearer ")
        assert key == KEY
        if Echo.count >= Echo.fails_from:
            self._send(401, {"error": {"message": f"Incorrect API key provided: {key}", "code": key}}, Location=key)
            return
        spelling = list(SPELLINGS.values())[Echo.count % len(SPELLINGS)]
        if Echo.count % 3 == 0:
            text = f"def solution():\n    # {spelling}\n    raise ValueError({spelling!r})"
        elif Echo.count % 3 == 1:
            text = f"{spelling}\n```python\n{PROGRAMS[Echo.count % len(PROGRAMS)]}\n```"
        else:
            text = PROGRAMS[Echo.count % len(PROGRAMS)]
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 5}
        self._send(200, {"id": spelling, "system_fingerprint": key, "choices": [choice], "usage": usage}, Request=key)

    def _send(self, status: int, value: object, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on standard error."""


@contextmanager
def echoing(fails_from: int) -> Iterator[str]:
    Echo.count, Echo.fails_from = 0, fails_from
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def spelled_in(data: bytes) -> list[str]:
    """Return the spellings of the key that `data` holds."""
    found = [name for name, spelling in SPELLINGS.items() if spelling.encode() in data]
    return found + (["any case"] if KEY.lower().encode() in data.lower() else [])


def watched(process: "subprocess.Popen[bytes]", timeout_s: float) -> list[str]:
    """Return where the key was seen in the processes of a run, while it runs.

    Between fork and exec a child is a copy of the run, with the run's environment: only a copy that stays counts.
    """
    seen = []
    copies: dict[int, float] = {}
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        assert time.monotonic() < deadline, "the run takes too long"
        for pid in descendants(process.pid):
            since = copies.setdefault(pid, time.monotonic())
            if command_line(pid) == command_line(process.pid) and time.monotonic() - since < 5:
                continue
            for name in ("cmdline", "environ"):
                try:
                    if spelled_in(Path(f"/proc/{pid}/{name}").read_bytes()):
                        seen.append(f"{name} of {command_line(pid)!r}")
                except OSError:  # it ended, or hides itself
                    pass
        time.sleep(0.02)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["normal", "crash", "killed"])
def test_a_planted_key_is_nowhere(ending: str, tmp_path: Path, controller_dir: Path) -> None:
    """Oracle: the search above, in every file below the run's root, in its output, and in processes while it runs."""
    with echoing(fails_from=9 if ending == "crash" else 10**9) as url:
        config = small(f"key-{ending}", controller_dir, url, rounds=0)
        generator = replace(config.generator, api_key_env="OPENAI_API_KEY")
        config = replace(config, star=False, generator=generator, rollout=replace(config.rollout, max_failed_share=0.0))
        (tmp_path / "config.toml").write_text(to_toml(config))
        variables = {**environment(), "OPENAI_API_KEY": KEY, "MATRYOSHKA_DEBUG": "1"}
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command("pilot", "--config", "config.toml"), cwd=tmp_path, env=variables, stdout=output, stderr=output
            )
            if ending == "killed":
                while Echo.count < 12 and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
            seen = watched(process, 600)
        told = (tmp_path / "output").read_bytes()
        asked = Echo.count
    assert asked >= 9, told.decode()[-2000:]
    assert (process.returncode == 0) == (ending == "normal"), told.decode()[-2000:]
    assert seen == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert {str(path): found for path in files if (found := spelled_in(path.read_bytes()))} == {}
    for path in files:  # pages of a database may split a text
        if path.suffix == ".sqlite":
            with sqlite3.connect(path) as database:
                assert spelled_in("\n".join(database.iterdump()).encode()) == []
    assert os.environ.get("OPENAI_API_KEY") != KEY
