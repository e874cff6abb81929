"""Does training on re-plans make second plans better? SmolLM2-135M on households, with the scripted generator.

    python -m matryoshka.benchmarks.replans                 seeds 0, 1 and 2; it may be stopped anywhere

For each seed the warm-up policy is trained as `configs/alfworld_demo.toml` says. Each training game gets one first plan
and, where that plan fails, several new plans in the one state behind it (`[rollout] replans`); the pairs among these
train the policy. The test: on held-out games the warm-up policy plans greedily, and where its plan fails, both policies
plan anew in the same state, behind the same failed plan and the same complaint. Only second plans are compared.
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
from matryoshka.pilot.episodes import Replay, failed_first_plans, policy_scheme, run_episodes
from matryoshka.pilot.recipes import RECIPES
from matryoshka.pilot.stages import collect, train_round, warm_up, write_pairs

SETTINGS = {
    "star": False,
    "controller.threads": 1,
    "task.train": 96,
    "task.validation": 4,
    "task.test": 100,
    "rollout.outer_turns": 2,
    "rollout.samples": 1,  # first plans are not what is trained here
    "rollout.replans": 8,
}


@dataclass(frozen=True)
class SecondPlans:
    """The held-out games of one seed.

    games: all of them. first: those that the warm-up policy's first plan won. stopped: those whose first plan failed
    without a complaint, so that there is no second one. before, after: the other games -> whether the second plan of
    the warm-up policy, and of the trained one in the same state, won. own_first: the games that the trained policy's
    own first plan won. own: those that its first or its second plan won. pairs: how many it was trained on.
    """

    games: int
    first: int
    stopped: int
    before: Mapping[str, bool]
    after: Mapping[str, bool]
    own_first: int
    own: int
    pairs: int
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
        episodes = collect(run, 1)
        pairs, counts = write_pairs(run, episodes)
        stage = train_round(run, 1, pairs, episodes)
        own = run_episodes(run, policy_scheme(run, start), ["test"], label="before")
        failed = {episode.example_id: episode for episode in own if len(episode.turns) > 1}
        after = run_episodes(run, again(run, stage, own), ["test"], label="after", only=set(failed))
        trained = run_episodes(run, policy_scheme(run, stage), ["test"], label="trained")
        return second_plans(own, after, trained, counts.pairs, run.seconds.as_dict())


def again(run: Run, stage: str, first: Sequence[Trajectory]) -> Scheme:
    """Return the scheme in which the policy of `stage` plans anew behind the failed first plans of `first`."""
    policy, table = policy_scheme(run, stage), failed_first_plans(first)

    def make(run: Run, sampler: TokenSampler) -> Controller:
        return Replay(policy.make(run, sampler), table)

    return replace(policy, name=f"{policy.name} again", make=make)


def second_plans(
    before: Sequence[Trajectory],
    after: Sequence[Trajectory],
    trained: Sequence[Trajectory],
    pairs: int,
    seconds: Mapping[str, float],
) -> SecondPlans:
    """Return the comparison of episodes on the same games; `after` has those in which `before` planned twice.

    Raises ValueError where a game of `after` did not come to the state that `before` came to.
    """
    state = {episode.example_id: episode.turns[1].prompt for episode in before if len(episode.turns) > 1}
    if {episode.example_id: episode.turns[1].prompt for episode in after} != state:
        raise ValueError("replans: the replayed first plans led to other states; the generator must be deterministic")
    alone = [episode for episode in before if len(episode.turns) == 1]
    return SecondPlans(
        games=len(before),
        first=sum(_won(episode) for episode in alone),
        stopped=sum(not _won(episode) for episode in alone),
        before={episode.example_id: _won(episode) for episode in before if len(episode.turns) > 1},
        after={episode.example_id: _won(episode) for episode in after},
        own_first=sum(_won(episode) for episode in trained if len(episode.turns) == 1),
        own=sum(map(_won, trained)),
        pairs=pairs,
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
