"""One adversarial program per property of the sandbox. The oracle is Python's own behaviour, stated at each program."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from matryoshka.tasks.sandbox import ERROR_CHARACTERS, Outcome, extract_code, run_solution
from matryoshka.tasks.sandbox_backends import SCRIPT, SERVER, STDOUT_BYTES, LocalSandbox, in_words
from matryoshka.tasks.sandbox_command import CommandSandbox
from matryoshka.tasks.sandbox_config import SandboxConfig
from matryoshka.tests.processes import alive, children, command_line, descendants

MEMORY = 256 * 2**20
INTERPRETER = getattr(sys, "_base_executable", None) or sys.executable


def run(code: str, timeout_s: float = 30.0, memory_bytes: int = MEMORY) -> Outcome:
    return asyncio.run(run_solution(code, timeout_s, memory_bytes))


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        ("42", 42),
        ("-0.5", -0.5),
        ("10**300", 10**300),
        ("2**53 + 1", 2**53 + 1),
        ("1e-320", 1e-320),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("__import__('decimal').Decimal('0.1')", 0.1),
        ("__import__('enum').IntEnum('E', 'a b').b", 2),
        ("type('F', (float,), {'__repr__': lambda self: 'half'})(0.5)", 0.5),
    ],
)
def test_numbers_come_back_exactly(returned: str, value: float | int) -> None:
    """Oracle: the literal. Type and every bit survive the JSON in between."""
    outcome = run(f"def solution():\n    return {returned}")
    assert (outcome.value, type(outcome.value), outcome.error) == (value, type(value), None)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ("'12'", "TypeError: solution() returned '12' (str)"),
        ("None", "TypeError: solution() returned None (NoneType)"),
        ("True", "TypeError: solution() returned True (bool)"),
        ("[1]", "TypeError: solution() returned [1] (list)"),
        ("1j", "TypeError: solution() returned 1j (complex)"),
        ("float('nan')", "ValueError: solution() returned nan"),
        ("float('-inf')", "ValueError: solution() returned a number beyond the range of floats"),
        ("10**400", "ValueError: solution() returned a number beyond the range of floats"),
        ("10**5000", "ValueError: solution() returned a number beyond the range of floats"),
    ],
)
def test_what_is_no_finite_number_is_an_error(returned: str, error: str) -> None:
    """Oracle: the documented rule. 10**5000 is also too long for Python to print."""
    outcome = run(f"def solution():\n    return {returned}")
    assert outcome.value is None and outcome.error is not None and outcome.error.startswith(error)


def test_an_exception_reports_type_message_line_and_source() -> None:
    """Oracle: the layout of Python's own traceback, written out by hand; the failing line is line 4."""
    outcome = run(
        "def per_person(total, people):\n    # share\n    total = total + 1\n    return total / people\n\n"
        "def solution():\n    return per_person(3, 0)\n"
    )
    assert outcome.error == (
        "Traceback (most recent call last):\n"
        '  File "<solution>", line 7, in solution\n'
        "    return per_person(3, 0)\n"
        '  File "<solution>", line 4, in per_person\n'
        "    return total / people\n"
        "ZeroDivisionError: division by zero"
    )


def test_a_syntax_error_reports_its_line() -> None:
    """Oracle: the unclosed bracket stands on line 2."""
    error = run("def solution():\n    return (1 +\n").error
    assert error == (
        'Traceback (most recent call last):\n  File "<solution>", line 2\n    return (1 +\n'
        "SyntaxError: '(' was never closed"
    )


@pytest.mark.parametrize("code", ["x = 5", "solution = 5", "", "Here is the answer: 5 apples"])
def test_code_without_solution_is_an_error(code: str) -> None:
    """Oracle: Python's own error for text that is no code; ours where no function is defined."""
    outcome = run(code)
    expected = "SyntaxError" if "apples" in code else "NameError: the code defines no function solution()"
    assert outcome.value is None and outcome.error is not None and expected in outcome.error


def test_nothing_leaks_from_one_run_to_the_next() -> None:
    """Oracle: the error. A `solution` that an earlier program defined is not there for a later one that defines
    none.
    """

    async def both() -> tuple[Outcome, Outcome]:
        first = await run_solution("import sys\nsys.leak = 1\ndef solution():\n    return 41", 5.0, MEMORY)
        return first, await run_solution("import sys\nx = sys.leak", 5.0, MEMORY)

    first, second = asyncio.run(both())
    assert first.value == 41
    assert second.value is None and "AttributeError" in str(second.error)


@pytest.mark.parametrize(
    "body", ["while True: pass", "while True:\n        try: raise ValueError\n        except: pass"]
)
def test_a_program_that_never_ends_is_killed(body: str) -> None:
    """Oracle: the time-out. A bare `except:` swallows whatever is raised inside; a kill from outside it cannot
    swallow.
    """
    outcome = run(f"def solution():\n    {body}", timeout_s=0.5)
    assert (outcome.value, outcome.error) == (None, "TimeoutError: the program did not finish within 0.5 s")
    assert outcome.seconds < 30


def test_a_memory_bomb_is_a_memory_error_with_its_line() -> None:
    """Oracle: Python's MemoryError at the line of the allocation."""
    outcome = run("def solution():\n    hoard = []\n    while True:\n        hoard.append(bytes(2**20))")
    assert "line 4, in solution" in str(outcome.error) and str(outcome.error).endswith("MemoryError")


def test_a_flood_of_output_is_stopped_and_cut() -> None:
    """Oracle: the kernel's file size limit, and the length of the kept output."""
    outcome = run("def solution():\n    while True:\n        print('x' * 1000)")
    assert "File too large" in str(outcome.error) and len(outcome.stdout) == STDOUT_BYTES


def test_secrets_of_the_environment_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the program's own view of its environment, which is empty."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    outcome = run("import os\ndef solution():\n    print(dict(os.environ))\n    return len(os.environ)")
    assert (outcome.value, outcome.stdout) == (0, "{}\n")


@pytest.mark.parametrize("module", ["pytest", "sandbox_child", "matryoshka"])
def test_only_the_standard_library_can_be_imported(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the errors. Neither site-packages, nor the folder of the child's own file, nor PYTHONPATH is on the
    program's path.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert f"ModuleNotFoundError: No module named '{module}'" in str(run(f"import {module}").error)
    assert run("import math, datetime, statistics\ndef solution():\n    return math.gcd(12, 18)").value == 6


def test_there_is_no_input() -> None:
    """Oracle: Python's EOFError."""
    assert "EOFError" in str(run("def solution():\n    return float(input())").error)


def test_printed_results_are_not_results() -> None:
    """Oracle: the returned value is 1; printed text is only output."""
    outcome = run(
        "print('{\"value\": 999}')\nprint('ready')\ndef solution():\n    print('{\"value\": 998}')\n    return 1"
    )
    assert outcome.value == 1 and outcome.stdout == '{"value": 999}\nready\n{"value": 998}\n'


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys\ndef solution():\n    sys.exit(0)", "line 3, in solution\n    sys.exit(0)\nSystemExit: 0"),
        ("import os\nos._exit(0)", "the program exited (code 0) before solution() returned"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import ctypes\nctypes.string_at(0)", "was killed (Segmentation fault)"),
        ("import os\ndef solution():\n    os.closerange(0, 999)\n    return 1", "exited"),
        ("def f(n):\n    return f(n + 1)\ndef solution():\n    return f(0)", "RecursionError: maximum recursion depth"),
    ],
)
def test_every_other_way_to_end_is_an_error_of_the_program(code: str, error: str) -> None:
    """Oracle: the error for each way to end, by hand."""
    outcome = run(code)
    assert outcome.value is None and error in str(outcome.error)


def test_a_long_traceback_is_cut_to_its_last_frames() -> None:
    """Oracle: the number of frames in the error."""
    error = str(run("def f(n):\n    return f(n + 1)\ndef solution():\n    return f(0)").error)
    assert "more frames" in error and error.count('File "<solution>"') == 4


def test_an_exception_that_cannot_be_printed_is_still_an_error() -> None:
    """Oracle: the name of the exception's class."""
    code = "class Odd(Exception):\n    def __str__(self): raise ValueError\ndef solution():\n    raise Odd"
    assert run(code).error == "Odd"


@pytest.mark.parametrize(
    "message",
    [b"[" * 5000, b'{"value": 1e999}', b'{"value": true}', b'{"value": "7"}', b"\x80\x04."],
    ids=["deep nesting", "infinity", "bool", "text", "pickle"],
)
def test_a_forged_message_is_never_more_than_an_error(message: bytes) -> None:
    """Oracle: the outcome. The program itself writes the message to every open descriptor, then leaves: no value, no
    exception.
    """
    code = (
        f"import os\nfor n in range(3, 999):\n    try: os.write(n, {message!r})\n    except OSError: pass\nos._exit(0)"
    )
    outcome = run(code)
    assert (outcome.value, outcome.error) == (None, "RuntimeError: the program disturbed the pipe for its result")


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (b'{"error": "\\ud800 lone"}', "? lone"),
        (b'{"error": "\\u001b[2Jgone"}', "?[2Jgone"),
        (b'{"error": ""}', "RuntimeError: the program ended without a reason"),
        (b'{"error": "' + b"x" * 60_000 + b'"}', "x" * ERROR_CHARACTERS),
    ],
    ids=["lone surrogate", "terminal escape", "empty", "60,000 characters"],
)
def test_a_forged_error_is_held_to_the_limits_of_an_error(written: bytes, error: str) -> None:
    """Oracle: UTF-8 encodes the error, and its length. The program writes it to every descriptor and leaves."""
    write = f"try: os.write(n, {written!r})\n    except OSError: pass"
    code = f"import os\nfor n in range(3, 99):\n    {write}\nos._exit(0)"
    found = run(code).error
    assert found == error and found.encode()


@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.kill(os.getppid(), 9)",
        "1 / (os.system('true') == 0)",
        "__import__('socket').socket()",
        "__import__('subprocess').run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "open('/etc/hostname').read()",
        "open('file', 'w')",
        "os.mkdir('folder')",
        "os.listdir('/proc')",
    ],
)
def test_processes_signals_sockets_and_files_are_refused(call: str) -> None:
    """Oracle: the kernel's answer, as Python's exception at the program's own line. A path may be missing outright."""
    error = str(run(f"import os\ndef solution():\n    return {call}").error)
    assert "line 3" in error and "Error" in error
    assert "not permitted" in error or "denied" in error or "No such file" in error or "ZeroDivision" in error


def test_descriptors_of_the_parent_are_not_inherited(tmp_path: Path) -> None:
    """Oracle: fstat. The child holds standard input, output, error and its line, and nothing up to 4,096."""
    with (tmp_path / "secret").open("w") as handle:
        os.set_inheritable(handle.fileno(), True)
        outcome = run(
            "import os\ndef held(n):\n    try: os.fstat(n)\n    except OSError: return 0\n    return 1\n"
            "def solution(): return sum(held(n) for n in range(4096))"
        )
    assert outcome.value == 4


def test_malformed_text_is_the_programs_error() -> None:
    """Oracle: an error of the program. A lone surrogate and a NUL byte can come out of a JSON reply."""
    assert "SyntaxError" in str(run("x = '\ud800'").error)
    assert "null bytes" in str(run("x = '\0'").error)


@pytest.mark.parametrize("first", ["# -*- coding: latin-1 -*-", "# coding: utf-16", "# coding: none", "\ufeff"])
def test_an_encoding_that_a_program_declares_does_not_count(first: str) -> None:
    """Oracle: the length of a text of one letter: a reply is Unicode, and read as Latin-1 it would have two."""
    assert run(f"{first}\ndef solution():\n    return len('\u00e9')").value == 1


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"timeout_s": 0.0}, "timeout_s 0.0 must be above 0"),
        ({"timeout_s": 1e30}, "timeout_s 1e[+]30 must be above 0 and at most 1,000,000"),
        ({"memory_mb": 63}, "memory_mb 63 must be at least 64"),
        ({"memory_mb": 10**13}, "memory_mb 10000000000000 must be at most 16,777,216"),
    ],
)
def test_limits_that_the_kernel_cannot_set_are_refused(limit: dict[str, Any], message: str) -> None:
    """Oracle: each message by hand."""
    with pytest.raises(ValueError, match=message):
        SandboxConfig(**limit)


def test_slots_bound_how_many_programs_run_at_once() -> None:
    """Oracle: two programs of 0.2 s take at least 0.4 s through one slot."""

    async def both() -> float:
        slots = asyncio.Semaphore(1)
        started = time.monotonic()
        program = "import time\ndef solution():\n    time.sleep(0.2)\n    return 1"
        await asyncio.gather(*(run_solution(program, 5.0, MEMORY, slots) for _ in range(2)))
        return time.monotonic() - started

    assert asyncio.run(both()) >= 0.4


def servers() -> set[int]:
    """Return the processes below ours that name the server: a program's process is a fork of it."""
    return {pid for pid in descendants(os.getpid()) if b"sandbox_server.py" in command_line(pid)}


async def sleeping(sandbox: LocalSandbox | None = None) -> "asyncio.Task[Outcome]":
    """Return the run of a program that would sleep for a minute, when its process is there."""
    before = servers()
    code = "import time\ndef solution():\n    time.sleep(60)"
    running = asyncio.create_task(run_solution(code, 60.0, MEMORY, sandbox=sandbox))
    while servers() <= before:
        await asyncio.sleep(0.01)
    return running


def test_a_cancelled_run_leaves_no_process() -> None:
    """Oracle: the kernel's list of the children of the sandbox's server."""

    async def cancel() -> None:
        task = await sleeping()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run("def solution(): return 1")  # the server runs now
    before = servers()
    asyncio.run(cancel())
    assert before and servers() == before


def test_an_interpreter_that_does_not_start_is_no_fault_of_the_program(tmp_path: Path) -> None:
    """Oracle: the exception quotes the interpreter. To score such a run 0 would be wrong."""
    script = tmp_path / "broken_script.py"
    script.write_text("raise SystemExit('this script is broken')")
    with pytest.raises(RuntimeError, match="before it ran any code.*this script is broken"):
        LocalSandbox("none").start(script)
    with pytest.raises(ValueError, match="at least 67108864 bytes"):
        run("def solution():\n    return 1", memory_bytes=2**20)


def test_a_server_that_died_is_started_again() -> None:
    """Oracle: the run in progress raises, since its end is unknown; the next one has its value."""
    sandbox = LocalSandbox("none")

    async def killed() -> None:
        code = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(9)"
        with pytest.raises(RuntimeError, match="server of the process has ended: code -9, without a word"):
            await run_solution(code, 9.0, MEMORY, sandbox=sandbox)

    asyncio.run(killed())
    assert asyncio.run(run_solution("def solution(): return 7", 5.0, MEMORY, sandbox=sandbox)).value == 7
    sandbox.close()


def test_a_server_that_fails_tells_why() -> None:
    """Oracle: the traceback of a server that was sent a request without descriptors, quoted by the run in progress."""
    sandbox = LocalSandbox()
    sandbox.start(SCRIPT)

    async def failed() -> None:
        running = await sleeping(sandbox)
        await sandbox._servers[SCRIPT].send(b"nothing", [])
        with pytest.raises(RuntimeError, match=r"(?s)code 1, Traceback.*ValueError: not enough values to unpack"):
            await running

    asyncio.run(failed())
    assert asyncio.run(run_solution("def solution(): return 7", 5.0, MEMORY, sandbox=sandbox)).value == 7
    sandbox.close()


def test_a_closed_sandbox_ends_what_still_runs() -> None:
    """Oracle: the run in progress raises the sandbox's own error: the server ended as it should, with code 0."""
    sandbox = LocalSandbox()
    sandbox.start(SCRIPT)

    async def closed() -> None:
        running = await sleeping(sandbox)
        await asyncio.to_thread(sandbox.close)
        with pytest.raises(RuntimeError, match="server of the process has ended: code 0, without a word"):
            await running

    asyncio.run(closed())


def test_what_a_program_leaves_behind_without_a_boundary_is_ended() -> None:
    """Oracle: the kernel's table when the run is over. A grandchild in a session of its own outlives its parents."""
    code = (
        "import os, time\nreader, writer = os.pipe()\ndef solution():\n"
        "    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            os.write(writer, str(os.getpid()).encode())\n            time.sleep(60)\n"
        "        os._exit(0)\n    return int(os.read(reader, 20))"
    )
    sandbox = LocalSandbox("none")
    outcome = asyncio.run(run_solution(code, 5.0, MEMORY, sandbox=sandbox))
    sandbox.close()
    if outcome.value is None:  # an ordinary user meets the limit on processes first
        assert "BlockingIOError" in str(outcome.error)
    else:
        assert not Path(f"/proc/{outcome.value}").exists()


@pytest.mark.parametrize("isolation", ["auto", "none"])
def test_no_process_outlives_a_killed_caller(isolation: str) -> None:
    """Oracle: the kernel's list, after SIGKILL to a process of ours whose program would sleep for a minute."""
    code = (
        "import asyncio, os, sys\nfrom matryoshka.tasks.sandbox import run_solution\n"
        "from matryoshka.tasks.sandbox_backends import SCRIPT, LocalSandbox\n"
        f"sandbox = LocalSandbox({isolation!r})\nsandbox.start(SCRIPT)\nprint('started', flush=True)\n"
        "program = 'import time\\ndef solution(): time.sleep(60)'\n"
        "asyncio.run(run_solution(program, 60.0, 2**28, sandbox=sandbox))\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert caller.stdout is not None and caller.stdout.readline() == b"started\n"
    deadline = time.monotonic() + 300
    interpreter = os.fsencode(os.path.realpath(INTERPRETER))
    below: list[int] = []
    while not any(command_line(pid).startswith(interpreter) and children(pid) for pid in below):  # a program runs
        below = descendants(caller.pid)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    while any(map(alive, below)):
        assert time.monotonic() < deadline, below
        time.sleep(0.05)


def test_the_boundary_asked_for_is_the_boundary_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: a server that knows no system calls: "required" refuses, "auto" runs and says once what is off."""
    for name in ("sandbox_server.py", "sandbox_child.py"):
        shutil.copy(SERVER.with_name(name), tmp_path)
    boundary = SERVER.with_name("sandbox_boundary.py").read_text()
    (tmp_path / "sandbox_boundary.py").write_text(boundary.replace('"x86_64"', '"x"').replace('"aarch64"', '"y"'))
    monkeypatch.setattr("matryoshka.tasks.sandbox_backends.SERVER", tmp_path / "sandbox_server.py")
    with pytest.raises(ValueError, match="isolation 'required': no tables of system calls for"):
        LocalSandbox("required").start(SCRIPT)
    sandbox = LocalSandbox("auto")
    holds = sandbox.start(SCRIPT)
    sandbox.start(SCRIPT.with_name("sandbox_child.py"))
    assert (holds["landlock"], holds["seccomp"]) == (0, False)
    assert caplog.text.count("Landlock and seccomp are off") == 1
    assert "Landlock and seccomp are off" in in_words(holds)
    assert asyncio.run(run_solution("def solution(): return 7", 5.0, MEMORY, sandbox=sandbox)).value == 7
    sandbox.close()


def test_a_command_is_a_sandbox_too() -> None:
    """Oracle: value, traceback, limits and time as in the local sandbox; the command here is `env`, not a container."""
    sandbox = CommandSandbox(("env", "-i"), sys.executable)
    assert sandbox.start(SCRIPT)["command"] == ["env", "-i"]

    def outcome(code: str, timeout_s: float = 9.0) -> Outcome:
        return asyncio.run(run_solution(code, timeout_s, MEMORY, sandbox=sandbox))

    assert outcome("print('here')\ndef solution(): return 6 * 7").value == 42
    assert outcome("print('here')\ndef solution(): return 6 * 7").stdout == "here\n"
    assert "line 2, in solution" in str(outcome("def solution():\n    return 1 / 0").error)
    assert str(outcome("x = bytes(10**9)").error).endswith("MemoryError")
    assert "did not finish within 0.5 s" in str(outcome("while True: pass", 0.5).error)
    with pytest.raises(ValueError, match="no such program"):
        CommandSandbox(("no-such-program",)).start(SCRIPT)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("Sure.\n```python\nx = 1\n```\nDone.\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nx = 0\n```\n```Python\nx = 1\n```", "x = 1\n"),
        ("```text\nx = 0\n```\n```\nx = 1\n```", "x = 0\n"),
        ("x = 1", "x = 1"),
        ("```python\nx = 1\nreturn", "x = 1\nreturn"),
        ("```py\r\nx = 1```", "x = 1"),
        ("1. Like this:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("", ""),
        ("~~~python\nx = 1\n~~~\nDone.", "x = 1\n"),
        ("```\n3\n```\n```python3.11\nx = 1\n```", "x = 1\n"),
        ("```\n3\n```\n```python title='a.py'\nx = 1\n```", "x = 1\n"),
        ("```\n3\n```\n```{.python}\nx = 1\n```", "x = 1\n"),
        ("```pycon\n>>> 3\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\nimport math\n```\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ('```python\ndef f():\n    """A ```x``` here."""\n```', 'def f():\n    """A ```x``` here."""\n'),
        ("````python\ns = \'\'\'\n```\n\'\'\'\n````", "s = \'\'\'\n```\n\'\'\'\n"),
        ("def f():\n    return 1\n```\nIt returns 1.", "def f():\n    return 1\n"),
        ("import math\ndef f(): pass\n```", "import math\ndef f(): pass\n"),
        (" def f():\n     return 1", "def f():\n    return 1"),
    ],
)
def test_extract_code(reply: str, code: str) -> None:
    """Oracle: the documented rule, written out by hand for each form in which models put a program."""
    assert extract_code(reply) == code


@pytest.mark.parametrize("part", ["`", "~", " ", "```", "``` ", "```x", "\n```", "def f(", "```\n", "\n ~~~ "])
def test_extracting_code_takes_time_in_proportion_to_the_reply(part: str) -> None:
    """Oracle: the clock: seconds of the CPU for a reply of 200,000 characters, whose square would take minutes."""
    started = time.thread_time()
    extract_code(part * (200_000 // len(part)))
    assert time.thread_time() - started < 3
