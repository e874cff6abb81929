"""A JSON service on aiohttp.web: it runs until a signal, keeps within limits, and answers every error as OpenAI does.

It is no public web server: there is no TLS, for which a proxy belongs in front, and answers are made before they are
sent. The invariants: a
handler whose client left is cancelled, a handler that fails costs its own request only, a client that sends or reads
slowly is cut off, and a stopping server finishes the requests that it runs.
"""

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 1024 * 1024  # a 128k-token prompt is below 1 MiB
MAX_CONNECTIONS = 2048
BACKLOG = 2048  # connections that may come at the same moment; the default of 128 makes the others wait a second
IDLE_S = 75.0  # a connection on which no whole request head arrives
TRANSFER_S = 60.0  # the body of a request coming in, or an answer going out
LINGER_S = 5.0  # of reading on after a refusal: a connection closed on unread bytes would lose the answer
GRACE_S = 30.0  # for the requests that run when a signal comes


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
        self.status, self.headers = status, headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> web.Response:
        return json_response(self.body, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return the response whose body is `value` in JSON. Raises ValueError on NaN and infinities."""
    body = json.dumps(value, allow_nan=False).encode()
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def serve_http(
    routes: Sequence[web.RouteDef],
    host: str,
    port: int,
    ready: Callable[[int], None] | None = None,
    check: Callable[[web.Request], None] | None = None,
) -> None:
    """Answer requests by `routes` until SIGTERM or SIGINT (or until cancelled), then return.

    check: sees every request before its body is read, and raises HttpError to refuse it. On a signal the server stops
    accepting, closes idle connections and gives running requests GRACE_S seconds; a second signal ends the process at
    once. Signals are only watched on the main thread: elsewhere, cancel the task. `ready` is called with the real port
    once connections are accepted. Raises ValueError when it cannot listen.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    running: set[asyncio.Task[Any]] = set()
    served = ", ".join(dict.fromkeys(route.path for route in routes))

    @web.middleware
    async def answer(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        task, transport = asyncio.current_task(), request.transport
        if task is None or transport is None:
            raise ConnectionResetError("the client left before its request was looked at")
        running.add(task)
        try:
            response = await _respond(request, handler, check, served)
            if stop.is_set():
                response.force_close()
            transport.set_write_buffer_limits(0)  # so that an answer counts as sent once all of it is
            async with asyncio.timeout(TRANSFER_S):
                await response.prepare(request)
                await response.write_eof()
            return response
        except TimeoutError as err:
            transport.abort()
            raise ConnectionResetError("the client did not read its answer") from err
        finally:
            running.discard(task)

    app = web.Application(middlewares=[answer], client_max_size=MAX_BODY_BYTES)
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    service = runner.server
    assert service is not None

    def accept() -> asyncio.Protocol:
        if len(service.connections) >= MAX_CONNECTIONS:
            return _Refusal()
        return _Connection(
            service, loop=loop, keepalive_timeout=IDLE_S, lingering_time=LINGER_S, auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for no log
        )  # fmt: skip

    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    listener: asyncio.Server | None = None
    try:
        try:
            listener = await loop.create_server(accept, host, port, backlog=BACKLOG)
        except (OSError, OverflowError) as err:
            where = f"{host}:{port}"
            raise ValueError(f"serve: cannot listen on {where} ({err}); choose another, or port 0 for any") from err
        for number in watched:
            loop.add_signal_handler(number, stop.set)
        if ready is not None:
            ready(listener.sockets[0].getsockname()[1])
        await stop.wait()
        listener.close()
        logger.info("stopping: %d requests are running", len(running))
        await asyncio.sleep(0)  # requests that have just arrived start to run
        service.pre_shutdown()  # idle connections close, the others after their request
        if running:
            await asyncio.wait(set(running), timeout=GRACE_S)
    finally:
        for number in watched:
            loop.remove_signal_handler(number)
        if listener is not None:
            listener.close()
        for task in set(running):
            task.cancel()
        await runner.cleanup()


async def _respond(
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    check: Callable[[web.Request], None] | None,
    served: str,
) -> web.StreamResponse:
    """Return the handler's response, or the error that it comes to. Cancelled when the client leaves."""
    start, line = time.monotonic(), f"{request.method} {request.path}"
    try:
        if check is not None:
            check(request)
        try:
            async with asyncio.timeout(TRANSFER_S):
                await request.read()
        except TimeoutError as err:
            raise HttpError(408, f"the request did not arrive within {TRANSFER_S:g} s") from err
        response = await handler(request)
    except HttpError as err:
        response = err.response
    except web.HTTPRequestEntityTooLarge:
        response = HttpError(413, f"the body is too large; at most {MAX_BODY_BYTES} bytes are taken").response
    except web.HTTPMethodNotAllowed as err:
        message = f"{request.path[:200]} takes {', '.join(sorted(err.allowed_methods))}, not {request.method[:20]}"
        response = HttpError(405, message, code="method_not_allowed", headers={"Allow": err.headers["Allow"]}).response
    except web.HTTPNotFound:
        message = f"no such path {request.path[:200]!r}; served: {served}"
        response = HttpError(404, message, code="unknown_url").response
    except web.HTTPException as err:  # another refusal of aiohttp, such as an unknown expectation
        response = HttpError(err.status, err.reason).response
    except web.RequestPayloadError as err:
        response = HttpError(400, f"the body of the request is malformed: {err}").response
    except asyncio.CancelledError:
        logger.info("%s: cancelled, by a client that left or a server that stops", line)
        raise
    except Exception as err:  # any failure of a handler ends here: it is logged and answered, and the server lives on
        if request.transport is None:  # the client left while it sent its request
            raise
        logger.exception("%s failed", line)
        response = HttpError(500, f"internal error: {type(err).__name__}: {err}").response
    logger.info("%s %d %.3fs", line, response.status, time.monotonic() - start)
    return response


class _Connection(web.RequestHandler):
    """Answers a request that is no HTTP in JSON too, with one line in the log instead of a traceback."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already; no other can follow it")
        words = " ".join((message or str(exc)).split())[:300]
        logger.warning("a request from %s failed with %d: %s", request.remote, status, words)
        response = HttpError(status, f"malformed request: {words}" if status < 500 else words).response
        response.force_close()
        return response


class _Refusal(asyncio.Protocol):
    """Tells a client that there are too many connections, and closes this one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        error = HttpError(503, f"the server has {MAX_CONNECTIONS} connections already; try again later")
        body = json.dumps(error.body).encode()
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with suppress(ConnectionError):
            transport.write(head.encode() + body)
        transport.close()
