"""Runs one model-written program in a fresh child process and returns the number that its `solution()` returns.

Every run gets its own interpreter (`python -I -S`: the standard library, no site-packages), an empty environment, an
empty working folder that is removed afterwards, its own session, and limits on time, memory, file size and open files.
Nothing survives from one run to the next. The answer comes back on a pipe of its own as JSON, so nothing that the
program prints is mistaken for it and reading it can run no code.

What is not covered. This keeps honest mistakes and casual mischief of generated programs away from the run; it is no
security boundary against an attacker:
* The program runs with your user's rights. It can read every file that you can read (/proc/<pid>/environ of the parent
  among them) and change or delete what you can change.
* No network, process or user namespace. An audit hook refuses processes, signals and sockets that are asked for through
  Python's own functions; ctypes and C extensions pass it by. A process made that way and moved to a session of its
  own outlives the run until it meets its CPU limit. RLIMIT_NPROC stops such a process for ordinary users, not for root.
* File size is limited, the number of files and the total disk space are not.
* A program can write a number to the result pipe itself. It gains nothing: it may return any number anyway.
Where that is not enough, run the whole job in a container or a virtual machine.
"""

import asyncio
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("sandbox_child.py")
# What a program may write into one file or print in all before it gets "File too large", and how much print we keep.
FILE_BYTES = 2**20
STDOUT_BYTES = 2**14
MIN_MEMORY_BYTES = 32 * 2**20
# The child keeps its error to so many characters. The parent cuts it again, because a program may forge the message.
ERROR_CHARACTERS = 2000
READY = b"ready\n"
# Some installations find libpython by it. Nothing else of the environment reaches the program.
PASSED_ON = ("LD_LIBRARY_PATH",)
_FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)

_log = logging.getLogger(__name__)
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
    code: str, timeout_s: float, memory_bytes: int, slots: asyncio.Semaphore | None = None
) -> Outcome:
    """Return the outcome of defining `code` and calling its `solution()` in a fresh process.

    timeout_s: wall clock, counted from the start of the process, some 10 ms before the code runs. memory_bytes:
    address space, the interpreter's own 20 MiB included. slots: how many programs run at once (default: one per CPU
    for each event loop). Integers, floats, Fraction and Decimal (as float) are values; bool, str, None, nan,
    infinities and integers beyond the range of floats are errors.
    Raises RuntimeError if the interpreter itself does not start: that is no fault of the program.
    """
    if timeout_s <= 0 or memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(
            f"sandbox: timeout_s is {timeout_s} and memory_bytes is {memory_bytes}; "
            f"expected a positive time and at least {MIN_MEMORY_BYTES} bytes"
        )
    async with slots or default_slots():
        folder = tempfile.mkdtemp(prefix="solution-")
        try:
            return await _run(code, timeout_s, memory_bytes, folder)
        finally:
            await remove(folder)


def extract_code(reply: str) -> str:
    """Return the program in a model's reply: its first ```python block, else its first block, else the whole reply.

    A block that was never closed runs to the end of the reply. An indented block (in a list) is moved to the margin.
    """
    blocks = _FENCE.findall(reply)
    for language, block in blocks:
        if language.strip().lower() in ("python", "python3", "py"):
            return textwrap.dedent(block)
    return textwrap.dedent(blocks[0][1]) if blocks else reply


async def _run(code: str, timeout_s: float, memory_bytes: int, folder: str) -> Outcome:
    # Plain files for input and output: a flood stops at FILE_BYTES and costs the parent nothing. The result is far
    # smaller than a pipe's buffer, so the child never waits for us, and one read, when it has ended, gets it all.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as printed:
        source.write(code.encode("utf-8", "surrogatepass"))  # malformed text becomes the compiler's SyntaxError
        source.seek(0)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        with open(reader, "rb", 0) as results, open(writer, "wb", 0):
            started = time.monotonic()
            process = await start(CHILD, folder, source, printed, writer, timeout_s, memory_bytes)
            timed_out = await _wait(process, timeout_s)
            seconds = time.monotonic() - started
            message = results.read(2**16) or b""  # None: nothing was written
        stdout = os.pread(printed.fileno(), STDOUT_BYTES, 0).decode("utf-8", "replace")
    if not message.startswith(READY):
        what = f"was not ready after {timeout_s:g} s" if timed_out else f"ended with code {process.returncode}"
        raise RuntimeError(
            f"sandbox: {sys.executable} {what} before it ran any code (memory_bytes {memory_bytes}): {stdout[-500:]}"
        )
    if timed_out:
        return Outcome(None, f"TimeoutError: the program did not finish within {timeout_s:g} s", stdout, seconds)
    value, error = _parse(message.removeprefix(READY), process.returncode or 0)
    return Outcome(value, error, stdout, seconds)


async def start(
    script: Path,
    folder: str,
    source: IO[bytes],
    printed: IO[bytes],
    descriptor: int,
    timeout_s: float,
    memory_bytes: int,
) -> asyncio.subprocess.Process:
    """Return `script` running as an isolated process group of its own in `folder`; the caller ends it with `end`.

    source, printed: files for its input and its output. descriptor: inherited, for its results. The script takes its
    limits itself, from its arguments: descriptor, memory_bytes, CPU seconds, FILE_BYTES.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-X", "utf8", str(script)),
        *(str(descriptor), str(memory_bytes), str(math.ceil(timeout_s) + 1), str(FILE_BYTES)),
        stdin=source,
        stdout=printed,
        stderr=printed,
        pass_fds=(descriptor,),
        env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        cwd=folder,
        start_new_session=True,
    )


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill the whole process group of `process`, ended or not."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nobody is left in the group, as usual
        pass
    await process.wait()


def _parse(message: bytes, returncode: int) -> tuple[float | int | None, str | None]:
    """Return (value, None) or (None, error) from what the child sent; exactly what the child writes is accepted."""
    if not message:
        how = f"exited (code {returncode})" if returncode >= 0 else f"was killed ({signal.strsignal(-returncode)})"
        return None, f"RuntimeError: the program {how} before solution() returned"
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
    """Return the last ERROR_CHARACTERS of a child's error as text that any file and any request can hold.

    Lone surrogates, which UTF-8 cannot encode, and control characters but line breaks and tabs become "?".
    """
    text = error[-ERROR_CHARACTERS:].encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)


async def _wait(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    """Return whether the time ran out. In any case the child's whole process group is dead afterwards."""
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return True
    finally:
        await end(process)
    return False


async def remove(folder: str) -> None:
    """Remove a program's working folder, whatever the program made of it."""
    try:
        os.rmdir(folder)  # nearly always empty
    except FileNotFoundError:
        pass
    except OSError:
        # Not shutil.rmtree: it recurses, and a generated program may nest folders deeper than Python's stack.
        remover = await asyncio.create_subprocess_exec("rm", "-rf", "--", folder)
        if await remover.wait():
            _log.warning("sandbox: could not remove %s, which a generated program filled", folder)


def default_slots() -> asyncio.Semaphore:
    """Return the running loop's semaphore with one slot per CPU."""
    loop = asyncio.get_running_loop()
    for closed in [other for other in _slots if other.is_closed()]:
        del _slots[closed]
    return _slots.setdefault(loop, asyncio.Semaphore(os.cpu_count() or 1))
