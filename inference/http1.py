"""A small HTTP/1.1 server on asyncio for JSON in and JSON out: keep-alive, Content-Length bodies, size and time limits.

It is not a web framework: no TLS, no chunked requests, no streaming; put a proxy in front for those. The invariants: a
request that cannot be framed exactly is refused and its connection closed, a handler whose client went away is
cancelled, a handler that fails costs its own request only, and a stopping server finishes the requests that it runs.
"""

import asyncio
import json
import logging
import re
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
MAX_BODY_BYTES = 8 * 1024 * 1024  # a 128k-token prompt is below 1 MiB
IDLE_S = 75.0  # a kept-alive connection without a request
TRANSFER_S = 60.0  # one request coming in, or one answer going out
LINGER_S = 2.0
GRACE_S = 30.0
BACKLOG = 2048  # connections that may come at the same moment; the default of 100 makes the others wait a second

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_SINGLE = ("authorization", "content-length", "host")  # two of these would leave the meaning open


@dataclass(frozen=True)
class Request:
    """One request: path without its query, header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool


@dataclass(frozen=True)
class Response:
    """One answer, its body JSON already: a value that JSON cannot hold fails the handler, not the connection."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def json_response(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    """Return the response whose body is `value` in JSON. Raises ValueError on NaN and infinities."""
    return Response(status, json.dumps(value, allow_nan=False).encode(), headers or {})


class HttpError(Exception):
    """A request that is answered with an error status, in OpenAI's error format."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.response = json_response(status, {"error": error}, headers)


Handler = Callable[[Request], Awaitable[Response]]


async def serve_http(handler: Handler, host: str, port: int, ready: Callable[[int], None] | None = None) -> None:
    """Answer requests with `handler` until SIGTERM or SIGINT (or until cancelled), then return.

    On a signal the server stops accepting, closes idle connections and gives running requests GRACE_S seconds; a second
    signal ends the process at once. Signals are only watched on the main thread: elsewhere, cancel the task.
    `ready` is called with the real port once connections are accepted. Raises ValueError when it cannot listen.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    connections: dict[asyncio.Task[None], _Connection] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        task = loop.create_task(connection.serve(handler, stop))
        connections[task] = connection
        task.add_done_callback(lambda task: connections.pop(task))

    try:
        server = await asyncio.start_server(accept, host, port, backlog=BACKLOG)
    except (OSError, OverflowError) as err:
        raise ValueError(f"serve: cannot listen on {host}:{port} ({err}); choose another, or port 0 for any") from err
    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    try:
        for number in watched:
            loop.add_signal_handler(number, stop.set)
        try:
            if ready is not None:
                ready(server.sockets[0].getsockname()[1])
            await stop.wait()
        finally:
            for number in watched:
                loop.remove_signal_handler(number)
        server.close()
        logger.info("stopping: %d requests are running", sum(c.busy for c in connections.values()))
        for task, connection in connections.items():
            if not connection.busy:
                task.cancel()
        if connections:
            await asyncio.wait(list(connections), timeout=GRACE_S)
    finally:
        server.close()
        unfinished = list(connections)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)


class _Connection:
    """One client's connection. Reads go through `buffer`, so that watching for a disconnect loses no bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.busy = False

    async def serve(self, handler: Handler, stop: asyncio.Event) -> None:
        try:
            with suppress(ConnectionError, TimeoutError):  # the client went away, or would not read its answer
                await self._serve_requests(handler, stop)
                self.writer.close()
                async with asyncio.timeout(TRANSFER_S):
                    await self.writer.wait_closed()  # sends what is still buffered
        finally:
            self.writer.transport.abort()  # does nothing to a closed one

    async def _serve_requests(self, handler: Handler, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                request = await self._read_request()
            except HttpError as err:
                await self._send(err.response, close=True)
                await self._linger()
                return
            if request is None:
                return
            self.busy = True
            response = await self._answer(handler, request)
            close = stop.is_set() or not request.keep_alive
            await self._send(response, close=close)
            if close:
                return
            self.busy = False

    async def _answer(self, handler: Handler, request: Request) -> Response:
        """Return the handler's response. Raises ConnectionError when the client left: the handler is cancelled then."""
        start = time.monotonic()
        work = asyncio.ensure_future(handler(request))
        watch = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = watch.done() and not work.done()
            watch.cancel()
            work.cancel()  # does nothing to a finished one
            await asyncio.wait({work, watch})
        if gone:
            logger.info("%s %s: the client left; cancelled", request.method, request.path)
            raise ConnectionError("the client left")
        # Any failure of a handler ends here: it is logged and answered, and the server lives on.
        error = asyncio.CancelledError("the work was cancelled") if work.cancelled() else work.exception()
        if isinstance(error, HttpError):
            response = error.response
        elif error is not None:
            logger.error("%s %s failed", request.method, request.path, exc_info=error)
            response = HttpError(500, f"internal error: {type(error).__name__}: {error}").response
        else:
            response = work.result()
        logger.info("%s %s %d %.3fs", request.method, request.path, response.status, time.monotonic() - start)
        return response

    async def _until_gone(self) -> None:
        """Return when the client has closed its side (a half-closed client counts as gone), reading ahead meanwhile."""
        with suppress(ConnectionError):
            while len(self.buffer) <= MAX_HEAD_BYTES + MAX_BODY_BYTES:
                await self._more()

    async def _more(self) -> None:
        data = await self.reader.read(65536)
        if not data:
            raise ConnectionError("the client closed the connection")
        self.buffer += data

    async def _read_request(self) -> Request | None:
        """Return the next request, or None when none begins within IDLE_S. Raises HttpError if it cannot be framed."""
        try:
            async with asyncio.timeout(IDLE_S):
                while not self.buffer:
                    await self._more()
        except TimeoutError:
            return None
        try:
            async with asyncio.timeout(TRANSFER_S):
                return await self._parse()
        except TimeoutError as err:
            raise HttpError(408, f"the request did not arrive within {TRANSFER_S:g} s") from err

    async def _parse(self) -> Request:
        while len(self.buffer) < 2:
            await self._more()
        if self.buffer.startswith(b"\r\n"):  # some clients end a body with an empty line
            del self.buffer[:2]
        while (end := self.buffer.find(b"\r\n\r\n")) < 0 and len(self.buffer) <= MAX_HEAD_BYTES:
            await self._more()
        if end < 0 or end > MAX_HEAD_BYTES:
            raise HttpError(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes")
        head = self.buffer[:end].decode("latin-1")
        del self.buffer[: end + 4]
        first, *lines = head.split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or not parts[1].startswith("/"):
            raise HttpError(400, f"malformed request line {first[:80]!r}; expected 'METHOD /path HTTP/1.1'")
        method, target, version = parts
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise HttpError(505, f"version {version[:20]!r} is not supported; use HTTP/1.1")
        headers = _parse_headers(lines)
        length = _body_length(headers)
        if "expect" in headers:
            if headers["expect"].lower() != "100-continue":
                raise HttpError(417, f"expectation {headers['expect'][:40]!r} is not supported")
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < length:
            await self._more()
        body = bytes(self.buffer[:length])
        del self.buffer[:length]
        options = [option.strip() for option in headers.get("connection", "").lower().split(",")]
        keep_alive = version == "HTTP/1.1" and "close" not in options
        return Request(method, target.partition("?")[0], headers, body, keep_alive)

    async def _send(self, response: Response, close: bool) -> None:
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(response.body)),
            "Connection": "close" if close else "keep-alive",
            **response.headers,
        }
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + response.body)
        async with asyncio.timeout(TRANSFER_S):
            await self.writer.drain()

    async def _linger(self) -> None:
        """Take in what a refused client still sends: closing on unread bytes would reset the answer away."""
        self.writer.write_eof()
        async with asyncio.timeout(LINGER_S):
            while await self.reader.read(65536):
                pass


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or any(char in value for char in "\r\n\0"):
            raise HttpError(400, f"malformed header line {line[:80]!r}; expected 'Name: value'")
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in _SINGLE:
            raise HttpError(400, f"header {name!r} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _body_length(headers: dict[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise HttpError(411, "chunked requests are not supported; send Content-Length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HttpError(400, f"malformed Content-Length {length[:40]!r}; expected a number of bytes")
    if len(length) > 15 or int(length) > MAX_BODY_BYTES:
        raise HttpError(413, f"the body has {length[:40]} bytes; at most {MAX_BODY_BYTES} are taken")
    return int(length)
