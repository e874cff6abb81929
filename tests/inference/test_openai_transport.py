"""The `openai` package as our transport: proxies, tokens, bounds, and a key that no server can make us write down.

The oracles are servers of ours that keep what they received, and searches for a planted key.
"""

import asyncio
import gzip
import json
import logging
import sys
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core import redaction
from matryoshka.core.files import Journal
from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import to_json
from matryoshka.inference import openai_transport
from matryoshka.inference.accounts import Spending
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generator_config import EndpointConfig, GeneratorConfig
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.http_client import TransportError
from matryoshka.inference.openai_transport import OpenAITransport, proxy_for
from matryoshka.tests.core.test_redaction import DECODERS, ENCODINGS
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, answer, failure, run

KEY = "sk-planted_4F9a7c21d8e6b350"
LETTERS = "skplanted4f9a7c21d8e6b350"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_secrets", {})
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield


def with_message(**message: Any) -> str:
    whole = json.loads(answer())
    whole["choices"][0]["message"].update(message)
    return json.dumps(whole)


# Where a server may put the key that it was sent.
PLACES: dict[str, Callable[[str], Any]] = {
    "content": lambda text: (200, answer(f"your key is {text}")),
    "content in parts": lambda text: (200, answer([{"type": "text", "text": text}])),
    "refusal": lambda text: (200, with_message(refusal=text)),
    "finish_reason": lambda text: (200, answer("x", text)),
    "model": lambda text: (200, answer("x", model=text)),
    "error in a 200": lambda text: (200, failure(f"bad key {text}")),
    "no JSON": lambda text: (200, f"<html>{text}</html>"),
    "error": lambda text: (401, failure(f"Incorrect API key provided: {text}", text)),
    "page of a proxy": lambda text: (502, f"<html>{text}</html>"),
    "redirect": lambda text: (307, "", {"Location": f"http://127.0.0.1:1/{text}"}),
}


@pytest.mark.parametrize(
    "place, encoding",
    [
        *(("content", name) for name in ENCODINGS),
        *((name, "JSON escapes") for name in PLACES),
        ("redirect", "as it is"),
    ],
)
def test_a_key_that_a_server_sends_back_is_written_nowhere(
    place: str, encoding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Oracle: the planted key's letters, looked for with several decoders in every log line, traceback, answer, count,
    in the cache's file and in a journal that got the answer.
    """
    monkeypatch.setenv("PLANTED", KEY)
    caplog.set_level(logging.DEBUG)
    bad = PLACES[place](ENCODINGS[encoding](KEY))
    endpoint = Endpoint(bad, bad, models=bad if place in ("error", "redirect") else ("m",))
    seen: list[str] = []
    cache, journal = ResponseCache(tmp_path / "c"), Journal(tmp_path / "j")

    async def scene(generator: OpenAIGenerator) -> None:
        for call in (generator.check(), generator.complete(PROMPT, GREEDY)):
            try:
                if (sample := await call) is not None:
                    journal.append("k", {"sample": to_json(sample)})
                seen.append(repr(sample))
            except (ValueError, GeneratorError) as err:
                seen.extend(traceback.format_exception(err))
        seen.extend((repr(generator.stats), repr(generator.endpoints), repr(vars(generator)), generator.name))

    run(endpoint, scene, cache, api_key_env="PLANTED", max_retries=1)
    cache.close()
    journal.close()
    assert f"bearer {KEY.lower()}" in endpoint.heads[0]  # it was sent
    files = [path.read_bytes().decode("utf-8", "replace") for path in tmp_path.iterdir()]
    everything = "\n".join([caplog.text, *seen, *files])
    for name, decode in DECODERS.items():
        if name not in ("hexadecimal",):  # which makes noise of text that is not hexadecimal
            decoded = "".join(char for char in decode(everything).lower() if char.isalnum())
            assert LETTERS not in decoded, (name, encoding)
    assert ENCODINGS["hexadecimal"](KEY) not in everything and ENCODINGS["base64"](KEY)[:30] not in everything


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_an_http_proxy_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the proxy's own record: it got the request for the other host, with the user and password of its URL."""
    proxy = Endpoint()

    async def main() -> None:
        async with proxy.up():
            port = proxy.url.split(":")[2].split("/")[0]
            monkeypatch.setenv(name, f"http://user:proxy-pass-9f3c@127.0.0.1:{port}")
            generator = OpenAIGenerator(GeneratorConfig("http://generator.example/v1", "m", ""))
            assert (await generator.complete(PROMPT, GREEDY)).text == "four"
            await generator.aclose()

    asyncio.run(main())
    head = proxy.heads[0]
    assert head.startswith("post http://generator.example/v1/chat/completions ")
    assert "proxy-authorization: basic dxnlcjpwcm94es1wyxnzltlmm2m=" in head  # user:proxy-pass-9f3c, in lower case
    assert redaction.redact("at proxy-pass-9f3c") == "at [key]"


@pytest.mark.parametrize(
    "variables, url, expected",
    [
        ({}, "http://a.example/v1", None),
        ({"HTTPS_PROXY": "http://p:1"}, "http://a.example/v1", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://a.example/v1", "http://p:1"),
        ({"HTTPS_PROXY": "p:1"}, "https://a.example/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1"}, "https://a.example/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1", "HTTPS_PROXY": "http://q:1"}, "https://a.example/v1", "http://q:1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "a.example"}, "https://a.example/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, "https://a.example/v1", None),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "a.example:8000"}, "http://a.example:8000/v1", None),
        ({"ALL_PROXY": "socks5://p:1"}, "http://127.0.0.1:8000/v1", None),
        ({"ALL_PROXY": "socks5://p:1"}, "http://localhost:8000/v1", None),
        ({"ALL_PROXY": "socks5://p:1"}, "http://[::1]:8000/v1", None),
        ({"ALL_PROXY": "socks5://user:secret-9f3c@p:1"}, "http://a.example/v1", ValueError("ALL_PROXY.*'socks5'")),
        ({"HTTPS_PROXY": "socks5h://p:1"}, "https://a.example/v1", ValueError("HTTPS_PROXY.*'socks5h'")),
        ({"HTTP_PROXY": "ftp://p:1"}, "http://a.example/v1", ValueError("HTTP_PROXY.*'ftp'.*NO_PROXY")),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "192.168.0.0/16, 10.0.0.0/8"}, "http://10.1.2.3:8000/v1", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3:8000/v1", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "fd00::/8"}, "http://[fd00::7]:8000/v1", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "10.1.2.3"}, "http://10.1.2.3:8000/v1", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*.lan,b.example"}, "http://gpu.lan:8000/v1", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*.lan"}, "http://a.example/v1", "http://p:1"),
        ({"HTTP_PROXY": "http://p:port"}, "http://a.example/v1", ValueError("HTTP_PROXY.*malformed port.*NO_PROXY")),
        ({"HTTP_PROXY": "http://"}, "http://a.example/v1", ValueError("HTTP_PROXY.*no host")),
        ({"HTTP_PROXY": "http://[::1"}, "http://a.example/v1", ValueError("HTTP_PROXY.*no host")),
        ({"HTTP_PROXY": "http://u:secret-9f3c#@p:1"}, "http://a.example/v1", ValueError("HTTP_PROXY.*as %XX")),
    ],
)
def test_proxies(variables: dict[str, str], url: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rules that curl and Python share, by hand; an unsupported proxy is refused without the password."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not isinstance(expected, ValueError):
        assert proxy_for(url) == expected
        return
    with pytest.raises(ValueError, match=str(expected)) as caught:
        OpenAIGenerator(GeneratorConfig(url, "m", ""))
    assert "secret-9f3c" not in str(caught.value)


@pytest.mark.parametrize("api", ["openai", "azure"])
def test_tokens_of_a_command(api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the heads that the server saw: the token of the first run while it lives, then new ones; a key is not
    asked for, and the token is redacted.
    """
    script = tmp_path / "token.py"
    script.write_text(f"p = {str(tmp_path / 'n')!r}\nopen(p, 'a').write('x')\nprint('token-9f3c-' + open(p).read())\n")
    endpoint = Endpoint()

    async def main() -> None:
        async with endpoint.up():
            url = endpoint.url.removesuffix("/v1") if api == "azure" else endpoint.url
            command = f"{sys.executable} {script}"
            version = "2024-10-21" if api == "azure" else ""
            config = EndpointConfig(url, "UNSET", "m", api, version, 4, token_command=command)
            transport = OpenAITransport(config, "")
            for _ in range(3):
                assert (await transport.chat(b"{}", 30.0)).status == 200
                monkeypatch.setattr(transport._token, "_until", -1.0) if len(endpoint.heads) == 2 else None
            await transport.aclose()

    asyncio.run(main())
    tokens = [head.split("authorization: bearer ")[1].split("\r")[0] for head in endpoint.heads]
    assert tokens == ["token-9f3c-x", "token-9f3c-x", "token-9f3c-xx"]
    assert all("api-key" not in head for head in endpoint.heads)
    assert redaction.redact("token-9f3c-xx") == "[key]"


@pytest.mark.parametrize(
    "command, words",
    [
        ("/no/such/program", "cannot be started: No such file"),
        ("sh -c 'echo no login >&2; exit 3'", "status 3 and printed no token; it said: no login"),
        ("true", "printed no token"),
        ("sleep 5", "did not end within 0.3 s"),
        ("sh -c 'sleep 2 & echo token'", "did not end within 0.3 s"),  # it has ended, but its output is still open
    ],
)
def test_a_command_without_a_token_fails_the_episode_and_sends_nothing(
    command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the server saw nothing, and nothing counts as billed; the error names the command and its output."""
    endpoint, cache = Endpoint(), ResponseCache(tmp_path / "cache.sqlite")
    if words.startswith("did not end"):
        monkeypatch.setattr("matryoshka.inference.openai_transport.TOKEN_COMMAND_S", 0.3)

    async def scene(generator: OpenAIGenerator) -> None:
        with pytest.raises(GeneratorError, match=f"(?s)after 1 attempts.*token_command.*{words}"):
            await generator.complete(PROMPT, GREEDY)
        with pytest.raises(ValueError, match="token_command"):
            await generator.check()

    generator = run(endpoint, scene, cache, token_command=command, max_retries=0)
    assert endpoint.heads == [] and generator.account.spending() == Spending()


def test_a_malformed_command_is_refused_before_anything_is_asked() -> None:
    """Oracle: the message, which names the setting and the fault."""
    with pytest.raises(ValueError, match=r"token_command \"echo 'x\": No closing quotation"):
        OpenAITransport(EndpointConfig("http://localhost", "", "m", token_command="echo 'x"), "")


class Raw:
    """A server that answers every request with the same bytes."""

    def __init__(self, head: str, body: bytes, pieces: int = 1) -> None:
        self.sent = f"HTTP/1.1 {head}\r\n\r\n".encode(), body, pieces

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body, pieces = self.sent
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            for _ in range(pieces):
                writer.write(body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def ask(server: Raw) -> tuple[object, int]:
    """Return the reply or the error, and the peak of memory in bytes that Python allocated meanwhile."""

    async def main() -> tuple[object, int]:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        transport = OpenAITransport(EndpointConfig(url, "", "m", "openai", "", 4), "")
        tracemalloc.start()
        try:
            found: object = await transport.chat(b"{}", 30.0)
        except TransportError as err:
            found = err
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            await transport.aclose()
            listening.close()
        return found, peak

    return asyncio.run(main())


MIB = 2**20
BOMB = gzip.compress(bytes(200 * MIB))


@pytest.mark.parametrize(
    "head, body, pieces, words",
    [
        (f"200 OK\r\nContent-Length: {64 * MIB}", bytes(MIB), 64, "longer than 16,777,216 bytes"),
        (f"500 Error\r\nContent-Length: {64 * MIB}", bytes(MIB), 64, "longer than 16,777,216 bytes"),
        ("200 OK", bytes(MIB), 64, "longer than 16,777,216 bytes"),
        (f"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(BOMB)}", BOMB, 1, "longer than 16,777,216 bytes"),
        (f"400 Bad\r\nContent-Encoding: gzip\r\nContent-Length: {len(BOMB)}", BOMB, 1, "longer than 16,777,216 bytes"),
        ("200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: 1", b"x", 1, "was not asked for"),
        ("200 OK\r\nContent-Encoding: br\r\nContent-Length: 1", b"x", 1, "was not asked for"),
        ("200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5", b"hello", 1, "connection broke"),
        ("200 OK\r\nContent-Length: -5", b"", 1, "connection broke"),
        ("9999 OK", b"", 1, "connection broke"),
        ("200 OK\r\nX: " + "y" * 100_000, b"", 1, "connection broke"),
        ("200 OK\r\nContent-Length: 10", b"short", 1, "connection broke"),
        ("hello", b"", 1, "connection broke"),
    ],
    ids=["long", "long error", "endless", "bomb", "bomb in an error", "packed twice", "brotli", "not gzip",
         "negative length", "status of four digits", "long header", "short", "no HTTP"],
)  # fmt: skip
def test_replies_are_bounded_and_broken_ones_are_one_error(head: str, body: bytes, pieces: int, words: str) -> None:
    """Oracle: a TransportError with these words that counts as sent, and less memory than the longest reply takes."""
    found, peak = ask(Raw(head, body, pieces))
    assert isinstance(found, TransportError) and words in str(found) and found.sent
    assert peak < 4 * openai_transport.MAX_REPLY_BYTES


@pytest.mark.parametrize(
    "head, body, status",
    [
        ("200 OK\r\nContent-Type: application/json; charset=undefined\r\nContent-Length: 2", b"{}", 200),
        ("400 Bad\r\nContent-Type: text/html; charset=undefined\r\nContent-Length: 2", b"\xff\xfe", 400),
        ("400 Bad\r\nContent-Type: text/html; charset=idna\r\nContent-Length: 2", b"\xff\xfe", 400),
        ("301 Moved\r\nLocation: http://[\r\nContent-Length: 0", b"", 301),
        ("204 No Content", b"", 204),
    ],
)
def test_odd_heads_are_replies(head: str, body: bytes, status: int) -> None:
    """Oracle: the status and the bytes as they were sent, whatever the head says of their encoding."""
    found, _ = ask(Raw(head, body))
    assert (getattr(found, "status", found), getattr(found, "body", None)) == (status, body)


def test_a_compressed_reply_is_read() -> None:
    """Oracle: the text that was compressed; some gateways compress without being asked."""
    packed = gzip.compress(b'{"a": 1}')
    found, _ = ask(Raw(f"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}", packed))
    assert getattr(found, "body", None) == b'{"a": 1}'


def test_the_request_tells_nothing_of_this_machine() -> None:
    """Oracle: the head that the server saw has no x-stainless field, and asks for no compression."""
    endpoint = Endpoint()
    run(endpoint, lambda generator: generator.complete(PROMPT, GREEDY))
    assert "x-stainless" not in endpoint.heads[0] and "accept-encoding: identity" in endpoint.heads[0]
