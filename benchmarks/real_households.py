"""The main experiment: a small controller learns to drive a generator that is used as it was published.

    bash scripts/real.sh                     seeds 0, 1 and 2 with the 0.5B generator; it may be stopped anywhere
    bash scripts/real.sh --quick             12 games under all conditions with the committed adapters, asked anew
    bash scripts/real.sh --transfer 1.5b     the trained controllers drive the 1.5B, which they never met
    bash scripts/real.sh --size 1.5b         the 1.5B trains controllers; with --transfer 0.5b these drive the 0.5B

The controller is SmolLM2-135M-Instruct, the games are ALFWorld's own (--data; the train split for training, valid_seen
for tests), the generator is Qwen2.5-Coder behind llama.cpp. The state of earlier runs lies in
benchmarks/results/real_households/ and is used. The state of this run is in runs/real/.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.benchmarks.levels import smallest_difference
from matryoshka.benchmarks.real_causes import causes
from matryoshka.benchmarks.real_generator import FILES, generator_file
from matryoshka.benchmarks.real_results import FIXED, TITLES, Outcomes, write_results
from matryoshka.benchmarks.real_state import COPIED, NEW_GAMES, SECOND_STAR, pack, unpack
from matryoshka.core.config import load_toml
from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf
from matryoshka.core.records import Trajectory
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Run, Scheme, open_run
from matryoshka.pilot.environment import environment
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.evaluate import schemes
from matryoshka.pilot.folder import copy_folder
from matryoshka.pilot.stages import collect, is_trained, policy_before, train_round, train_star, warm_up, write_pairs
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.task import ALFWorldTask

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = RESULTS / "real_households"
QUICK_GAMES = 12
REACT_TOKENS = 60  # a thought and a command
REACT_CALLS = 50  # most commands of a game
# Measured on two virtual cores of an AMD EPYC with AVX-512, beside other programs (real_households.md).
SECONDS_PER_CALL = {"0.5b": 2.6, "1.5b": 9.0}
NEW_PLANS = 0.6  # share of the plans of a collection that were not asked before
TRAINING_S = 400.0  # one stage of training with its sampling
DISAGREEMENT, SHARED, SEED_DEVIATION = 0.35, 0.5, 0.03  # assumed for the smallest difference, and printed with it


@dataclass(frozen=True)
class Options:
    """The command line."""

    size: str
    generator: str
    data: str
    seeds: tuple[int, ...]
    games: int
    quick: bool
    transfer: str
    pack: bool
    config: Path
    test_only: bool
    conditions: tuple[str, ...]

    @property
    def trainer(self) -> str:
        """The ending of names that says which generator trained: "" for the 0.5B, "-1.5b"."""
        return "" if self.size == "0.5b" else f"-{self.size}"

    @property
    def with_star(self) -> bool:
        """Whether STaR is trained: a control that is not tested is not trained."""
        return not {"star", "star_2"}.isdisjoint(self.conditions)


def main() -> None:
    """Run or continue the experiment, print its table and, as the last line, one JSON object."""
    started = float(os.environ.get("MATRYOSHKA_REAL_STARTED", time.time()))
    options = parse(sys.argv[1:])
    os.chdir(ROOT)
    root = Path("runs/real-quick" if options.quick else "runs/real")
    size = options.transfer or options.size
    file = generator_file(size, options.generator, Path("models"))
    convert_gguf(smollm2_gguf(), Path(load_toml(RunConfig, options.config).controller.path))
    known = unpack(COMMITTED, root, with_answers=not options.quick)
    print(f"{known} answers of earlier runs are used again", file=sys.stderr)
    say_plan(options, size)
    outcomes = Outcomes.load(saved(options, root, size))
    path = root / "results" if options.quick else RESULTS / results_name(options)
    try:
        for seed in options.seeds:
            config = configuration(options, seed, size, file)
            run_seed(options, config, root, outcomes, saved(options, root, size))
            if "star_2" in options.conditions:
                run_second_star(options, config, root, outcomes, saved(options, root, size))
            if "new_games" in options.conditions:
                run_new_games(options, config, root, outcomes, saved(options, root, size))
        if "react" in options.conditions and not options.quick:
            run_react(configuration(options, options.seeds[0], size, file), root, outcomes, saved(options, root, size))
    finally:  # a run that is stopped writes what there is
        result = write_results(outcomes, about(options, size, file), notes(path), path)
        if options.pack:
            pack(root, COMMITTED)
    print(path.with_suffix(".md").read_text())
    last = {row["condition"]: row["success"] for row in result["conditions"]}
    print(json.dumps({"games": result["games"], **last, "seconds": round(time.time() - started, 1)}), flush=True)


def parse(arguments: Sequence[str]) -> Options:
    """Return the options on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = ", ".join(f"{size}: huggingface.co/{file.repository}" for size, file in FILES.items())
    parser.add_argument("--size", choices=list(FILES), default="0.5b", help="the generator that trains the controller")
    parser.add_argument("--generator", default="", help=f"a GGUF file to use in place of the pinned parts ({where})")
    parser.add_argument("--data", default=os.environ.get("MATRYOSHKA_DATA", "data") + "/alfworld", help="the games")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--games", type=int, default=0, help="test games, 0 for the configuration's number")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_GAMES} games, no training, under half an hour")
    parser.add_argument("--transfer", choices=list(FILES), default="", help="test the controllers with this generator")
    parser.add_argument("--pack", action="store_true", help=f"write what was learnt to {COMMITTED.relative_to(ROOT)}")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "real_households.toml")
    parser.add_argument("--test-only", action="store_true", help="train nothing; test the stages that are trained")
    parser.add_argument("--conditions", nargs="+", choices=list(TITLES), default=list(TITLES), help="of the test")
    args = parser.parse_args(arguments)
    if args.transfer == args.size:
        parser.error(f"--transfer {args.transfer}: it trained these controllers; --size names the one that did")
    seeds = tuple(args.seeds[:1] if args.quick else args.seeds)
    config = args.config.resolve()
    return Options(
        size=args.size,
        generator=args.generator,
        data=args.data,
        seeds=seeds,
        games=args.games,
        quick=args.quick,
        transfer=args.transfer,
        pack=args.pack,
        config=config,
        test_only=args.test_only or args.quick or bool(args.transfer),
        conditions=tuple(args.conditions),
    )


def configuration(options: Options, seed: int, size: str, file: Path) -> RunConfig:
    """Return the configuration of one seed."""
    config = load_toml(RunConfig, options.config, {"seed": seed, "task.options.data": options.data})
    name = file.stem
    games = QUICK_GAMES if options.quick else options.games or config.task.test
    return replace(
        config,
        name=f"{config.name}{options.trainer}-{seed}",
        generator=replace(config.generator, model=name),
        serve=replace(config.serve, model=str(file), name=name),
        task=replace(config.task, test=games),
    )


def saved(options: Options, root: Path, size: str) -> Path:
    """Return the file that keeps the outcomes."""
    return root / (f"transfer-{size}.json" if options.transfer else f"outcomes{options.trainer}.json")


def results_name(options: Options) -> str:
    """Return the name of the tables, without an ending: a name for the generator that trained and for the test's."""
    name = f"real_transfer{options.trainer}" if options.transfer else f"real_households{options.trainer}"
    return name.replace("-", "_").replace(".", "_")


def run_react(config: RunConfig, root: Path, outcomes: Outcomes, path: Path) -> None:
    """Let the generator act by itself, without a controller, in the style of ReAct; recorded in `outcomes`."""
    if len(outcomes.table.get("react", {}).get("", {})) >= config.task.test:
        return
    assert isinstance(config.task.options, AlfworldOptions)
    acting = replace(config.task.options, prompts="full", mode="react")
    config = replace(
        config,
        name="real-households-react",
        rounds=0,
        generator=replace(config.generator, concurrency=1),
        task=replace(config.task, options=acting),
        # One game for each server, so that it meets its own prefix in the server's one slot.
        rollout=replace(config.rollout, code_tokens=REACT_TOKENS, limit=config.serve.copies),
    )
    with open_run(config, root, cache=root / "answers.sqlite") as run:
        _, scheme = schemes(run)["no_guidance"]
        episodes, seconds = tested(run, "react", scheme)
        outcomes.add("react", "", episodes, seconds, {})
    outcomes.save(path)


def run_seed(options: Options, config: RunConfig, root: Path, outcomes: Outcomes, path: Path) -> None:
    """Train the seed as far as it is not trained, and evaluate every condition; all is recorded in `outcomes`.

    path: the file that keeps them.
    """
    seed = str(config.seed)
    folder = root / "transfer" if options.transfer else root
    if options.transfer:
        unpack_adapters(root, folder)
    with open_run(config, folder, cache=root / "answers.sqlite") as run:
        if not options.test_only:
            outcomes.training[seed] = train(run, outcomes.training.get(seed), config.star and options.with_star)
        for name, (_, scheme) in ordered(schemes(run)):
            is_known = name in FIXED and len(outcomes.table.get(name, {}).get("", {})) >= config.task.test
            if name in options.conditions and not is_known:
                episodes, seconds = tested(run, name, scheme)
                assert isinstance(run.task, ALFWorldTask)
                outcomes.add(name, seed, episodes, seconds, causes(run.task, episodes))
                outcomes.save(path)


def run_second_star(options: Options, config: RunConfig, root: Path, outcomes: Outcomes, path: Path) -> None:
    """Train the STaR control for a second round, as far as it is not trained, and evaluate it on the test games.

    Its own policy samples as many episodes as a round does, and it learns from the winners of both rounds, going on
    from where it was. So it has as many calls of the generator as two rounds of preferences.
    """
    folder = root / "transfer" if options.transfer else root
    first = folder / config.name / "star" / "adapter"
    again = replace(
        config,
        name=config.name + SECOND_STAR,
        rounds=1,
        controller=replace(config.controller, adapter=str(first)),
        warmup=replace(config.warmup, source="adapter"),
    )
    is_known = (folder / again.name / "star" / "adapter").exists()
    if not first.exists() or (options.test_only and not is_known):
        return
    earlier: list[Trajectory] = []
    if not is_known:
        with open_run(config, folder, cache=root / "answers.sqlite") as run:
            earlier = collect(run, 1)
    with open_run(again, folder, cache=root / "answers.sqlite") as run:
        if not is_known:
            warm_up(run)
            train_star(run, earlier + collect(run, 1))
        episodes, seconds = tested(run, "star_2", policy_scheme(run, "star"))
        assert isinstance(run.task, ALFWorldTask)
        outcomes.add("star_2", str(config.seed), episodes, seconds, causes(run.task, episodes))
    outcomes.save(path)


def run_new_games(options: Options, config: RunConfig, root: Path, outcomes: Outcomes, path: Path) -> None:
    """Train another second round, as far as it is not trained, and evaluate it on the test games.

    It starts from round 1 as round 2 does, samples as many games that the first round did not have, and learns from
    the pairs of both rounds. So it has as many calls of the generator as two rounds on the same games.
    """
    folder = root / "transfer" if options.transfer else root
    again = replace(
        config,
        name=config.name + NEW_GAMES,
        task=replace(config.task, train=2 * config.task.train),
        rollout=replace(config.rollout, examples=config.task.train),
    )
    is_known = (folder / again.name / "round-2" / "adapter").exists()
    if not (folder / config.name / "round-1" / "adapter").exists() or (options.test_only and not is_known):
        return
    earlier: list[Trajectory] = []
    if not is_known:
        for stage in COPIED[NEW_GAMES]:
            copy_folder(folder / config.name / stage / "adapter", folder / again.name / stage / "adapter")
        with open_run(config, folder, cache=root / "answers.sqlite") as run:
            earlier = collect(run, 1)
    with open_run(again, folder, cache=root / "answers.sqlite") as run:
        if not is_known:
            collected = earlier + collect(run, 2)
            pairs, _ = write_pairs(run, collected)
            train_round(run, 2, pairs, collected)
        episodes, seconds = tested(run, "new_games", policy_scheme(run, "round-2"))
        assert isinstance(run.task, ALFWorldTask)
        outcomes.add("new_games", str(config.seed), episodes, seconds, causes(run.task, episodes))
    outcomes.save(path)


def train(run: Run, known: dict[str, Any] | None, with_star: bool) -> dict[str, Any]:
    """Run warm-up, rounds and, if asked for, STaR as far as they are not done; return what they took and used.

    known: what an earlier run returned; where every stage is trained, it is returned and nothing is sampled.
    """
    stages = [policy_before(run.config, round) for round in range(1, run.config.rounds + 2)]
    if known and all(is_trained(run, stage) for stage in [*stages, *(["star"] if with_star else [])]):
        return known
    warm_up(run)
    collected: list[Trajectory] = []
    rows: dict[str, Any] = {}
    for round in range(1, run.config.rounds + 1):
        sampled = collect(run, round)
        collected += sampled
        pairs, counts = write_pairs(run, collected)
        train_round(run, round, pairs, collected)
        rows[f"round_{round}"] = {**counts.as_dict(), **sample_figures(sampled)}
        if round == 1 and with_star:
            train_star(run, collected)
    return {
        **rows,
        "round_calls": sum(episode.info.calls for episode in collected),
        "wins": sum(episode.reward > 0.5 for episode in collected),
        "seconds": run.seconds.as_dict(),
    }


def sample_figures(sampled: Sequence[Trajectory]) -> dict[str, float]:
    """Return what a collapse would show in: shares of plans that won and that differ, tokens, and nats a token.

    nats_per_token: mean negative log-prob of the sampled tokens under the policy, which estimates its entropy (it is
    exact for temperature 1; the same bias in every round below that).
    """
    actions = [turn.action for episode in sampled for turn in episode.turns]
    tokens = sum(len(action.token_ids or ()) for action in actions)
    logps = sum(sum(action.logprobs or ()) for action in actions)
    plans = {(episode.example_id, turn.action.text) for episode in sampled for turn in episode.turns}
    return {
        "won": sum(episode.reward > 0.5 for episode in sampled) / len(sampled),
        "distinct": len(plans) / len(actions),
        "tokens_per_plan": tokens / len(actions),
        "nats_per_token": -logps / max(tokens, 1),
    }


def ordered(found: dict[str, tuple[str, Scheme]]) -> list[tuple[str, tuple[str, Scheme]]]:
    """Return the conditions, those of the trained controllers first: a run that is stopped has what matters most."""
    order = {name: place for place, name in enumerate(TITLES)}
    return sorted(found.items(), key=lambda item: (item[0] in FIXED, order.get(item[0], len(order))))


def tested(run: Run, name: str, scheme: Scheme) -> tuple[list[Trajectory], float]:
    """Return the greedy episodes of one condition over the test games, and the seconds that they took over all starts.
    """
    label = f"evaluate {name}"
    episodes = run_episodes(run, scheme, ["test"], label=label)
    return episodes, run.seconds.as_dict()[label]


def unpack_adapters(root: Path, folder: Path) -> None:
    """Link the trained policies of the runs under `root` into runs of the same names under `folder`."""
    for adapter in sorted(root.glob("real-households-*/*/adapter")):
        link = folder / adapter.relative_to(root)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(adapter.resolve(), target_is_directory=True)


def say_plan(options: Options, size: str) -> None:
    """Print how long this takes at most, and the smallest difference that it can find."""
    config = load_toml(RunConfig, options.config)
    task, seeds, per_call = config.task, len(options.seeds), SECONDS_PER_CALL[size]
    games = QUICK_GAMES if options.quick else options.games or task.test
    star = config.star and options.with_star
    new = "new_games" in options.conditions
    policies = config.rounds + 1 + 2 * star + new
    fixed = games * 6  # no plan, wrong, gold, untrained; the generator's own plan takes two calls
    calls = fixed + seeds * policies * games
    if "react" in options.conditions and not options.quick:
        calls += games * REACT_CALLS
    stages = 0
    if not options.test_only:
        warm = task.warmup * config.warmup.samples * 2
        rounds = (config.rounds + star + new) * (task.train * config.rollout.samples * NEW_PLANS + task.validation)
        calls, stages = calls + int(seeds * (warm + rounds)), seeds * (config.rounds + 1 + 2 * star + new)
    hours = (calls * per_call + stages * TRAINING_S) / 3600
    points = 100 * smallest_difference(games, seeds, DISAGREEMENT, SHARED, SEED_DEVIATION if seeds > 1 else 0.0)
    print(
        f"at most {calls} calls of the generator at {per_call} s and {stages} stages of training: about {hours:.1f} "
        f"hours on two cores, less what is done already.\n{games} games and {seeds} seeds find a difference of "
        f"{points:.0f} points with 80% power if {DISAGREEMENT:.0%} of the games differ, half of that in all seeds "
        f"alike, and seeds deviate by {100 * SEED_DEVIATION:.0f} points.",
        file=sys.stderr,
        flush=True,
    )


def about(options: Options, size: str, file: Path) -> dict[str, Any]:
    """Return what must stand beside the numbers: models, machine, versions, settings."""
    machine = environment()
    config = load_toml(RunConfig, options.config)
    what = "transfer to another generator" if options.transfer else "a real generator on real games"
    trained = (
        f"Warm-up on {config.task.warmup} games with plans that the generator made for itself and won with, and gold "
        f"plans of types of which fewer than {config.warmup.gold_per_group} won; each round samples "
        f"{config.rollout.samples} plans for each of {config.task.train} games of the train split."
    )
    if options.transfer:
        theirs = results_name(replace(options, transfer=""))
        trained = f"The controllers are those of {theirs}.md, trained with the {options.size.upper()}, and unchanged."
    return {
        "title": f"Households: {what}",
        "summary": (
            f"SmolLM2-135M-Instruct plans, {file.stem} (untouched, behind llama.cpp) writes the program, ALFWorld's "
            "own games judge. One attempt, label-free, greedy. " + trained
        ),
        "generator": {"file": file.name, "sha256": FILES[size].sha256, "repository": FILES[size].repository},
        "machine": machine,
    }


def notes(path: Path) -> str:
    """Return the prose that stands below the tables: the file `<path>_notes.md`, if there is one."""
    prose = path.with_name(f"{path.name}_notes.md")
    return prose.read_text() if prose.exists() else ""


if __name__ == "__main__":
    main()
