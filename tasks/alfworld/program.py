"""Runs a model-written program that plays a household: the program in a sandboxed process, the household here.

The program (step_1(agent, memory), step_2(agent, memory), ...) runs in the sandbox's child process, behind the same
boundary as every generated program (`tasks/sandbox.py`); every action of its agent is a request over the child's line,
which the session here answers. So a program changes the household by commands alone, and a fault of its own becomes an
outcome.
"""

import asyncio
import marshal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from matryoshka.tasks.alfworld.playthrough import Session, StepsSpentError
from matryoshka.tasks.sandbox import END_S, clean, frame, limits_for, program_slots
from matryoshka.tasks.sandbox_backends import START_S, Process, Sandbox, local_sandbox, printable

CHILD = Path(__file__).with_name("program_child.py")
MAX_MESSAGE = 2**15
# Commands and questions go into prompts and records, so the parent holds them to these numbers of characters.
MAX_COMMAND, MAX_QUESTION = 500, 2000
MAX_NOTES = 1000  # messages that need no answer: one for each step and one at the end
MAX_REFUSED = 20  # requests beyond a limit, after which a program is not heard any more
STDOUT_BYTES = 2**11


@dataclass(frozen=True)
class Limits:
    """The limits of one program. timeout_s: wall clock without the time that `ask` takes. asks: questions.

    ask_tokens: of one answer; the caller's `ask` keeps to it. sandbox: where it runs, by default this machine's sandbox
    with isolation "auto".
    """

    timeout_s: float = 10.0
    memory_bytes: int = 256 * 2**20
    asks: int = 5
    ask_tokens: int = 64
    sandbox: Sandbox | None = None


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
) -> ProgramOutcome:
    """Return the outcome of running the steps of `code` from number `first` on in `session`, as it is now.

    memory: that of an earlier outcome. ask answers a question; an exception of it but AskRefusedError ends the program
    and is raised. One program per CPU runs at once; one that waits for an answer gives its slot away. Raises
    RuntimeError if the child does not start.
    """
    process_limits = limits_for(limits.timeout_s, limits.memory_bytes)
    slots = program_slots()
    async with slots:
        started = time.monotonic()
        async with (limits.sandbox or local_sandbox()).open(CHILD, process_limits) as process:
            play = _Play(process, session, ask, limits, slots)
            source = code.encode("utf-8", "surrogatepass")  # malformed text becomes the compiler's SyntaxError
            begun = await play.begin(source, first, memory)
            if begun:
                await play.serve()
            ended = await process.end()
    stdout = ended.printed[:STDOUT_BYTES]
    if not begun:
        raise RuntimeError(f"program: the child was not ready: it {ended.how}: {stdout[-500:]}")
    return ProgramOutcome(play.error, play.step, play.memory, stdout, time.monotonic() - started)


class _Play:
    """The conversation with one child: its requests, and what they led to."""

    def __init__(
        self,
        process: Process,
        session: Session,
        ask: Callable[[str], Awaitable[str]],
        limits: Limits,
        slots: asyncio.Semaphore,
    ) -> None:
        self._process, self._reader, self._writer = process, process.reader, process.writer
        self._session, self._ask, self._limits, self._slots = session, ask, limits, slots
        self.step = 0
        self.memory = "{}"
        self.error = ""

    async def begin(self, source: bytes, first: int, memory: str) -> bool:
        """Return whether the child is ready to run the program."""
        session = self._session
        # marshal is safe in this direction: the child trusts us, and it is the same interpreter.
        start = marshal.dumps((source, session.verbs, session.screen, session.history, first, memory))
        self._writer.write(frame(start))
        try:
            async with asyncio.timeout(START_S):
                return await self._reader.readexactly(5) == b"R\0\0\0\0"
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return False

    async def serve(self) -> None:
        """Answer the child until the program ends, the task is done or a limit is met."""
        try:
            async with asyncio.timeout(self._limits.timeout_s) as clock:
                await self._converse(clock)
        except TimeoutError:
            self.error = f"TimeoutError: the program did not finish within {self._limits.timeout_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            ended = await self._process.end(END_S)
            self.error = f"RuntimeError: the program {ended.how} before its last step had ended"

    async def _converse(self, clock: asyncio.Timeout) -> None:
        refused = asked = notes = 0
        while not self._session.won:
            head = await self._reader.readexactly(5)
            kind, size = head[:1], int.from_bytes(head[1:], "big")
            if kind not in b"AQSMEF" or size > MAX_MESSAGE:
                self.error = "RuntimeError: the program disturbed the line to its household"
                return
            text = printable((await self._reader.readexactly(size)).decode("utf-8", "replace"))
            if kind in b"SM" and (notes := notes + 1) > MAX_NOTES:
                self.error = "RuntimeError: the program disturbed the line to its household"
                return
            if kind == b"S":
                self.step = int(text) if text.isdecimal() and len(text) < 9 else self.step
            elif kind == b"M":
                self.memory = text
            elif kind == b"E":
                self.error = clean(text) or "RuntimeError: the program ended without a reason"
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
        self._writer.write(frame(status + text.encode("utf-8", "replace")))
