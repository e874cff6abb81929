"""An OpenAI-compatible server for the pilot's tests, in a process of its own; answers are functions of the prompt.

    python scripted_server.py ANSWERS.json LOG

ANSWERS maps questions to gold answers. The hash of the last message decides between the right program, a wrong one and
one that raises. Each chat request is appended to LOG (tenant and body hash) and synced before it is answered. The path
is /TENANT/v1/..., so that several runs can be told apart; the tenant `stalling` gets three answers and no more. Prints
its port; ends when its standard input closes.
"""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOCK = threading.Lock()
STALLING, ANSWERED = "stalling", 3


def program(prompt: str, answers: dict[str, float]) -> str:
    """Return the answer to a prompt whose first line is a question of `answers`."""
    kind = hashlib.sha256(prompt.encode()).digest()[0] % 8
    answer = answers.get(prompt.splitlines()[0], 0)  # a controller's prompt is no question
    body = f"return {answer}" if kind < 4 else "return -1" if kind < 7 else "return nothing"
    return f"def solution():\n    {body}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: dict[str, float]
    log: Path
    num_stalling = 0

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        tenant = self.path.split("/")[1]
        with LOCK, self.log.open("a") as handle:
            handle.write(f"{tenant} {hashlib.sha256(body).hexdigest()}\n")
            handle.flush()
            os.fsync(handle.fileno())
            Handler.num_stalling += tenant == STALLING
        if tenant == STALLING and Handler.num_stalling > ANSWERED:
            threading.Event().wait()
        text = program(json.loads(body)["messages"][-1]["content"], self.answers)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 7, "completion_tokens": 5}
        # Some servers do tell what they were told: a client that keeps it would keep the key.
        told = self.headers.get("Authorization", "")
        self._send({"id": told, "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def _send(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client was killed
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on standard error."""


def main() -> None:
    Handler.answers = json.loads(Path(sys.argv[1]).read_text())
    Handler.log = Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
