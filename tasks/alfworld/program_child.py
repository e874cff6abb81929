"""The program that plays in the sandbox's child process; `tasks/alfworld/program.py` starts it and nobody imports it.

It reads the model's code from standard input, takes its limits on, and runs the code's step_1(agent, memory),
step_2(agent, memory), ... in order. Whatever the agent does goes through one socket to the parent, which owns the
household; so the code can lie to itself at most. `memory` is the one thing that survives into a later attempt, and only
what is plain data in it. Every message is a byte that says its kind, the length in four bytes, and UTF-8 text.
"""

import marshal
import os
import resource
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = os.path.dirname(os.path.abspath(os.__file__))  # "lib/python3.11" or the like
MAX_TEXT = 2**15  # of a message to the parent
MAX_DEPTH = 20  # of plain data
DENIED = ("os.", "shutil.", "ctypes.", "mmap.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def guard(event: str, args: tuple[object, ...]) -> None:
    """Raise PermissionError for an audit event that touches the system or a file.

    Importing a module of the standard library lists its folder and reads its file: that alone is let through.
    """
    if event == "os.listdir" and _in_library(args[0]):
        return
    if event == "open" and _in_library(args[0]) and isinstance(args[2], int) and not args[2] & WRITING:
        return
    if event == "import" and args[0] == "_posixsubprocess":  # it starts processes without an event of its own
        event = "import of _posixsubprocess"
    elif event != "open" and not event.startswith(DENIED):
        return
    raise PermissionError(f"{event} is not allowed here: a program acts through its agent alone")


def _in_library(path: object) -> bool:
    return isinstance(path, str) and (os.path.abspath(path) + os.sep).startswith(LIBRARY + os.sep)


def flush() -> None:
    """Write what was printed, before a message after which the parent may end this process: the task may be done."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # closed, replaced, or over the file limit: only output is lost
        pass


class Line:
    """The connection with the parent. Whatever the parent refuses is raised as RuntimeError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read, self._write = os.read, os.write  # taken now, since the code may replace them

    def send(self, kind: bytes, text: str) -> None:
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_TEXT:
            raise ValueError(f"a text of {len(data)} bytes is more than a household takes ({MAX_TEXT})")
        message = kind + len(data).to_bytes(4, "big") + data
        while message:
            message = message[self._write(self._descriptor, message) :]

    def ask(self, kind: bytes, text: str) -> str:
        flush()
        self.send(kind, text)
        answer = self.receive()
        if answer[:1] == b"-":
            raise RuntimeError(answer[1:].decode())
        return answer[1:].decode()

    def receive(self) -> bytes:
        return self._exactly(int.from_bytes(self._exactly(4), "big"))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self._read(self._descriptor, count - len(data))
            if not chunk:
                raise EOFError("the household is gone")
            data += chunk
        return data


def plain(value: object, depth: int = 0) -> str:
    """Return a literal that evaluates to `value`. Raises TypeError where there is none: only plain data travels."""
    if depth > MAX_DEPTH:
        raise TypeError("nested too deep")
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return repr(value)
    inner = [plain(item, depth + 1) for item in value] if kind in (list, tuple, set) else []  # type: ignore[attr-defined]
    if kind is list:
        return f"[{', '.join(inner)}]"
    if kind is tuple:
        return f"({', '.join(inner)},)" if inner else "()"
    if kind is set:
        return f"{{{', '.join(inner)}}}" if inner else "set()"
    if kind is dict:
        pairs = [f"{plain(k, depth + 1)}: {plain(v, depth + 1)}" for k, v in value.items()]  # type: ignore[attr-defined]
        return f"{{{', '.join(pairs)}}}"
    raise TypeError(f"{kind.__name__} is no plain data")


def travelling(memory: object) -> str:
    """Return the literal of a dict with the entries of `memory` that are plain data and together fit a message."""
    entries: list[str] = []
    room = MAX_TEXT - 1024
    for key, value in memory.items() if type(memory) is dict else ():
        try:
            entry = f"{plain(key)}: {plain(value)}"
        except (TypeError, ValueError, MemoryError):  # ValueError: an integer too long to be written
            continue
        size = len(entry.encode("utf-8", "replace")) + 2
        if size <= room:
            room -= size
            entries.append(entry)
    return f"{{{', '.join(entries)}}}"


def recalled(text: str) -> dict[object, object]:
    """Return the dict that `travelling` wrote. It is code of an earlier program, and runs where that one ran."""
    names = {"__builtins__": {}, "set": set, "nan": float("nan"), "inf": float("inf")}
    found = eval(text, names)
    return found if type(found) is dict else {}


def main() -> None:
    descriptor, memory_bytes, cpu_s, file_bytes = (int(argument) for argument in sys.argv[1:])
    sys.path[:0] = [HERE, os.path.dirname(HERE)]
    import agent as agents
    import sandbox_child as sandbox

    del sys.path[:2], sys.argv[1:]
    leave, setrlimit, address_space = os._exit, resource.setrlimit, resource.RLIMIT_AS
    line = Line(descriptor)
    source = sys.stdin.buffer.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    verbs, screen, history, first, recall = marshal.loads(line.receive())
    sandbox.take_limits(memory_bytes, cpu_s, file_bytes)
    sys.addaudithook(sandbox.deny)
    sys.addaudithook(guard)

    memory: dict[object, object] = {}
    agent = agents.Agent(
        screen,
        lambda command: line.ask(b"A", command),
        lambda question: line.ask(b"Q", question),
        verbs,
        history,
    )
    line.send(b"R", "")
    error = None
    try:
        memory.update(recalled(recall))
        run(source, agent, memory, first, line, sandbox.NAME)
    except BaseException as err:  # sys.exit() and KeyboardInterrupt are the code's errors as well
        setrlimit(address_space, (memory_bytes + sandbox.SPARE_BYTES, memory_bytes + sandbox.SPARE_BYTES))
        try:
            error = sandbox.describe(err, source)
        except BaseException:  # an exception whose __str__ raises
            error = type(err).__name__
    flush()
    if error is None:
        line.send(b"F", "")
    else:
        line.send(b"M", travelling(memory))
        line.send(b"E", error)
    leave(0)


def run(source: bytes, agent: object, memory: dict[object, object], first: int, line: Line, name: str) -> None:
    """Run the steps that `source` defines, from number `first` on. Raises whatever they raise."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    exec(compile(source, name, "exec"), module.__dict__)
    numbers = [int(key[5:]) for key in vars(module) if key.startswith("step_") and key[5:].isdecimal()]
    for number in range(first, max([first, *numbers]) + 1):
        step = getattr(module, f"step_{number}", None)
        if not callable(step):
            raise NameError(f"the code defines no function step_{number}(agent, memory)")
        line.send(b"S", str(number))
        step(agent, memory)


if __name__ == "__main__":
    main()
