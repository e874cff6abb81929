"""An OpenAI-compatible server in a process of its own, which the rollout benchmark drives.

It answers additions, with the latency and the faults that it is told. It counts its answers, and every request that
came again after it had been answered.

    python -m matryoshka.benchmarks.loopback '{"latency_s": 5.0}'

Prints its URL; ends when its standard input closes. GET /v1/stats gives the counts.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web

from matryoshka.inference.http_server import HttpError, json_response, serve_http

MODEL = "additions"
_SUM = re.compile(r"What is (\d+) \+ (\d+)\?$")


@dataclass(frozen=True)
class Loopback:
    """latency_s: from a request to its answer. error_share and hang_share of the attempts get a 500 or no answer; in
    the last `burst` of every burst_every requests (0: never) get a 429 that asks to wait retry_after_s.
    """

    latency_s: float = 0.0
    error_share: float = 0.0
    hang_share: float = 0.0
    burst_every: int = 0
    burst: int = 50
    retry_after_s: float = 1.0


@dataclass
class _State:
    config: Loopback
    counts: Counter[str] = field(default_factory=Counter)
    attempts: Counter[bytes] = field(default_factory=Counter)
    answered: set[bytes] = field(default_factory=set)


def question(a: int, b: int) -> str:
    """Return the question that the server answers with the sum."""
    return f"What is {a} + {b}?"


@contextmanager
def running(config: Loopback) -> Iterator[str]:
    """Start a server in a process of its own and yield its base URL; it ends with the block or with us."""
    command = [sys.executable, "-m", "matryoshka.benchmarks.loopback", json.dumps(asdict(config))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def stats(url: str) -> dict[str, int]:
    """Return the counts of the server at `url`."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/stats") as reply:
        counts: dict[str, int] = json.load(reply)
    return counts


async def _complete(state: _State, data: bytes) -> web.Response:
    config, key = state.config, hashlib.sha256(data).digest()
    state.counts["requests"] += 1
    state.counts["asked again"] += key in state.answered
    state.attempts[key] += 1
    if config.burst_every and state.counts["requests"] % config.burst_every >= config.burst_every - config.burst:
        state.counts["429"] += 1
        raise HttpError(429, "slow down", headers={"Retry-After": f"{config.retry_after_s:g}"})
    # A fixed function of request and attempt, so that a run can be repeated.
    draw = int.from_bytes(hashlib.sha256(key + bytes([state.attempts[key] % 256])).digest()[:8], "big") / 2**64
    if draw < config.hang_share:
        state.counts["hangs"] += 1
        await asyncio.Event().wait()
    if config.latency_s:
        await asyncio.sleep(config.latency_s)
    if draw < config.hang_share + config.error_share:
        state.counts["errors"] += 1
        raise HttpError(500, "an error of the server")
    body = json.loads(data)
    found = _SUM.search(body["messages"][-1]["content"])
    text = str(int(found[1]) + int(found[2])) if found else "I only add."
    state.counts["answers"] += 1
    state.answered.add(key)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": len(data) // 4, "completion_tokens": 8}
    answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL}
    return json_response({**answer, "choices": [choice], "usage": usage})


def main() -> None:
    """Serve until standard input closes."""
    state = _State(Loopback(**json.loads(sys.argv[1])))

    def end_with_input() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_input, daemon=True).start()

    async def stats(request: web.Request) -> web.Response:
        return json_response(dict(state.counts))

    async def models(request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [{"id": MODEL}]})

    async def complete(request: web.Request) -> web.Response:
        return await _complete(state, await request.read())

    routes = [
        web.route("GET", "/v1/stats", stats),
        web.route("GET", "/v1/models", models),
        web.route("POST", "/v1/chat/completions", complete),
    ]

    def ready(port: int) -> None:
        print(f"http://127.0.0.1:{port}/v1", flush=True)

    asyncio.run(serve_http(routes, "127.0.0.1", 0, ready))


if __name__ == "__main__":
    main()
