"""The sandbox's server: a small interpreter that forks one child for each program; `sandbox_backends.py` starts it.

It holds no secret: its environment is empty, its memory is that of a fresh interpreter, and it never sees a program or
a result. A request on the control socket carries limits and three descriptors: a socket that stands for the run, the
line to the program, and a file for its output. The server forks a child, reports on the run's socket how it ended, and
kills it when the other end of that socket closes. So a run never outlives the process that asked for it.

Arguments: the control socket, "bounded" or "unbounded", and a script. The server calls the script's `prepare()` once,
and each child calls its `main(reading, writing, memory_bytes)` with the descriptors of the line. The first message
comes from the server and says as JSON what holds: {"landlock": version, "seccomp": bool, "problems": [text]}.
"""

import gc
import importlib.machinery
import os
import select
import signal
import socket
import sys
from collections.abc import Callable

MAX_DESCRIPTOR = 2**20
LINE = 3  # the descriptor that a child finds its line at
OUTSIDE = os.path.abspath(__file__)  # a file that a program must not be able to open
# Programs import these often; a child finds them in memory.
MODULES = "collections datetime decimal fractions functools itertools json math random re statistics string".split()


class Boundary:
    """What the kernel enforces on the children. `problems`: the parts that it does not, with their reasons."""

    def __init__(self, is_wanted: bool) -> None:
        import sandbox_boundary as kernel

        self.kernel = kernel
        self.landlock = 0
        self.filter: kernel.Filter | None = None
        self.is_wanted = is_wanted
        self.problems: list[str] = []

    def confine_server(self) -> None:
        """Confine this process as far as the kernel lets us; what it refuses is noted."""
        kernel = self.kernel
        kernel.adopt_orphans()
        if not self.is_wanted:
            return
        if not kernel.is_architecture_known():
            kernel.drop_privileges()
            self.problems = [f"no tables of system calls for {os.uname().machine}: Landlock and seccomp are off"]
            return
        try:
            self.landlock = kernel.confine_server(kernel.library_files())
        except (kernel.BoundaryError, OSError) as err:
            self.problems.append(f"Landlock is off: {err}")
        else:
            if not self.landlock:
                self.problems.append("Landlock is off: this kernel has none, or it is turned off")
        self.filter = kernel.Filter()
        if problem := self._try():
            self.filter = None
            self.problems.append(f"seccomp is off: {problem}")

    def confine_program(self) -> None:
        """Put this process, a child, behind the boundary. Raises if a part that held at the start does not hold now."""
        if self.filter is not None:
            self.kernel.confine_program(self.landlock, self.filter)

    def _try(self) -> str:
        """Return why a confined child can do what it must not, "" if it cannot."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                self.confine_program()
                found = _escape(bool(self.landlock))
            except BaseException as err:
                found = f"{type(err).__name__}: {err}"
            os.write(writer, found.encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            found = pipe.read().decode()
        os.waitpid(child, 0)
        return found


def _escape(has_landlock: bool) -> str:
    """Return what this process can do although it is confined, "" for nothing."""
    attempts: dict[str, Callable[[], object]] = {
        "make a socket": socket.socket,
        "make a process": os.fork,
        "signal its parent": lambda: os.kill(os.getppid(), 0),
    }
    if has_landlock:
        attempts["read a file outside the library"] = lambda: os.open(OUTSIDE, os.O_RDONLY)
    for what, attempt in attempts.items():
        try:
            if attempt() == 0 and what == "make a process":
                os._exit(0)
        except PermissionError:
            continue
        return f"a confined process can {what}"
    return ""


class Server:
    """The runs of one server: each has a child and a socket."""

    def __init__(self, control: socket.socket, boundary: Boundary, script: str, null: int) -> None:
        self._control, self._boundary, self._null = control, boundary, null
        import sandbox_child

        self._limit = sandbox_child.take_limits
        self._script = __import__(os.path.splitext(os.path.basename(script))[0])
        self._script.prepare()
        self._poll = select.poll()
        self._children: dict[int, tuple[int, socket.socket]] = {}  # a child's pidfd -> its number, its run's socket
        self._runs: dict[int, int] = {}  # descriptor of a run's socket -> the child's number

    def serve(self) -> None:
        """Serve requests until the other end of the control socket closes; no child is left then."""
        # Descriptors come in the order of their registration: requests first, so that a number which is freed in a
        # round is not taken again in the same round.
        self._poll.register(self._control, select.POLLIN)
        is_open = True
        while is_open:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._control.fileno():
                    is_open = self._accept()
                elif descriptor in self._children:
                    self._report(descriptor)
                elif descriptor in self._runs:  # the other end is shut
                    os.kill(self._runs[descriptor], signal.SIGKILL)
                    self._poll.unregister(descriptor)
        for child in self._runs.values():
            os.kill(child, signal.SIGKILL)

    def _accept(self) -> bool:
        """Start the run that was asked for. Returns False when the other end of the control socket is closed."""
        request, descriptors, _, _ = socket.recv_fds(self._control, 4096, 3)
        if not request:
            return False
        run, line, printed = descriptors
        owner = socket.socket(fileno=run)
        try:
            child = os.fork()
        except OSError as err:
            owner.send(f"error {err}".encode())
            owner.close()
        else:
            if child == 0:
                self._become_program(request.decode(), line, printed)
            pidfd = os.pidfd_open(child)
            self._children[pidfd] = child, owner
            self._runs[run] = child
            self._poll.register(pidfd, select.POLLIN)
            self._poll.register(run, select.POLLIN)
        os.close(line)
        os.close(printed)
        return True

    def _report(self, pidfd: int) -> None:
        """Tell how a child ended, after every process that it left behind has ended too."""
        child, owner = self._children.pop(pidfd)
        if self._boundary.filter is None:
            _kill_group(child)
        _, status = os.waitpid(child, 0)
        del self._runs[owner.fileno()]
        if self._boundary.filter is None:
            self._kill_orphans()
        self._poll.unregister(pidfd)
        os.close(pidfd)
        try:
            self._poll.unregister(owner)
        except KeyError:  # its other end had closed before
            pass
        try:
            owner.send(f"ended {os.waitstatus_to_exitcode(status)}".encode())
        except OSError:  # the process that asked for this run is gone
            pass
        owner.close()

    def _kill_orphans(self) -> None:
        """End the processes that programs left behind; the kernel made them our children. Without seccomp only."""
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                orphans = {int(number) for number in file.read().split()} - {c for c, _ in self._children.values()}
            if not orphans:
                return
            for orphan in orphans:
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)

    def _become_program(self, request: str, line: int, printed: int) -> None:
        """Become the child for a request; never returns."""
        status = 1
        try:
            memory_bytes, cpu_s, file_bytes, folder = request.split(" ", 3)
            os.setsid()
            os.dup2(self._null, 0)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os.dup2(line, LINE)
            os.closerange(LINE + 1, MAX_DESCRIPTOR)
            os.chdir(folder)
            self._boundary.kernel.die_with_parent()
            self._limit(int(memory_bytes), int(cpu_s), int(file_bytes))
            self._boundary.confine_program()
            gc.enable()
            self._script.main(LINE, LINE, int(memory_bytes))
            status = 0
        except BaseException as err:  # our own fault: the program's exceptions end in the script
            os.write(2, f"{type(err).__name__}: {err}"[:500].encode("utf-8", "replace"))
        finally:
            os._exit(status)


def _kill_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it had not made its group yet
        pass


def _folder(module: object) -> str:
    return os.path.dirname(os.path.abspath(getattr(module, "__file__", None) or "/"))


def main() -> None:
    control_descriptor, is_wanted, script = int(sys.argv[1]), sys.argv[2] == "bounded", sys.argv[3]
    # Descriptors 0 to LINE stay taken, so that those of a request never lie there.
    null = os.open(os.devnull, os.O_RDWR)
    control = socket.socket(fileno=os.dup(os.dup(os.dup(os.dup(control_descriptor)))))
    os.dup2(null, LINE)
    own = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(script))]
    sys.path[:0] = own
    boundary = Boundary(is_wanted)
    server = Server(control, boundary, script, null)
    for name in MODULES:
        __import__(name)
    del sys.path[:2], sys.argv[1:]
    for name in [name for name, module in sys.modules.items() if _folder(module) in own]:
        del sys.modules[name]
    sys.modules["__main__"] = type(sys)("__main__")
    # The import system lists each folder of the library once, now, since the boundary forbids it later.
    importlib.machinery.PathFinder.find_spec("no_module_has_this_name")
    os.environ.clear()
    sys.dont_write_bytecode = True
    boundary.confine_server()
    import json

    found = {"landlock": boundary.landlock, "seccomp": boundary.filter is not None, "problems": boundary.problems}
    control.send(json.dumps(found).encode())
    gc.collect()
    gc.disable()
    gc.freeze()
    server.serve()


if __name__ == "__main__":
    main()
