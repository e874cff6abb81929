"""One pool of HTTP connections for JSON in and text out, to a vLLM server of ours.

It knows nothing of models, retries or keys; it returns a reply, whatever its status, or raises TransportError, which
says whether the server may have begun to work. The invariant: an exchange ends within its time-out, connecting and a
slow body included.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from matryoshka.core.redaction import redact

CONNECT_S = 15.0  # a host that does not even accept the connection is not waited for as long as an answer is
MAX_ANSWER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reply:
    """A whole reply; header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body with U+FFFD for what is not UTF-8."""
        return self.body.decode("utf-8", "replace")


class TransportError(Exception):
    """No whole reply came. `sent`: the request may have reached the server, which then may have billed it."""

    def __init__(self, reason: str, sent: bool) -> None:
        super().__init__(redact(reason))
        self.sent = sent


class HttpClient:
    """Keeps connections alive between requests. One object lives in one event loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_s: float,
    ) -> Reply:
        """Return the server's reply. Raises TransportError when none came whole within `timeout_s`."""
        if self._session is None:
            # How many requests run at once is the caller's business; the answer of one is never a cookie of another.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            )
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session.request(
                    method, url, headers=headers, data=body, allow_redirects=False
                )
                try:
                    data = bytearray()
                    async for chunk in response.content.iter_any():
                        data += chunk
                        if len(data) > MAX_ANSWER_BYTES:
                            raise TransportError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes", sent=True)
                except BaseException:
                    response.close()  # a connection with half an answer on it is of no use
                    raise
                # No await after the last byte: a cancellation now would lose an answer that was received.
                return Reply(response.status, response.headers, bytes(data))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as err:
            raise TransportError(f"connection failed: {err}", sent=False) from err
        except TimeoutError as err:
            raise TransportError(f"timed out after {timeout_s:g} s", sent=True) from err
        except (aiohttp.ClientError, OSError) as err:
            raise TransportError(f"connection broke: {err or type(err).__name__}", sent=True) from err

    async def aclose(self) -> None:
        """Close all connections; a later request opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None
