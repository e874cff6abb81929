"""Secrets: read once from the environment, removed from it, and taken out of everything that this process writes.

`read_secret` returns the value of an environment variable and wipes it there, so that no child process inherits it and
`/proc/PID/environ` no longer shows it. `redact` replaces every secret that was read or given to `add_secret` by "[key]"
in a text or in a structure of lists and dicts. It finds a secret that is spelled with JSON, URL or HTML escapes (also
repeated), in hexadecimal, in base64, backwards, in another case, or with spaces or punctuation between its characters.

Not covered: encodings that are not named here (compression, a cipher), a secret that is cut in parts, secrets of fewer
than eight letters and digits (they would be found in ordinary text), and copies in this process's own memory: on Linux
other processes of the same user cannot read that memory, but a process with the capability SYS_PTRACE can.
"""

import base64
import ctypes
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

MARK = "[key]"
SHORTEST = 8  # letters and digits; a shorter value is not searched for
MAX_LAYERS = 3  # of escapes within escapes

_SQUEEZE = {code: None for code in range(128) if not chr(code).isalnum()} | {0x200B: None, 0xAD: None}
# One class comes first, so that the search skips what begins no escape. It takes more than the three kinds of escapes,
# which does no harm: what it yields is only searched. The texts are in lower case.
_ESCAPE = re.compile(r"[\\%&](?:\\*u([0-9a-f]{4})|\\*x([0-9a-f]{2})|([0-9a-f]{2})|#x0*([0-9a-f]{2});?|#0*(\d{2,3});?)")
# Between two characters of a spelled-out secret: punctuation or white space, plain or escaped.
_PUNCTUATION = "(?:0[9ad]|2[0-9a-f]|3[a-f]|40|5[b-f]|60|7[b-e])"
_BETWEEN = rf"(?:\\+(?:u00|x){_PUNCTUATION}|%(?:25)*{_PUNCTUATION}|&#x0*{_PUNCTUATION};?|&#0*\d{{2,3}};|[\W_]){{0,12}}?"

T = TypeVar("T")


@dataclass(frozen=True)
class _Secret:
    """One value to hide. Its spellings are kept without punctuation and in lower case."""

    value: str

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        data = self.value.encode()
        forms = [self.value, self.value[::-1], data.hex()]
        for offset in range(3):  # base64 depends on where the secret begins within a group of three bytes
            encoded = base64.b64encode(b"\0" * offset + data).decode()
            forms.append(encoded[(offset * 8 + 5) // 6 : (offset + len(data)) * 8 // 6])
        squeezed = [form.lower().translate(_SQUEEZE) for form in forms]
        return tuple(form for form in squeezed if len(form) >= SHORTEST)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(_BETWEEN.join(map(_spelled, form)), re.I) for form in self.spellings)


_by_variable: dict[str, str] = {}
_secrets: dict[str, _Secret] = {}


def read_secret(variable: str) -> str:
    """Return what environment variable `variable` holds, without white space around it; "" if it holds nothing.

    The first call removes the variable from the environment; later ones return the same value. From then on the process
    leaves no core file, and other processes of its user cannot read its memory or its environment (Linux).
    """
    value = os.environ.get(variable)
    if value is None:
        return _by_variable.get(variable, "")
    secret = _by_variable[variable] = value.strip()
    if secret:
        add_secret(secret)
        _wipe(os.fsencode(value))
        _hide_memory()
    del os.environ[variable]
    return secret


def add_secret(value: str) -> None:
    """Let `redact` take `value` out of all texts from now on."""
    if value not in _secrets and (secret := _Secret(value)).spellings:
        _secrets[value] = secret


def redact(value: T) -> T:
    """Return `value`, a text or a structure of lists, tuples and dicts with texts in it, without any known secret."""
    if not _secrets:
        return value
    if isinstance(value, str):
        return cast(T, _redact_text(value))
    if isinstance(value, dict):
        return cast(T, {redact(key): redact(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return cast(T, type(value)(redact(item) for item in value))
    return value


def to_redacted_json(value: Any, **options: Any) -> str:
    """Return the JSON text of `value` without any known secret; `options` are those of json.dumps."""
    text = json.dumps(value, **options)
    return json.dumps(redact(value), **options) if _found(text) else text


def redact_output() -> None:
    """Redact all later text on standard output and standard error, tracebacks and log lines included."""
    if not isinstance(sys.stdout, _Redacted):
        sys.stdout, sys.stderr = (cast(TextIO, _Redacted(stream)) for stream in (sys.stdout, sys.stderr))


class _Redacted:
    """The text stream `stream`, but for `write`, which redacts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(redact(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self._stream.writelines(map(redact, lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redact_text(text: str) -> str:
    found = _found(text)
    for secret in sorted(found, key=lambda secret: -len(secret.value)):  # one may be the beginning of another
        for pattern in secret.patterns:
            text = pattern.sub(MARK, text)
    # A spelling that the detection sees and no pattern matches: losing the text is better than showing the secret.
    return MARK if found and _found(text) else text


def _found(text: str) -> list[_Secret]:
    """Return the secrets that `text` holds in any spelling."""
    if not _secrets:
        return []
    text = text.lower()
    forms = [text.translate(_SQUEEZE)]
    for _ in range(MAX_LAYERS):
        plain = _ESCAPE.sub(_unescaped, text)
        if plain == text:
            break
        text = plain
        forms.append(text.translate(_SQUEEZE))
    known = list(_secrets.values())  # another thread may add one meanwhile
    return [s for s in known if any(spelling in form for form in forms for spelling in s.spellings)]


def _unescaped(match: re.Match[str]) -> str:
    *hexadecimal, decimal = match.groups()
    code = int(decimal) if decimal else int(next(filter(None, hexadecimal)), 16)
    return chr(code).lower()


def _spelled(char: str) -> str:
    """Return a pattern of one letter or digit: itself or any escape of it, in lower or upper case."""
    codes = {ord(char), ord(char.upper())}
    digits = "|".join(f"{code:02x}" for code in sorted(codes))
    numbers = "|".join(str(code) for code in sorted(codes))
    escapes = rf"\\+(?:u00|x)(?:{digits})|%(?:25)*(?:{digits})|&#x0*(?:{digits});?|&#0*(?:{numbers});?"
    return f"(?:{re.escape(char)}|{escapes})"


def _wipe(value: bytes) -> None:
    """Overwrite `value` in the block of memory in which the process received its environment (Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end of proc_pid_stat(5), 0 where not shown
    block, at = ctypes.string_at(start, end - start) if start else b"", -1
    while (at := block.find(value, at + 1)) >= 0:
        ctypes.memset(start + at, 0, len(value))


def _hide_memory() -> None:
    """Forbid core files, and access to this process's memory and /proc entries to other processes of its user (Linux).

    The kernel lifts this for a child as soon as it executes a program, so children are not affected.
    """
    if sys.platform == "linux":
        PR_SET_DUMPABLE = 4
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
