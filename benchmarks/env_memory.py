"""Memory growth of a fresh process for `bench env`. It never imports torch, which would hide much of it."""

import itertools
import resource
from collections.abc import Sequence

from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.games import Row

PLAYED = 10


def grown_bytes(rows: Sequence[Row], commands: Sequence[Sequence[str]], count: int) -> int:
    """Return by how much this process's highest memory rises while it holds `count` games that share nothing.

    `rows` are taken in turn, each loaded anew every time, and PLAYED of its commands are given.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    playing = []
    for row, own in itertools.islice(itertools.cycle(zip(rows, commands, strict=True)), count):
        engine = Engine(load_game(row))
        for command in own[:PLAYED]:
            engine.step(command)
        playing.append(engine)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
