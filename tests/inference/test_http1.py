"""The HTTP layer against raw bytes: framing, limits, time-outs, shutdown. The oracles are RFC 9110 and RFC 9112."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from matryoshka.inference import http1
from matryoshka.inference.http1 import Request, Response, json_response, serve_http


class Server:
    """Echoes method, path and body; /wait never answers."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cancelled = 0
        self.port = 0
        self.task: asyncio.Task[None]

    async def handle(self, request: Request) -> Response:
        self.requests.append(request)
        try:
            if request.path == "/wait":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return json_response(200, [request.method, request.path, request.body.decode()])

    async def raw(self, *chunks: bytes) -> bytes:
        """Return everything that the server sends on one connection; our side stays open until it has closed its."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for chunk in chunks:
            writer.write(chunk)
            await asyncio.sleep(0.005)
        data = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return data


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server.task = asyncio.create_task(serve_http(server.handle, "127.0.0.1", 0, ready.set_result))
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


CLOSE = b"GET /last HTTP/1.1\r\nConnection: Close\r\n\r\n"


def test_kept_alive_pipelined_and_split_requests() -> None:
    """Oracle: two requests in one packet (an empty line between them), then one byte by byte, are answered in order."""

    async def main() -> None:
        async with serving() as server:
            two = b"POST /a?q=1 HTTP/1.1\r\nContent-Length: 3\r\n\r\nxyz" + b"\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n"
            data = await server.raw(two, *(CLOSE[i : i + 1] for i in range(len(CLOSE))))
            assert replies(data) == [
                (200, ["POST", "/a", "xyz"]),
                (200, ["GET", "/b", ""]),
                (200, ["GET", "/last", ""]),
            ]
            assert replies(await server.raw(b"GET /c HTTP/1.0\r\n\r\n")) == [(200, ["GET", "/c", ""])]  # 1.0 closes

    asyncio.run(main())


MALFORMED: list[tuple[bytes, int]] = [
    (b"hello\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    (b"GET  /a HTTP/1.1\r\n\r\n", 400),
    (b"GET http://x/a HTTP/1.1\r\n\r\n", 400),
    (b"GET /a HTTP/2.0\r\n\r\n", 505),
    (b"GET /a HTTP/1.1\r\nno colon\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nBad Name: x\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nA: b\nC: d\r\n\r\n", 400),
    (b"POST /a HTTP/1.1\r\nContent-Length: ten\r\n\r\n", 400),
    (b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /a HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400),
    (b"POST /a HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x", 400),
    (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    (b"POST /a HTTP/1.1\r\nContent-Length: 9000000000\r\n\r\n", 413),
    (b"POST /a HTTP/1.1\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\n", 413),
    (b"GET /a HTTP/1.1\r\nExpect: wonders\r\n\r\n", 417),
    (b"GET /a HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    (b"x" * 100_000, 431),
]


def test_malformed_requests_are_refused_and_their_connection_closed() -> None:
    """Oracle: the RFC's status for each; what follows on the connection is never taken for a request; others go on."""

    async def main() -> None:
        async with serving() as server:
            for request, expected in MALFORMED:
                data = await server.raw(request + CLOSE)
                ((status, body),) = replies(data)
                assert status == expected, (request[:80], data)
                assert b"\r\nConnection: close\r\n" in data
                assert set(body["error"]) == {"message", "type", "param", "code"}
            assert server.requests == []
            assert len(replies(await server.raw(CLOSE))) == 1

    asyncio.run(main())


def test_expect_continue_and_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 100 comes before the body is read; a request that stalls gets 408, an idle connection a quiet end."""
    monkeypatch.setattr(http1, "TRANSFER_S", 0.2)
    monkeypatch.setattr(http1, "IDLE_S", 0.2)

    async def main() -> None:
        async with serving() as server:
            head = b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
            first, _, rest = (await server.raw(head, b"{}")).partition(b"\r\n\r\n")
            assert first == b"HTTP/1.1 100 Continue"
            assert replies(rest) == [(200, ["POST", "/a", "{}"])]
            assert replies(await server.raw(b"GET /a HT"))[0][0] == 408
            assert replies(await server.raw(b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{"))[0][0] == 408
            assert await server.raw() == b""

    asyncio.run(main())


def test_an_answer_larger_than_the_socket_buffers_arrives_whole() -> None:
    """Oracle: the length of 20 MB that a slow reader gets, on a connection that is closed after it."""
    text = "x" * 20_000_000

    async def handle(request: Request) -> Response:
        return json_response(200, text)

    async def main() -> None:
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve_http(handle, "127.0.0.1", 0, ready.set_result))
        reader, writer = await asyncio.open_connection("127.0.0.1", await ready)
        writer.write(CLOSE)
        await asyncio.sleep(0.1)
        assert len((await reader.read()).partition(b"\r\n\r\n")[2]) == len(text) + 2
        writer.close()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


def test_port_in_use_and_no_signals_off_the_main_thread() -> None:
    """Oracle: a second server on a port fails with the address in the error; one in a thread serves."""

    async def main() -> None:
        async with serving() as server:
            with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{server.port}"):
                await serve_http(server.handle, "127.0.0.1", server.port)
            with pytest.raises(ValueError, match="cannot listen on 127.0.0.1:70000"):
                await serve_http(server.handle, "127.0.0.1", 70000)
            assert len(replies(await server.raw(CLOSE))) == 1

    ended: list[None] = []
    thread = threading.Thread(target=lambda: ended.append(asyncio.run(main())))
    thread.start()
    thread.join(10)
    assert ended == [None]


def test_a_request_that_does_not_end_is_cut_off_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: SIGTERM while a request hangs: serve returns after the grace, the handler having been cancelled."""
    monkeypatch.setattr(http1, "GRACE_S", 0.2)

    async def main() -> None:
        async with serving() as server:
            call = asyncio.create_task(server.raw(b"GET /wait HTTP/1.1\r\n\r\n"))
            while not server.requests:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(asyncio.shield(server.task), 5)
            assert server.cancelled == 1
            assert await call == b""

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(main())
    assert signal.getsignal(signal.SIGTERM) == before
