"""Does training on re-plans make second plans better? SmolLM2-135M on households, with the scripted generator.

    python -m matryoshka.benchmarks.replans --seeds 0       it may be stopped anywhere

The warm-up policy is trained as `configs/alfworld_demo.toml` says, on first plans alone. Each training game gets one
first plan and, where that plan fails, one second plan. The warm-up policy's second plans hardly ever win, so that the
generator, as in `[rollout] bootstrap`, plans anew there several times, behind the same failed plan. The pairs among all
second plans of a state train the policy. The test: on held-out games the warm-up policy plans greedily, and where its
plan fails, both policies plan anew in the same state, behind the same failed plan and the same complaint. Only second
plans are compared.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.core.config import load_toml
from matryoshka.core.files import write_json
from matryoshka.core.intervals import wilson
from matryoshka.core.protocols import Controller
from matryoshka.core.records import Trajectory, to_json
from matryoshka.eval.statistics import paired_difference
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Run, Scheme, open_run
from matryoshka.pilot.environment import environment
from matryoshka.pilot.episodes import Replay, failed_first_plans, policy_scheme, run_episodes, sampled_settings
from matryoshka.pilot.recipes import RECIPES
from matryoshka.pilot.stages import (
    after_first_turn,
    collect,
    episodes_seed,
    generator_scheme,
    in_controller_tokens,
    train_round,
    warm_up,
    write_pairs,
)

SETTINGS = {
    "star": False,
    "controller.threads": 1,
    "task.train": 48,
    "task.validation": 1,
    "task.test": 60,
    "rollout.outer_turns": 2,
    "rollout.samples": 1,  # first plans are not what is trained here
    "rollout.guidance_tokens": 64,
    "dpo.pairs_per_example": 4,
    "dpo.train.epochs": 1,
    "dpo.train.batch_size": 8,
}
TAUGHT = 6  # second plans of the generator in each state


@dataclass(frozen=True)
class SecondPlans:
    """The held-out games of one seed.

    games: all of them. first: those that the warm-up policy's first plan won. stopped: those whose first plan failed
    without a complaint, so that there is no second one. before, after: the other games -> whether the second plan of
    the warm-up policy, and of the trained one in the same state, won. training: counts of the training's second plans.
    """

    games: int
    first: int
    stopped: int
    before: Mapping[str, bool]
    after: Mapping[str, bool]
    training: Mapping[str, int]
    seconds: Mapping[str, float]


def main() -> None:
    """Run or continue the experiment, write its figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/replans.json"))
    parser.add_argument("--config", type=Path, default=RECIPES / "alfworld_demo.toml")
    args = parser.parse_args()
    found: dict[int, SecondPlans] = {}
    for seed in args.seeds:
        config = load_toml(RunConfig, args.config, SETTINGS | {"seed": seed, "name": f"replans-{seed}"})
        found[seed] = run_seed(config, args.runs)
        result = {"settings": SETTINGS, "seeds": {str(n): vars(one) for n, one in found.items()}, **summary(found)}
        write_json(args.out, {**result, "environment": environment()})
        print(json.dumps(summary(found)), flush=True)


def run_seed(config: RunConfig, root: Path) -> SecondPlans:
    """Train one seed as far as it is not trained, and return what its second plans achieve."""
    with open_run(config, root) as run:
        start = warm_up(run)
        sampled = collect(run, 1)
        taught = replanned_by_generator(run, sampled)
        pairs, counts = write_pairs(run, [*sampled, *taught])
        stage = train_round(run, 1, pairs, sampled)
        before = run_episodes(run, policy_scheme(run, start), ["test"], label="before")
        failed = {episode.example_id for episode in before if len(episode.turns) > 1}
        scheme = again(policy_scheme(run, stage), before)
        after = run_episodes(run, scheme, ["test"], label="after", only=failed)
        own = [episode for episode in sampled if len(episode.turns) > 1]
        training = {
            "states": len(own), "won": sum(map(_won, own)), "taught": len(taught), "taught_won": sum(map(_won, taught)),
            "pairs": counts.pairs,
        }  # fmt: skip
        return second_plans(before, after, training, run.seconds.as_dict())


def replanned_by_generator(run: Run, done: Sequence[Trajectory]) -> list[Trajectory]:
    """Return TAUGHT second plans of the generator behind each training game's failed first plan, without that one."""
    settings = sampled_settings(run.config, episodes_seed("replan", run.config, 1), TAUGHT)
    failed = {episode.example_id for episode in done if len(episode.turns) > 1}
    scheme = again(generator_scheme(run.config), done)
    episodes = run_episodes(run, scheme, ["train"], settings, "taught", only=failed)
    return [in_controller_tokens(run.tokenizer, after_first_turn(episode)) for episode in episodes]


def again(scheme: Scheme, first: Sequence[Trajectory]) -> Scheme:
    """Return the scheme that plans as `scheme` does, behind the failed first plans of `first`."""
    table = failed_first_plans(first)

    def make(run: Run, sampler: TokenSampler) -> Controller:
        return Replay(scheme.make(run, sampler), table)

    return replace(scheme, name=f"{scheme.name} again", make=make)


def second_plans(
    before: Sequence[Trajectory], after: Sequence[Trajectory], training: Mapping[str, int], seconds: Mapping[str, float]
) -> SecondPlans:
    """Return the comparison of episodes on the same games; `after` has those in which `before` planned twice.

    Raises ValueError where a game of `after` did not come to the state that `before` came to.
    """
    twice = [episode for episode in before if len(episode.turns) > 1]
    state = {episode.example_id: episode.turns[1].prompt for episode in twice}
    if {episode.example_id: episode.turns[1].prompt for episode in after} != state:
        raise ValueError("replans: the replayed first plans led to other states; the generator must be deterministic")
    alone = [episode for episode in before if len(episode.turns) == 1]
    return SecondPlans(
        games=len(before),
        first=sum(map(_won, alone)),
        stopped=len(alone) - sum(map(_won, alone)),
        before={episode.example_id: _won(episode) for episode in twice},
        after={episode.example_id: _won(episode) for episode in after},
        training=training,
        seconds=seconds,
    )


def summary(found: Mapping[int, SecondPlans]) -> dict[str, Any]:
    """Return shares of second plans that won, by seed and pooled, and the pooled paired difference."""
    before = [won for one in found.values() for won in one.before.values()]
    after = [one.after[game] for one in found.values() for game in one.before]

    def share(wins: Mapping[str, bool]) -> float:
        return round(sum(wins.values()) / max(1, len(wins)), 4)

    return {
        "by_seed": {
            str(seed): {"n": len(one.before), "before": share(one.before), "after": share(one.after)}
            for seed, one in found.items()
        },
        "before": to_json(wilson(sum(before), len(before))),
        "after": to_json(wilson(sum(after), len(after))),
        "difference": vars(paired_difference(before, after)),
    }


def _won(episode: Trajectory) -> bool:
    return episode.reward > 0.5


if __name__ == "__main__":
    main()
