"""Reads ALFWorld's games from the user's folder. It downloads nothing and skips no game silently.

Two layouts of a data folder are read: `<split>.jsonl.xz` (or `.jsonl`) with one game a row, and ALFWorld's own, which
`ALFWORLD_DATA` names: `json_2.1.1/<split>/<task>/<trial>/{game.tw-pddl,traj_data.json}`. A row is a dict {game,
task_type, task, walkthrough, pddl_problem} and is what `load_game` takes; our own households are such rows too.
"""

import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.core.json_input import parse_json

# In the order of ALFWorld's numbers 1 to 6.
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
SPLITS = ("train", "valid_seen", "valid_unseen")
KEYS = ("game", "task_type", "task", "walkthrough", "pddl_problem")
OFFICIAL = "json_2.1.1"
_SENTENCE = re.compile(r'"Your task is to: (.+?)\.?"')

Row = dict[str, Any]


@dataclass(frozen=True)
class Logic:
    """The PDDL domain and the grammar that TextWorld interprets; all games share them but for the task's sentence."""

    domain: str
    grammar: str


def read_split(folder: Path, split: str, types: Sequence[str] = TASK_TYPES) -> list[Row]:
    """Return the games of `split` under `folder` that are of `types`.

    Rows keep their file's order; ALFWorld's own layout is read in the order of paths, and as ALFWorld does, without
    games that need slicing or moving of receptacles and without those marked unsolvable.
    Raises FileNotFoundError where neither layout has the split, ValueError naming file and line.
    """
    if unknown := [name for name in types if name not in TASK_TYPES]:
        raise ValueError(f"alfworld: task type {unknown[0]!r} is unknown; choose from {', '.join(TASK_TYPES)}")
    return [row for row in _rows(folder, split) if row["task_type"] in types]


def read_logic(folder: Path) -> Logic | None:
    """Return the domain and grammar beside the games of `folder`, None where there are none."""
    for place in (folder, folder / "logic"):
        domain, grammar = place / "alfred.pddl", place / "alfred.twl2"
        if domain.is_file() and grammar.is_file():
            return Logic(domain.read_text(encoding="utf-8"), grammar.read_text(encoding="utf-8"))
    return None


def check_row(row: Any, where: str = "") -> Row:
    """Return `row` if it has the form of a game. Raises ValueError, which begins with `where`, for any other."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}the row is {type(row).__name__}; expected an object with {', '.join(KEYS)}")
    for key in KEYS:
        kind = list if key == "walkthrough" else str
        if not isinstance(row.get(key), kind):
            raise ValueError(f"{where}{key!r} is {type(row.get(key)).__name__}; expected {kind.__name__}")
    if odd := [command for command in row["walkthrough"] if not isinstance(command, str)]:
        raise ValueError(f"{where}the walkthrough has {odd[0]!r:.60}; expected commands as texts")
    if row["task_type"] not in TASK_TYPES:
        expected = f"expected one of {', '.join(TASK_TYPES)}"
        raise ValueError(f"{where}task type {row['task_type']!r} is unknown; {expected}")
    return row


def _rows(folder: Path, split: str) -> Iterator[Row]:
    files = [folder / f"{split}.jsonl.xz", folder / f"{split}.jsonl"]
    for path in files:
        if path.is_file():
            return _rows_of_file(path)
    folders = [folder / OFFICIAL / split, folder / split]
    for place in folders:
        if place.is_dir():
            return _rows_of_folder(place)
    tried = ", ".join(str(path) for path in (*files, *folders))
    raise FileNotFoundError(
        f"alfworld: no games of split {split!r} under {folder} (tried {tried}); `matryoshka data alfworld` fetches "
        "them, as `alfworld-download` does; give the folder that it fills (ALFWORLD_DATA)"
    )


def _rows_of_file(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield check_row(parse_json(line, f"{path}:{number}"), f"{path}:{number}: ")
    except (lzma.LZMAError, EOFError) as err:
        raise ValueError(f"{path}: not a whole .xz file ({err}); fetch it again") from err
    if not number:
        raise ValueError(f"{path}: the file is empty; expected one game a line")


def _rows_of_folder(folder: Path) -> Iterator[Row]:
    found = False
    for path in sorted(folder.glob("*/*/game.tw-pddl")):
        found = True
        place = path.parent.relative_to(folder)
        if "movable" in str(place) or "Sliced" in str(place):
            continue
        try:
            kind = json.loads((path.parent / "traj_data.json").read_text(encoding="utf-8")).get("task_type")
            data = json.loads(path.read_text(encoding="utf-8"))
            if kind not in TASK_TYPES or not data.get("solvable"):
                continue
            sentence = _SENTENCE.search(data["grammar"])
            if sentence is None:
                raise ValueError("its grammar has no 'Your task is to: ...'")
            row = {
                "game": f"{folder.name}/{place.as_posix()}/game.tw-pddl",
                "task_type": kind,
                "task": sentence[1],
                "walkthrough": data.get("walkthrough") or [],
                "pddl_problem": data["pddl_problem"],
            }
            yield check_row(row)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
            raise ValueError(f"{path}: not a game of ALFWorld: {type(err).__name__} {err}") from err
    if not found:
        raise FileNotFoundError(f"{folder}: no */*/game.tw-pddl in it; fetch the games with `matryoshka data alfworld`")
