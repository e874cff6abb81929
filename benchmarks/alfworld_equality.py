"""Compares our ALFWorld engine with TextWorld, game by game and step by step: `python -m
matryoshka.benchmarks.alfworld_equality --data FOLDER`.

In each game both play the stored walkthrough and half of the random steps after it, start afresh and play the other
half; after every command observation, admissible commands, score, done and won must be equal. Games are drawn from the
seed. What a game showed is recorded as it ends, so that a comparison that was stopped goes on where it was, as long as
the engine's code and the packages are the same; the result names that code by its hash.
"""

import ast
import hashlib
import importlib.metadata
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matryoshka.core.files import Journal, write_json
from matryoshka.core.records import content_key, stable_seed
from matryoshka.scripts.cli import read_config
from matryoshka.tasks.alfworld import engine, game, pddl
from matryoshka.tasks.alfworld.engine import Engine, Observation
from matryoshka.tasks.alfworld.game import in_verbs
from matryoshka.tasks.alfworld.games import SPLITS, Logic, Row, read_logic, read_split
from matryoshka.tasks.alfworld.textworld_backend import TextWorldEngine

T = TypeVar("T")
FIELDS = ("text", "admissible", "score", "done", "won")
PACKAGES = ("textworld", "alfworld", "fast-downward-textworld")
# A share of the random steps is none that the game offers, and another one follows the walkthrough on.
INVALID, FOLLOW = 0.15, 0.25
GARBAGE = ("", "xyzzy", "LOOK", "go to", "take", "take it", "go to nowhere 1", "open", "look around", "put 1 in/on 2")
# A process keeps what TextWorld loads for every game; after so many games a fresh one takes over.
GAMES_PER_PROCESS = 16


@dataclass(frozen=True)
class Config:
    """Compare our ALFWorld engine with TextWorld.

    Args:
        data: Folder with the games, as rows or as ALFWorld lays them out.
        valid_seen: Games of valid_seen; 0 for none.
        train: Games of train.
        valid_unseen: Games of valid_unseen.
        steps: Random and invalid commands in each game, beside its walkthrough.
        seed: Decides games and commands.
        verbs: "current" or "old".
        processes: How many games are compared at once.
        out: The result, written when all games are through.
        journal: What each game showed, to go on from.
    """

    data: Path
    valid_seen: int = 140
    train: int = 300
    valid_unseen: int = 0
    steps: int = 50
    seed: int = 0
    verbs: str = "current"
    processes: int = 1
    out: Path = Path("benchmarks/results/alfworld_equality.json")
    journal: Path = Path("runs/alfworld_equality.jsonl")


def engine_hash() -> str:
    """Return the SHA-256 of the engine's code, comments and docstrings left out; it belongs to one minor Python."""
    digest = hashlib.sha256()
    for module in (pddl, game, engine):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


class Difference(Exception):
    """The first thing in which the two differ: {field, commands, ours, textworld}."""

    def __init__(self, field: str, commands: Sequence[str], ours: Any, textworld: Any) -> None:
        super().__init__(field)
        self.found = {"field": field, "commands": list(commands), "ours": ours, "textworld": textworld}


class Pair:
    """One game in our engine and in TextWorld, played in step; every method raises Difference where they part."""

    def __init__(self, row: Row, logic: Logic | None, verbs: str) -> None:
        self.played: list[str] = []
        self.seconds = {"ours": 0.0, "textworld": 0.0}
        self.ours = self._timed("ours", lambda: Engine(game.load_game(row), verbs))
        self.stock = self._timed("textworld", lambda: TextWorldEngine(row, verbs, logic))
        self._compare(self.ours.observation, self.stock.observation)

    def step(self, command: str) -> None:
        self.played.append(command)
        self._both(lambda player: player.step(command))

    def reset(self) -> None:
        self.played.append("(reset)")
        self._both(lambda player: player.reset())

    def _both(self, act: Callable[[Engine | TextWorldEngine], Observation]) -> None:
        self._compare(self._timed("ours", lambda: act(self.ours)), self._timed("textworld", lambda: act(self.stock)))

    def _compare(self, ours: Observation, textworld: Observation) -> None:
        for field in FIELDS:
            left, right = getattr(ours, field), getattr(textworld, field)
            if left != right:
                raise Difference(field, self.played, left, right)

    def _timed(self, who: str, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = act()
        self.seconds[who] += time.perf_counter() - began
        return result


def compare(row: Row, logic: Logic | None, verbs: str, steps: int, seed: int) -> dict[str, Any]:
    """Return {game, split, steps, seconds, mismatch} of one game; mismatch is None, or what differed first, and how."""
    pair = Pair(row, logic, verbs)
    rng = random.Random(stable_seed("alfworld equality", seed, row["game"]))
    walkthrough = [in_verbs(command, verbs) for command in row["walkthrough"]]
    mismatch = None
    try:
        for command in walkthrough:
            pair.step(command)
        if walkthrough and not pair.ours.observation.won:
            raise Difference("walkthrough", pair.played, "does not win", "does not win")
        for _ in range(steps // 2):
            pair.step(_command(pair.ours, rng, iter(())))
        pair.reset()
        to_follow = iter(walkthrough)
        for _ in range(steps - steps // 2):
            pair.step(_command(pair.ours, rng, to_follow))
    except Difference as difference:
        mismatch = difference.found
    return {
        "game": row["game"],
        "split": row["game"].partition("/")[0],
        "steps": sum(command != "(reset)" for command in pair.played),
        "seconds": {who: round(taken, 4) for who, taken in pair.seconds.items()},
        "mismatch": mismatch,
    }


def run(config: Config) -> dict[str, Any]:
    """Return the result of comparing all games of `config`, and write it to `config.out`."""
    logic = read_logic(config.data)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    code = engine_hash()
    setting = (code, versions, config.verbs, config.steps, config.seed, platform.python_version_tuple()[:2])
    rows = {content_key(setting, row, logic): row for row in choose(config)}
    journal = Journal(config.journal)
    waiting = [key for key in rows if key not in journal.rows]
    print(f"{len(rows)} games, {len(rows) - len(waiting)} of them compared before", flush=True)
    jobs = [(key, rows[key], logic, config) for key in waiting]
    # spawn: TextWorld's shared libraries do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(config.processes, maxtasksperchild=GAMES_PER_PROCESS) as pool:
        for done, (key, found) in enumerate(pool.imap_unordered(_job, jobs), start=len(rows) - len(waiting) + 1):
            journal.append(key, found)
            print(f"{done}/{len(rows)} {found['game']}: {'DIFFERS' if found['mismatch'] else 'equal'}", flush=True)
    games = [journal.rows[key] for key in rows]
    journal.close()
    result = {
        "what": "walkthrough, then random and invalid commands, in our engine and in TextWorld",
        "engine_code_sha256": code,
        "versions": {"python": platform.python_version(), **versions},
        "verbs": config.verbs,
        "seed": config.seed,
        "random_steps_a_game": config.steps,
        "games": {split: sum(found["split"] == split for found in games) for split in SPLITS},
        "steps": sum(found["steps"] for found in games),
        "seconds": {who: round(sum(found["seconds"][who] for found in games), 1) for who in ("ours", "textworld")},
        "mismatches": sum(found["mismatch"] is not None for found in games),
        "first_mismatches": [found for found in games if found["mismatch"] is not None][:10],
    }
    write_json(config.out, result)
    return result


def _job(job: tuple[str, Row, Logic | None, Config]) -> tuple[str, dict[str, Any]]:
    key, row, logic, config = job
    return key, compare(row, logic, config.verbs, config.steps, config.seed)


def choose(config: Config) -> list[Row]:
    """Return the games to compare: of each split as many as asked for, drawn from the seed.

    Raises ValueError for a split that has fewer.
    """
    chosen: list[Row] = []
    for split in SPLITS:
        wanted = getattr(config, split)
        rows = read_split(config.data, split) if wanted else []
        if len(rows) < wanted:
            raise ValueError(f"{config.data}: {len(rows)} games of {split}; --{split} asks for {wanted}")
        chosen += random.Random(stable_seed("alfworld equality", config.seed, split)).sample(rows, wanted)
    return chosen


def main() -> int:
    """Run the comparison and return the exit status: 0 where nothing differs."""
    result = run(read_config(Config, sys.argv[1:], "python -m matryoshka.benchmarks.alfworld_equality"))
    print(f"{sum(result['games'].values())} games, {result['steps']} steps, {result['mismatches']} games differ")
    return 1 if result["mismatches"] else 0


def _command(player: Engine, rng: random.Random, to_follow: Iterator[str]) -> str:
    """Return the next command to try: invalid, the walkthrough's next, or of a verb drawn from those possible."""
    drawn = rng.random()
    if drawn < INVALID:
        things, places = player.game.objects or ("mug 1",), player.game.receptacles or ("desk 1",)
        thing, place = rng.choice(things), rng.choice(places)
        wrong = [f"take {thing} from {place}", f"move {thing} to {place}", f"put {thing} in/on {place}"]
        wrong += [f"clean {thing} with {place}", f"use {thing}", f"examine {thing}", f"open {place}", f"go to {place}"]
        return rng.choice([*GARBAGE, *wrong])
    if drawn < INVALID + FOLLOW and (following := next(to_follow, "")):
        return following
    verbs: dict[str, list[str]] = {}
    for command in player.observation.admissible:
        verbs.setdefault(command.partition(" ")[0], []).append(command)
    # A blank at either end is stripped by both.
    return rng.choice(("", "", "", " ")) + rng.choice(verbs[rng.choice(sorted(verbs))])


if __name__ == "__main__":
    sys.exit(main())
