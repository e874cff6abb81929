"""A sandbox that is a command, for instance a Docker container: for programs that need packages or a stronger wall.

It has the interface of `sandbox_backends.Sandbox`. The script and the modules that it needs travel in the command line,
so the other side needs a Python and nothing of ours.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO

from matryoshka.tasks.sandbox_backends import (
    FILE_BYTES,
    LINE_BYTES,
    SCRIPT,
    STDOUT_BYTES,
    Ended,
    ProcessLimits,
    printable,
)


class CommandSandbox:
    """Runs scripts through a command, such as ("docker", "run", "--rm", "-i", "--network=none", "python:3.11-slim").

    The command is given a Python command line. Standard input and output are the line, standard error takes what the
    program prints. The boundary is the command's business; memory and CPU are limited as elsewhere. Killing the command
    must end the program: for Docker let it run under `timeout -s KILL`, since a container outlives its client.
    """

    def __init__(self, command: Sequence[str], python: str = "python3") -> None:
        self._command, self._python = tuple(command), python

    def start(self, script: Path) -> dict[str, object]:
        """Return the command; we cannot know what it holds. Raises ValueError if there is no such program."""
        if not self._command or shutil.which(self._command[0]) is None:
            raise ValueError(f"sandbox: command {self._command}: no such program; install it, or use the local sandbox")
        return {"isolation": "command", "command": list(self._command)}

    @contextlib.asynccontextmanager
    async def open(self, script: Path, limits: ProcessLimits) -> AsyncIterator["_CommandProcess"]:
        """Run `script` in a process of the command."""
        numbers = (str(n) for n in (limits.memory_bytes, limits.cpu_s, FILE_BYTES))
        with tempfile.TemporaryFile() as printed:
            process = await asyncio.create_subprocess_exec(
                *(*self._command, self._python, "-I", "-S", "-X", "utf8", "-c", _carried(script), *numbers),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                limit=LINE_BYTES,
                start_new_session=True,
            )
            running = _CommandProcess(process, printed)
            try:
                yield running
            finally:
                await running.end()
                running.writer.close()


class _CommandProcess:
    """A running command."""

    def __init__(self, process: asyncio.subprocess.Process, printed: IO[bytes]) -> None:
        assert process.stdout is not None and process.stdin is not None
        self.reader, self.writer = process.stdout, process.stdin
        self._process, self._printed = process, printed
        self._ended: Ended | None = None

    async def end(self, grace_s: float = 0.0) -> Ended:
        """Return how the command ended."""
        if self._ended is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            code = self._process.returncode
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            printed = printable(os.pread(self._printed.fileno(), STDOUT_BYTES, 0).decode("utf-8", "replace"))
            self._ended = Ended(code, printed)
        return self._ended


# What `python -c` runs in a command: the modules that the script needs come with it, so the image needs none of ours.
_CARRIED = """
import os, sys
for name, text in {modules!r}.items():
    module = sys.modules[name] = type(sys)(name)
    exec(compile(text, name, "exec"), module.__dict__)
script = sys.modules[{script!r}]
script.prepare()
reading, writing = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
memory_bytes, cpu_s, file_bytes = map(int, sys.argv[1:])
sys.modules["sandbox_child"].take_limits(memory_bytes, cpu_s, file_bytes)
script.main(reading, writing, memory_bytes)
os._exit(0)
"""


def _carried(script: Path) -> str:
    """Return `script` with every module beside it that it may import, as one Python program."""
    paths = [SCRIPT, *(path for path in (script.with_name("agent.py"), script) if path.is_file() and path != SCRIPT)]
    modules = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    return _CARRIED.format(modules=modules, script=script.stem)
