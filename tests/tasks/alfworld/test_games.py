"""Reading games: the same rows from both layouts, what ALFWorld leaves out, and each way in which a file can be bad."""

import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import pytest

from matryoshka.tasks.alfworld.games import TASK_TYPES, Row, read_logic, read_split
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.splits import example_of
from matryoshka.tests.tasks.alfworld.kitchen import row

DATA = Path(os.environ.get("MATRYOSHKA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "alfworld"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set MATRYOSHKA_DATA")
GRAMMAR = '{"task": [{"rhs": "Your task is to: %s."}]}'


def games() -> list[Row]:
    names = (
        "pick_heat_then_place_in_recep-Potato-None-Fridge-1/trial_1",
        "look_at_obj_in_light-CD-None-DeskLamp-3/trial_2",
    )
    return [row(game=f"train/{name}/game.tw-pddl", task_type=name.partition("-")[0]) for name in sorted(names)]


def write_official(folder: Path, rows: list[Row], **changes: Any) -> None:
    """Write `rows` as alfworld-download lays games out, with `changes` to what their files say."""
    for one in rows:
        path = folder / "json_2.1.1" / one["game"]
        path.parent.mkdir(parents=True)
        data = {"grammar": GRAMMAR % one["task"], "pddl_domain": "", "solvable": True, **one, **changes}
        path.write_text(json.dumps(data))
        (path.parent / "traj_data.json").write_text(json.dumps({"task_type": one["task_type"]}))


def test_both_layouts_give_the_same_rows(tmp_path: Path) -> None:
    """Oracle: the rows that were written."""
    lines = "".join(json.dumps(one) + "\n" for one in games())
    for name, write in (("plain", "train.jsonl"), ("packed", "train.jsonl.xz")):
        (tmp_path / name).mkdir()
        data = lines.encode()
        (tmp_path / name / write).write_bytes(lzma.compress(data) if write.endswith("xz") else data)
        assert read_split(tmp_path / name, "train") == games()
    write_official(tmp_path / "official", games())
    assert read_split(tmp_path / "official", "train") == games()
    assert read_split(tmp_path / "official" / "json_2.1.1", "train") == games()


def test_types_choose_in_order(tmp_path: Path) -> None:
    """Oracle: three rows of two types, chosen by hand."""
    look, heat = games()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (heat, look, heat)))
    assert read_split(tmp_path, "train", types=("look_at_obj_in_light",)) == [look]
    assert read_split(tmp_path, "train", types=(heat["task_type"],)) == [heat, heat]


def test_what_alfworld_leaves_out_is_left_out(tmp_path: Path) -> None:
    """Oracle: ALFWorld's own environment: no slicing, no movable receptacles, nothing unsolvable, no other type."""
    look, heat = games()
    write_official(tmp_path, [look])
    write_official(tmp_path, [{**heat, "game": heat["game"].replace("Potato", "PotatoSliced")}])
    write_official(tmp_path, [{**heat, "game": heat["game"].replace("trial_1", "trial_movable")}])
    write_official(tmp_path, [{**heat, "game": heat["game"].replace("trial_1", "trial_unsolved")}], solvable=False)
    write_official(tmp_path, [{**heat, "game": heat["game"].replace("trial_1", "trial_other"), "task_type": "movable"}])
    assert read_split(tmp_path, "train") == [look]


def test_a_game_without_a_walkthrough_has_an_empty_one(tmp_path: Path) -> None:
    """Oracle: by definition."""
    write_official(tmp_path, games(), walkthrough=None)
    assert [one["walkthrough"] for one in read_split(tmp_path, "train")] == [[], []]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"malformed JSON \(Expecting property name"),
        ("[]", "the row is list; expected an object with game, "),
        (json.dumps({"game": "g"}), "'task_type' is NoneType; expected str"),
        (json.dumps(row(walkthrough="look")), "'walkthrough' is str; expected list"),
        (json.dumps(row(walkthrough=["look", 3])), "the walkthrough has 3; expected commands as texts"),
        (json.dumps(row(task_type="sing")), "task type 'sing' is unknown; expected one of pick_and_place_simple, "),
        ('{"game": "\udcff"}', r"not UTF-8 \(byte 11\)"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    """Oracle: one fault at a time in line 2; the message names file and line."""
    data = json.dumps(row()) + "\n" + line + "\n"
    (tmp_path / "train.jsonl").write_bytes(data.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: {message}"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("pattern", "put", "message"),
    [
        (r"\(inReceptacle (\S+) \S+\)", r"(inReceptacle \1)", "its problem cannot be played: IndexError"),
        (r"\(:init", "(:init (inReceptacle ghost_bar_1 ghost_bar_2)", "its problem cannot be played: KeyError"),
        (r"\(:init", "(:init (openable)", "its problem cannot be played: IndexError"),
        (r"\(:init", "(:init (objectType x)", "not enough values to unpack"),
        (r"\(:goal (.*)\)\s*\)\s*$", rf"(:goal {'(and ' * 3000}\1{')' * 3000}))", "cannot be played: RecursionError"),
    ],
)
def test_a_problem_that_cannot_be_played_is_named(pattern: str, put: str, message: str) -> None:
    """Oracle: one fault at a time in the problem of a household that is sound without it."""
    (sound,) = households("train", 1, 0)
    problem, count = re.subn(pattern, put, sound["pddl_problem"], count=1, flags=re.DOTALL)
    assert count == 1 and example_of(sound).id == sound["game"]
    with pytest.raises(ValueError, match=f"game {re.escape(sound['game'])}: .*{message}"):
        example_of({**sound, "pddl_problem": problem})


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """Oracle: an empty file, a cut archive and an empty folder; each message names the place."""
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl: the file is empty"):
        read_split(tmp_path, "train")
    (tmp_path / "valid_seen.jsonl.xz").write_bytes(lzma.compress(json.dumps(row()).encode())[:-20])
    with pytest.raises(ValueError, match=r"valid_seen\.jsonl\.xz: not a whole \.xz file"):
        read_split(tmp_path, "valid_seen")
    (tmp_path / "valid_unseen").mkdir()
    with pytest.raises(FileNotFoundError, match="valid_unseen: no .*game.tw-pddl"):
        read_split(tmp_path, "valid_unseen")
    write_official(tmp_path / "official", games(), grammar="{}")
    with pytest.raises(ValueError, match=r"game\.tw-pddl: not a game of ALFWorld: .*no 'Your task is to"):
        read_split(tmp_path / "official", "train")
    write_official(tmp_path / "number", games(), grammar=3)
    with pytest.raises(ValueError, match=r"game\.tw-pddl: not a game of ALFWorld: TypeError"):
        read_split(tmp_path / "number", "train")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """Oracle: each message names the missing split or the unknown type."""
    with pytest.raises(FileNotFoundError, match=r"no games of split 'train' under .*alfworld-download.*ALFWORLD_DATA"):
        read_split(tmp_path, "train")
    with pytest.raises(ValueError, match="task type 'sing' is unknown; choose from pick_and_place_simple"):
        read_split(tmp_path, "train", types=("sing",))


def test_the_logic_is_found_in_both_layouts(tmp_path: Path) -> None:
    """Oracle: files written in either place; the folder's own come first."""
    assert read_logic(tmp_path) is None
    for place in (tmp_path / "logic", tmp_path):
        place.mkdir(exist_ok=True)
        (place / "alfred.pddl").write_text("domain")
        (place / "alfred.twl2").write_text(str(place))
        logic = read_logic(tmp_path)
        assert logic is not None and (logic.domain, logic.grammar) == ("domain", str(place))


@needs_data
def test_the_real_files_are_read_whole() -> None:
    """Oracle: the published counts of valid_seen by type, and that every type occurs."""
    rows = read_split(DATA, "valid_seen")
    counts = [sum(one["task_type"] == kind for one in rows) for kind in TASK_TYPES]
    assert counts == [35, 13, 27, 16, 25, 24] and len({one["game"] for one in rows}) == 140
