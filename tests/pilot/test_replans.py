"""Re-plans are trained: several new plans in one and the same state give pairs where single episodes give none."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.files import UnwrittenJournal
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Messages, PairRule, RolloutSettings, Sample, Sampling, Trajectory
from matryoshka.dpo.pairs import make_pairs
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.episodes import Replay, failed_first_plans, sampled_settings
from matryoshka.pilot.recipes import RECIPES
from matryoshka.pilot.stages import after_first_turn
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tasks.rollout import Job, Setup, job_key, run_rollouts

SIZES = {"warmup": 0, "train": 4, "validation": 0, "test": 0, "held_out": 0}
SETTINGS = RolloutSettings(controller=Sampling(temperature=1.0), outer_turns=2)


class Planner:
    """A policy whose first plans all fail, each in its own way, and whose new plan is right in every other draw."""

    name = "planner"

    def __init__(self, gold: dict[Messages, str]) -> None:
        self.gold, self.asked = gold, list[tuple[int, int]]()

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        if len(prompt) == len(next(iter(self.gold))):
            text = f"1. find nothing{sampling.draw}: nowhere"
        else:
            self.asked.append((sampling.draw, sampling.seed))
            text = self.gold[prompt[:-2]] if sampling.draw % 2 else f"1. find thing{sampling.draw}: nowhere"
        ids = tuple(text.encode())
        return [Sample(text, token_ids=ids, logprobs=(-1.0,) * len(ids))] * n

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        return (1, len(prompt))

    def count_tokens(self, prompt: Messages) -> int:
        return len(prompt)


def play(task: ALFWorldTask, controller: Planner | Replay, settings: Sequence[RolloutSettings]) -> list[Trajectory]:
    generator = LiteralGenerator()
    pairs = [(example, one) for example in task.examples("train") for one in settings]
    jobs = [Job(job_key(task, example, one, controller, generator), example, one) for example, one in pairs]
    return asyncio.run(run_rollouts(Setup(task, controller, generator), jobs, UnwrittenJournal(), 8))


def test_new_plans_in_one_state_make_pairs_where_single_ones_make_none() -> None:
    """Oracle: households of the engine and a planner by hand. Four episodes a game: every one fails in a state of its
    own, so there is no pair at all before. Four new plans after one failed plan: they share a prompt, half of them win,
    and all pairs are of that prompt.
    """
    task = ALFWorldTask(AlfworldOptions("compact", size="small"), TaskSetting(SIZES))
    gold = {task.first_prompt(example): str(task.gold_guidance(example)) for example in task.examples("train")}
    planner = Planner(gold)
    draws = [replace(SETTINGS, controller=replace(SETTINGS.controller, draw=draw)) for draw in range(4)]
    done = play(task, planner, draws)
    assert {len(episode.turns) for episode in done} == {2} and {episode.reward for episode in done} == {0.0, 1.0}
    before, _ = make_pairs(done, PairRule(cap=4), 0)
    assert before == []

    table = failed_first_plans(done)
    assert {prompt: sample.text for prompt, sample in table.items()} == {
        prompt: "1. find nothing0: nowhere" for prompt in gold
    }
    replay = Replay(planner, table)
    branches = play(task, replay, draws)
    assert {episode.turns[0].action.text for episode in branches} == {"1. find nothing0: nowhere"}
    after, counts = make_pairs(done + [after_first_turn(episode) for episode in branches], PairRule(cap=4), 0)
    assert {pair.example_id for pair in after} == {example.id for example in task.examples("train")}
    for pair in after:
        assert pair.prompt[:-2] in gold and pair.prompt[-2].content == "1. find nothing0: nowhere"
        assert pair.chosen.text == gold[pair.prompt[:-2]] and pair.rejected.text.endswith(": nowhere")
        assert pair.chosen.token_ids == tuple(pair.chosen.text.encode())
    assert counts.prompts_with_both == 4 and len(after) >= 8


def test_a_replay_has_another_name_for_another_plan() -> None:
    """Oracle: invariants; it answers the policy's prompt ids, so that its samples can be trained on."""
    planner = Planner({(): "gold"})
    one, other = (Replay(planner, {(): Sample(text)}) for text in ("a", "b"))
    assert one.name != other.name and one.name.startswith("planner+after-")
    assert one.name == Replay(planner, {(): Sample("a", token_ids=(1,))}).name and one.prompt_ids(()) == (1, 0)
    assert asyncio.run(one.propose((), 2, Sampling())) == [Sample("a")] * 2


def test_new_plans_need_a_second_turn() -> None:
    """Oracle: the message; [collect] outer_turns counts."""
    path = RECIPES / "alfworld_demo.toml"
    with pytest.raises(ValueError, match="replans 4 needs outer_turns of at least 2 in collection"):
        load_toml(RunConfig, Path(path), {"rollout.replans": 4})
    config = load_toml(RunConfig, Path(path), {"rollout.replans": 4, "collect.outer_turns": 2})
    assert len(sampled_settings(config, 0, config.rollout.replans)) == 4
