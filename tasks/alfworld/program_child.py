"""Plays a model-written program in the sandbox's child process; `tasks/sandbox_server.py` alone calls it.

It runs the code's step_1(agent, memory), step_2(agent, memory), ... in order. Whatever the agent does goes over the
line to the parent, which owns the household, so the code can deceive itself alone. `memory` alone survives into a later
attempt, as far as it is plain data. From the parent come frames (a length in four bytes,
then the content): first the start, made by `marshal`, then answers. Every message to the parent is a byte that says its
kind, the length in four bytes, and UTF-8 text.
"""

import marshal
import sys
from types import ModuleType

MAX_TEXT = 2**15  # of a message to the parent
MAX_DEPTH = 20  # of plain data
_loaded: dict[str, ModuleType] = {}


def prepare() -> None:
    """Load what `main` needs before a child is made: the agent, and the sandbox's other script."""
    for name in ("agent", "sandbox_child"):
        _loaded[name] = __import__(name)


class Household:
    """The line to the parent. What the parent refuses is raised as RuntimeError."""

    def __init__(self, reading: int, writing: int) -> None:
        self._sandbox = _loaded["sandbox_child"]
        self._line = self._sandbox.Line(reading, writing)
        self.receive = self._line.receive

    def send(self, kind: bytes, text: str) -> None:
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_TEXT:
            raise ValueError(f"a text of {len(data)} bytes is more than a household takes ({MAX_TEXT})")
        self._line.send(kind + len(data).to_bytes(4, "big") + data)

    def ask(self, kind: bytes, text: str) -> str:
        self._sandbox.flush()  # the parent may end this process after the message: the task may be done
        self.send(kind, text)
        answer = self.receive().decode()
        if answer[:1] == "-":
            raise RuntimeError(answer[1:])
        return str(answer[1:])


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


def main(reading: int, writing: int, memory_bytes: int) -> None:
    """Run the program that comes over the line, and tell how it ended."""
    sandbox = _loaded["sandbox_child"]
    household = Household(reading, writing)
    source, verbs, screen, history, first, recall = marshal.loads(household.receive())
    memory: dict[object, object] = {}
    agent = _loaded["agent"].Agent(
        screen,
        lambda command: household.ask(b"A", command),
        lambda question: household.ask(b"Q", question),
        verbs,
        history,
    )
    household.send(b"R", "")
    error = None
    try:
        memory.update(recalled(recall))
        run(source, agent, memory, first, household)
    except BaseException as err:  # sys.exit() and KeyboardInterrupt are the code's errors as well
        error = sandbox.described(err, source, memory_bytes)
    sandbox.flush()
    if error is None:
        household.send(b"F", "")
    else:
        household.send(b"M", travelling(memory))
        household.send(b"E", error)


def run(source: bytes, agent: object, memory: dict[object, object], first: int, household: Household) -> None:
    """Run the steps that `source` defines, from number `first` on. Raises whatever they raise."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    exec(_loaded["sandbox_child"].compiled(source), module.__dict__)
    numbers = [int(key[5:]) for key in vars(module) if key.startswith("step_") and key[5:].isdecimal()]
    for number in range(first, max([first, *numbers]) + 1):
        step = getattr(module, f"step_{number}", None)
        if not callable(step):
            raise NameError(f"the code defines no function step_{number}(agent, memory)")
        household.send(b"S", str(number))
        step(agent, memory)
