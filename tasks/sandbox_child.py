"""The program that runs inside the sandbox's child process; `tasks/sandbox.py` starts it and nobody imports it.

It reads the model's code from standard input, takes its limits on, calls `solution()` and writes two lines to the
result pipe: "ready" before the first line of the code runs, then one JSON object, {"value": number} or
{"error": text}. It imports nothing beyond built-in modules, because every import is paid for in every run.
"""

import os
import resource
import sys

NAME = "<solution>"
MAX_FRAMES = 4
MAX_TEXT = 2000
# Room to report a MemoryError: the soft limit is raised by this much once the code has ended.
SPARE_BYTES = 32 * 2**20

# Python's own doors to other processes and to the network. No arithmetic needs them.
DENIED = {"os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.system", "subprocess.Popen"}


def deny(event: str, args: tuple[object, ...]) -> None:
    """Raise PermissionError for an audit event that starts a process, signals one or opens a socket."""
    if event in DENIED or event.startswith("socket."):
        raise PermissionError(f"{event} is not allowed here")


def take_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Set this process's limits; whatever it starts inherits them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes + SPARE_BYTES))


def run(source: bytes) -> int | float:
    """Return what the `solution()` that `source` defines returns. Raises whatever the code raises, or TypeError."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    exec(compile(source, NAME, "exec"), module.__dict__)
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
    return value


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


def json_string(text: str) -> bytes:
    """Return `text` as a JSON string in UTF-8 (importing `json` would double the start-up time)."""
    quoted = "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\' else c for c in text)
    return f'"{quoted}"'.encode("utf-8", "replace")


def main() -> None:
    result_pipe, memory_bytes, cpu_s, file_bytes = (int(argument) for argument in sys.argv[1:])
    # Taken now, since the code may replace them.
    write, leave, setrlimit, address_space = os.write, os._exit, resource.setrlimit, resource.RLIMIT_AS

    source = sys.stdin.buffer.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    del sys.argv[1:]
    take_limits(memory_bytes, cpu_s, file_bytes)
    sys.addaudithook(deny)
    write(result_pipe, b"ready\n")
    try:
        message = b'{"value": ' + repr(run(source)).encode() + b"}"
    except BaseException as err:  # sys.exit() and KeyboardInterrupt are the code's errors as well
        setrlimit(address_space, (memory_bytes + SPARE_BYTES, memory_bytes + SPARE_BYTES))
        try:
            text = describe(err, source)
        except BaseException:  # an exception whose __str__ raises
            text = type(err).__name__
        message = b'{"error": ' + json_string(text) + b"}"
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # closed, replaced, or over the file limit: only output is lost
        pass
    write(result_pipe, message)
    leave(0)


if __name__ == "__main__":
    main()
