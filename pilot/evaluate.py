"""Evaluation: the conditions of a run's report over its held-out problems, and its policies with other generators."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from matryoshka.core.protocols import Controller
from matryoshka.core.records import Trajectory, stable_seed
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance, ScriptedGuidance
from matryoshka.eval.report import Condition
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.context import Run, Scheme
from matryoshka.pilot.episodes import policy_scheme, rollout_settings, run_episodes
from matryoshka.pilot.generator import open_generator, with_generator
from matryoshka.pilot.stages import is_trained

HELD_OUT_SPLITS = ("test", "held_out")


def evaluate(run: Run, label: str = "evaluate") -> list[Condition]:
    """Return every condition over the held-out problems, one greedy episode each; `label` names the time it takes."""
    conditions = []
    for name, (title, scheme) in schemes(run).items():
        stage = f"{label} {name}"
        episodes = run_episodes(run, scheme, HELD_OUT_SPLITS, label=stage)
        calls = sum(t.info.calls for t in episodes)
        seconds = run.seconds.as_dict()[stage]
        conditions.append(Condition(name, title, episodes, seconds, calls, num_tokens(episodes)))
    return conditions


def num_tokens(episodes: Sequence[Trajectory]) -> int:
    """Return the tokens, prompts included, that controller and generator took for `episodes`."""
    usage = [turn.action.usage for t in episodes for turn in t.turns]
    controller = sum(u.prompt_tokens + u.completion_tokens for u in usage)
    generator: int = sum(t.info.prompt_tokens + t.info.completion_tokens for t in episodes)
    return controller + generator


def evaluate_with(run: Run, generator: str) -> list[Condition]:
    """Return every condition with another generator in place of the run's own; see `with_generator` for its name."""
    config = with_generator(run.config, generator)
    with open_generator(config, run.folder, run.ranks, run.runner, run.cache) as other:
        return evaluate(replace(run, config=config, generator=other), f"transfer {generator}")


def schemes(run: Run) -> dict[str, tuple[str, Scheme]]:
    """Return the conditions of the report: name -> (title, scheme), from no guidance to the last round."""
    config, examples = run.config, [e for split in HELD_OUT_SPLITS for e in run.problems[split]]
    one_plan = replace(rollout_settings(config, greedy=True), outer_turns=1)  # fixed guidance has no second plan
    found = {"no_guidance": ("no guidance", Scheme("no-guidance", _fixed(NoGuidance()), one_plan))}
    gold = [guidance for example in examples if (guidance := run.task.gold_guidance(example)) is not None]
    if len(gold) == len(examples):
        tables = [("gold_guidance", "gold guidance", gold)]
        if len(set(gold)) > 1:  # where all problems have one guidance, there is no wrong one
            other = wrong_guidance(gold, config.seed)
            tables = [("wrong_guidance", "wrong guidance (another problem's)", other), *tables]
        prompts = [run.task.first_prompt(example) for example in examples]
        for name, title, texts in tables:
            controller = ScriptedGuidance(f"{name}-{config.seed}", dict(zip(prompts, texts, strict=True)))
            found[name] = (title, Scheme(name, _fixed(controller), one_plan))
    if config.warmup.source == "generator" or run.task.compares_own_guidance:
        own = Scheme("own-guidance", lambda run, _: GeneratorGuidance(run.generator), one_plan)
        found["own_guidance"] = ("the generator's own guidance", own)
    known = {run.task.first_prompt(example): run.task.baselines(example) for example in examples}
    for place, baseline in enumerate(run.task.baselines(examples[0])):
        table = {prompt: baselines[place].guidance for prompt, baselines in known.items()}
        fixed = _fixed(ScriptedGuidance(f"{baseline.name}-{config.seed}", table))
        found[baseline.name] = (baseline.label, Scheme(baseline.name, fixed, one_plan))
    found["untrained"] = ("untrained controller", policy_scheme(run, ""))
    if is_trained(run, "warmup"):
        found["warmup"] = ("after warm-up (SFT)", policy_scheme(run, "warmup"))
    for round in trained_rounds(run):
        found[f"round_{round}"] = (f"after round {round}", policy_scheme(run, f"round-{round}"))
    if is_trained(run, "star"):
        found["star"] = ("STaR control (SFT on round 1's wins)", policy_scheme(run, "star"))
    return found


def trained_rounds(run: Run) -> list[int]:
    """Return the rounds whose policies are trained."""
    return [round for round in range(1, run.config.rounds + 1) if is_trained(run, f"round-{round}")]


def wrong_guidance(gold: Sequence[str], seed: int) -> list[str]:
    """Return for each example the gold guidance of another one, drawn by `seed`."""
    draws = random.Random(stable_seed("wrong", seed))
    return [draws.choice([other for other in gold if other != own]) for own in gold]


def _fixed(controller: Controller) -> Callable[[Run, TokenSampler], Controller]:
    return lambda _run, _sampler: controller
