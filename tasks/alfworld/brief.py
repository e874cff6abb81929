"""Prompts for a small instruction-tuned generator on slow hardware: few tokens to read, few to write.

The controller is asked as in the compact style: types of receptacles, the task, steps of a few words. The generator
sees the same with the plan in sentences, a short list of the agent's methods, and one worked household of the same type
of task, whose program is straight lines of code. All prompts of a type begin alike, so a server with a prefix cache
reads that part once; games that look the same share the whole prompt, so that a plan that repeats is asked once.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld.agent import kind_of
from matryoshka.tasks.alfworld.compact import PLAN_SYSTEM, short
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS
from matryoshka.tasks.alfworld.plan_language import NUMBERED, Step, parse_step, write_compact
from matryoshka.tasks.alfworld.prompts import Scene, Style, act, with_plan

SOLVE_SYSTEM = """\
You write a Python function step_1(agent, memory) that acts in a household. It does what the plan says; if there is no \
plan, it does what you think is right. Write straight lines of code and nothing else.
agent.fetch(kind, places)   visits these places until a thing of this kind is there, and takes it
agent.find(kind, places)    the same without taking it; returns (thing, place)
agent.go(place)             goes there; returns its name
agent.holding               the thing in hand
agent.put(thing, place), agent.clean(thing, place), agent.heat(thing, place), agent.cool(thing, place)
agent.use(thing)            turns on a lamp"""


def straight_program(steps: Sequence[Step]) -> str:
    """Return a program of one line a step, which does what the steps say, each at the first place that they name."""
    lines = []
    for step in steps:
        match step.verb:
            case "find":
                lines.append(f"agent.fetch({step.thing!r}, {list(step.places)})")
            case "use":
                lines.append(f"agent.use(agent.find({step.thing!r}, {list(step.places)})[0])")
            case verb:
                lines.append(f"agent.{verb}(agent.holding, agent.go({step.places[0]!r}))")
    return "\n".join(["def step_1(agent, memory):", *(f"    {line}" for line in lines)])


def in_sentences(plan: str) -> str:
    """Return a compact plan in sentences; a line that is no step of the compact language stays as it is."""
    lines = []
    for line in plan.splitlines():
        match = NUMBERED.match(line)
        step = parse_step(match[1]) if match else Step("")
        lines.append(f"{line.partition('.')[0]}. {sentence(step)}" if step.verb and step.places else line)
    return "\n".join(lines)


def sentence(step: Step) -> str:
    """Return a step as a sentence; names of places are quoted as the program must write them."""
    *before, last = map(repr, step.places)
    places = f"{', '.join(before)} or {last}" if before else last
    match step.verb:
        case "find":
            return f"Find a {step.thing} in {places} and take it."
        case "use":
            return f"Find a {step.thing} in {places} and use it."
        case "put":
            return f"Put the {step.thing} in {places}."
    return f"{step.verb.capitalize()} the {step.thing} in {places}."


def write_kinds(steps: Sequence[Step]) -> str:
    """Return the compact plan with types of places ("cabinet") in place of names ("cabinet 16").

    The controller sees the types alone, so this is the plan that it can learn to write.
    """
    kinds = [replace(step, places=tuple(dict.fromkeys(map(kind_of, step.places)))) for step in steps]
    return write_compact(kinds)


def brief_style(max_steps: int = 50, verbs: str = "current") -> Style:
    """Return the style. max_steps, verbs: of the household."""

    def solve(scene: Scene, plan: str) -> Messages:
        shot = EXEMPLARS[scene.task_type]
        shown = short(Scene(shot.screen, scene.task_type))
        turns = (
            Message("user", with_plan(shown, in_sentences(write_compact(shot.steps)) if plan else "")),
            Message("assistant", straight_program(shot.steps)),
        )
        return Message("system", SOLVE_SYSTEM), *turns, Message("user", with_plan(short(scene), in_sentences(plan)))

    def plan(scene: Scene) -> Messages:
        shot = EXEMPLARS[scene.task_type]
        turns = (
            Message("user", short(Scene(shot.screen, scene.task_type))),
            Message("assistant", write_compact(shot.steps)),
        )
        return Message("system", PLAN_SYSTEM), *turns, Message("user", short(scene))

    return Style("brief", plan, solve, partial(_act, max_steps=max_steps, verbs=verbs), write_kinds)


def _act(scene: Scene, plan: str, max_steps: int, verbs: str) -> Messages:
    return act(scene, plan, max_steps, verbs)
