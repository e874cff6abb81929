"""Where generated programs run: the interface of a sandbox, and the one of this machine.

A sandbox starts a script of ours (`sandbox_child.py`, or another with `prepare()` and `main(reading, writing,
memory_bytes)`) and joins it to us by a line of bytes; what travels there is the caller's business. `LocalSandbox` runs
it behind the kernel's boundary on this machine; `sandbox_command.py` has one that runs it through a command, such as
`docker run`.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from matryoshka.tasks import sandbox_boundary

Isolation = Literal["auto", "required", "none"]
SERVER = Path(__file__).with_name("sandbox_server.py")
SCRIPT = Path(__file__).with_name("sandbox_child.py")
# What a program may write into one file or print in all before it gets "File too large", and how much print we keep.
FILE_BYTES = 2**20
STDOUT_BYTES = 2**14
MIN_MEMORY_BYTES = 64 * 2**20
LINE_BYTES = 2**16  # that a program may send before the parent has read them
START_S = 60.0  # until an interpreter has started: a busy machine is no fault of a program
KILL_S = 60.0  # until the kernel has ended a killed process
LAST_WORDS_S = 5.0  # until a server whose socket is closed has ended
# Some installations find libpython by it. Nothing else of the environment reaches the interpreter.
PASSED_ON = ("LD_LIBRARY_PATH",)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessLimits:
    """What the kernel allows the process of one program: bytes of address space and seconds of the CPU."""

    memory_bytes: int
    cpu_s: int

    def __post_init__(self) -> None:
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(
                f"sandbox: memory_bytes is {self.memory_bytes}; expected at least {MIN_MEMORY_BYTES} bytes, since the "
                "interpreter itself needs some 30 MiB"
            )


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit code, -n for signal n, None if it was killed by us. printed: the first
    STDOUT_BYTES that it wrote to standard output and error.
    """

    code: int | None
    printed: str

    @property
    def how(self) -> str:
        """The end in words, for an error."""
        if self.code is None:
            return "closed its line"
        if self.code >= 0:
            return f"exited (code {self.code})"
        return f"was killed ({signal.strsignal(-self.code) or f'signal {-self.code}'})"


def printable(text: str) -> str:
    """Return `text` as any file, terminal and request can take it.

    Lone surrogates, which UTF-8 cannot encode, and control characters but line breaks and tabs become "?".
    """
    return "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)


class Process(Protocol):
    """A running script. reader, writer: our end of its line."""

    @property
    def reader(self) -> asyncio.StreamReader: ...

    @property
    def writer(self) -> asyncio.StreamWriter: ...

    async def end(self, grace_s: float = 0.0) -> Ended:
        """Return how the process ended, killing it and all that it started if it runs longer than `grace_s` yet."""
        ...


class Sandbox(Protocol):
    """Starts scripts behind some boundary."""

    def start(self, script: Path) -> dict[str, object]:
        """Get ready for `script` and return what the boundary consists of, as JSON-ready values.

        Raises ValueError if the boundary is weaker than was asked for, RuntimeError if no interpreter starts.
        """
        ...

    def open(self, script: Path, limits: ProcessLimits) -> AbstractAsyncContextManager[Process]:
        """Run `script` in a process of its own, which is gone when the context ends."""
        ...


class LocalSandbox:
    """Runs scripts on this machine, each in a child that a server forks; one server for each script.

    isolation: "auto" takes what this kernel has, and says once what is missing; "required" refuses to start without
    Landlock and seccomp; "none" keeps limits and the empty environment alone. use_bubblewrap: add namespaces, where
    bubblewrap is installed.
    """

    def __init__(self, isolation: Isolation = "auto", use_bubblewrap: bool = True) -> None:
        self._isolation, self._use_bubblewrap = isolation, use_bubblewrap
        self._servers: dict[Path, _Server] = {}
        self._lock = threading.Lock()
        self._has_warned = False
        _sandboxes.add(self)

    def start(self, script: Path) -> dict[str, object]:
        """Start the server of `script`, unless it runs, and return what holds behind it."""
        return self._server(script).boundary | {"isolation": self._isolation}

    @contextlib.asynccontextmanager
    async def open(self, script: Path, limits: ProcessLimits) -> AsyncIterator["_LocalProcess"]:
        """Run `script` in a fresh child. Raises RuntimeError if the child cannot be made."""
        server = self._servers.get(script)
        if server is None or server.has_ended:
            server = await asyncio.to_thread(self._server, script)
        with contextlib.ExitStack() as opened:
            folder = "/"
            if not server.is_walled:  # a program may write into its working folder, so it gets one of its own
                folder = opened.enter_context(_working_folder())
            printed = opened.enter_context(open(os.memfd_create("printed", os.MFD_CLOEXEC), "rb", 0))
            line, its_line = _socket_pair(opened, socket.SOCK_STREAM)
            run, its_run = _socket_pair(opened, socket.SOCK_SEQPACKET)
            request = f"{limits.memory_bytes} {limits.cpu_s} {FILE_BYTES} {folder}"
            await server.send(request.encode(), [its_run.fileno(), its_line.fileno(), printed.fileno()])
            its_run.close()
            its_line.close()
            reader, writer = await asyncio.open_connection(sock=line, limit=LINE_BYTES)
            process = _LocalProcess(reader, writer, run, printed, server)
            try:
                yield process
            finally:
                await process.end()
                writer.transport.abort()

    def close(self) -> None:
        """End the servers, and with them every program that still runs."""
        with self._lock:
            for server in self._servers.values():
                server.close()
            self._servers.clear()

    def forget(self) -> None:
        """Close our copies of the servers' sockets: for a forked copy of this process."""
        for server in self._servers.values():
            server.control.close()
        self._servers.clear()
        self._lock = threading.Lock()

    def _server(self, script: Path) -> "_Server":
        with self._lock:
            server = self._servers.get(script)
            if server is None or server.has_ended:
                server = self._servers[script] = self._started(script)
            return server

    def _started(self, script: Path) -> "_Server":
        if self._isolation == "none":
            return _Server([], script, is_bounded=False)
        sandbox_boundary.hide_memory()  # keys may lie in the memory and the environment of this process
        problem = ""
        server = None
        if self._use_bubblewrap:
            try:
                server = _Server(_bubblewrap(script), script, is_bounded=True)
            except (OSError, RuntimeError) as err:
                problem = f"namespaces are off: {err}"
        has_namespaces = server is not None
        server = server or _Server([], script, is_bounded=True)
        problems = [*server.problems, *([problem] if problem else [])]
        server.boundary |= {"namespaces": has_namespaces, "problems": problems}
        if not server.is_bounded and self._isolation == "required":
            server.close()
            raise ValueError(
                f"isolation 'required': {'; '.join(server.problems)}; use a kernel with Landlock and seccomp, run the "
                "whole job in a container of its own with isolation 'none', or accept less with 'auto'"
            )
        if server.problems and not self._has_warned:
            self._has_warned = True
            _log.warning("sandbox: programs run behind less than the whole boundary: %s", "; ".join(server.problems))
        return server


class _Server:
    """A running `sandbox_server.py`. wrapper: the command that it is started through."""

    def __init__(self, wrapper: Sequence[str], script: Path, is_bounded: bool) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        interpreter = [_interpreter(), "-P", "-s", "-S", "-X", "utf8", str(SERVER), str(theirs.fileno())]
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._printed = tempfile.TemporaryFile()  # open for as long as a run may ask for the last words
        with theirs:
            self._process = subprocess.Popen(
                [*wrapper, *interpreter, "bounded" if is_bounded else "unbounded", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=(theirs.fileno(),),
                env={**environment, "PYTHONHASHSEED": "0"},  # the same program then gives the same result
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            self.control.settimeout(START_S)
            try:
                found = self.control.recv(2**16)
            except TimeoutError:
                found = b""
            if not found:
                words = self.last_words
                self.close()
                raise RuntimeError(f"sandbox: {interpreter[0]} ended before it ran any code: {words}")
        self.control.setblocking(False)
        self.boundary: dict[str, object] = json.loads(found)

    @property
    def problems(self) -> list[str]:
        found = self.boundary["problems"]
        return found if isinstance(found, list) else []

    @property
    def is_bounded(self) -> bool:
        """Whether Landlock and seccomp hold."""
        return bool(self.boundary["landlock"] and self.boundary["seccomp"])

    @property
    def is_walled(self) -> bool:
        """Whether programs cannot write any file."""
        return bool(self.boundary["landlock"] or self.boundary["seccomp"] or self.boundary.get("namespaces"))

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    async def send(self, request: bytes, descriptors: list[int]) -> None:
        """Ask for a run. Raises RuntimeError if the server has ended."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.send_fds(self.control, [request], descriptors)
                return
            except BlockingIOError:  # it has many requests to serve yet
                await asyncio.sleep(0.001)
            except OSError as err:
                raise RuntimeError(f"sandbox: its server has ended ({err}): {self.last_words}") from err
        raise RuntimeError(f"sandbox: its server has taken no request for {START_S:g} s")

    @property
    def last_words(self) -> str:
        """How the server ended and what it printed, for an error; it is waited for, since its sockets close first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_S)
        printed = os.pread(self._printed.fileno(), STDOUT_BYTES, 0).decode("utf-8", "replace").strip()
        return f"code {self._process.returncode}, {printed[-500:] or 'without a word'}"

    def close(self) -> None:
        """End the server."""
        self.control.close()
        try:
            self._process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _LocalProcess:
    """A child of a server. run: our end of the socket that stands for it; printed: the file of its output."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        run: socket.socket,
        printed: IO[bytes],
        server: _Server,
    ) -> None:
        self.reader, self.writer = reader, writer
        self._run, self._printed, self._server = run, printed, server
        self._ended: Ended | None = None

    async def end(self, grace_s: float = 0.0) -> Ended:
        """Return how the process ended. Raises RuntimeError if its server ended, or could not make it."""
        if self._ended is not None:
            return self._ended
        is_killed = False
        report = await self._report(grace_s)
        if report is None:
            is_killed = True
            with contextlib.suppress(OSError):  # it has ended meanwhile
                self._run.shutdown(socket.SHUT_WR)
            report = await self._report(KILL_S)
            if report is None:
                raise RuntimeError(f"sandbox: a killed process has not ended after {KILL_S:g} s")
        what, _, code = report.decode().partition(" ")
        printed = printable(os.pread(self._printed.fileno(), STDOUT_BYTES, 0).decode("utf-8", "replace"))
        self._ended = Ended(None if is_killed or what != "ended" else int(code), printed)
        if what == "error":
            raise RuntimeError(f"sandbox: the process was not made: {code}")
        if what != "ended":
            raise RuntimeError(f"sandbox: the server of the process has ended: {self._server.last_words}")
        return self._ended

    async def _report(self, timeout_s: float) -> bytes | None:
        """Return the server's word about the end, None if it does not come within the time."""
        try:
            return self._run.recv(512)
        except BlockingIOError:
            pass
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().sock_recv(self._run, 512)
        except TimeoutError:
            return None


@functools.cache
def local_sandbox(isolation: Isolation = "auto") -> LocalSandbox:
    """Return this process's sandbox of a kind."""
    return LocalSandbox(isolation)


def in_words(boundary: Mapping[str, object]) -> str:
    """Return what `Sandbox.start` found as one line for a report."""
    if boundary["isolation"] == "command":
        return f"generated programs run through {boundary['command']}"
    problems = boundary["problems"] if isinstance(boundary["problems"], list) else []
    parts = ["no privileges"] if boundary["isolation"] != "none" else []
    parts += [f"Landlock version {boundary['landlock']}"] if boundary["landlock"] else []
    parts += ["seccomp"] if boundary["seccomp"] else []
    parts += ["namespaces by bubblewrap"] if boundary.get("namespaces") else []
    return f"isolation {boundary['isolation']!r}: {', '.join(parts) or 'limits alone'}" + "".join(
        f"; {problem}" for problem in problems
    )


def _interpreter() -> str:
    """Return the path of the interpreter itself, since a virtual environment's looks for packages of its own."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _bubblewrap(script: Path) -> list[str]:
    """Return the command that starts a server in namespaces of its own. Raises OSError where bubblewrap is missing."""
    program = shutil.which("bwrap")
    if program is None:
        raise OSError("the program bwrap is not installed (package bubblewrap)")
    seen = ["/usr", "/etc/ld.so.cache", sys.base_prefix, _interpreter(), str(SERVER.parent), str(script.parent)]
    seen += os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    command = [program, "--unshare-all", "--cap-drop", "ALL"]
    for path in ("/lib", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            seen.append(path)
    for path in dict.fromkeys(path for path in seen if path and os.path.exists(path)):
        command += ["--ro-bind", path, path]
    command += ["--dev-bind", os.devnull, os.devnull, "--proc", "/proc", "--chdir", "/"]
    return [*command, "--"]


@contextlib.contextmanager
def _working_folder() -> Iterator[str]:
    """Make a program's working folder, and remove it whatever the program made of it."""
    folder = tempfile.mkdtemp(prefix="solution-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)  # nearly always empty
        except FileNotFoundError:
            pass
        except OSError:
            # Not shutil.rmtree: it recurses, and a generated program may nest folders deeper than Python's stack.
            if subprocess.run(["rm", "-rf", "--", folder], check=False).returncode:
                _log.warning("sandbox: could not remove %s, which a generated program filled", folder)


def _socket_pair(opened: contextlib.ExitStack, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    return opened.enter_context(ours), opened.enter_context(theirs)


_sandboxes: "weakref.WeakSet[LocalSandbox]" = weakref.WeakSet()


def _close_all() -> None:
    for sandbox in list(_sandboxes):
        sandbox.close()


def _forget_all() -> None:
    for sandbox in list(_sandboxes):
        sandbox.forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
