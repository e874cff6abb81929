"""The estimated cost of a configuration, from a few training examples that are really run.

The generator is really called, with the untrained controller's guidance, and its answers are kept in the run's cache.
The number of the whole run's episodes follows from the configuration; each is assumed to cost what these cost on
average. Equal requests are counted each time although a run sends them once, so the estimate is rather too high. Where
the generator guides itself, its guidance is taken to cost the tokens that the controller's has.
"""

import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.protocols import Task
from matryoshka.core.records import Trajectory, Usage
from matryoshka.inference.accounts import add
from matryoshka.pilot.config import RunConfig, rollout_settings
from matryoshka.pilot.context import Problems, Run, open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.evaluate import HELD_OUT_SPLITS, fixed_schemes

EXAMPLES = 20


def estimate_run(config: RunConfig, root: Path) -> dict[str, Any]:
    """Run EXAMPLES training examples and return what the whole run will cost (see `extrapolate`).

    The answers go to the cache of the run's own folder under `root`, where the run will find them.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = replace(config, executor="local")  # with Ray, each machine would have its own cache
        with open_run(local, Path(folder), root / config.name / "cache.sqlite", trains=False) as run:
            settings = rollout_settings(local, greedy=False)
            done = run_episodes(run, policy_scheme(run, ""), ["train"], [settings], "estimate", EXAMPLES)
            return extrapolate(run, done)


def extrapolate(run: Run, done: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the episodes of each stage of the whole run, and calls, tokens and dollars at what `done` cost each."""
    episodes = num_episodes(run.config, run.task, run.problems)
    total = sum(episodes.values())
    guided = sum(num_guided(run.config, run.task, run.problems).values())
    done = [trajectory for trajectory in done if trajectory.info.verdict != "failed"]
    infos = [trajectory.info for trajectory in done]
    plans = [_sum(turn.action.usage for turn in trajectory.turns) for trajectory in done]
    usages = [Usage(info.prompt_tokens, info.completion_tokens) for info in infos]
    if not usages:
        raise ValueError("estimate: all episodes failed, since the generator did not answer; check [generator]")
    if run.account is not None and not any(usage != Usage() for usage in usages):
        raise ValueError("estimate: the generator's answers do not report tokens (`usage`), so their cost is unknown")

    def whole(cost: Callable[[Usage], float]) -> tuple[float, float | None]:
        value, error = _total(total, [cost(usage) for usage in usages])
        return value + guided * statistics.fmean(map(cost, plans)), error

    tokens, tokens_error = whole(lambda usage: usage.prompt_tokens + usage.completion_tokens)
    price = None if run.account is None else run.account.price
    usd, usd_error = (None, None) if price is None else whole(price.usd)
    return {
        "episodes": episodes,
        "calls": total * statistics.fmean(info.calls for info in infos)
        + guided * statistics.fmean(len(trajectory.turns) for trajectory in done),
        "tokens": tokens,
        "tokens_error": tokens_error,
        "usd": usd,
        "usd_error": usd_error,
        "sampled": len(usages),
    }


def num_guided(config: RunConfig, task: Task, problems: Problems) -> dict[str, int]:
    """Return in how many of these episodes the generator guides itself: each of its guidances is one call more."""
    episodes, fixed = num_episodes(config, task, problems), fixed_schemes(config, task, problems)
    evaluated = sum(len(problems[split]) for split in HELD_OUT_SPLITS) * ("own_guidance" in fixed)
    return {name: episodes[name] for name in ("warm-up", "bootstrap, at most")} | {"evaluate": evaluated}


def _sum(usages: Iterable[Usage]) -> Usage:
    return functools.reduce(add, usages, Usage())


def _total(count: int, values: Sequence[float]) -> tuple[float, float | None]:
    """Return `count` times the mean of `values` and the half-width of its 95% interval, None for a single value."""
    spread = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return count * statistics.fmean(values), None if spread is None else count * spread


def num_episodes(config: RunConfig, task: Task, problems: Problems) -> dict[str, int]:
    """Return how many episodes the stages of the whole run have, most of them with at least one black-box call."""
    sizes = {split: len(problems[split]) for split in ("train", "validation", *HELD_OUT_SPLITS)}
    sampled = config.rounds * min(config.rollout.examples or sizes["train"], sizes["train"])
    rates = len(config.dpo.learning_rates) or 1
    # The untrained controller is a condition, and so is every policy that will be trained.
    policies = 1 + config.rounds + (config.warmup.source != "none") + (config.star and config.rounds > 0)
    conditions = len(fixed_schemes(config, task, problems)) + policies
    return {
        "warm-up": len(problems["warmup"]) * config.warmup.samples * (config.warmup.source == "generator"),
        "collect": sampled * config.rollout.samples,
        "re-plan, at most": sampled * config.rollout.replans,
        "bootstrap, at most": sampled * config.rollout.bootstrap,
        # The policy of a round is its best candidate, whose episodes are read back.
        "choose": (config.rounds * rates + 1) * sizes["validation"],
        "evaluate": conditions * sum(sizes[split] for split in HELD_OUT_SPLITS),
    }
