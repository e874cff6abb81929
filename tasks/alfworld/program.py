"""Runs a model-written program that plays a household: the program in a sandboxed process, the household here.

The program (step_1(agent, memory), step_2(agent, memory), ...) runs in the sandbox's child process, with its limits and
without files; every action of its agent is a request over a socket, which the session here answers. So it can do to
the household only what commands can, and whatever it does to itself ends in an outcome. What the sandbox does not cover
(`tasks/sandbox.py`), this does not either.
"""

import asyncio
import marshal
import os
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from matryoshka.tasks import sandbox
from matryoshka.tasks.alfworld.playthrough import Session, StepsSpentError

CHILD = Path(__file__).with_name("program_child.py")
START_S = 60.0  # until the child is ready to run the program: a busy machine is no fault of the program
MAX_MESSAGE = 2**15
# Commands and questions go into prompts and records, so the parent holds them to these numbers of characters.
MAX_COMMAND, MAX_QUESTION = 500, 2000
END_S = 1.0  # for a child that has closed its line to end by itself, so that the reason of its end is known
MAX_REFUSED = 20  # requests beyond a limit, after which a program is not heard any more
STDOUT_BYTES = 2**11


@dataclass(frozen=True)
class Limits:
    """What one program may use. timeout_s: wall clock without the time that `ask` takes. asks: questions.

    ask_tokens: of one answer; the caller's `ask` keeps to it.
    """

    timeout_s: float = 10.0
    memory_bytes: int = 256 * 2**20
    asks: int = 5
    ask_tokens: int = 64


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended. error: why it stopped early, its traceback or the limit it met; "" if it ran to its end or
    the task was done on the way. step: the number of the step that was running, 0 before the first. memory: a literal
    of what the program remembered, as plain data. stdout: the first that it printed.
    """

    error: str
    step: int
    memory: str
    stdout: str
    seconds: float


class AskRefusedError(RuntimeError):
    """A question that is not answered; its text is what the program is told."""


async def run_program(
    code: str,
    session: Session,
    ask: Callable[[str], Awaitable[str]],
    limits: Limits,
    first: int = 1,
    memory: str = "{}",
    slots: asyncio.Semaphore | None = None,
) -> ProgramOutcome:
    """Return the outcome of running the steps of `code` from number `first` on in `session`, as it is now.

    memory: that of an earlier outcome. ask answers a question; an exception of it but AskRefusedError ends the program
    and is raised. slots: how many programs run at once (default: one per CPU for each event loop); a program that
    waits for an answer gives its slot away. Raises RuntimeError if the child does not start.
    """
    if limits.timeout_s <= 0 or limits.memory_bytes < sandbox.MIN_MEMORY_BYTES:
        raise ValueError(
            f"program: timeout_s is {limits.timeout_s} and memory_bytes is {limits.memory_bytes}; "
            f"expected a positive time and at least {sandbox.MIN_MEMORY_BYTES} bytes"
        )
    slots = slots or sandbox.default_slots()
    async with slots:
        folder = tempfile.mkdtemp(prefix="program-")
        try:
            return await _run(code, session, ask, limits, first, memory, slots, folder)
        finally:
            await sandbox.remove(folder)


async def _run(
    code: str,
    session: Session,
    ask: Callable[[str], Awaitable[str]],
    limits: Limits,
    first: int,
    memory: str,
    slots: asyncio.Semaphore,
    folder: str,
) -> ProgramOutcome:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as printed:
        source.write(code.encode("utf-8", "surrogatepass"))
        source.seek(0)
        ours, theirs = socket.socketpair()
        started = time.monotonic()
        try:
            with theirs:
                process = await sandbox.start(
                    CHILD, folder, source, printed, theirs.fileno(), limits.timeout_s, limits.memory_bytes
                )
        except BaseException:
            ours.close()
            raise
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_MESSAGE)
            try:
                play = _Play(reader, writer, session, ask, limits, slots)
                begun = await play.begin(first, memory)
                if begun:
                    await play.serve(process)
            finally:
                writer.close()
        finally:
            await sandbox.end(process)
        stdout = os.pread(printed.fileno(), STDOUT_BYTES, 0).decode("utf-8", "replace")
    if not begun:
        raise RuntimeError(f"program: the child (code {process.returncode}) was not ready: {stdout[-500:]}")
    return ProgramOutcome(play.error, play.step, play.memory, stdout, time.monotonic() - started)


class _Play:
    """The conversation with one child: its requests, and what they led to."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        session: Session,
        ask: Callable[[str], Awaitable[str]],
        limits: Limits,
        slots: asyncio.Semaphore,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._session, self._ask, self._limits, self._slots = session, ask, limits, slots
        self.step = 0
        self.memory = "{}"
        self.error = ""

    async def begin(self, first: int, memory: str) -> bool:
        """Return whether the child is ready to run the program."""
        session = self._session
        # marshal is safe in this direction: the child trusts us, and it is the same interpreter.
        start = marshal.dumps((session.verbs, session.screen, session.history, first, memory))
        self._writer.write(len(start).to_bytes(4, "big") + start)
        try:
            async with asyncio.timeout(START_S):
                return await self._reader.readexactly(5) == b"R\0\0\0\0"
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return False

    async def serve(self, process: asyncio.subprocess.Process) -> None:
        """Answer the child until the program ends, the task is done or a limit is met."""
        try:
            async with asyncio.timeout(self._limits.timeout_s) as clock:
                await self._converse(clock)
        except TimeoutError:
            self.error = f"TimeoutError: the program did not finish within {self._limits.timeout_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            try:
                async with asyncio.timeout(END_S):
                    code = await process.wait()
                how = f"exited (code {code})" if code >= 0 else f"was killed ({signal.strsignal(-code)})"
            except TimeoutError:  # it closed the line and goes on, or has stopped itself: `_run` kills it
                how = "closed the line to its household"
            self.error = f"RuntimeError: the program {how} before its last step had ended"

    async def _converse(self, clock: asyncio.Timeout) -> None:
        refused = asked = 0
        while not self._session.won:
            head = await self._reader.readexactly(5)
            kind, size = head[:1], int.from_bytes(head[1:], "big")
            if kind not in b"AQSMEF" or size > MAX_MESSAGE:
                self.error = "RuntimeError: the program disturbed the line to its household"
                return
            text = (await self._reader.readexactly(size)).decode("utf-8", "replace")
            if kind == b"S":
                self.step = int(text) if text.isdecimal() and len(text) < 9 else self.step
            elif kind == b"M":
                self.memory = text
            elif kind == b"E":
                self.error = sandbox.clean(text) or "RuntimeError: the program ended without a reason"
                return
            elif kind == b"F":
                return
            else:
                try:
                    if len(text) > (limit := MAX_QUESTION if kind == b"Q" else MAX_COMMAND):
                        raise AskRefusedError(f"a text of {len(text)} characters is longer than {limit}")
                    if kind == b"Q":
                        asked += 1
                        answer = await self._answer(text, asked, clock)
                    else:
                        answer = self._session.act(text)
                    self._reply(b"+", answer)
                except (StepsSpentError, AskRefusedError) as err:
                    refused += 1
                    if refused > MAX_REFUSED:
                        self.error = f"RuntimeError: {err}; the program went on all the same"
                        return
                    self._reply(b"-", str(err))
                await self._writer.drain()

    async def _answer(self, question: str, number: int, clock: asyncio.Timeout) -> str:
        """Return the answer to a question; meanwhile the clock stands still and another program may run."""
        if number > self._limits.asks:
            raise AskRefusedError(f"all {self._limits.asks} questions are used up")
        loop = asyncio.get_running_loop()
        left = (clock.when() or 0.0) - loop.time()
        clock.reschedule(None)
        self._slots.release()
        try:
            return await self._ask(question)
        finally:
            await self._slots.acquire()
            clock.reschedule(loop.time() + left)

    def _reply(self, status: bytes, text: str) -> None:
        data = status + text.encode("utf-8", "replace")
        self._writer.write(len(data).to_bytes(4, "big") + data)
