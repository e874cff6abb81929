"""Plans as a language, and the generator that takes them at their word: the plan alone decides."""

import asyncio
import json
import lzma
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.core.protocols import GeneratorError, TaskSetting
from matryoshka.core.records import Example, Message, RolloutSettings, Sampling, Trajectory
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance, ScriptedGuidance
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import Game, load_game
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.plan_language import (
    Step,
    from_walkthrough,
    merged,
    parse_plan,
    parse_step,
    program,
    write_compact,
    write_full,
)
from matryoshka.tasks.alfworld.playthrough import Environment, screen_text
from matryoshka.tasks.alfworld.prompt_style import Scene, Style
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tests.tasks.alfworld import kitchen

DATA = Path(os.environ.get("MATRYOSHKA_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
STYLES = [Style("brief"), Style("compact"), Style("full")]
NAMES = st.sampled_from(["mug", "cellphone", "knife", "cd", "handtowel"])
PLACES = st.lists(st.sampled_from(["cabinet", "cabinet 2", "sinkbasin", "desk 1", "tvstand"]), min_size=1, max_size=4)
STEPS = st.builds(Step, st.sampled_from(["find", "clean", "heat", "cool", "put", "use"]), NAMES, PLACES.map(tuple))


@given(st.lists(STEPS, min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(steps: list[Step]) -> None:
    """Oracle: the steps themselves, through either style."""
    for write in (write_full, write_compact):
        read = parse_plan(write(steps))
        assert [(step.verb, step.thing, step.places) for step in read] == [(s.verb, s.thing, s.places) for s in steps]


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("Find a mug in the countertop, the coffeemachine or the cabinet 2 and take it.",
         ("find", "mug", ("countertop", "coffeemachine", "cabinet 2"))),
        ("find mug: shelf, desk 1", ("find", "mug", ("shelf", "desk 1"))),
        ("Take another cellphone from the bed", ("find", "cellphone", ("bed",))),
        ("look for the hot potato on countertop and in fridge", ("find", "potato", ("countertop",))),
        ("Heat the mug 1 with the microwave 1.", ("heat", "mug", ("microwave 1",))),
        ("cool the hot mug using fridge", ("cool", "mug", ("fridge",))),
        ("Clean cloth in sinkbasin", ("clean", "cloth", ("sinkbasin",))),
        ("Put the clean mug on the shelf", ("put", "mug", ("shelf",))),
        ("turn on the desklamp near the desk", ("use", "desklamp", ("desk",))),
        ("Use the desklamp on desk 1", ("use", "desklamp", ("desk 1",))),
        ("dance with the mug in the shelf", ("", "", ())),
        ("find a mug", ("", "", ())),
        ("", ("", "", ())),
    ],
)  # fmt: skip
def test_steps_are_read_as_they_are_meant(words: str, step: tuple[str, str, tuple[str, ...]]) -> None:
    """Oracle: by eye."""
    found = parse_step(words)
    assert (found.verb, found.thing, found.places) == step


def test_lines_without_a_number_are_no_steps() -> None:
    """Oracle: by eye, in the forms that models use."""
    text = "General plan: find it.\n# [Step 1] find mug: shelf\nStep 2: put mug: desk\n3) put mug: bed\nput mug: sofa"
    assert [step.places for step in parse_plan(text)] == [("shelf",), ("desk",), ("bed",)]
    assert parse_plan("no steps at all") == []


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_words_make_a_program_that_compiles(words: str) -> None:
    """Oracle: Python's compiler; the words of a model cannot become code."""
    source = program([parse_step(words), Step("", words=words)])
    names = compile(source, "x", "exec").co_names
    assert names == ("step_1", "step_2")


def test_a_walkthrough_becomes_steps_with_the_lamp_where_it_stands() -> None:
    """Oracle: by hand; the lamp is not where the player stands but in reach of it."""
    commands = ["go to bed 1", "use desklamp 1", "open drawer 1", "take pen 2 from drawer 1", "move pen 2 to desk 1"]
    steps = from_walkthrough(commands, {"desklamp 1": "shelf 3"})
    assert write_compact(steps) == "1. use desklamp: shelf 3\n2. find pen: drawer 1\n3. put pen: desk 1"
    with pytest.raises(ValueError, match="no step stands for 'slice bread 1 with knife 1'"):
        from_walkthrough(["slice bread 1 with knife 1"], {})


def test_games_that_look_alike_have_one_plan() -> None:
    """Oracle: by hand; and in the kitchen with its two potatoes swapped, the one plan of both wins both."""
    plans = [
        [Step("use", "desklamp", ("desk 1",)), Step("find", "pen", ("desk 1",))],
        [Step("find", "pen", ("bed 1",)), Step("use", "desklamp", ("desk 1",))],
        [Step("put", "pen", ("bed 1",))],
    ]
    both = [Step("find", "pen", ("desk 1", "bed 1")), Step("use", "desklamp", ("desk 1",))]
    assert merged(plans) == both and merged(plans[2:]) == plans[2]
    swapped = kitchen.PROBLEM.replace("(inReceptacle Potato_bar_1 CounterTop_bar_1)", "")
    assert swapped != kitchen.PROBLEM
    walkthrough = ["go to fridge 1", "open fridge 1", "take potato 1 from fridge 1", "go to microwave 1"]
    walkthrough += ["heat potato 1 with microwave 1", "go to fridge 1", "move potato 1 to fridge 1"]
    heatable = swapped.replace("(heatable Potato_bar_1)", "(heatable Potato_bar_1) (heatable Potato_bar_2)")
    other = kitchen.row(game="other", pddl_problem=heatable, walkthrough=walkthrough)
    games = [load_game(kitchen.row()), load_game(other)]
    for style in STYLES:
        assert [t.reward for t in play(games, style, gold)] == [1.0, 1.0]


def example(game: Game) -> Example:
    where = {game.names[fact[1]]: game.names[fact[2]] for fact in game.facts if fact[0] == "inreceptacle"}
    gold = [[step.verb, step.thing, list(step.places)] for step in from_walkthrough(game.walkthrough, where)]
    fields = {"question": screen_text(Engine(game).observation.text), "answer": "", "task_type": game.task_type}
    return Example(game.id, {**fields, "gold": gold})


def make_task(
    examples: Sequence[Example], style: Style, environment: Callable[[Example], Environment], **options: Any
) -> ALFWorldTask:
    task = ALFWorldTask(AlfworldOptions(**options), TaskSetting({}))
    task.__dict__["_splits"] = {"test": examples}
    task.style, task.household = style, environment
    return task


def play(
    games: Sequence[Game], style: Style, make_plan: Any, mode: Any = "program", verbs: str = "current"
) -> list[Trajectory]:
    """Return one episode a game; make_plan: "own", "none", or a function from (task, index, example) to a plan."""
    by_id = {game.id: game for game in games}
    examples = [example(game) for game in games]
    task = make_task(examples, style, lambda asked: Engine(by_id[asked.id], verbs), mode=mode, verbs=verbs)
    generator = LiteralGenerator()

    # One controller for all, as in a run: it sees prompts and no games.
    controller: Any = {"own": GeneratorGuidance(generator), "none": NoGuidance()}.get(make_plan)
    if controller is None:
        table = {task.first_prompt(asked): make_plan(task, i, asked) for i, asked in enumerate(examples)}
        controller = ScriptedGuidance("fixed", table)

    async def all_of_them() -> list[Trajectory]:
        settings = RolloutSettings(Sampling(1.0))
        runs = (task.rollout(asked, controller, generator, settings) for asked in examples)
        return list(await asyncio.gather(*runs))

    return asyncio.run(all_of_them())


def gold(task: ALFWorldTask, index: int, asked: Example) -> str:
    return str(task.gold_guidance(asked))


def garbage(task: ALFWorldTask, index: int, asked: Example) -> str:
    """Return numbered lines of the very words of gold plans, in no order."""
    draws = random.Random(index)
    words = [word for other in task.examples("test") for word in re.findall(r"\w+", str(task.gold_guidance(other)))]
    return "\n".join(f"{number}. {' '.join(draws.choices(words, k=6))}" for number in range(1, 5))


@pytest.fixture(scope="module")
def own_games() -> list[Game]:
    return [load_game(row) for size, n in (("small", 12), ("medium", 12)) for row in households("train", n, 5, size)]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_gold_plans_win_everything_and_other_plans_nothing(style: Style, own_games: list[Game]) -> None:
    """Oracle: the duty of a literal reader: it wins with gold plans, never with none, garbage or another game's."""
    assert [t.reward for t in play(own_games, style, gold)] == [1.0] * len(own_games)
    for bad in ("none", garbage):
        assert sum(t.reward for t in play(own_games, style, bad)) == 0

    def wrong(task: ALFWorldTask, index: int, asked: Example) -> str:
        others = task.examples("test")
        return gold(task, index, others[(index + 1) % len(others)])

    assert sum(t.reward for t in play(own_games, style, wrong)) <= 1


@pytest.mark.parametrize("verbs", ["current", "old"])
def test_its_actions_are_those_of_its_program(verbs: str, own_games: list[Game]) -> None:
    """Oracle: the same episodes with programs, command for command; without a plan it does nothing, fifty times."""
    style = Style("full", verbs=verbs)

    def commands(mode: str, plans: Any) -> list[tuple[float, list[str]]]:
        told = [
            (t.reward, "\n".join(call.outcome for call in t.turns[0].calls))
            for t in play(own_games, style, plans, mode, verbs)
        ]
        return [(reward, re.findall("^> (.+)$", story, re.MULTILINE)) for reward, story in told]

    for plans in (gold, garbage):
        acted = commands("react", plans)
        assert acted == commands("program", plans)
        assert [reward for reward, _ in acted] == [float(plans is gold)] * len(own_games)
    idle = play(own_games[:1], style, "none", "react", verbs)[0]
    assert (idle.reward, idle.info.measures["steps"], idle.info.calls, idle.info.verdict) == (0.0, 50, 50, "error")


def test_its_own_plans_win_some(own_games: list[Game]) -> None:
    """Oracle: the right steps with guessed places must win some games and not all, as a warm-up's filter needs."""
    for style in STYLES:
        won = [t.reward for t in play(own_games, style, "own")]
        assert 0 < sum(won) < len(won)


def test_answers_are_a_function_of_prompt_and_seed() -> None:
    """Oracle: equality, and difference of at least one draw."""
    game = load_game(kitchen.row())
    task = make_task([], Style("compact"), lambda _: Engine(game))
    prompt = task.first_prompt(example(game))

    def said(seed: int, draw: int) -> str:
        return asyncio.run(LiteralGenerator().complete(prompt, Sampling(1.0, seed=seed, draw=draw))).text

    assert said(1, 0) == said(1, 0)
    assert len({said(seed, draw) for seed in range(3) for draw in range(3)}) > 2
    assert re.fullmatch(r"1\. find potato: [\w, ]+\n2\. heat potato: microwave\n3\. put potato: fridge", said(1, 0))


def test_a_retry_is_answered_with_the_same_plan() -> None:
    """Oracle: the program for the first request, whatever the complaint says."""
    game = load_game(kitchen.row())
    asked = example(game)
    style, generator = Style("full"), LiteralGenerator()
    task = make_task([asked], style, lambda _: Engine(game))
    plan = str(task.gold_guidance(asked)).replace("microwave", "shelf")
    controller = ScriptedGuidance("fixed", {task.first_prompt(asked): plan})
    trajectory = asyncio.run(task.rollout(asked, controller, generator, RolloutSettings(inner_attempts=3)))
    first, *others = [call.sample.text for call in trajectory.turns[0].calls]
    assert others == [first, first] and "shelf" in first


@pytest.mark.parametrize("system", ["You answer questions", "", "You act"])
def test_what_it_cannot_answer_fails_the_episode(system: str) -> None:
    """Oracle: the exception that fails an episode; it quotes the request."""
    with pytest.raises(GeneratorError, match="writes programs, actions and plans only"):
        asyncio.run(LiteralGenerator().complete((Message("system", system), Message("user", "?")), Sampling()))


def test_a_sentence_of_no_known_kind_fails_the_episode() -> None:
    """Oracle: the exception names the sentence."""
    prompt = (*Style("compact").plan(example_scene())[:-1], Message("user", "cabinet, desk\ndance on the table"))
    with pytest.raises(GeneratorError, match="'dance on the table'"):
        asyncio.run(LiteralGenerator().complete(prompt, Sampling()))


def example_scene() -> Any:
    return Scene(screen_text(Engine(load_game(kitchen.row())).observation.text), "pick_heat_then_place_in_recep")


@pytest.mark.slow
def test_gold_plans_win_all_of_valid_seen() -> None:
    """Oracle: ALFWorld's own games: 140 of 140 with gold plans, hardly any with another game's."""
    path = DATA / "alfworld" / "valid_seen.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not here; MATRYOSHKA_DATA names the folder")
    games = [load_game(json.loads(line)) for line in lzma.open(path, "rt")]
    assert sum(t.reward for t in play(games, Style("compact"), gold)) == len(games) == 140
    assert sum(t.reward for t in play(games, Style("compact"), garbage)) <= 2
