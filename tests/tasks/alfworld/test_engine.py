"""The engine plays a kitchen known by heart, command by command, with its refusals, and ALFWorld's games.

The transcript was written from ALFWorld's grammar by hand; test_equality.py plays the same commands in TextWorld.
"""

import os
import pickle
from pathlib import Path

import pytest

from matryoshka.tasks.alfworld.engine import HELP, Engine, Observation
from matryoshka.tasks.alfworld.game import Game, in_verbs, load_game
from matryoshka.tasks.alfworld.games import read_split
from matryoshka.tests.tasks.alfworld.kitchen import PROBLEM, TRANSCRIPT, WALKTHROUGH, row

DATA = Path(os.environ.get("MATRYOSHKA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "alfworld"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set MATRYOSHKA_DATA")

SCREEN = (
    "-= Welcome to TextWorld, ALFRED! =-\n\n"
    "You are in the middle of a room. Looking quickly around you, you see a countertop 1, a drawer 2, a drawer 1, "
    "a fridge 1, a microwave 1, and a sinkbasin 1.\n\n"
    "Your task is to: put a hot potato in fridge."
)
AT_START = (
    *("go to countertop 1", "go to drawer 1", "go to drawer 2", "go to fridge 1", "go to microwave 1"),
    *("go to sinkbasin 1", "help", "inventory", "look"),
)


@pytest.fixture
def game() -> Game:
    return load_game(row())


def play(engine: Engine, *commands: str) -> Observation:
    for command in commands:
        engine.step(command)
    return engine.observation


def test_a_game_tells_what_it_is(game: Game) -> None:
    """Oracle: the rows of the kitchen; names number the ids of a type downwards, lists run in the order of ids."""
    assert (game.task_type, game.task) == ("pick_heat_then_place_in_recep", "put a hot potato in fridge")
    assert game.id.endswith("/by_hand") and game.walkthrough == tuple(WALKTHROUGH)
    assert game.receptacles == ("countertop 1", "drawer 2", "drawer 1", "fridge 1", "microwave 1", "sinkbasin 1")
    assert game.objects == (*("desklamp 1", "knife 1", "mug 1", "potato 2", "potato 1", "saltshaker 1", "spoon 1"),)


def test_every_command_reads_as_in_the_grammar(game: Game) -> None:
    """Oracle: the transcript written by hand."""
    engine = Engine(game)
    assert engine.observation.text == SCREEN
    for command, text in TRANSCRIPT:
        assert (command, engine.step(command).text) == (command, text)


def test_the_first_screen_and_its_commands(game: Game) -> None:
    """Oracle: the kitchen's first screen and commands, by hand."""
    assert Engine(game).observation == Observation(SCREEN, AT_START, 0.0, False, False)


def test_what_is_admissible_beside_the_countertop_and_with_the_knife_in_hand(game: Game) -> None:
    """Oracle: the domain's conditions: no second object, nothing onto what cannot hold it, slicing with a knife."""
    engine = Engine(game)
    travel = {"go to drawer 1", "go to drawer 2", "go to fridge 1", "go to microwave 1", "go to sinkbasin 1"}
    always = travel | {"help", "inventory", "look", "examine countertop 1", "use desklamp 1"}
    takes = {f"take {name} from countertop 1" for name in ("knife 1", "mug 1", "potato 2", "saltshaker 1")}
    assert set(play(engine, "go to countertop 1").admissible) == always | takes
    assert set(play(engine, "take knife 1 from countertop 1").admissible) == always | {
        "examine knife 1",
        "move knife 1 to countertop 1",
        "slice potato 2 with knife 1",
    }


def test_the_walkthrough_wins_with_its_last_command_only(game: Game) -> None:
    """Oracle: scores by hand: six commands without a score, then the win."""
    engine = Engine(game)
    seen = [engine.step(command) for command in WALKTHROUGH]
    assert [(o.score, o.done, o.won) for o in seen] == [(0.0, False, False)] * 6 + [(1.0, True, True)]


def test_the_end_is_where_the_goal_holds_not_a_latch(game: Game) -> None:
    """Oracle: TextWorld asks for the goal after every command, so that taking the potato out again undoes the win."""
    engine = Engine(game)
    assert play(engine, *WALKTHROUGH).won and engine.step("look").won
    assert not engine.step("take potato 2 from fridge 1").done
    assert engine.step("move potato 2 to fridge 1").score == 1.0


@pytest.mark.parametrize(
    "command",
    [
        *("", "xyzzy", "LOOK", "go to countertop", "go to countertop 2", "go  to countertop 1", "open fridge 1"),
        *("take potato 2 from countertop 1", "examine potato 2", "use desklamp 1", "put potato 2 in/on fridge 1"),
    ],
)
def test_what_is_not_admissible_changes_nothing(game: Game, command: str) -> None:
    """Oracle: ALFWorld's own answer to such a command; the snapshot is equal."""
    engine = Engine(game)
    before = engine.snapshot()
    assert engine.step(command) == Observation("Nothing happens.", AT_START, 0.0, False, False)
    assert engine.snapshot()._replace(observation=before.observation) == before


def test_blanks_around_a_command_do_not_count(game: Game) -> None:
    """Oracle: the command without blanks."""
    assert Engine(game).step("  look\n").text == Engine(game).step("look").text


def test_a_reset_is_a_fresh_start(game: Game) -> None:
    """Oracle: a new engine of the game."""
    engine = Engine(game)
    play(engine, *WALKTHROUGH)
    assert engine.reset() == Engine(game).observation == engine.observation
    assert engine.snapshot() == Engine(game).snapshot()


def test_engines_of_one_game_do_not_meet(game: Game) -> None:
    """Oracle: one engine plays to the end, and the other is still at the start."""
    one, other = Engine(game), Engine(game)
    play(one, *WALKTHROUGH)
    assert other.observation.text == SCREEN and play(other, *WALKTHROUGH).won


@pytest.mark.parametrize("at", range(len(WALKTHROUGH)))
def test_a_restored_moment_goes_on_as_it_did(game: Game, at: int) -> None:
    """Oracle: the same commands played without interruption; the snapshot went through pickle meanwhile."""
    engine, straight = Engine(game), Engine(game)
    play(engine, *WALKTHROUGH[:at])
    snapshot = pickle.loads(pickle.dumps(engine.snapshot()))
    play(engine, "go to drawer 1", "open drawer 2", "look")
    assert engine.restore(snapshot) == play(straight, *WALKTHROUGH[:at])
    for command in WALKTHROUGH[at:]:
        assert engine.step(command) == straight.step(command)


def test_a_snapshot_of_another_game_is_refused(game: Game) -> None:
    """Oracle: the message names both games."""
    with pytest.raises(ValueError, match="the snapshot is of game .*by_hand; this one plays another"):
        Engine(load_game(row(game="another"))).restore(Engine(game).snapshot())


def test_the_old_verbs(game: Game) -> None:
    """Oracle: ALFWorld before 0.4.0: put in/on, positions instead of names, no help."""
    engine = Engine(game, "old")
    assert "help" not in engine.observation.admissible and engine.step("help").text == "Nothing happens."
    # Positions are numbered like everything else: of loc_bar_0 to loc_bar_5 the fifth has number 2.
    shown = engine.step("go to countertop 1").text
    assert shown.startswith("You arrive at loc 2. On the countertop 1, you see a desklamp 1, ")
    play(engine, *WALKTHROUGH[1:6])
    assert engine.step("move potato 2 to fridge 1").text == "Nothing happens."
    assert "put potato 2 in/on fridge 1" in engine.observation.admissible
    done = engine.step("put potato 2 in/on fridge 1")
    assert (done.text, done.won) == ("You put the potato 2 in/on the fridge 1.", True)


def test_verbs_translate_both_ways() -> None:
    """Oracle: ALFWorld's old and current verbs, by hand."""
    assert (
        in_verbs("move mug 1 to desk 2", "old") == "put mug 1 in/on desk 2" == in_verbs("put mug 1 in/on desk 2", "old")
    )
    assert in_verbs("put mug 1 in/on desk 2", "current") == "move mug 1 to desk 2"
    assert in_verbs("go to desk 2", "old") == "go to desk 2" == in_verbs("go to desk 2", "current")


def test_help_names_the_current_verbs(game: Game) -> None:
    """Oracle: ALFWorld's help text."""
    assert Engine(game).step("help").text == HELP and "move (object) to (receptacle)" in HELP


def test_who_starts_beside_a_receptacle_faces_it() -> None:
    """Oracle: the grammar's first choice for `look`, which the first screen uses too."""
    beside = row(pddl_problem=PROBLEM.replace("(atLocation agent1 loc_bar_0)", "(atLocation agent1 loc_bar_5)"))
    observation = Engine(load_game(beside)).observation
    assert "\n\nYou are facing the drawer 2, and drawer 1. Next to it, you see nothing.\n\n" in observation.text
    assert "go to drawer 1" not in observation.admissible and "open drawer 1" in observation.admissible


@pytest.mark.parametrize(
    ("cut", "into", "message"),
    [
        ("(atLocation agent1 loc_bar_0)", "", r"0 facts \(atLocation agent location\); expected one"),
        ("(atLocation agent1 loc_bar_0)", "(holds agent1 Mug_bar_1) (atLocation agent1 loc_bar_0)", "in hand"),
        ("(receptacleType Drawer_bar_2 DrawerType)", "", "receptacle drawer_bar_2 has no fact"),
        ("(openable Drawer_bar_2)", "(receptacleAtLocation Drawer_bar_2 loc_bar_0)", "drawer_bar_2 has two facts"),
        ("(isHot ?o)", "(checked ?o)", r"the goal asks for \(checked \?o\), which is not kept track of"),
        ("(isHot ?o)", "(isHot ?x)", r"\?x in \(ishot \?x\) is bound by no quantifier"),
        ("(heatable ?o)", "(heatable ?x)", r"\?x in \(heatable \?x\) is bound by no quantifier"),
        ("(:goal", "(:metric", r"the problem has no \(:goal"),
        ("loc_bar_unused - location)", "loc_bar_unused)", "'loc_bar_0' has no type"),
        ("(inReceptacle ?o ?r))))))", "(inReceptacle ?o ?r)))))", r"1 '\(' not closed"),
        ("(define", ")(define", r"a '\)' closes nothing"),
        ("(define", "(defined", r"the text begins with \(defined"),
    ],
)
def test_a_problem_that_cannot_be_played_is_named(cut: str, into: str, message: str) -> None:
    """Oracle: one fault at a time; the message names the game and the fault."""
    assert cut in PROBLEM
    with pytest.raises(ValueError, match=rf"game train/.*by_hand: .*{message}"):
        load_game(row(pddl_problem=PROBLEM.replace(cut, into)))


def test_a_row_without_a_problem_and_unknown_verbs_are_named(game: Game) -> None:
    """Oracle: each message, by hand."""
    with pytest.raises(ValueError, match="game g: the row has no 'task_type'; it has game"):
        load_game({"game": "g"})
    with pytest.raises(ValueError, match="verbs 'new' are unknown; choose 'current' or 'old'"):
        Engine(game, "new")


@needs_data
@pytest.mark.parametrize("split", ["valid_seen"])
def test_the_stored_walkthroughs_win(split: str) -> None:
    """Oracle: ALFWorld's planner, whose commands were stored with the games; in both kinds of verbs."""
    for given in read_split(DATA, split):
        game = load_game(given)
        for verbs in ("current", "old"):
            engine = Engine(game, verbs)
            assert not engine.observation.won, game.id
            assert play(engine, *(in_verbs(command, verbs) for command in game.walkthrough)).won, game.id


@needs_data
@pytest.mark.slow
def test_the_stored_walkthroughs_of_all_games_win() -> None:
    """Oracle: ALFWorld's own walkthroughs of 3,893 games."""
    played = 0
    for split in ("train", "valid_train", "valid_seen"):
        for given in read_split(DATA, split):
            assert play(Engine(load_game(given)), *given["walkthrough"]).won, given["game"]
            played += 1
    assert played == 3893
