"""What a child may write on its line, at random: nothing of it raises in the parent or passes the parent's limits.

The oracle is the documented type and size of what comes out, and that UTF-8 encodes it.
"""

import asyncio
import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.playthrough import Session
from matryoshka.tasks.alfworld.program import MAX_COMMAND, Limits, _Play
from matryoshka.tasks.sandbox import ERROR_CHARACTERS, _parse
from matryoshka.tasks.sandbox_backends import Ended
from matryoshka.tests.tasks.alfworld import kitchen

LEFT = Ended(0, "")
GAME = load_game(kitchen.row())
PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
JSON = PLAIN | st.lists(PLAIN, max_size=2)
MESSAGES = st.binary(max_size=60) | st.dictionaries(st.sampled_from(["value", "error", "x"]), JSON, max_size=2).map(
    lambda data: json.dumps(data).encode()
)


class Writer:
    """Takes what the parent answers."""

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass


class Child:
    """A process whose line holds `data` and then ends."""

    def __init__(self, data: bytes) -> None:
        self.reader = asyncio.StreamReader(limit=2**15)
        self.reader.feed_data(data)
        self.reader.feed_eof()
        self.writer = Writer()

    async def end(self, grace_s: float = 0.0) -> Ended:
        return LEFT


async def _echo(question: str) -> str:
    return question


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_a_result_is_a_finite_number_or_a_short_clean_error(message: bytes) -> None:
    """Oracle: the documented types: a finite number, or an error of limited length that UTF-8 encodes."""
    value, error = _parse(message, LEFT)
    assert (value is None) != (error is None)
    if error is None:
        assert type(value) in (int, float) and abs(value or 0) <= 1.8e308 and value == value
    else:
        assert 0 < len(error) <= ERROR_CHARACTERS and error.encode() and "\x1b" not in error


def test_a_household_takes_any_bytes() -> None:
    """Oracle: nothing raises. Messages of every kind and random size, then noise, are drawn from a seed."""
    draws = random.Random(0)

    def message() -> bytes:
        size = draws.choice((0, 1, 5, 700, 3000))
        content = draws.choice((draws.randbytes(size), b"look", b"9" * size, b"\xed\xa0\x80\x1b[2J", b"go to fridge 1"))
        length = len(content) if draws.random() < 0.9 else draws.randrange(2**32)
        return draws.choice(b"AQSMEFx").to_bytes(1, "big") + length.to_bytes(4, "big") + content

    async def play(data: bytes) -> tuple[_Play, Session]:
        session = Session(Engine(GAME), 5)
        played = _Play(Child(data), session, _echo, Limits(timeout_s=5.0, asks=2), asyncio.Semaphore(1))  # type: ignore[arg-type]
        async with played._slots:
            await played.serve()
        return played, session

    for _ in range(200):
        data = b"".join(message() for _ in range(draws.randint(1, 30))) + draws.randbytes(draws.randrange(20))
        played, session = asyncio.run(play(data))
        assert len(played.error) <= ERROR_CHARACTERS and played.error.isprintable() | ("\n" in played.error)
        assert 0 <= played.step < 10**9
        assert len(session.history) <= 5 and all(len(command) <= MAX_COMMAND for command, _ in session.history)
        json.dumps([played.error, played.memory, session.history], ensure_ascii=False).encode()
