"""ALFWorld's games by split, read from a folder or made by us, and the task over them.

An example carries its own game, compressed, so nothing else has to be kept beside it.
"""

import base64
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from matryoshka.core.protocols import Generator
from matryoshka.core.records import Example, Messages, PairRule, stable_seed
from matryoshka.pilot.config import AlfworldConfig, RunConfig
from matryoshka.tasks.alfworld.brief import brief_style
from matryoshka.tasks.alfworld.compact import compact_style
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import Game, load_game
from matryoshka.tasks.alfworld.games import TASK_TYPES, Row, read_split
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.plan_language import from_walkthrough
from matryoshka.tasks.alfworld.playthrough import Environment, screen_text
from matryoshka.tasks.alfworld.program import CHILD, Limits
from matryoshka.tasks.alfworld.prompts import full_style
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tasks.alfworld.textworld_backend import TextWorldEngine
from matryoshka.tasks.sandbox_backends import sandbox_of

STYLES = {"brief": brief_style, "compact": compact_style, "full": full_style}
GAMES_IN_MEMORY = 256  # parsed; a game takes some milliseconds to parse


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the games: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for games that are missing, malformed or too few.
    """
    task, games = config.task, config.task.alfworld
    seed = config.seed if games.games_seed < 0 else games.games_seed
    needed = task.warmup + task.train + task.validation
    train = _games(games, games.train_split, needed, seed)
    splits: dict[str, Sequence[Example]] = {
        "warmup": train[: task.warmup],
        "train": train[task.warmup : task.warmup + task.train],
        "validation": train[task.warmup + task.train :],
        "test": _games(games, games.test_split, task.test, seed),
        "held_out": _games(games, games.held_out_split, task.held_out, seed) if task.held_out else [],
    }
    ids = [example.id for examples in splits.values() for example in examples]
    if shared := len(ids) - len(set(ids)):
        raise ValueError(f"[task.alfworld] {shared} games stand in two splits; training would see what tests it")
    return splits


def make_task(
    config: RunConfig, splits: Mapping[str, Sequence[Example]], count_tokens: Callable[[Messages], int]
) -> ALFWorldTask:
    """Return the task over the games of `splits`."""
    task, games = config.task, config.task.alfworld
    sandbox = sandbox_of(task.isolation, task.sandbox_command)
    if games.mode == "program":
        sandbox.start(CHILD)
    return ALFWorldTask(
        splits,
        STYLES[task.prompts](games.max_steps, games.verbs),
        _environments(games),
        games.mode,
        games.max_steps,
        games.verbs,
        Limits(task.timeout_s, task.memory_mb * 2**20, games.asks, sandbox=sandbox),
        PairRule("binary", cap=config.dpo.pairs_per_example),
    )


def scripted_generator(name: str) -> Generator:
    """Return the generator that takes plans at their word. Raises ValueError for another name than "literal"."""
    if name != "literal":
        raise ValueError(f"[serve] scripted {name!r}: ALFWorld has one scripted generator, 'literal'")
    return LiteralGenerator()


def example_of(row: Row) -> Example:
    """Return the example of a game's row. Raises ValueError naming the game if it cannot be played."""
    game = load_game(row)
    where = {game.names[fact[1]]: game.names[fact[2]] for fact in game.facts if fact[0] == "inreceptacle"}
    try:
        gold = from_walkthrough(game.walkthrough, where)
    except (KeyError, ValueError) as err:
        raise ValueError(f"game {game.id}: its walkthrough cannot be read as a plan: {err}") from err
    fields = {
        "question": screen_text(Engine(game).observation.text),
        "answer": ", ".join(game.walkthrough) or "unknown",
        "task_type": game.task_type,
        "gold": [[step.verb, step.thing, list(step.places)] for step in gold],
        "game": base64.b85encode(zlib.compress(json.dumps(row).encode())).decode(),
    }
    return Example(game.id, fields)


def _games(games: AlfworldConfig, split: str, count: int, seed: int) -> list[Example]:
    """Return `count` games of `split`, drawn by `seed`, the types in turn as far as each has any."""
    types = games.types or TASK_TYPES
    if not games.data:
        return [example_of(row) for row in households(split, count, seed, games.size, types)]
    rows = read_split(Path(games.data), split, types)
    if len(rows) < count:
        has = f"has {len(rows)} games of these types"
        raise ValueError(f"[task] split {split!r} of {games.data} {has} but the configuration takes {count}")
    draws = random.Random(stable_seed("alfworld", seed, split))
    draws.shuffle(rows)
    of_type: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_type[row["task_type"]].append(row)
    order = {row["game"]: place for same in of_type.values() for place, row in enumerate(same)}
    return [example_of(row) for row in sorted(rows, key=lambda row: order[row["game"]])[:count]]


def _environments(games: AlfworldConfig) -> Callable[[Example], Environment]:
    """Return what makes the household of an example."""

    def engine(example: Example) -> Environment:
        return Engine(_game(example.fields["game"]), games.verbs)

    def textworld(example: Example) -> Environment:
        return TextWorldEngine(_row(example.fields["game"]), games.verbs)

    return engine if games.backend == "engine" else textworld


def _row(packed: str) -> Row:
    row: Row = json.loads(zlib.decompress(base64.b85decode(packed)))
    return row


@lru_cache(GAMES_IN_MEMORY)
def _game(packed: str) -> Game:
    return load_game(_row(packed))
