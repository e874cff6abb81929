"""Households with a generator behind HTTP: the client, its cache and both control schemes, end to end on loopback."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Message, Sampling, Trajectory, from_json
from matryoshka.scripts import cli
from matryoshka.tasks.alfworld.prompt_style import Style
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tests.pilot.conftest import with_context
from matryoshka.tests.pilot.test_alfworld import flags

ASK_SYSTEM = Style("compact").ask("")[0].content

ASKING = "def step_1(agent, memory):\n    print(agent.ask('Where is it?'))\n"


@contextmanager
def served(asks: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serve the literal reader as an OpenAI-compatible endpoint; yields its URL and the systems it was asked under.

    asks: every program that it writes asks a question in a first step of its own.
    """
    asked: list[str] = []

    def answer(messages: list[dict[str, str]], seed: int) -> str:
        asked.append(messages[0]["content"])
        if messages[0]["content"] == ASK_SYSTEM:
            return "in the fridge"
        prompt = tuple(Message(message["role"], message["content"]) for message in messages)
        text = asyncio.run(LiteralGenerator().complete(prompt, Sampling(seed=seed))).text
        return text.replace("def step_1(agent, memory):\n", ASKING) if asks else text

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                message = {"role": "assistant", "content": answer(body["messages"], body.get("seed") or 0)}
            except GeneratorError as err:
                return self._send(400, {"error": {"message": str(err)}})
            usage = {"prompt_tokens": 7, "completion_tokens": 5}
            self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def controller(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(tiny_dir, tmp_path_factory.mktemp("controller") / "tiny", 2048)


@pytest.mark.parametrize("mode", ["program", "react"])
def test_a_generator_behind_http_plays_households(
    mode: str, controller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the literal reader wins all with gold plans and none without one, in either scheme; every question of a
    program reached the server; a second evaluation asks nothing again.
    """
    monkeypatch.chdir(tmp_path)
    with served(asks=mode == "program") as (url, asked):
        changes = {"serve.scripted": "", "generator.base-url": url, "task.options.mode": mode, "name": "h"}
        command = ["evaluate", *flags(controller, **changes)]
        assert cli.main(command) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (last["gold_guidance"], last["no_guidance"]) == (1.0, 0.0)
        rows = read_jsonl(tmp_path / "runs" / "h" / "trajectories.jsonl")
        told = [from_json(Trajectory, row["trajectory"]) for row in rows]
        calls = [call for trajectory in told for turn in trajectory.turns for call in turn.calls]
        assert all(call.sample.usage.prompt_tokens == 7 for call in calls)
        gold = next(t for t in told if t.info.controller.startswith("gold_guidance"))
        assert gold.task.endswith(mode) and gold.info.verdict == "right"
        if mode == "react":
            assert gold.info.calls == gold.info.measures["steps"] == len(gold.turns[0].calls)
            assert all(call.sample.text.startswith("Think: ") for call in gold.turns[0].calls)
        else:
            program, question = gold.turns[0].calls
            assert question.sample.text == "in the fridge" and "printed: in the fridge" in program.outcome
            assert asked.count(ASK_SYSTEM) > 0
        before = len(asked)
        assert cli.main(command) == 0
        assert len(asked) == before
