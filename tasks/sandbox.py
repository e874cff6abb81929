"""Runs one model-written program and returns the number that its `solution()` returns.

Every run gets an interpreter of its own (a fork of a fresh `python -S`: the standard library, no site-packages) with an
empty environment, without privileges, behind the kernel's boundary (`sandbox_boundary.py`), and with limits on time,
memory, file size and open files. Nothing survives from one run to the next. The answer comes back on a line of its own
as JSON, so nothing that the program prints is mistaken for it and reading it can run no code. SECURITY.md says what
holds, what does not, and which test shows it.

A program could write a number to that line itself. It would gain nothing by it, since it may return any number.
"""

import asyncio
import json
import math
import re
import sys
import textwrap
import time
from dataclasses import dataclass

from matryoshka.core.machine import usable_cores
from matryoshka.tasks.sandbox_backends import (
    LINE_BYTES,
    SCRIPT,
    START_S,
    Ended,
    Process,
    ProcessLimits,
    Sandbox,
    local_sandbox,
    printable,
)

READY = b"ready\n"
# The child keeps its error to so many characters. The parent cuts it again, because a program may forge the message.
ERROR_CHARACTERS = 2000
END_S = 3.0  # in which a program that has closed its line may end by itself, so that its exit status is known
# A fenced block: its fence, what stands behind it (the language), and its lines. It ends with the same fence at the
# beginning or the end of a line, so that a docstring may quote one.
_FENCE = re.compile(
    r"(?:(?<!`)(`{3,}+)|^[ \t]*+(~{3,}+))([^\n`]*+)\n(.*?)(?:^[ \t]*(?:\1|\2)|(?:\1|\2)[ \t\r]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = re.compile(r"\W*(?:python|py)(?![a-z-])", re.IGNORECASE)
_BARE = re.compile(r"\s*(?:def \w+\(|import \w+\s*$|from \w[\w.]* import )", re.MULTILINE)  # code before any fence

_slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


@dataclass(frozen=True)
class Outcome:
    """What a program did: `value` if `solution()` returned a finite int or float, else `error`, the reason.

    error: the traceback of the model's own code, or what ended the program (time, a signal, its own exit).
    stdout: the first STDOUT_BYTES that it printed, standard error included. seconds: wall clock, start-up included.
    """

    value: float | int | None
    error: str | None
    stdout: str
    seconds: float


async def run_solution(
    code: str,
    timeout_s: float,
    memory_bytes: int,
    slots: asyncio.Semaphore | None = None,
    sandbox: Sandbox | None = None,
) -> Outcome:
    """Return the outcome of defining `code` and calling its `solution()` in a fresh process.

    timeout_s: wall clock, counted from the moment when the child is ready to run the code. memory_bytes: address space,
    the interpreter's own included. slots: how many programs run at once (default: one per CPU for each event
    loop). sandbox: where it runs, by default this machine's with isolation "auto". Integers, floats, Fraction and
    Decimal (as float) are values; bool, str, None, nan, infinities and integers beyond the range of floats are errors.
    Raises RuntimeError if the interpreter itself does not start: that is no fault of the program.
    """
    limits = limits_for(timeout_s, memory_bytes)
    async with slots or program_slots():
        started = time.monotonic()
        async with (sandbox or local_sandbox()).open(SCRIPT, limits) as process:
            source = code.encode("utf-8", "surrogatepass")  # malformed text becomes the compiler's SyntaxError
            process.writer.write(frame(source))
            try:
                async with asyncio.timeout(START_S):
                    is_ready = await process.reader.read(len(READY)) == READY
            except (TimeoutError, ConnectionError):
                is_ready = False
            message = bytearray()
            try:
                async with asyncio.timeout(timeout_s if is_ready else 0.0):
                    await _read_all(process, message)
                    timed_out = False
            except TimeoutError:
                timed_out = True
            ended = await process.end(0.0 if timed_out else END_S)
        seconds = time.monotonic() - started
    if not is_ready:
        raise RuntimeError(
            f"sandbox: the interpreter {ended.how} before it ran any code (memory_bytes {memory_bytes}): "
            f"{ended.printed[-500:]}"
        )
    if timed_out:
        error = f"TimeoutError: the program did not finish within {timeout_s:g} s"
        return Outcome(None, error, ended.printed, seconds)
    value, error_found = _parse(bytes(message), ended)
    return Outcome(value, error_found, ended.printed, seconds)


def limits_for(timeout_s: float, memory_bytes: int) -> ProcessLimits:
    """Return the limits of a program's process. Raises ValueError for a time or memory that makes no sense."""
    if timeout_s <= 0:
        raise ValueError(f"sandbox: timeout_s is {timeout_s}; expected a positive number of seconds")
    return ProcessLimits(memory_bytes, math.ceil(timeout_s) + 1)


def frame(data: bytes) -> bytes:
    """Return `data` as a frame of a line: its length, then itself."""
    return len(data).to_bytes(4, "big") + data


def extract_code(reply: str) -> str:
    """Return the program in a model's reply, moved to the margin.

    It is the first ```python block that defines a function, else the first ```python block; without any, a block of
    another language, chosen likewise; without any block the whole reply. A block that was never closed runs to the end
    of the reply. A reply that begins with code ends at its first fence, since the opening one stood in the prompt.
    """
    if _BARE.match(reply):
        return textwrap.dedent(re.split("^[ \t]*(?:```|~~~)", reply, maxsplit=1, flags=re.MULTILINE)[0])
    blocks = [(_PYTHON.match(language), block) for _, _, language, block in _FENCE.findall(reply)]
    blocks = [(python, block) for python, block in blocks if python] or blocks
    texts = [block for _, block in blocks] or [reply]
    return textwrap.dedent(next((text for text in texts if "def " in text), texts[0]))


async def _read_all(process: Process, message: bytearray) -> None:
    """Append to `message` what comes over the line until it closes, or until it is longer than any message of ours."""
    try:
        while len(message) <= LINE_BYTES and (chunk := await process.reader.read(LINE_BYTES)):
            message += chunk
    except ConnectionError:  # closed while something that we had sent was unread
        pass


def _parse(message: bytes, ended: Ended) -> tuple[float | int | None, str | None]:
    """Return (value, None) or (None, error) from what the child sent; exactly what the child writes is accepted."""
    if not message:
        return None, f"RuntimeError: the program {ended.how} before solution() returned"
    try:
        data = json.loads(message)
    except (ValueError, RecursionError):
        data = None
    match data:
        case {"value": bool()}:
            pass
        case {"value": int() | float() as value} if abs(value) <= sys.float_info.max:
            return value, None
        case {"error": str() as error}:
            return None, clean(error) or "RuntimeError: the program ended without a reason"
    return None, "RuntimeError: the program disturbed the pipe for its result"


def clean(error: str) -> str:
    """Return the last ERROR_CHARACTERS of a child's error as any file, terminal and request can take them."""
    return printable(error[-ERROR_CHARACTERS:])


def program_slots() -> asyncio.Semaphore:
    """Return the running loop's semaphore with one slot per CPU."""
    loop = asyncio.get_running_loop()
    for closed in [other for other in _slots if other.is_closed()]:
        del _slots[closed]
    return _slots.setdefault(loop, asyncio.Semaphore(usable_cores()))
