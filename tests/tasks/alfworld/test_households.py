"""Our own households: each can be won, held-out tasks are not trained on, and a seed always makes the same ones."""

import json

import pytest

from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.games import SPLITS, TASK_TYPES, check_row
from matryoshka.tasks.alfworld.households import SIZES, goals, households


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_walkthrough_does_what_the_task_says(split: str, size: str) -> None:
    """Oracle: the engine, which knows nothing of how a household is built, and the row having gone through JSON."""
    for made in households(split, 30, 7, size):
        row = check_row(json.loads(json.dumps(made)))
        engine = Engine(load_game(row))
        won = [engine.step(command).won for command in row["walkthrough"]]
        assert won == [False] * (len(won) - 1) + [True], row["game"]
        assert "Nothing happens." not in engine.observation.text
        assert len(won) <= 12  # far below ALFWorld's limit of 50
        _, thing, _, target, _ = row["game"].split("/")[1].split("-")
        assert thing.lower() in row["task"] and target.lower() in row["task"]
        assert f"{target.lower()} " in row["walkthrough"][-1], row


def test_types_come_in_turn_and_sizes_hold() -> None:
    """Oracle: the promised sizes; things that a task needs may come on top."""
    for size, promised in SIZES.items():
        rows = households("train", 12, 3, size)
        assert [row["task_type"] for row in rows] == [*TASK_TYPES, *TASK_TYPES]
        for row in rows:
            game = load_game(row)
            assert promised.receptacles <= len(game.receptacles) <= promised.receptacles + 2
            assert promised.things <= len(game.objects) <= promised.things + 2


def test_held_out_goals_are_those_of_no_training_household() -> None:
    """Oracle: the pair of thing and target in the names of the games; every type has both sorts."""

    def pairs(split: str) -> set[tuple[str, ...]]:
        return {tuple(row["game"].split("/")[1].split("-")[1:4:2]) for row in households(split, 150, 0)}

    assert not pairs("valid_unseen") & (pairs("train") | pairs("valid_seen"))
    assert pairs("train") & pairs("valid_seen")
    for kind in TASK_TYPES:
        assert len(goals(kind, "valid_unseen")) >= 4 and goals(kind, "train") == goals(kind, "valid_seen")


def test_a_seed_decides_everything() -> None:
    """Oracle: equality of whole rows; other seeds, splits and sizes make other households."""
    first = households("train", 6, 1)
    assert households("train", 12, 1)[:6] == first
    assert households("train", 3, 1, types=("look_at_obj_in_light",))[1] == first[1]
    problems = {row["pddl_problem"] for row in first}
    for other in (households("train", 6, 2), households("valid_seen", 6, 1), households("train", 6, 1, "medium")):
        assert not problems & {row["pddl_problem"] for row in other}


def test_household_problems_do_not_repeat() -> None:
    """Oracle: 120 rows have 120 different problems and names."""
    rows = households("train", 120, 0)
    assert len({row["pddl_problem"].split("(:objects")[1] for row in rows}) == len({row["game"] for row in rows}) == 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 1, 0), "split 'test' is unknown; choose from train, valid_seen, valid_unseen"),
        (("train", 1, 0, "huge"), "size 'huge' is unknown; choose from small, medium, large"),
        (("train", 1, 0, "small", ("sing",)), "task type 'sing' is unknown"),
        (("train", 1, 0, "small", ()), "task type '' is unknown"),
    ],
)
def test_what_there_is_not_is_named(arguments: tuple[str, int, int], message: str) -> None:
    """Oracle: the message for each argument, by hand."""
    with pytest.raises(ValueError, match=message):
        households(*arguments)
