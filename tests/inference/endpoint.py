"""A scripted endpoint on this machine that answers, or fails to, in every way a real one does.

It keeps its own account, the oracle of the client's tests: what was asked, how often, when, and how much at once.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from matryoshka.core.records import Message, Sampling
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.spending import Budget

PROMPT = (Message("system", "be brief"), Message("user", "2 + 2?"))
GREEDY = Sampling(max_tokens=8)


def answer(content: Any = "four", finish_reason: str = "stop", model: str | None = None) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice], "usage": usage}
    return json.dumps(whole if model is None else {**whole, "model": model})


def failure(message: str, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": "t", "param": None, "code": code}})


OK = (200, answer())
TRICKLE_S = 0.05


class Endpoint:
    """Answers request i with script[i], then with OK.

    A reply is (status, body), (status, body, headers), "drop" (the connection), "hang" (say nothing), "half" (drop in
    the middle of the body) or "trickle" (a byte of the body every TRICKLE_S).
    """

    def __init__(self, *script: Any, models: Any = ("m", "model-b")) -> None:
        self.script = list(script)
        self.models = models
        self.seen: list[dict[str, Any]] = []  # bodies of the requests for answers
        self.heads: list[str] = []
        self.times: list[float] = []
        self.gate: asyncio.Event | None = None
        self.running = self.most_running = 0
        self.url = ""

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                sizes = [line for line in head.split("\r\n") if line.startswith("content-length:")]
                body = await reader.readexactly(int(sizes[0].split(":")[1])) if sizes else b""
                self.heads.append(head)
                if "/models" in head.splitlines()[0]:
                    reply = self.models
                    if isinstance(reply, tuple) and isinstance(reply[0], str):
                        reply = (200, json.dumps({"data": [{"id": name} for name in reply]}))
                else:
                    reply = await self.completion(json.loads(body))
                if reply == "drop":
                    return
                if reply == "hang":
                    await reader.read()  # until the client gives up
                    return
                slow = reply if reply in ("half", "trickle") else ""
                reply = OK if slow else reply
                status, text, headers = (*reply, {}) if len(reply) == 2 else reply
                lines = [
                    f"HTTP/1.1 {status} X",
                    f"Content-Length: {len(text.encode())}",
                    "Content-Type: application/json",
                ]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                whole = ("\r\n".join(lines) + "\r\n\r\n" + text).encode()
                if slow == "half":
                    writer.write(whole[: -len(text) // 2])
                    await writer.drain()
                    return
                if slow == "trickle":
                    writer.write(whole[: -len(text)])
                    for byte in text:
                        writer.write(byte.encode())
                        await writer.drain()
                        await asyncio.sleep(TRICKLE_S)
                    continue
                writer.write(whole)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def completion(self, body: dict[str, Any]) -> Any:
        self.seen.append(body)
        self.times.append(time.monotonic())
        reply = self.script.pop(0) if self.script else OK
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.gate is not None:
            await self.gate.wait()
        self.running -= 1
        return reply

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Endpoint"]:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()


def run(
    endpoint: Endpoint,
    scene: Callable[[OpenAIGenerator], Awaitable[object]],
    cache: ResponseCache | None = None,
    budget: Budget | None = None,
    **settings: Any,
) -> OpenAIGenerator:
    """Let `scene` use a client of `endpoint`, which is gone afterwards, and return the client."""

    async def main() -> OpenAIGenerator:
        async with endpoint.up():
            config = GeneratorConfig(
                **{"base_url": endpoint.url, "model": "m", "api_key_env": "", "backoff_s": 0.001, **settings}
            )
            generator = OpenAIGenerator(config, cache, budget=budget)
            try:
                await scene(generator)
            finally:
                await generator.aclose()
            return generator

    return asyncio.run(main())
