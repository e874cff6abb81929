"""A stand-in for vLLM's server that speaks its protocol and misbehaves on request; standard library only.

    python fake_vllm.py --model DIR --served-model-name NAME --port PORT ...

FAKE_FAULTS names a file with one fault a line; every completion request takes the first line away and acts it out
("ok" is none). FAKE_START: "fail" (says why and exits), "hang" (never answers). What it draws is a function of prompt,
seed and adapter; each request is appended to FAKE_LOG, the command line written to FAKE_ARGUMENTS.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOCK = threading.Lock()
ADAPTERS: dict[str, str] = {}
CONTEXT = 64


def next_fault() -> str:
    path = Path(os.environ.get("FAKE_FAULTS", "/nowhere"))
    with LOCK:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines:
            path.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0] if lines else "ok"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    base = ""

    def do_GET(self) -> None:
        models = [{"id": self.base, "parent": None, "max_model_len": CONTEXT}]
        models += [{"id": name, "parent": self.base} for name in ADAPTERS]
        listed = json.loads(os.environ.get("FAKE_MODELS", "null")) or models
        self.send({"object": "list", "data": listed} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK, Path(os.environ.get("FAKE_LOG", os.devnull)).open("a") as log:
            log.write(json.dumps([self.path, self.headers.get("Authorization"), body]) + "\n")
        name = body.get("lora_name", "")
        if self.path == "/v1/load_lora_adapter":
            ADAPTERS[name] = body["lora_path"]
            self.send({})
        elif self.path == "/v1/unload_lora_adapter":
            del ADAPTERS[name]
            self.send({})
        else:
            self.complete(body, next_fault())

    def complete(self, body: dict[str, Any], fault: str) -> None:
        if fault == "die":
            os._exit(9)
        if fault == "forget":
            ADAPTERS.clear()
        if body["model"] != self.base and body["model"] not in ADAPTERS:
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        if fault.isdigit():
            return self.refuse(int(fault), f"as you wish, {self.headers.get('Authorization')}")
        if fault == "drop":
            return self.hang_up()
        if fault.startswith("sleep"):
            time.sleep(float(fault.removeprefix("sleep")))
        while fault.startswith("until ") and not os.path.exists(fault.removeprefix("until ")):
            time.sleep(0.005)
        seed = body.get("seed", 0) + len(body["model"])
        ids = [32 + (sum(body["prompt"]) + seed + i) % 90 for i in range(body["max_tokens"])]
        scores = {"token_logprobs": [-0.5] * len(ids)}
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "token_ids": ids}
        choice |= {"logprobs": scores, "prompt_token_ids": body["prompt"]}
        answer = {"model": body["model"], "choices": [choice]}
        if fault == "wrong model":
            answer["model"] = "another"
        elif fault == "wrong prompt":
            choice["prompt_token_ids"] = [0, *body["prompt"]]
        elif fault == "no ids":
            choice["token_ids"] = None
        elif fault == "ids as text":
            choice["token_ids"] = "a" * len(ids)
        elif fault == "prompt as a number":
            choice["prompt_token_ids"] = 5
        elif fault == "no log-probs":
            choice["logprobs"] = None
        elif fault == "log-probs as a list":
            choice["logprobs"] = scores["token_logprobs"]
        elif fault == "log-probs of 400 digits":
            choice["logprobs"] = {"token_logprobs": [-(10**400)] * len(ids)}
        elif fault == "nan":
            choice["logprobs"] = {"token_logprobs": [float("nan")] * len(ids)}
        elif fault == "abort":
            choice["finish_reason"] = "abort"
        elif fault == "no choices":
            answer["choices"] = []
        data = json.dumps(answer).encode()
        if fault == "garbage":
            data = b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self.hang_up()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, message: str) -> None:
        self.send({"error": {"message": message, "code": status}}, status)

    def send(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on standard error."""


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--served-model-name", "--port"):
        parser.add_argument(name)
    arguments, _ = parser.parse_known_args()
    Path(os.environ.get("FAKE_ARGUMENTS", os.devnull)).write_text(" ".join(sys.argv[1:]))
    print("a line of the log", flush=True)
    start = os.environ.get("FAKE_START", "")
    if start == "fail":
        sys.exit("no memory for the cache")
    if start == "hang":
        time.sleep(600)
    Handler.base = arguments.served_model_name
    ThreadingHTTPServer(("127.0.0.1", int(arguments.port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
