"""The service on aiohttp.web against raw bytes: refusals, limits, time-outs, shutdown. Oracles: RFC 9110 and 9112."""

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web

from matryoshka.core.terminal import EscapingFormatter, printable
from matryoshka.inference import http_server
from matryoshka.inference.http_server import json_response, serve_http

HEAD = b"Host: x\r\n"
LAST = b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Server:
    """/echo answers with method, path and body, /wait never, /large with 20 MB, /broken with an error."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.cancelled = 0
        self.port = 0
        self.task: asyncio.Task[None]

    def routes(self) -> list[web.RouteDef]:
        handlers = {"/echo": self.echo, "/wait": self.wait, "/large": self.large, "/broken": self.broken}
        routes = [web.route("GET", path, handler) for path, handler in handlers.items()]
        return [*routes, web.route("POST", "/echo", self.echo)]

    async def echo(self, request: web.Request) -> web.Response:
        self.requests.append(request.path)
        return json_response([request.method, request.path, (await request.read()).decode()])

    async def wait(self, request: web.Request) -> web.Response:
        self.requests.append(request.path)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        raise AssertionError

    async def large(self, request: web.Request) -> web.Response:
        return json_response("x" * 20_000_000)

    async def broken(self, request: web.Request) -> web.Response:
        return json_response(float("nan"))

    async def raw(self, *chunks: bytes) -> bytes:
        """Return everything that the server sends on one connection; our side stays open until it has closed its."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with suppress(ConnectionError):
            for chunk in chunks:
                writer.write(chunk)
                await asyncio.sleep(0.005)
        data = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return data


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server.task = asyncio.create_task(serve_http(server.routes(), "127.0.0.1", 0, ready.set_result))
    server.port = await ready
    try:
        yield server
    finally:
        server.task.cancel()
        with suppress(asyncio.CancelledError):
            await server.task


def replies(data: bytes) -> list[tuple[int, Any]]:
    """Return (status, body) of each response, taken apart by Content-Length."""
    result = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
        result.append((int(head.split()[1]), json.loads(data[:length])))
        data = data[length:]
    return result


def test_kept_alive_and_pipelined_requests() -> None:
    """Oracle: two requests in one packet, then one byte by byte, are answered in order."""

    async def main() -> None:
        async with serving() as server:
            two = b"POST /echo?q=1 HTTP/1.1\r\n" + HEAD + b"Content-Length: 3\r\n\r\nxyz"
            two += b"GET /echo HTTP/1.1\r\n" + HEAD + b"\r\n"
            data = await server.raw(two, *(LAST[i : i + 1] for i in range(len(LAST))))
            posted, got = (200, ["POST", "/echo", "xyz"]), (200, ["GET", "/echo", ""])
            assert replies(data) == [posted, got, got]

    asyncio.run(main())


MALFORMED = [
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n\r\n",  # no Host
    b"GET /echo HTTP/9.9\r\n" + HEAD + b"\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"no colon\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"Bad Name: x\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"A: b\nC: d\r\n\r\n",
    b"POST /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: ten\r\n\r\n",
    b"POST /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: -1\r\n\r\n",
    b"POST /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    b"POST /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /echo HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"Expect: wonders\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"A: " + b"x" * 40_000 + b"\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n" + HEAD + b"A: b\r\n" * 1000 + b"\r\n",
    b"x" * 100_000,
]


@pytest.mark.parametrize("request_bytes", MALFORMED, ids=lambda data: data[-40:].decode("latin-1"))
def test_malformed_requests_are_refused(request_bytes: bytes) -> None:
    """Oracle: a 4xx with an error object or text, and the next connection is served; a smuggled request is not."""

    async def main() -> None:
        async with serving() as server:
            data = await server.raw(request_bytes + LAST)
            assert data.startswith(b"HTTP/1.") and 400 <= int(data.split()[1]) < 500, data[:100]
            assert server.requests in ([], ["/echo"])
            assert replies(await server.raw(LAST)) == [(200, ["GET", "/echo", ""])]

    asyncio.run(main())


def test_errors_are_openais_objects_and_a_broken_handler_fails_alone() -> None:
    """Oracle: RFC statuses and the format of OpenAI's errors; NaN is not sent as if JSON could hold it."""
    cases = [
        (b"GET /nowhere HTTP/1.1\r\n", 404, "no such path '/nowhere'; served: /echo, /wait"),
        (b"PUT /echo HTTP/1.1\r\n", 405, "/echo takes GET, HEAD, POST, not PUT"),
        (b"GET /broken HTTP/1.1\r\n", 500, "internal error: ValueError"),
        (b"hello\r\n", 400, "malformed request"),
    ]

    async def main() -> None:
        async with serving() as server:
            for line, expected, message in cases:
                ((status, body),) = replies(await server.raw(line + HEAD + b"Connection: close\r\n\r\n"))
                assert status == expected and message in body["error"]["message"]
                assert set(body["error"]) == {"message", "type", "param", "code"}

    asyncio.run(main())


def test_slow_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 408 for a body that does not come; silence, half a head and an unread answer end the connection."""
    monkeypatch.setattr(http_server, "TRANSFER_S", 0.3)
    monkeypatch.setattr(http_server, "LINGER_S", 0.1)
    monkeypatch.setattr(http_server, "IDLE_S", 0.3)

    async def main() -> None:
        async with serving() as server:
            data = await server.raw(b"POST /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: 3\r\n\r\nx")
            assert int(data.split()[1]) == 408
            assert await server.raw() == b""
            assert await server.raw(b"GET /echo HT") == b""
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /large HTTP/1.1\r\n" + HEAD + b"\r\n")
            await asyncio.sleep(1.0)  # nothing is read meanwhile
            with suppress(ConnectionResetError):
                assert len(await reader.read(30_000_000)) < 20_000_000
            writer.close()
            assert len(replies(await server.raw(LAST))) == 1

    asyncio.run(main())


def test_an_answer_larger_than_the_socket_buffers_arrives_whole() -> None:
    """Oracle: the length of 20 MB that a slow reader gets, on a connection that is closed after it."""

    async def main() -> None:
        async with serving() as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /large HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
            await asyncio.sleep(0.1)
            assert len((await reader.read()).partition(b"\r\n\r\n")[2]) == 20_000_002
            writer.close()

    asyncio.run(main())


def test_connections_beyond_the_limit_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with two connections open the third gets 503, and is served once one of them has closed."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        async with serving() as server:
            writers = [(await asyncio.open_connection("127.0.0.1", server.port))[1] for _ in range(2)]
            await asyncio.sleep(0.1)
            ((status, body),) = replies(await server.raw(LAST))
            assert status == 503 and "has 2 connections already" in body["error"]["message"]
            writers[0].close()
            await asyncio.sleep(0.1)
            assert replies(await server.raw(LAST))[0][0] == 200
            writers[1].close()

    asyncio.run(main())


def test_port_in_use_and_no_signals_off_the_main_thread() -> None:
    """Oracle: a second server on a port fails with the address in the error; one in a thread serves."""

    async def main() -> None:
        async with serving() as server:
            for port in (server.port, 70000):
                with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"):
                    await serve_http(server.routes(), "127.0.0.1", port)
            assert len(replies(await server.raw(LAST))) == 1

    ended: list[None] = []
    thread = threading.Thread(target=lambda: ended.append(asyncio.run(main())))
    thread.start()
    thread.join(120)
    assert ended == [None]


def test_a_request_that_does_not_end_is_cut_off_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: SIGTERM while a request hangs: serve returns after the grace, the handler having been cancelled."""
    monkeypatch.setattr(http_server, "GRACE_S", 0.2)

    async def main() -> None:
        async with serving() as server:
            call = asyncio.create_task(server.raw(b"GET /wait HTTP/1.1\r\n" + HEAD + b"\r\n"))
            while not server.requests:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(asyncio.shield(server.task), 60)
            assert server.cancelled == 1
            assert await call == b""

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(main())
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_client_sends_cannot_steer_a_terminal_or_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the log as it is printed: no control character of the request is in it, and no line of its own."""
    hostile = b"GET /%1b%5b2J%0aFORGED%e2%80%ae HTTP/1.1\r\n"

    async def main() -> None:
        async with serving() as server:
            assert replies(await server.raw(hostile + HEAD + b"Connection: close\r\n\r\n"))[0][0] == 404

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    printed = "\n".join(EscapingFormatter("%(message)s").format(record) for record in caplog.records)
    assert r"/\x1b[2J\nFORGED\u202e" in printed
    assert not any(line.startswith("FORGED") for line in printed.splitlines())
    assert printable("plain \u00e9\u4e16") == "plain \u00e9\u4e16"
    try:
        raise ValueError("\x1b]0;title\x07\nFORGED")
    except ValueError as err:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), (ValueError, err, err.__traceback__))
    lines = EscapingFormatter("%(message)s").format(record).splitlines()
    assert lines[0] == "failed" and all(line.startswith("    ") and line.isprintable() for line in lines[1:])
