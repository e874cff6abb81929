"""Programs in their process: their effect on the household, their limits towards us, and their end."""

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from matryoshka.core.protocols import GeneratorError
from matryoshka.tasks import sandbox
from matryoshka.tasks.alfworld import program
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.playthrough import Session
from matryoshka.tasks.alfworld.program import AskRefusedError, Limits, ProgramOutcome, run_program
from matryoshka.tests.tasks.alfworld import kitchen

LIMITS = Limits(timeout_s=30.0, memory_bytes=128 * 2**20, asks=2)


async def no_answer(question: str) -> str:
    raise AskRefusedError("nobody answers")


def session(max_steps: int = 50) -> Session:
    return Session(Engine(load_game(kitchen.row())), max_steps)


def run(
    code: str,
    place: Session | None = None,
    first: int = 1,
    memory: str = "{}",
    limits: Limits = LIMITS,
    ask: Callable[[str], Awaitable[str]] = no_answer,
) -> ProgramOutcome:
    return asyncio.run(run_program(code, place or session(), ask, limits, first, memory))


def step(body: str) -> str:
    """Return a program of one step with these lines."""
    return "def step_1(agent, memory):\n" + "\n".join(f"    {line}" for line in body.split("\n"))


WINNING = """
def step_1(agent, memory):
    agent.visit("countertop 1")
    agent.take("potato 2", "countertop 1")
    memory["potato"] = agent.holding

def step_2(agent, memory):
    agent.go_to("microwave 1")
    agent.heat(memory["potato"], "microwave 1")

def step_3(agent, memory):
    agent.visit("fridge 1")
    agent.put(memory["potato"], "fridge 1")
    raise RuntimeError("the game was over before this line")
"""


def test_a_program_plays_the_household_here() -> None:
    """Oracle: the kitchen's walkthrough by heart; the end of the game ends the program as well."""
    place = session()
    outcome = run(WINNING, place)
    assert place.won
    assert [command for command, _ in place.history] == kitchen.WALKTHROUGH
    assert (outcome.error, outcome.step) == ("", 3)


def test_a_program_that_ends_without_the_task_done_has_no_error() -> None:
    """Oracle: a program that does one thing."""
    place = session()
    outcome = run(step("agent.look()\nprint('looked')"), place)
    assert (outcome.error, outcome.step, outcome.stdout, place.won) == ("", 1, "looked\n", False)
    assert [command for command, _ in place.history] == ["look"]


def test_a_failed_assertion_comes_back_with_its_step_and_traceback() -> None:
    """Oracle: Python's own layout of a traceback, lines counted by hand."""
    code = "def step_1(agent, memory):\n    pass\n\ndef step_2(agent, memory):\n"
    outcome = run(code + "    assert agent.holding, 'my hand is empty'\n")
    assert outcome.step == 2
    assert outcome.error == (
        'Traceback (most recent call last):\n  File "<solution>", line 5, in step_2\n'
        "    assert agent.holding, 'my hand is empty'\nAssertionError: my hand is empty"
    )


def test_an_attempt_goes_on_where_another_stopped() -> None:
    """Oracle: the same household, the memory and the agent's state of the first program in a second process."""
    place = session()
    broken = WINNING.replace('agent.heat(memory["potato"], "microwave 1")', "assert False")
    outcome = run(broken, place)
    assert (outcome.step, outcome.memory) == (2, "{'potato': 'potato 2'}")
    check = (
        'def step_2(agent, memory):\n    assert agent.holding == memory["potato"] and agent.location == "microwave 1"\n'
    )
    check += '    agent.heat(memory["potato"], "microwave 1")\n' + WINNING[WINNING.index("\ndef step_3") :]
    again = run(check, place, outcome.step, outcome.memory)
    assert again.error == "" and place.won
    assert len(place.history) == len(kitchen.WALKTHROUGH)  # nothing was done twice


def test_only_plain_data_travels() -> None:
    """Oracle: equality in the next process for every plain kind; anything else stays behind."""
    values = "{'n': None, 'b': True, 'i': -3, 'f': 0.1, 's': 'it\\'s \"x\"\\n\\u20ac', "
    values += "'l': [1, (2,), ()], 3: {4: {5}}, 'e': set()}"
    fill = f"memory.update({values})\nmemory['agent'] = agent\nmemory['code'] = [len]\nmemory['big'] = 'x' * 100000\n"
    fill += "memory['inf'] = float('-inf')\nloop = []\nloop.append(loop)\nmemory['loop'] = loop\nassert False"
    outcome = run(step(fill))
    check = step(f"assert memory.pop('inf') == float('-inf')\nassert memory == {values}, memory\nagent.look()")
    place = session()
    assert run(check, place, 1, outcome.memory).error == ""
    assert len(place.history) == 1


def test_actions_beyond_the_limit_are_refused_in_the_program() -> None:
    """Oracle: a household of three actions; the traceback names the line that asked for a fourth."""
    place = session(3)
    outcome = run(step("for _ in range(9):\n    agent.look()"), place)
    assert len(place.history) == 3
    assert "line 3, in step_1" in outcome.error
    assert outcome.error.endswith("RuntimeError: all 3 actions in this household are used up")
    stubborn = step("while True:\n    try:\n        agent.look()\n    except RuntimeError:\n        pass")
    assert run(stubborn, session(3)).error.endswith("the program went on all the same")


def test_questions_are_answered_within_their_budget() -> None:
    """Oracle: answers made from the question; the third of two is refused in the program."""

    async def shout(question: str) -> str:
        return question.upper()

    body = "memory['a'] = [agent.ask('one'), agent.ask('two')]\n"
    body += "try:\n    agent.ask('three')\nexcept RuntimeError as err:\n"
    body += "    memory['a'].append(str(err))\nassert False"
    outcome = run(step(body), ask=shout)
    assert outcome.memory == "{'a': ['ONE', 'TWO', 'all 2 questions are used up']}"


def test_a_question_costs_no_program_time_and_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by definition: of two programs in one slot each waits longer than its time limit, and both wait at once.
    """
    monkeypatch.setattr(sandbox, "usable_cores", lambda: 1)
    asked, both_wait = list[str](), asyncio.Event()

    async def slowly(question: str) -> str:
        asked.append(question)
        if len(asked) == 2:
            await asyncio.sleep(3.2)
            both_wait.set()
        await both_wait.wait()
        return "yes"

    async def both() -> list[ProgramOutcome]:
        quick = Limits(timeout_s=3.0, memory_bytes=LIMITS.memory_bytes)
        code = step("agent.ask('well?')")
        runs = (run_program(code, session(), slowly, quick) for _ in range(2))
        return list(await asyncio.gather(*runs))

    assert [outcome.error for outcome in asyncio.run(both())] == ["", ""]


def test_a_black_box_that_fails_ends_the_program_and_is_raised() -> None:
    """Oracle: the exception itself; no process of the program is left."""

    async def broken(question: str) -> str:
        raise GeneratorError("no answer")

    with pytest.raises(GeneratorError, match="no answer"):
        run(step("agent.ask('well?')"), ask=broken)


HOSTILE = {
    "endless loop": ("while True: pass", "did not finish within"),
    "sleep": ("__import__('time').sleep(99)", "did not finish within"),
    "recursion": ("f = lambda: f()\nf()", "RecursionError"),
    "sys.exit": ("__import__('sys').exit(0)", "SystemExit: 0"),
    "os._exit": ("__import__('os')._exit(0)", "exited (code 0) before its last step had ended"),
    "abort": ("__import__('os').abort()", "was killed (Aborted)"),
    "fork": ("__import__('os').fork()", "PermissionError: [Errno 1] Operation not permitted"),
    "subprocess": ("__import__('subprocess').run(['true'])", "PermissionError"),
    "shell": ("assert __import__('os').system('true') == 0", "AssertionError"),
    "kill": ("__import__('os').kill(__import__('os').getppid(), 15)", "PermissionError: [Errno 1]"),
    "network": ("__import__('socket').socket()", "PermissionError: [Errno 1]"),
    "read a file": ("open('/etc/passwd').read()", "Error: [Errno"),
    "read by number": ("__import__('os').open('/proc/self/environ', 0)", "PermissionError: [Errno 13]"),
    "write a file": ("open('x', 'w').write('x')", "PermissionError"),
    "overwrite the library": ("open(__import__('os').__file__, 'r+')", "PermissionError"),
    "out of the library": (
        "import os\nopen(os.path.dirname(os.__file__) + '/../../../../../../../etc/passwd')",
        "Error: [Errno",
    ),
    "list a folder": ("__import__('os').listdir('/')", "PermissionError"),
    "remove a file": ("__import__('os').remove('/tmp/nothing')", "PermissionError"),
    "a socket by ctypes": ("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0", "AssertionError"),
    "1 GB string": ("x = 'x' * 10**9", "MemoryError"),
    "1 GB list": ("x = [0] * 10**9", "MemoryError"),
    "printing 100 MB": ("for _ in range(100): print('x' * 10**6)", "File too large"),
    "long command": ("agent.go_to('x' * 10**6)", "is more than a household takes"),
    "surrogates": ("raise ValueError('\\ud800')", "ValueError"),
    "error that cannot be shown": ("class E(Exception):\n    __str__ = None\nraise E", "E"),
    "closing the line": ("__import__('os').closerange(3, 99)\nagent.look()", "before its last step had ended"),
    "closing the line and sleeping": (
        "__import__('os').closerange(0, 99)\n__import__('time').sleep(99)",
        "closed its line before its last step had ended",
    ),
    "closing the line and stopping": (
        "import os, signal\nos.closerange(0, 99)\nsignal.raise_signal(signal.SIGSTOP)",
        "closed its line before its last step had ended",
    ),
    "stopping itself": ("import signal\nsignal.raise_signal(signal.SIGSTOP)", "did not finish within"),
    "forged long error": (
        "import os\nfor n in range(3, 40):\n    try: os.write(n, b'E\\0\\0\\x7f\\xff' + b'x' * 0x7fff)\n"
        "    except OSError: pass\nos._exit(0)",
        "x" * 2000,
    ),
    "a very long command": ("agent.go_to('x' * 10**4)", "a text of 10006 characters is longer than 500"),
    "noise on the line": (
        "import os\nfor n in range(3, 40):\n    try: os.write(n, b'?' * 100)\n    except OSError: pass",
        "disturbed the line",
    ),
    "flood on the line": (
        "import os\nfor n in range(3, 40):\n    try:\n        while True: os.write(n, b'A\\0\\0\\0\\4look')\n"
        "    except OSError: pass",
        "",
    ),
    "flood of steps": (
        "import os\nfor n in range(3, 40):\n    try:\n        while True: os.write(n, b'S\\0\\0\\0\\x011')\n"
        "    except OSError: pass",
        "disturbed the line",
    ),
    "no program": ("pass\n\n)", "SyntaxError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_end_in_an_error_of_their_own(name: str) -> None:
    """Oracle: the reason in words, the household not won, and time that stays near the limit."""
    body, reason = HOSTILE[name]
    limits = Limits(timeout_s=1.0, memory_bytes=128 * 2**20) if "finish" in reason or not reason else LIMITS
    place = session()
    started = time.monotonic()
    outcome = run(step(body), place, limits=limits)
    assert outcome.error and reason in outcome.error
    assert not place.won
    assert len(outcome.error) <= 2000
    assert len(outcome.stdout) <= program.STDOUT_BYTES
    assert time.monotonic() - started < 60


def test_a_program_without_the_step_asked_for_says_so() -> None:
    """Oracle: the words that name the function; a hole in the numbers is one too."""
    assert "defines no function step_1(agent, memory)" in run("x = 1").error
    assert "defines no function step_2(agent, memory)" in run("def step_1(agent, memory): pass", first=2).error
    outcome = run("def step_1(agent, memory): pass\ndef step_3(agent, memory): pass")
    assert "defines no function step_2(agent, memory)" in outcome.error and outcome.step == 1


def test_patching_the_agent_fools_the_program_alone() -> None:
    """Oracle: the household, which never heard of it."""
    body = "agent.__class__.go_to = lambda self, place: 'You win.'\nagent.__class__.holding = 'potato 2'\n"
    body += "agent._history = agent._seen = None\nagent.won = True\nassert agent.go_to('fridge 1') == 'You win.'"
    place = session()
    assert run(step(body), place).error == ""
    assert (place.won, place.history) == (False, [])


def test_the_program_sees_nothing_of_us() -> None:
    """Oracle: an empty environment, no modules of ours, no third-party packages; the standard library is there."""
    os.environ["SECRET_OF_THE_TEST"] = "x"
    body = "import os, sys, math, json, re, random\nassert 'SECRET_OF_THE_TEST' not in os.environ\n"
    body += "assert not any('matryoshka' in name for name in sys.modules)\nimport numpy"
    assert "ModuleNotFoundError: No module named 'numpy'" in run(step(body)).error


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file descriptors before and after, and the folder for temporary files, which is this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def left() -> tuple[int, list[str]]:
        gc.collect()  # closes what earlier tests have dropped
        return len(os.listdir("/proc/self/fd")), os.listdir(tmp_path)

    run(WINNING)
    before = left()
    assert before[1] == []
    for body in ("pass", "while True: pass", "__import__('os')._exit(1)"):
        run(step(body), limits=Limits(timeout_s=0.5, memory_bytes=LIMITS.memory_bytes))
    assert left() == before


def test_many_programs_share_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: thirty programs at once in two slots all win."""
    monkeypatch.setattr(sandbox, "usable_cores", lambda: 2)

    async def all_of_them() -> list[Session]:
        places = [session() for _ in range(30)]
        await asyncio.gather(*(run_program(WINNING, place, no_answer, LIMITS) for place in places))
        return places

    assert all(place.won for place in asyncio.run(all_of_them()))


def test_limits_that_make_no_sense_are_refused() -> None:
    """Oracle: the message names both."""
    with pytest.raises(ValueError, match="timeout_s is 0"):
        run(WINNING, limits=Limits(timeout_s=0, memory_bytes=1))
