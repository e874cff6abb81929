"""`matryoshka bench env`: our ALFWorld engine against the stock environment, on one core and without any model.

Both play the same commands in the same games, drawn from the seed: the walkthrough, then random admissible ones.
Times are CPU seconds of this process, so that other jobs on the machine do not count. Memory is what a fresh process
grows by while it loads so many games, each on its own, and keeps all of them in mid-play.
"""

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matryoshka.benchmarks.env_memory import grown_bytes
from matryoshka.benchmarks.measure import MIB, alternate, check_peers
from matryoshka.benchmarks.result import BenchResult, Row, speed_up
from matryoshka.core.records import stable_seed
from matryoshka.tasks.alfworld import games, textworld_backend
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.textworld_backend import TextWorldEngine

T = TypeVar("T")
PEERS = ("stock",)
PACKAGES = ("textworld", "alfworld", "fast-downward-textworld")
STEPS_PER_S, LOAD_MS, RESET_MS, MEMORY_MIB, RATIO = 5000, 5.0, 0.2, 1024, 400


@dataclass(frozen=True)
class Config:
    """Steps, loads, resets and memory of household games on one core.

    Args:
        against: stock (ALFWorld's own environment), or nothing.
        data: Folder with ALFWorld's games; by default the large ones of our own households.
        split: Which of its games.
        games: How many of them our engine plays.
        stock_games: How many of these the stock environment plays; it needs seconds for each.
        steps: Commands in each game.
        stock_steps: Commands in each game of the stock environment.
        concurrent: Games in memory at once; 0 leaves memory out.
        repeats: How often our engine plays everything.
        seed: Decides games and commands.
    """

    against: tuple[str, ...] = ("stock",)
    data: Path | None = None
    split: str = "valid_seen"
    games: int = 20
    stock_games: int = 2
    steps: int = 50
    stock_steps: int = 20
    concurrent: int = 10_000
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_peers("env", self.against, PEERS)
        if "stock" in self.against and not textworld_backend.is_installed():
            raise ValueError(
                "bench env: --against stock needs the packages textworld and alfworld, which are not installed; "
                "pip install 'textworld[pddl]' and pip install --no-deps alfworld, or leave stock out"
            )
        counts = (self.stock_games, self.steps, self.stock_steps, self.repeats)
        if min(counts) < 1 or self.games < self.stock_games or self.concurrent < 0:
            raise ValueError("bench env: games, steps and repeats must be at least 1, and games cover stock_games")


def run(config: Config) -> BenchResult:
    """Return steps a second, milliseconds of loading and of a reset, and memory."""
    rows = _rows(config)
    commands = [_commands(row, config.steps, config.seed) for row in rows]
    taken = alternate({"engine": lambda: _ours(rows, commands)}, config.repeats + 1)["engine"][1:]
    rate, load, reset = (statistics.median(values) for values in zip(*taken, strict=True))
    source = config.data.name if config.data else "our large households"
    details = {"games": len(rows), "of": source, "clock": "CPU seconds"}
    result = [
        Row("engine", rate, "steps/s", {"target": STEPS_PER_S, "holds": rate >= STEPS_PER_S, **details}),
        Row("engine, load", 1e3 * load, "ms", {"target": LOAD_MS, "holds": 1e3 * load < LOAD_MS}),
        Row("engine, reset", 1e3 * reset, "ms", {"target": RESET_MS, "holds": 1e3 * reset < RESET_MS}),
    ]
    others = []
    if config.against:
        shorter = [played[: config.stock_steps] for played in commands[: config.stock_games]]
        logic = games.read_logic(config.data) if config.data else None
        stock_rate, stock_load, stock_reset = _stock(rows[: config.stock_games], shorter, logic)
        others = [stock_rate]
        result += [
            Row("stock", stock_rate, "steps/s", {**details, "games": config.stock_games}),
            Row("stock, load", 1e3 * stock_load, "ms"),
            Row("stock, reset", 1e3 * stock_reset, "ms"),
        ]
    if config.concurrent:
        # A fresh process: this one's heap has holes that would hide what is allocated.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            used = pool.apply(grown_bytes, (rows, commands, config.concurrent)) / MIB
        result.append(
            Row(
                f"engine, {config.concurrent} games at once",
                used,
                "MiB",
                {"target": MEMORY_MIB, "holds": used < MEMORY_MIB},
            )
        )
    ratio = speed_up(rate, others, higher_is_better=True)
    return BenchResult("env", result, ratio, RATIO if others else None, PACKAGES if others else ())


def _rows(config: Config) -> list[games.Row]:
    if config.data is None:
        return households(config.split, config.games, config.seed, "large")
    rows = games.read_split(config.data, config.split)
    if len(rows) < config.games:
        raise ValueError(f"{config.data}: {len(rows)} games of {config.split}; --games asks for {config.games}")
    return random.Random(stable_seed("bench env", config.seed)).sample(rows, config.games)


def _commands(row: games.Row, steps: int, seed: int) -> list[str]:
    """Return `steps` commands: the walkthrough, then random admissible ones."""
    engine, rng = Engine(load_game(row)), random.Random(stable_seed("bench env", seed, row["game"]))
    played = list(engine.game.walkthrough[:steps])
    for command in played:
        engine.step(command)
    while len(played) < steps:
        played.append(rng.choice(engine.observation.admissible))
        engine.step(played[-1])
    return played


def _ours(rows: Sequence[games.Row], commands: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """Return steps a second, and the seconds of a load and of a reset."""
    loaded, load = _timed(lambda: [load_game(row) for row in rows])
    engines = [Engine(game) for game in loaded]
    _, reset = _timed(lambda: [engine.reset() for engine in engines])
    _, play = _timed(lambda: [engine.step(c) for engine, own in zip(engines, commands, strict=True) for c in own])
    return sum(map(len, commands)) / play, load / len(rows), reset / len(rows)


def _stock(
    rows: Sequence[games.Row], commands: Sequence[Sequence[str]], logic: games.Logic | None
) -> tuple[float, float, float]:
    """Return the same of TextWorld; its load ends with the first screen, so one reset is taken off."""
    engines, load = _timed(lambda: [TextWorldEngine(row, logic=logic) for row in rows])
    _, reset = _timed(lambda: [engine.reset() for engine in engines])
    _, play = _timed(lambda: [engine.step(c) for engine, own in zip(engines, commands, strict=True) for c in own])
    return sum(map(len, commands)) / play, max(load - reset, 0.0) / len(rows), reset / len(rows)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.process_time()
    result = work()
    return result, time.process_time() - began
