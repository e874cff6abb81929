"""Runs one model-written program in the sandbox's child process; `tasks/sandbox_server.py` alone calls it.

The line carries the program in one frame (its length in four bytes, then UTF-8), and back two lines of text: "ready"
before the first line of the program runs, then one JSON object, {"value": number} or {"error": text}.
"""

import os
import resource
import sys
from types import CodeType

NAME = "<solution>"
MAX_FRAMES = 4
MAX_TEXT = 2000
# Room to report a MemoryError: the soft limit is raised by this much once the code has ended.
SPARE_BYTES = 32 * 2**20


def take_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Set this process's limits; the soft limit of memory may be raised by SPARE_BYTES later."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes + SPARE_BYTES))


def prepare() -> None:
    """Load what `main` needs before a child is made: nothing."""


def compiled(source: bytes) -> CodeType:
    """Return the code of a program. A line that declares another encoding says nothing here: replies are Unicode."""
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise SyntaxError(f"(unicode error) {err}") from None
    return compile(text, NAME, "exec")


def run(source: bytes) -> int | float:
    """Return what the `solution()` that `source` defines returns. Raises whatever the code raises, or TypeError."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    exec(compiled(source), module.__dict__)
    solution = getattr(module, "solution", None)
    if not callable(solution):
        raise NameError("the code defines no function solution()")
    value = solution()
    # Exact numbers of the standard library count; True, "12" and lists do not: guessing would hide a mistake.
    if type(value).__module__ in ("decimal", "fractions"):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"solution() returned {repr(value)[:60]} ({type(value).__name__}); expected an int or a float")
    if not abs(value) <= sys.float_info.max:
        what = "nan" if value != value else "a number beyond the range of floats"
        raise ValueError(f"solution() returned {what}; expected a finite number")
    return int(value) if isinstance(value, int) else float(value)  # a member of an enumeration, for one


def describe(err: BaseException, source: bytes) -> str:
    """Return the traceback of `err` in Python's own layout, the frames of the model's code only."""
    places = []
    trace = err.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == NAME:
            places.append((trace.tb_lineno, f", in {code.co_name}"))
        trace = trace.tb_next
    if isinstance(err, SyntaxError) and err.filename == NAME:
        places.append((err.lineno or 0, ""))
        message = err.msg
    else:
        message = str(err)
    lines = source.decode("utf-8", "replace").split("\n")
    report = ["Traceback (most recent call last):"] if places else []
    if len(places) > MAX_FRAMES:
        report.append(f"  ... {len(places) - MAX_FRAMES} more frames ...")
    for number, inside in places[-MAX_FRAMES:]:
        report.append(f'  File "{NAME}", line {number}{inside}')
        if 1 <= number <= len(lines):
            report.append(f"    {lines[number - 1].strip()[:200]}")
    name = type(err).__name__
    report.append(f"{name}: {message[: MAX_TEXT // 2]}" if message else name)
    return "\n".join(report)[-MAX_TEXT:]


def described(err: BaseException, source: bytes, memory_bytes: int) -> str:
    """Return `describe(err, source)` with spare memory, whatever `err` is."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes + SPARE_BYTES, memory_bytes + SPARE_BYTES))
    try:
        return describe(err, source)
    except BaseException:  # an exception whose __str__ raises
        return type(err).__name__


def json_string(text: str) -> bytes:
    """Return `text` as a JSON string in UTF-8, by nothing that the program may have replaced."""
    quoted = "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\' else c for c in text)
    return f'"{quoted}"'.encode("utf-8", "replace")


def flush() -> None:
    """Write what was printed."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # closed, replaced, or over the file limit: only output is lost
        pass


class Line:
    """The connection with the parent: frames in, bytes out."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._read, self._write = os.read, os.write  # taken now, since the code may replace them

    def send(self, data: bytes) -> None:
        while data:
            data = data[self._write(self._writing, data) :]

    def receive(self) -> bytes:
        return self._exactly(int.from_bytes(self._exactly(4), "big"))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self._read(self._reading, count - len(data))
            if not chunk:
                raise EOFError("the parent is gone")
            data += chunk
        return data


def main(reading: int, writing: int, memory_bytes: int) -> None:
    """Run the program that comes over the line and send its result."""
    line = Line(reading, writing)
    source = line.receive()
    line.send(b"ready\n")
    try:
        message = b'{"value": ' + repr(run(source)).encode() + b"}"
    except BaseException as err:  # sys.exit() and KeyboardInterrupt are the code's errors as well
        message = b'{"error": ' + json_string(described(err, source, memory_bytes)) + b"}"
    flush()
    line.send(message)
