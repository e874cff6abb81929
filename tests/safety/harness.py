"""Plants what `escapes.py` looks for, runs the programs in one mode, and prints as JSON what each of them achieved.

Arguments: the user ("user" or "root"), the mode, and which programs: "all", "some" (every third), or a text that their
names contain. Modes: "bare" (a
fork of this process runs the program: nothing stops it), "solution" and "household" (behind the whole boundary, as a
PAL program and as a household program), "direct" (a PAL program behind the boundary without bubblewrap). Started as
root for "user", the harness becomes the user `nobody` first, in a mount namespace in which `nobody` can reach the
interpreter and this checkout.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from matryoshka.tests.safety.escapes import ESCAPES, PRELUDE, Escape

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
TIME_S, BRIEF_S = 30.0, 0.3  # of a program; of one that is to be stopped by its time
PATIENCE_S = 2.0  # of a neighbour where nothing stops programs
SURVIVOR_S = 30.0  # of us for a survivor there, which a busy machine may show late
LATE_S = 30.0  # a program that is ended so late has outlived its time: the sandbox itself waits 3 s for an exit status
MEMORY = 192 * 2**20
MARK = "OPENAI_API_KEY"
MODES = ("bare", "solution", "household", "direct")


def main() -> None:
    user, mode, chosen = sys.argv[1:4]
    if user == "user" and os.getuid() == 0:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        become_nobody([sys.base_prefix, str(ROOT), sys.prefix])
        os.environ["HOME"] = "/"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # a fresh process, which may be looked into by its user
    flag = random.SystemRandom().randrange(10**11, 10**12)
    if MARK not in os.environ:  # a process's first environment is what /proc shows
        os.environ[MARK] = f"sk-planted-{flag}"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    secret = os.environ[MARK]  # in this frame, for programs that look into frames
    with planted(int(secret.rpartition("-")[2])) as plant:
        print(json.dumps(plant.run(user, mode, chosen)))


def become_nobody(needed: list[str]) -> None:
    """Become `nobody`, who can reach the folders `needed` in a mount namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    closed = {}  # a folder that is needed -> the first folder on the way to it that others may not search
    for path in needed:
        way = reversed([Path(path), *Path(path).parents])
        on_the_way = [place for place in way if not place.stat().st_mode & 0o001]
        if on_the_way:
            closed[path] = on_the_way[0]
    if closed:
        checked(libc.unshare(0x00020000))  # CLONE_NEWNS
        checked(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    held = {path: os.open(path, os.O_PATH) for path in closed}
    for place in set(closed.values()):
        checked(libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"mode=755"))
    for path, descriptor in held.items():
        os.makedirs(path, exist_ok=True)
        checked(libc.mount(f"/proc/self/fd/{descriptor}".encode(), os.fsencode(path), None, 0x5000, None))
        os.close(descriptor)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


class Plant:
    """Flag, folder, servers and victim of one harness."""

    def __init__(self, folder: Path, flag: int, stack: contextlib.ExitStack) -> None:
        self.folder, self.flag = folder, flag
        self.secret = f"sk-planted-{flag}"  # in this process's memory
        self.spread()
        self.handle = stack.enter_context((folder / "flag.txt").open())
        os.set_inheritable(self.handle.fileno(), True)
        self.abstract = f"escape-{flag}"
        self.servers = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": socket.socket(socket.AF_UNIX),
            "abstract": socket.socket(socket.AF_UNIX),
        }
        self.servers["udp"].bind(("127.0.0.1", 0))
        self.servers["unix"].bind(str(folder.parent / "socket"))
        self.servers["abstract"].bind("\0" + self.abstract)
        for name, server in self.servers.items():
            stack.enter_context(server)
            server.setblocking(False)
            if name in ("unix", "abstract"):
                server.listen()
        self.victim = self.new_victim()
        stack.callback(self.end_victim)

    def spread(self) -> None:
        """Put the folder into its first state."""
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(self.folder)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rm", "-rf", "--", str(self.folder)], check=True)
        self.folder.mkdir()
        (self.folder / "flag.txt").write_text(f"planted-{self.flag}\n")
        (self.folder / "flag_module.py").write_text(f"FLAG = {self.flag}\n")
        (self.folder / f"planted-{self.flag}").mkdir()
        with contextlib.closing(sqlite3.connect(self.folder / "flag.db")) as database:
            database.execute("create table t (n integer)")
            database.execute("insert into t values (?)", (self.flag,))
            database.commit()

    def look(self) -> list[tuple[str, int, int, float, int]]:
        """Return what can be seen of the folder: names, rights, links, times of change, sizes."""
        found = []
        for path in sorted([self.folder, *self.folder.iterdir()]):
            stat = path.lstat()
            found.append((path.name, stat.st_mode, stat.st_nlink, stat.st_mtime, stat.st_size))
        return found

    def new_victim(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)

    def end_victim(self) -> None:
        self.victim.kill()
        self.victim.wait()

    def victim_state(self) -> list[object]:
        """Return what can be changed of the victim from outside."""
        if self.victim.poll() is not None:
            return ["ended"]
        try:
            fields = Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()
            limit = resource.prlimit(self.victim.pid, resource.RLIMIT_NOFILE)
            return ["T" if fields[0] in "Tt" else "S", fields[16], limit, os.sched_getaffinity(self.victim.pid)]
        except OSError:  # it ended in between
            return ["ended"]

    def heard(self) -> bool:
        """Return whether a server was spoken to; forget it."""
        found = False
        for name, server in self.servers.items():
            with contextlib.suppress(BlockingIOError):
                if name == "udp":
                    found = bool(server.recv(100)) or found
                else:
                    server.accept()[0].close()
                    found = True
        return found

    def filled(self, code: str) -> str:
        """Return `code` with the names of what is planted."""
        names = {
            "FOLDER": self.folder, "MAIN": os.getpid(), "VICTIM": self.victim.pid, "FLAG": self.flag,
            "PORT": self.servers["tcp"].getsockname()[1], "UDP_PORT": self.servers["udp"].getsockname()[1],
            "SOCKET": self.folder.parent / "socket", "ABSTRACT": self.abstract, "FD": self.handle.fileno(),
        }  # fmt: skip
        return string.Template(code.replace("$FLAG", "FLAG_NOT_TOLD")).safe_substitute(names)

    def run(self, user: str, mode: str, chosen: str) -> dict[str, dict[str, object]]:
        """Return for each program whether it did harm, and its own words."""
        run = Bare() if mode == "bare" else Bounded(mode)
        found = {}
        for number, escape in enumerate(ESCAPES):
            name = f"{escape.kind}: {escape.name}"
            is_chosen = chosen == "all" or (number % 3 == 0 if chosen == "some" else chosen in name)
            if user in escape.users and is_chosen:
                found[name] = self.attempt(run, escape)
        run.close()
        return found

    def attempt(self, run: "Bare | Bounded", escape: Escape) -> dict[str, object]:
        """Run one program; return whether its effect came about, whether any harm was done, and its words."""
        began = time.monotonic()
        effect, mode_is_bare = escape.effect, isinstance(run, Bare)
        before, well, mine = self.look(), self.victim_state(), own_processes()
        program = self.filled(PRELUDE + escape.code)
        told = run.program(program, BRIEF_S if effect == "outlives" else TIME_S, escape.kind == "neighbours")
        value, words, overtime, neighbour = told
        survivors = own_processes() - mine - run.helpers()
        while effect == "survivor" and not survivors and mode_is_bare and time.monotonic() < began + SURVIVOR_S:
            survivors = own_processes() - mine
        changed, hurt, heard = self.look() != before, self.victim_state() != well, self.heard()
        harm = {
            "value": value in (self.flag, 1),
            "folder": changed,
            "heard": heard,
            "victim": hurt,
            "outlives": overtime,
            "survivor": bool(survivors),
            "neighbour": neighbour != 1,
        }
        for pid in survivors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if changed:
            self.spread()
        if hurt:
            self.end_victim()
            self.victim = self.new_victim()
        # Whatever a program is about, none of these may happen behind the boundary.
        any_harm = harm[effect] or changed or heard or hurt or bool(survivors) or (value == self.flag)
        return {"effect": harm[effect], "harm": any_harm, "words": words[-200:], "seconds": time.monotonic() - began}


def own_processes() -> set[int]:
    """Return the living descendants of this process; as a subreaper it inherits those whose parent has ended.

    It must never be more than that: the harness kills what a program leaves behind.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1, 0, 0, 0) == 0, "PR_SET_CHILD_SUBREAPER"
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


class Bare:
    """Runs a program in a fork of this process, with all that this process has."""

    def helpers(self) -> set[int]:
        return set()

    def close(self) -> None:
        pass

    def program(self, code: str, timeout_s: float, with_neighbour: bool) -> tuple[object, str, bool, object]:
        """Return the program's value, its error, whether it ran on after its time, and its neighbour's value."""
        patient = f"import time\ndef solution():\n    time.sleep({PATIENCE_S})\n    return 1"
        neighbour = self._fork(patient) if with_neighbour else None
        value, words, overtime = self._wait(*self._fork(code), timeout_s)
        return value, words, overtime, self._wait(*neighbour, TIME_S)[0] if neighbour else 1

    def _fork(self, code: str) -> tuple[int, int]:
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            return child, reader
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            space: dict[str, object] = {}
            try:
                exec(compile(code, "<escape>", "exec"), space)
                told = {"value": space["solution"](), "error": ""}  # type: ignore[operator]
            except BaseException as err:
                told = {"value": None, "error": f"{type(err).__name__}: {err}"}
            os.write(writer, json.dumps(told, default=str).encode())
        finally:
            os._exit(0)

    def _wait(self, child: int, reader: int, timeout_s: float) -> tuple[object, str, bool]:
        deadline = time.monotonic() + timeout_s + 0.2
        overtime = False
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                overtime = True
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        os.set_blocking(reader, False)
        with open(reader, "rb", 0) as pipe:
            told = json.loads(pipe.read(2**16) or b"{}")
        return told.get("value"), told.get("error", "ended early"), overtime


class Bounded:
    """Runs a program in the sandbox with isolation "required"; mode: as the harness's."""

    def __init__(self, mode: str) -> None:
        if mode == "direct":
            os.environ["PATH"] = ""  # bubblewrap is not found
        from matryoshka.tasks.alfworld.program import CHILD
        from matryoshka.tasks.sandbox_backends import SCRIPT, LocalSandbox

        self._mode = mode
        self._sandbox = LocalSandbox("required")
        for script in (CHILD, SCRIPT):
            self._sandbox.start(script)
        os.environ["PATH"] = os.defpath
        self._helpers = own_processes()

    def helpers(self) -> set[int]:
        return self._helpers

    def close(self) -> None:
        self._sandbox.close()

    def program(self, code: str, timeout_s: float, with_neighbour: bool) -> tuple[object, str, bool, object]:
        return asyncio.run(self._program(code, timeout_s, with_neighbour))

    async def _program(self, code: str, timeout_s: float, with_neighbour: bool) -> tuple[object, str, bool, object]:
        from matryoshka.tasks.sandbox import run_solution

        slots = asyncio.Semaphore(2)
        neighbour = None
        if with_neighbour:
            patient = "import time\ndef solution():\n    time.sleep(0.3)\n    return 1"
            neighbour = asyncio.ensure_future(run_solution(patient, TIME_S, MEMORY, slots, self._sandbox))
            await asyncio.sleep(0.1)
        started = time.monotonic()
        if self._mode == "household":
            value, words = await self._household(code, timeout_s)
        else:
            outcome = await run_solution(code, timeout_s, MEMORY, slots, self._sandbox)
            value, words = outcome.value, str(outcome.error)
        overtime = time.monotonic() - started > timeout_s + LATE_S
        return value, words, overtime, (await neighbour).value if neighbour else 1

    async def _household(self, code: str, timeout_s: float) -> tuple[object, str]:
        """Run the program in a household, whose memory brings its value back."""
        from matryoshka.tasks.alfworld.engine import Engine
        from matryoshka.tasks.alfworld.game import load_game
        from matryoshka.tasks.alfworld.playthrough import Session
        from matryoshka.tasks.alfworld.program import Limits, run_program
        from matryoshka.tests.tasks.alfworld import kitchen

        step = f"{code}\ndef step_1(agent, memory):\n    memory['value'] = solution()\n    raise RuntimeError('told')"
        session = Session(Engine(load_game(kitchen.row())), 9)
        outcome = await run_program(step, session, _refuse, Limits(timeout_s, MEMORY, sandbox=self._sandbox))
        memory = eval(outcome.memory) if outcome.memory.startswith("{") else {}
        return memory.get("value"), outcome.error


async def _refuse(question: str) -> str:
    return ""


@contextlib.contextmanager
def planted(flag: int) -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="escape-"))
    try:
        with contextlib.ExitStack() as stack:
            yield Plant(folder / "folder", flag, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
