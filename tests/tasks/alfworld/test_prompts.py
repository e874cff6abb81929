"""Prompts show true exemplars and an API that exists, and nothing that only gold plans know."""

import asyncio
import inspect
import re
from pathlib import Path

import pytest

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld import prompt_style, react
from matryoshka.tasks.alfworld.agent import Agent, kind_of, receptacles_of, task_of
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS, played
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.games import TASK_TYPES
from matryoshka.tasks.alfworld.plan_language import (
    Step,
    in_sentences,
    parse_plan,
    program,
    straight_program,
    write_compact,
    write_full,
)
from matryoshka.tasks.alfworld.playthrough import Session, screen_text
from matryoshka.tasks.alfworld.program import AskRefusedError, Limits, run_program
from matryoshka.tasks.alfworld.prompt_style import PLAN_MARK, Failure, Scene, Style

# What stands where in the exemplars' rooms: the thing of the task where a sensible search finds it late, or a lamp.
THINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "pick_and_place_simple": {"cellphone": ("dresser 1",)},
    "look_at_obj_in_light": {"newspaper": ("armchair 1",), "floorlamp": ("tvstand 1",)},
    "pick_clean_then_place_in_recep": {"plate": ("diningtable 1",)},
    "pick_heat_then_place_in_recep": {"potato": ("garbagecan 1",)},
    "pick_cool_then_place_in_recep": {"tomato": ("sinkbasin 1",)},
    "pick_two_obj_and_place": {"soapbar": ("sinkbasin 1", "bathtubbasin 1")},
}
OPENABLE = ("cabinet", "drawer", "fridge", "microwave")
MADE = {"clean": "isClean", "heat": "isHot", "cool": "isCool"}


def place_id(kind: str, number: str) -> str:
    """Return an id of ALFWorld's form; a basin's ends in its kind."""
    stem = kind.removesuffix("basin")
    return f"{stem}_bar_{99 - int(number)}" + f"_bar_{kind}" * (stem != kind)


def room(task_type: str) -> dict[str, object]:
    """Return an exemplar's room as a game of its own, written from its screen and the table above."""
    screen = EXEMPLARS[task_type].screen
    receptacles, things = receptacles_of(screen), THINGS[task_type]
    facts = ["atLocation agent1 loc_bar_0"]
    objects = ["agent1 - agent", "loc_bar_0 - location"]
    kinds = {kind_of(name) for name in receptacles} | {"sinkbasin", "microwave", "fridge"}
    objects += [f"{kind}Type - rtype" for kind in sorted(kinds)]
    objects += [f"{kind}Type - otype" for kind in sorted({*things, "knife", "butterknife"})]
    # Numbers run against the order of ids: the first id of a type gets the highest number.
    place_ids = {name: place_id(*name.split()) for name in receptacles}
    for number, (name, id) in enumerate(place_ids.items(), start=1):
        objects += [f"{id} - receptacle", f"loc_bar_{number} - location"]
        facts += [f"receptacleAtLocation {id} loc_bar_{number}", f"receptacleType {id} {kind_of(name)}Type"]
        facts += [f"openable {id}"] * (kind_of(name) in OPENABLE)
    for thing, places in things.items():
        for number, place in enumerate(places):
            id = f"{thing}_bar_{number}"
            objects.append(f"{id} - object")
            here = f"loc_bar_{receptacles.index(place) + 1}"
            facts += [f"objectType {id} {thing}Type", f"inReceptacle {id} {place_ids[place]}"]
            facts += [f"objectAtLocation {id} {here}"]
            facts += [f"{trait} {id}" for trait in ("pickupable", "cleanable", "heatable", "coolable")]
            facts += [f"toggleable {id}"] * thing.endswith("lamp")
        facts += [f"canContain {kind}Type {thing}Type" for kind in kinds]
    first, second = EXEMPLARS[task_type].steps[0], EXEMPLARS[task_type].steps[1]
    target = EXEMPLARS[task_type].steps[-1].places[0]
    inside = f"(objectType ?o {first.thing}Type) (inReceptacle ?o ?r)"
    if second.verb in MADE:
        inside += f" ({MADE[second.verb]} ?o)"
    if task_type == "pick_two_obj_and_place":
        twin = f"(not (= ?o ?p)) (objectType ?p {first.thing}Type) (inReceptacle ?p ?r)"
        inside += f" (exists (?p - object) (and {twin}))"
    goal = f"(exists (?r - receptacle) (exists (?o - object) (and (receptacleType ?r {target}Type) {inside})))"
    if task_type == "look_at_obj_in_light":
        lit = "(isToggled ?o) (inReceptacle ?o ?r) (receptacleAtLocation ?r ?l) (atLocation ?a ?l)"
        goal = f"(exists (?o - object ?r - receptacle ?a - agent ?l - location) (and {lit}))"
        goal = f"(and {goal} (exists (?o - object ?a - agent) (and (objectType ?o {first.thing}Type) (holds ?a ?o))))"
    text = f"(define (problem room) (:domain alfred) (:objects {' '.join(objects)})"
    text += f" (:init {' '.join(f'({fact})' for fact in facts)}) (:goal {goal}))"
    return {"game": task_type, "task_type": task_type, "task": task_of(screen), "walkthrough": [], "pddl_problem": text}


async def no_answer(question: str) -> str:
    raise AskRefusedError("nobody answers")


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_exemplar_is_won_by_its_own_program(task_type: str) -> None:
    """Oracle: the engine, in a room with the exemplar's first screen to the letter; the plan as steps and as text."""
    exemplar = EXEMPLARS[task_type]
    for steps in (exemplar.steps, parse_plan(write_full(exemplar.steps)), parse_plan(write_compact(exemplar.steps))):
        session = Session(Engine(load_game(room(task_type))), 50)
        assert session.screen == exemplar.screen
        outcome = asyncio.run(run_program(program(steps), session, no_answer, Limits(10.0, 128 * 2**20)))
        assert (session.won, outcome.error) == (True, "")
        assert 4 <= len(session.history) <= 20


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_exemplar_needs_each_of_its_steps(task_type: str) -> None:
    """Oracle: the engine, which a program without any one of the steps does not win."""
    steps = EXEMPLARS[task_type].steps
    for left_out in range(len(steps)):
        session = Session(Engine(load_game(room(task_type))), 50)
        fewer = program([step for number, step in enumerate(steps) if number != left_out])
        asyncio.run(run_program(fewer, session, no_answer, Limits(10.0, 128 * 2**20)))
        assert not session.won


def test_the_agent_has_what_the_prompt_promises() -> None:
    """Oracle: the class: every name and every number of arguments, and no method is in none of the prompts."""
    brief, full = (Style(name).solve(scene(), "")[0].content for name in ("brief", "full"))
    for name, arguments in re.findall(r"agent\.(\w+)(\([^)]*\))?", brief):
        member = inspect.getattr_static(Agent, name)
        assert isinstance(member, property) or len(inspect.signature(member).parameters) == arguments.count(",") + 2
    for name, arguments in re.findall(r"agent\.(\w+)(\([^)]*\))?", full):
        member = inspect.getattr_static(Agent, name)
        if not arguments:
            assert isinstance(member, property), name
            continue
        wanted = [argument.strip(" *") for argument in arguments.strip("()").split(",") if argument.strip()]
        assert list(inspect.signature(member).parameters)[1:] == wanted, name
    public = {name for name in vars(Agent) if not name.startswith("_")}
    assert public == set(re.findall(r"agent\.(\w+)", f"{full}\n{brief}"))


@pytest.mark.parametrize("verbs", ["current", "old"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_exemplar_is_won_by_its_actions_too(task_type: str, verbs: str) -> None:
    """Oracle: the engine's answer to each command; the old positions by their form, since their numbers say nothing."""
    session = Session(Engine(load_game(room(task_type)), verbs), 50, verbs)
    for _, command, answer in played(task_type, verbs):
        assert not session.won
        wording = re.escape(answer) if verbs == "current" else re.sub(r"loc \d+", r"loc \\d+", answer)
        assert re.fullmatch(wording, session.act(command))
    assert session.won


def scene(task_type: str = "pick_heat_then_place_in_recep") -> Scene:
    """Return a scene that is none of the exemplars."""
    seen = "Looking quickly around you, you see a cabinet 2, a cabinet 1, and a stove 1."
    task = "Your task is to: heat some yam and put it in cabinet."
    return Scene(f"You are in the middle of a room. {seen}\n\n{task}", task_type)


def text_of(prompt: Messages) -> str:
    return "\n".join(message.content for message in prompt)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_the_full_style_shows_the_exemplar_of_the_type(task_type: str) -> None:
    """Oracle: by eye: its screen and plan to the controller, also its program to the generator, the scene last."""
    style, shot = Style("full", 37), EXEMPLARS[task_type]
    plan = style.plan(scene(task_type))
    assert [message.role for message in plan] == ["system", "user", "assistant", "user"]
    assert plan[1].content == shot.screen and plan[2].content == write_full(shot.steps)
    assert plan[3].content == scene().screen
    solve = style.solve(scene(task_type), "my plan")
    assert "37 actions" in solve[0].content and "agent.find(kind, places)" in solve[0].content
    assert solve[1].content == f"{shot.screen}{PLAN_MARK}{write_full(shot.steps)}"
    assert solve[2].content == f"```python\n{program(shot.steps).strip()}\n```"
    assert solve[3].content == f"{scene().screen}{PLAN_MARK}my plan"


def test_without_a_plan_no_plan_is_shown() -> None:
    """Oracle: the mark before a plan is nowhere in the prompt."""
    for style in (Style("full"), Style("compact"), Style("brief")):
        for prompt in (style.solve(scene(), ""), style.act(scene(), "")):
            assert PLAN_MARK not in text_of(prompt)
        assert PLAN_MARK in text_of(style.solve(scene(), "p")) and PLAN_MARK in text_of(style.act(scene(), "p"))


@pytest.mark.parametrize("plan", ["", "my plan"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_direct_action_is_shown_a_whole_example_first(task_type: str, plan: str) -> None:
    """Oracle: by eye: roles alternate, the exemplar from its screen to its last command, then this scene."""
    system, shot, *turns, last = Style("full").act(scene(task_type), plan)
    roles = [message.role for message in (system, shot, *turns, last)]
    assert roles == ["system"] + ["user", "assistant"] * ((len(turns) + 1) // 2) + ["user"]
    assert shot.content.startswith(EXEMPLARS[task_type].screen) and (PLAN_MARK in shot.content) is bool(plan)
    commands = [react.action_in(message.content) for message in turns[::2]]
    assert commands == [command for _, command, _ in played(task_type)]
    assert last.content == scene().screen + (f"{PLAN_MARK}my plan" if plan else "")


def test_direct_action_names_the_commands_of_the_household() -> None:
    """Oracle: ALFWorld's wording before and since 0.4.0."""
    new, old = (Style("full", 50, verbs).act(scene(), "") for verbs in ("current", "old"))
    assert "move THING to RECEPTACLE" in new[0].content and "put THING in/on RECEPTACLE" not in new[0].content
    assert "put THING in/on RECEPTACLE" in old[0].content and "{" not in old[0].content + new[0].content


def test_compact_prompts_share_their_shots_and_are_short() -> None:
    """Oracle: by eye: the same messages before the last one; there the task and each type of receptacle once."""
    style = Style("compact")
    prompts = [style.plan(scene(task_type)) for task_type in TASK_TYPES]
    assert len({prompt[:-1] for prompt in prompts}) == 1 and len(prompts[0]) == 2 * 3 + 2
    assert prompts[0][-1] == Message("user", "cabinet, stove\nheat some yam and put it in cabinet")
    assert style.write(EXEMPLARS["look_at_obj_in_light"].steps) == prompts[0][4].content


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_the_brief_style_shows_sentences_to_the_generator_alone(task_type: str) -> None:
    """Oracle: by eye: the controller's prompt has the compact plan of the type's shot and the compact style's last
    message; the generator's has plans in sentences with quoted places. All prompts of a type have all but the last
    message in common.
    """
    style, shot = Style("brief"), EXEMPLARS[task_type]
    asked = style.plan(scene(task_type))
    assert asked[2] == Message("assistant", write_compact(shot.steps)) and len(asked) == 4
    assert asked[-1] == Style("compact").plan(scene(task_type))[-1]
    plan = "1. find yam: cabinet 2, stove\n2. heat yam: stove\n3. put yam: cabinet\nthen rest"
    solve, bare = style.solve(scene(task_type), plan), style.solve(scene(task_type), "")
    assert solve[-1].content == f"cabinet, stove\nheat some yam and put it in cabinet{PLAN_MARK}" + (
        "1. Find a yam in 'cabinet 2' or 'stove' and take it.\n2. Heat the yam in 'stove'.\n"
        "3. Put the yam in 'cabinet'.\nthen rest"
    )
    assert solve[:-1] == style.solve(scene(task_type), "1. find mug: stove")[:-1] != bare[:-1]
    assert solve[2] == bare[2] == Message("assistant", straight_program(shot.steps))
    steps = [Step("find", "mug", ("cabinet 16", "cabinet 2", "shelf 1")), Step("put", "mug", ("desk",))]
    assert style.write(steps) == "1. find mug: cabinet, shelf\n2. put mug: desk"
    read = parse_plan(in_sentences(write_compact(shot.steps)))  # a scripted reader takes them at their word
    assert [(s.verb, s.thing, s.places) for s in read] == [(s.verb, s.thing, s.places) for s in shot.steps]
    assert in_sentences("4. use desklamp: desk") == "4. Find a desklamp in 'desk' and use it."


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_straight_program_wins_in_its_room(task_type: str) -> None:
    """Oracle: the engine; each exemplar's room holds its things where a sensible search finds them."""
    session = Session(Engine(load_game(room(task_type))), 50)
    code = straight_program(EXEMPLARS[task_type].steps)
    outcome = asyncio.run(run_program(code, session, no_answer, Limits(10.0, 128 * 2**20)))
    assert (session.won, outcome.error) == (True, "")


@pytest.mark.parametrize("style", [Style("full"), Style("compact")], ids=lambda style: style.name)
def test_what_went_wrong_is_shown_after_what_was_said(style: Style) -> None:
    """Oracle: by eye: the conversation continues, roles alternate."""
    again = style.replan(scene(), "the plan", "it broke")
    assert again[:-2] == style.plan(scene()) and again[-2] == Message("assistant", "the plan")
    assert "it broke" in again[-1].content
    retry = style.retry(scene(), "the plan", "the code\n", Failure("it broke"))
    assert retry[:-2] == style.solve(scene(), "the plan")
    assert retry[-2].content == "```python\nthe code\n```" and "it broke" in retry[-1].content
    for prompt in (again, retry, style.ask("where?")):
        roles = [message.role for message in prompt]
        assert roles[0] == "system" and roles[1:] == ["user", "assistant"] * ((len(roles) - 1) // 2) + ["user"]


def test_the_brief_style_shows_what_was_searched_in_place_of_the_log() -> None:
    """Oracle: by hand: the request for a program again, and below it the error and the places of both kinds."""
    style, plan, failure = Style("brief"), "1. find yam: stove", Failure("log", "TypeError: x", ["stove"])
    asked, retry = style.solve(scene(), plan), style.retry(scene(), plan, "code", failure)
    assert retry[:-1] == asked[:-1]
    more = "\nA program for this failed: TypeError: x\nIt is not in 'stove'. Search 'cabinet' in place of them.\n"
    assert retry[-1].content == asked[-1].content + more
    (*_, again) = style.retry(scene(), plan, "code", Failure("log", "", ["stove", "cabinet"]))
    assert again.content.strip() == asked[-1].content  # everything is searched: nothing can be named


def test_the_screen_loses_only_its_title() -> None:
    """Oracle: the engine's own first words."""
    text = Engine(load_game(room("pick_heat_then_place_in_recep"))).observation.text
    assert text == f"-= Welcome to TextWorld, ALFRED! =-\n\n{screen_text(text)}"
    assert screen_text("no title") == "no title"


def test_a_user_s_own_file_changes_exemplars_and_requests(tmp_path: Path) -> None:
    """Oracle: by hand: an exemplar of one type is changed key by key; a retry that inserts nothing begins anew."""
    shipped = (Path(prompt_style.__file__).with_name("prompts") / "published.toml").read_text()
    own = tmp_path / "mine.toml"
    own.write_text(shipped + '\n[exemplars.pick_heat_then_place_in_recep]\nplan = "# General Plan: mine."\n')
    style, published = Style(str(own)), Style("published")
    assert style.name.startswith("mine-") and published.name == "published"
    (asked,), (other,) = style.plan(scene()), style.plan(scene("pick_two_obj_and_place"))
    assert "Here is a decomposition:\n# General Plan: mine.\n" in asked.content and asked.role == "user"
    assert "cabinet 2, cabinet 1, stove 1" in asked.content and asked.content.endswith("Here is a decomposition:")
    assert (other,) == published.plan(scene("pick_two_obj_and_place"))
    (retry,) = style.retry(scene(), "the plan", "the code", Failure("it broke"))
    assert "it broke" in retry.content and "the code" not in retry.content
    own.write_text(f"{shipped}\n[exemplars.look_at_obj_in_light]\ntask = 'mine'\nscreen = '''\\n{scene().screen}'''\n")
    (asked,) = Style(str(own)).plan(scene("look_at_obj_in_light"))  # own words for a part of the own screen
    assert "cabinet 2, cabinet 1, stove 1" in asked.content and "The task: mine\n" in asked.content
    steps = EXEMPLARS["look_at_obj_in_light"].steps
    assert style.write(steps).startswith("# General Plan: ") and len(parse_plan(style.write(steps))) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[[exemplars]]\nscreen = 'x'", r"exemplars is \[.*expected a table \[exemplars.TYPE\] for each type"),
        ("[exemplars.look_at_obj_in_lihgt]\nscreen = 'x'", "no type of task has this name; did you mean 'look"),
        ("[exemplars]\nlook_at_obj_in_light = 'x'", r"\[exemplars.look_at_obj_in_light\]: expected a table"),
        ("[exemplars.look_at_obj_in_light]\nscreen = 3", r"in_light\]: expected a table, in which screen is a text"),
        ("[exemplars.look_at_obj_in_light]\nsteps = 3", r"in_light\]: expected a table, in which .* steps has rows"),
        ("[exemplars.look_at_obj_in_light]\nsteps = [['find']]", r"the step \['find'\]; expected \[verb, thing, \["),
        ("[exemplars.look_at_obj_in_light]\nsteps = [['find', 'mug', 'desk']]", r"the step .* expected \[verb, thing"),
        ("[exemplars.look_at_obj_in_light]\nsteps = [['fnd', 'mug', ['desk']]]", "verb is unknown; did you mean 'fi"),
        ("[exemplars.look_at_obj_in_light]\nscren = 'x'", r"no template uses the key 'scren'; did you mean 'screen'\?"),
        ("[exemplars.look_at_obj_in_light]\nplan = 'x'", r"in_light\]: no template uses the key 'plan'"),
        ("[exemplars.look_at_obj_in_light]\nsteps = [['find', 'mug', []]]", r"the step .* expected \[verb, thing, \["),
    ],
)
def test_what_is_wrong_with_own_exemplars_is_said(table: str, message: str, tmp_path: Path) -> None:
    """Oracle: each message by hand; it names the file."""
    shipped = (Path(prompt_style.__file__).with_name("prompts") / "full.toml").read_text()
    (tmp_path / "mine.toml").write_text(f"{shipped}\n{table}\n")
    with pytest.raises(ValueError, match=rf"mine\.toml: .*{message}"):
        Style(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("reply", "command"),
    [
        ("Think: here.\nAct: go to desk 1", "go to desk 1"),
        ("> look\nYou see nothing.\n> help", "look"),
        ("**Act:** go to desk 1", "go to desk 1"),
        ("**Action**: go to desk 1.", "go to desk 1"),
        ("Thought 2: hm\nAction 2: open drawer 1\r\nObservation 2: ...", "open drawer 1"),
        ("- Act: `take pen 1 from desk 1`.", "take pen 1 from desk 1"),
        ("Act 3: > inventory", "inventory"),
        ("Act:\nlook", "look"),
        ("I shall act: now", ""),
        ("Action", ""),
    ],
)
def test_the_first_command_of_a_reply_is_taken(reply: str, command: str) -> None:
    """Oracle: by hand, over the forms in which models mark an action."""
    assert react.action_in(reply) == command


def test_an_unknown_style_is_named(tmp_path: Path) -> None:
    """Oracle: the names of the shipped files; a file that inserts what there is not."""
    with pytest.raises(FileNotFoundError, match="'fall': no such file; expected brief, compact, full, published"):
        Style("fall")
    text = (Path(prompt_style.__file__).with_name("prompts") / "full.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('insert = "played"', 'insert = "plaid"'))
    with pytest.raises(ValueError, match=r"mine.toml: \[\[act\]\]: there are no messages 'plaid' to insert here"):
        Style(str(tmp_path / "mine.toml")).act(scene(), "")
