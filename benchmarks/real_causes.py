"""Why games are lost: through the plan's steps, through its places, or through the generator's program."""

import asyncio
from collections.abc import Mapping, Sequence

from matryoshka.core.records import Example, RolloutSettings, Trajectory
from matryoshka.eval.baselines import ScriptedGuidance
from matryoshka.tasks.alfworld.plan_language import Step, parse_plan
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.task import ALFWorldTask, gold_steps

CAUSES = {
    "program": "the plan wins when it is taken at its word",
    "steps": "the plan's steps are not those of the gold plan",
    "places": "the steps are right, and the plan loses at its word",
    "other": "there was no plan, or a call failed",
}
"""Cause of a lost game -> how it is told from the others."""


def causes(task: ALFWorldTask, episodes: Sequence[Trajectory]) -> Mapping[str, str]:
    """Return the cause of each lost episode, a key of `CAUSES`, by its game; the episodes are of the test games."""
    examples = {example.id: example for example in task.examples("test")}
    lost = [episode for episode in episodes if episode.reward <= 0.5]
    return {episode.example_id: _cause(task, examples[episode.example_id], episode) for episode in lost}


def _cause(task: ALFWorldTask, example: Example, episode: Trajectory) -> str:
    plan = episode.turns[-1].action.text if episode.turns else ""
    if not plan.strip() or episode.info.verdict == "failed":
        return "other"
    reader = ScriptedGuidance("the same plan", {task.first_prompt(example): plan})
    if asyncio.run(task.rollout(example, reader, LiteralGenerator(), RolloutSettings())).reward > 0.5:
        return "program"
    return "places" if _form(parse_plan(plan)) == _form(gold_steps(example)) else "steps"


def _form(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Return what is done to which thing; a lamp may be turned on at any time, so it stands last."""
    return [(step.verb, step.thing) for step in sorted(steps, key=lambda step: step.verb == "use")]
