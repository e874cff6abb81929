"""Short prompts for models of a hundred million parameters: the types of receptacles, the task, steps of a few words.

The controller sees three worked households, which all prompts share. The generator sees none: a model of this size
learns a format by training, not from examples in its prompt.
"""

from collections.abc import Sequence

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS
from matryoshka.tasks.alfworld.plan_language import write_compact
from matryoshka.tasks.alfworld.prompts import Scene, Style, act, with_plan

PLAN_SYSTEM = "Plan the household task in short steps."
SOLVE_SYSTEM = "Write step_1(agent, memory), step_2(agent, memory), ... from the plan."
SHOTS: Sequence[str] = ("pick_heat_then_place_in_recep", "look_at_obj_in_light", "pick_two_obj_and_place")


def short(scene: Scene) -> str:
    """Return the types of receptacles and, on a line of its own, the task. The words that a plan copies stand last."""
    return f"{', '.join(scene.kinds)}\n{scene.task}"


def compact_style(max_steps: int = 50, verbs: str = "current") -> Style:
    """Return the style for small models. max_steps, verbs: of the household."""

    def plan(scene: Scene) -> Messages:
        shots = [(short(Scene(EXEMPLARS[kind].screen, kind)), write_compact(EXEMPLARS[kind].steps)) for kind in SHOTS]
        turns = [turn for shown, steps in shots for turn in (Message("user", shown), Message("assistant", steps))]
        return Message("system", PLAN_SYSTEM), *turns, Message("user", short(scene))

    def solve(scene: Scene, plan: str) -> Messages:
        return Message("system", SOLVE_SYSTEM), Message("user", with_plan(short(scene), plan))

    return Style("compact", plan, solve, lambda scene, plan: act(scene, plan, max_steps, verbs), write_compact)
