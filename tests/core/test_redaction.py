"""`redact` removes every spelling of a secret and leaves ordinary text; a key that was read leaves the environment."""

import base64
import html
import io
import json
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator

import pytest

from matryoshka.core import redaction
from matryoshka.core.redaction import add_secret, read_secret, redact, redact_output, to_redacted_json

KEY = "sk-planted_4F9a7c21d8e6b350"


@pytest.fixture(autouse=True)
def no_secrets_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_secrets", {})
    monkeypatch.setattr(redaction, "_by_variable", {})
    yield


def json_escapes(text: str) -> str:
    return "".join(f"\\u{ord(char):04x}" for char in text)


ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda key: key,
    "JSON escapes": json_escapes,
    "JSON escapes within JSON": lambda key: json.dumps(json.dumps(json_escapes(key))),
    "some characters escaped": lambda key: key[:5] + json_escapes(key[5:9]) + key[9:],
    "Python byte escapes": lambda key: "".join(f"\\x{ord(char):02X}" for char in key),
    "URL escapes": lambda key: "".join(f"%{ord(char):02X}" for char in key),
    "URL escapes twice": lambda key: urllib.parse.quote("".join(f"%{ord(char):02x}" for char in key)),
    "HTML decimal": lambda key: "".join(f"&#{ord(char)};" for char in key),
    "HTML hexadecimal": lambda key: "".join(f"&#x{ord(char):X};" for char in key),
    "HTML names": lambda key: html.escape(key),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal with spaces": lambda key: key.encode().hex(" ").upper(),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 after another byte": lambda key: base64.b64encode(b"x" + key.encode() + b"tail").decode(),
    "base64 after two bytes, for URLs": lambda key: base64.urlsafe_b64encode(b"\xff\xfe" + key.encode()).decode(),
    "basic authorisation": lambda key: "Basic " + base64.b64encode(f"user:{key}".encode()).decode(),
    "backwards": lambda key: key[::-1],
    "upper case": lambda key: key.upper(),
    "a space after each character": lambda key: " ".join(key),
    "a line break in the middle": lambda key: key[:12] + "\n" + key[12:],
    "without punctuation": lambda key: re.sub("[-_]", "", key),
    "a dash after each three": lambda key: "-".join(key[i : i + 3] for i in range(0, len(key), 3)),
    "zero-width spaces": lambda key: "\u200b".join(key),
}
DECODERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "JSON": lambda text: re.sub(r"\\+u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text),
    "URL": lambda text: urllib.parse.unquote(urllib.parse.unquote(text)),
    "HTML": html.unescape,
    "bytes": lambda text: re.sub(r"\\+x([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), text),
    "hexadecimal": lambda text: re.sub("[0-9a-fA-F]{2} ?", lambda m: chr(int(m[0], 16)), text),
    "backwards": lambda text: text[::-1],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_spelling_of_a_secret_is_left(encoding: str) -> None:
    """Oracle: decoders of the standard library: none finds the secret's letters in order; the text around it stays."""
    add_secret(KEY)
    spelled = ENCODINGS[encoding](KEY)
    shown = redact(f"before: {spelled} :after")
    assert shown.startswith("before: ") and shown.endswith(":after") and redaction.MARK in shown
    letters = re.sub("[^0-9a-z]", "", KEY.lower())
    for name, decode in DECODERS.items():
        assert letters not in re.sub("[^0-9a-z]", "", decode(shown).lower()), name
    for piece in re.findall(r"[A-Za-z0-9+/=_-]{16,}", shown):
        assert b"planted" not in base64.b64decode(piece + "==", altchars=b"-_")


def test_a_secret_may_be_added_while_another_thread_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the text comes back, redacted, where a secret is added at the worst moment: while the known ones are
    gone over. A dict that grows meanwhile would raise RuntimeError."""

    class Meanwhile:
        @property
        def spellings(self) -> tuple[str, ...]:
            add_secret("another-secret-1234")
            return ()

    monkeypatch.setitem(redaction._secrets, "the other thread", Meanwhile())
    add_secret(KEY)
    assert redact(f"Bearer {KEY}, sent") == f"Bearer {redaction.MARK}, sent"


PLACES: dict[str, Callable[[str], object]] = {
    "a text": lambda key: key,
    "a dict's value": lambda key: {"content": key},
    "a dict's key": lambda key: {key: 1},
    "a list in a list": lambda key: [1, [key, None]],
    "a tuple": lambda key: ("a", f"Bearer {key}"),
    "the middle of a word": lambda key: f"x{key}y",
    "twice in one text": lambda key: f"{key}, {key}",
    "a URL": lambda key: f"https://host/v1?key={key}&x=1",
    "a Python literal": lambda key: repr({"api_key": key}),
    "a traceback's last line": lambda key: f"ValueError: {key}\n",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_taken_out_wherever_it_stands(place: str) -> None:
    """Oracle: no text of the result has the secret, and shape, numbers and None are unchanged."""
    add_secret(KEY)
    value = PLACES[place](KEY)
    shown = redact(value)
    assert KEY not in repr(shown) and redaction.MARK in repr(shown) and type(shown) is type(value)
    assert repr(shown).replace(redaction.MARK, "K") == repr(value).replace(KEY, "K")
    assert json.loads(to_redacted_json(value)) == json.loads(json.dumps(shown))


@pytest.mark.parametrize(
    "text",
    ["", "20% of 50 is \\u0031\\u0030 & more", "x" * 5000, "sk-planted", "\\", "%", "&#", "&#99999;", "\ud83d", "%%25"],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    """Oracle: the text itself, with a secret known that it does not hold."""
    add_secret(KEY)
    assert redact(text) == text and redact({"a": [text, 1.5, None]}) == {"a": [text, 1.5, None]}


@pytest.mark.parametrize("value", ["", "none", "k", "EMPTY", "------------"])
def test_a_value_that_is_no_secret_is_not_searched_for(value: str) -> None:
    """Oracle: a text that holds such a value stays whole: redacting it would destroy ordinary text."""
    add_secret(value)
    assert redact(f"ask {value} none EMPTY k") == f"ask {value} none EMPTY k"


def test_output_and_logs_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what two streams of ours received: print and a traceback without the secret, the rest as it was."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    redact_output()
    redact_output()
    print("known later:", KEY)
    add_secret(KEY)
    print("key", KEY, "end")
    try:
        raise RuntimeError(f"bad key {KEY}")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    assert sys.stdout.encoding == out.encoding and not sys.stderr.isatty()
    assert out.getvalue() == f"known later: {KEY}\nkey [key] end\n"
    assert "RuntimeError: bad key [key]" in err.getvalue() and KEY not in err.getvalue()


def test_a_secret_is_read_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the environment after the first call, and the value of the second; a new value replaces the old one."""
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_secret("SOME_KEY") == KEY and "SOME_KEY" not in os.environ
    assert read_secret("SOME_KEY") == KEY and redact(KEY) == "[key]"
    monkeypatch.setenv("SOME_KEY", "")
    assert read_secret("SOME_KEY") == read_secret("SOME_KEY") == ""
    assert read_secret("NEVER_SET") == ""


PROBE = """
import ctypes, os, subprocess
from matryoshka.core import redaction
if os.getuid() == 0:
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as if the process had been started by this user

def child():
    see = "cat /proc/$PPID/environ | grep -c planted; (: < /proc/$PPID/mem) && echo memory; env | grep -c SOME_KEY"
    return subprocess.run(["/bin/sh", "-c", see], stdout=subprocess.PIPE, text=True).stdout.split()

print(child())
redaction._hide_memory = lambda: None
assert len(redaction.read_secret("SOME_KEY")) == 27
print(child())
environment = open("/proc/self/environ").read()
assert "planted" not in environment and "OTHER=stays" in environment and "SOME_KEY=" in environment
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's")
def test_neither_proc_nor_a_child_shows_what_was_read() -> None:
    """Oracle: what a child of the same user, without root's rights, counts and opens before and after the key was read;
    first with the wipe alone, which /proc/self/environ shows, then with the memory hidden as well.
    """
    environment = {**os.environ, "SOME_KEY": KEY, "OTHER": "stays"}
    for hides, after in ((False, "['0', 'memory', '0']"), (True, "['0', '0']")):
        code = PROBE if not hides else PROBE.split("environment = ")[0].replace("redaction._hide_memory", "_")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split("\n")[:2] == ["['1', 'memory', '1']", after], done.stderr


def test_a_crash_shows_no_secret() -> None:
    """Oracle: the standard error of a process that ends in a traceback, in a thread and at its end, with the secret in
    its errors and in a log line.
    """
    code = """
import logging, threading
from matryoshka.core.redaction import read_secret, redact_output
redact_output()
key = read_secret("SOME_KEY")
logging.basicConfig()
logging.warning("asked with %s", key)
def fail():
    raise ValueError(f"thread {key}")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise RuntimeError(f"main {key}")
"""
    environment = {**os.environ, "SOME_KEY": KEY}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and KEY not in done.stderr
    for line in ("asked with [key]", "ValueError: thread [key]", "RuntimeError: main [key]"):
        assert line in done.stderr
