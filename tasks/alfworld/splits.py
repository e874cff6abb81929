"""ALFWorld's games by split, read from a folder or made by us.

An example carries its own compressed game, so that it is complete by itself.
"""

import base64
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from matryoshka.core.records import Example, stable_seed
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import Game, load_game
from matryoshka.tasks.alfworld.games import TASK_TYPES, Row, read_split
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.plan_language import from_walkthrough
from matryoshka.tasks.alfworld.playthrough import Environment, screen_text
from matryoshka.tasks.alfworld.textworld_backend import TextWorldEngine

GAMES_IN_MEMORY = 256  # parsed; a game takes some milliseconds to parse


def load_splits(options: AlfworldOptions, sizes: Mapping[str, int], seed: int) -> dict[str, Sequence[Example]]:
    """Return the games: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for games that are missing, malformed or too few.
    """
    warmup, train = sizes["warmup"], sizes["train"]
    seed = seed if options.games_seed < 0 else options.games_seed
    games = _games(options, options.train_split, warmup + train + sizes["validation"], seed)
    held_out = sizes["held_out"]
    return {
        "warmup": games[:warmup],
        "train": games[warmup : warmup + train],
        "validation": games[warmup + train :],
        "test": _games(options, options.test_split, sizes["test"], seed),
        "held_out": _games(options, options.held_out_split, held_out, seed) if held_out else [],
    }


def example_of(row: Row) -> Example:
    """Return the example of a game's row. Raises ValueError naming the game if it cannot be played."""
    try:
        game = load_game(row)
        where = {game.names[fact[1]]: game.names[fact[2]] for fact in game.facts if fact[0] == "inreceptacle"}
        screen = screen_text(Engine(game).observation.text)
    except (LookupError, RecursionError) as err:  # facts of other arity than the domain's, or of unknown objects
        raise ValueError(f"game {row['game']}: its problem cannot be played: {type(err).__name__} {err}") from err
    try:
        gold = from_walkthrough(game.walkthrough, where)
    except (KeyError, ValueError) as err:
        raise ValueError(f"game {game.id}: its walkthrough cannot be read as a plan: {err}") from err
    fields = {
        "question": screen,
        "answer": ", ".join(game.walkthrough) or "unknown",
        "task_type": game.task_type,
        "gold": [[step.verb, step.thing, list(step.places)] for step in gold],
        "game": base64.b85encode(zlib.compress(json.dumps(row).encode())).decode(),
    }
    return Example(game.id, fields)


def _games(options: AlfworldOptions, split: str, count: int, seed: int) -> list[Example]:
    """Return `count` games of `split`, drawn by `seed`, the types in turn as far as each has any."""
    types = options.types or TASK_TYPES
    if not options.data:
        return [example_of(row) for row in households(split, count, seed, options.size, types)]
    rows = read_split(Path(options.data), split, types)
    if len(rows) < count:
        has = f"has {len(rows)} games of these types"
        raise ValueError(f"[task] split {split!r} of {options.data} {has} but the configuration takes {count}")
    draws = random.Random(stable_seed("alfworld", seed, split))
    draws.shuffle(rows)
    of_type: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_type[row["task_type"]].append(row)
    order = {row["game"]: place for same in of_type.values() for place, row in enumerate(same)}
    return [example_of(row) for row in sorted(rows, key=lambda row: order[row["game"]])[:count]]


def household_of(options: AlfworldOptions, example: Example) -> Environment:
    """Return the household of an example."""
    packed = example.fields["game"]
    if options.backend == "engine":
        return Engine(_game(packed), options.verbs)
    return TextWorldEngine(_row(packed), options.verbs)


def _row(packed: str) -> Row:
    row: Row = json.loads(zlib.decompress(base64.b85decode(packed)))
    return row


@lru_cache(GAMES_IN_MEMORY)
def _game(packed: str) -> Game:
    return load_game(_row(packed))
