"""The `openai` package as the transport of one endpoint: a request's bytes in, a whole reply or a TransportError out.

It knows nothing of models, retries or budgets. The package brings connections, authentication, Azure's URLs and
proxies; its own retries, redirects and reading of answers are off. The invariants: an exchange ends within its
time-out, connecting and a slow body included; a reply takes bounded memory, also when it is compressed; and nothing
that is raised refers to the request, whose headers hold the key.
"""

import asyncio
import functools
import ipaddress
import os
import shlex
import signal
import ssl
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from matryoshka.core.redaction import add_secret
from matryoshka.inference.generator_config import EndpointConfig
from matryoshka.inference.http_client import CONNECT_S, Reply, TransportError

if TYPE_CHECKING:
    import httpx2

KEEP_ALIVE_S = 15.0
MAX_REPLY_BYTES = 16 * 2**20
_TELLS = "Lang Package-Version OS Arch Runtime Runtime-Version Async Retry-Count Read-Timeout".split()
TOKEN_LIFE_S = 300.0  # a command that prints tokens is run again after this; tokens live for an hour
TOKEN_COMMAND_S = 60.0


class OpenAITransport:
    """The client of one endpoint. It keeps connections alive between requests; one object lives in one event loop."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        """Make the client; nothing is sent. Raises ValueError for a proxy or a token command that cannot be used."""
        # Imported here, since it takes a second that a command without a generator need not wait for.
        import httpx2
        import openai

        self._token = _Token(config.token_command) if config.token_command else None
        limits = httpx2.Limits(max_connections=config.concurrency, keepalive_expiry=KEEP_ALIVE_S)
        http_client = openai.DefaultAioHttpClient(
            limits=limits,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            proxy=proxy_for(config.base_url),
            trust_env=False,  # proxies are chosen, and refused, by `proxy_for`; no ~/.netrc
            verify=_tls_context(),
            follow_redirects=False,  # they would take the key elsewhere
            event_hooks={"response": [_bound]},
        )
        headers = {"Accept-Encoding": "identity"}
        # The package's headers describe this machine. The server does not need them, and they take time.
        self._options: Any = {"headers": {f"X-Stainless-{name}": openai.omit for name in _TELLS}}
        # Whole, which saves the package some of its work; Azure's client makes another URL of the path.
        self._chat_url = ("" if config.api == "azure" else config.base_url.rstrip("/")) + "/chat/completions"
        self._client: openai.AsyncOpenAI
        if config.api == "azure":
            self._client = openai.AsyncAzureOpenAI(
                azure_endpoint=config.base_url,
                azure_deployment=config.model,
                api_version=config.api_version,
                api_key=None if self._token else key or "none",
                azure_ad_token_provider=self._token,
                max_retries=0,
                http_client=http_client,
                default_headers=headers,
            )
        else:
            self._client = openai.AsyncOpenAI(
                base_url=config.base_url,
                api_key=self._token or key or "none",  # a server that wants no key may still want to see one
                max_retries=0,
                http_client=http_client,
                default_headers=headers,
            )

    async def chat(self, body: bytes, timeout_s: float) -> Reply:
        """Return the reply to a chat request. Raises TransportError when none came whole within `timeout_s`."""
        return await self._exchange(body, timeout_s)

    async def models(self, timeout_s: float) -> Reply:
        """Return the reply to a request for the list of models; raises as `chat` does."""
        return await self._exchange(None, timeout_s)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def _exchange(self, body: bytes | None, timeout_s: float) -> Reply:
        import aiohttp
        import httpx2
        import openai

        try:
            if self._token is not None:
                await self._token()  # outside of the exchange's time: a command that hangs has sent nothing
            async with asyncio.timeout(timeout_s):
                client, options = self._client, self._options
                if body is None:
                    response = await client.get("/models", cast_to=httpx2.Response, options=options)
                else:
                    path = self._chat_url
                    response = await client.post(path, cast_to=httpx2.Response, content=body, options=options)
            return _reply(response)
        except openai.APIStatusError as err:
            return _reply(err.response)
        except TimeoutError:
            error = TransportError(f"timed out after {timeout_s:g} s", sent=True)
        except (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, OSError) as err:
            error = _transport_error(err)
        raise error  # outside the handlers, so that it refers to nothing


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return Python's own TLS settings, which SSL_CERT_FILE and SSL_CERT_DIR extend."""
    return ssl.create_default_context()


def _reply(response: "httpx2.Response") -> Reply:
    return Reply(response.status_code, response.headers, response.content)


def _transport_error(err: BaseException) -> TransportError:
    """Return what happened, by the aiohttp error underneath: the layers above it lose whether anything was sent."""
    import aiohttp

    causes = [err]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    root = next((cause for cause in causes if isinstance(cause, aiohttp.ClientError)), causes[-1])
    if isinstance(root, TokenError):
        return TransportError(str(root), sent=False)
    not_sent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)
    unsent = isinstance(root, not_sent)
    what = "connection failed" if unsent else "connection broke"
    return TransportError(f"{what}: {str(root)[:500] or type(root).__name__}", sent=not unsent)


async def _bound(response: "httpx2.Response") -> None:
    """Bound what reading `response` takes: called when its head has come."""
    import httpx2

    response.encoding = "utf-8"  # a server may name an encoding that does not decode
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate", ""):
        raise httpx2.DecodingError(f"the reply has the content encoding {encoding[:40]!r}, which was not asked for")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _stream_class()(response.stream, encoding in ("gzip", "deflate"))
    response.headers.pop("content-encoding", None)  # a compressed reply is decompressed here, where it is bounded


@functools.cache
def _stream_class() -> "Callable[[httpx2.AsyncByteStream, bool], httpx2.AsyncByteStream]":
    """Return the class of a stream, compressed or not, that raises ReadError after MAX_REPLY_BYTES."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: httpx2.AsyncByteStream, is_compressed: bool) -> None:
            self._stream = stream
            self._unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if is_compressed else None  # gzip or zlib

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._stream:
                if self._unpacker is not None:
                    try:
                        chunk = self._unpacker.decompress(chunk, MAX_REPLY_BYTES - size + 1)
                    except zlib.error as err:
                        raise httpx2.DecodingError(f"the reply cannot be decompressed: {err}") from err
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"the reply is longer than {MAX_REPLY_BYTES:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    return Bounded


def proxy_for(url: str) -> str | None:
    """Return the proxy for `url` that the environment names (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY), or None.

    A loopback address has none. Raises ValueError for a proxy that is no HTTP proxy, naming the variable.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    address = f"{host}:{parts.port}" if parts.port else host
    proxies = urllib.request.getproxies()
    if _is_loopback(host) or urllib.request.proxy_bypass(address) or _is_exempt(host, proxies.get("no", "")):
        return None
    name = parts.scheme if proxies.get(parts.scheme) else "all"
    if not (proxy := proxies.get(name)):
        return None
    where = f"generator: the environment variable {name.upper()}_PROXY names"
    remedy = "name one, such as http://HOST:PORT, or add the host to NO_PROXY to do without"
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        found = urllib.parse.urlsplit(proxy)
        is_whole = bool(found.hostname) and found.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:  # it is not shown: it may hold a password
        raise ValueError(
            f"{where} a proxy for {url} that has no host or a malformed port; {remedy}. Special characters of a "
            "password are written as %XX"
        )
    if found.password:
        add_secret(urllib.parse.unquote(found.password))
    if found.scheme.lower() not in ("http", "https"):
        raise ValueError(
            f"{where} a proxy of kind {found.scheme!r} for {url}; only HTTP proxies are supported: {remedy}"
        )
    return proxy


def _is_exempt(host: str, no_proxy: str) -> bool:
    """Return whether NO_PROXY has `host` in a form that Python does not know: 10.0.0.0/8 or *.example.com."""
    for entry in (entry.strip().lower() for entry in no_proxy.split(",")):
        if entry.startswith("*.") and host.endswith(entry[1:]):
            return True
        with suppress(ValueError):  # a name, not an address
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenError(OSError):
    """The command that prints tokens failed; nothing was sent."""


class _Token:
    """The output of a command: a token for Azure's Entra ID or another identity service, kept for TOKEN_LIFE_S."""

    def __init__(self, command: str) -> None:
        self._where = f"generator: token_command {command!r}"
        try:
            self._words = shlex.split(command)
        except ValueError as err:
            raise ValueError(f"{self._where}: {err}; write it as in a shell") from err
        self._value, self._until = "", 0.0
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._value = await self._run()
                add_secret(self._value)
                self._until = time.monotonic() + TOKEN_LIFE_S
        return self._value

    async def _run(self) -> str:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self._words, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as err:
            raise TokenError(f"{self._where} cannot be started: {err.strerror}") from None
        try:
            async with asyncio.timeout(TOKEN_COMMAND_S):
                out, errors = await process.communicate()
        except BaseException as err:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too, one of which may hold its output open
            if not isinstance(err, TimeoutError):
                raise
            await process.communicate()  # which ends at once now, and closes the pipes
            raise TokenError(f"{self._where} did not end within {TOKEN_COMMAND_S:g} s") from None
        token = out.decode("utf-8", "replace").strip()
        if process.returncode or not token.isascii() or not token.isprintable() or not token:
            said = errors.decode("utf-8", "replace").strip()[-300:]
            what = f"ended with status {process.returncode} and printed no token; it said: {said}"
            raise TokenError(f"{self._where} {what}")
        return token
