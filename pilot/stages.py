"""The stages of a pilot that make policies: warm-up, collection, pairs, a round of training, the STaR control.

Each is a function of an open run. It reads back recorded episodes and trained policies, and does the rest.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from matryoshka.core.files import write_json, write_jsonl
from matryoshka.core.protocols import Controller, Task
from matryoshka.core.records import Example, Preference, Trajectory, Turn, stable_seed, to_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainConfig
from matryoshka.dpo import objectives
from matryoshka.dpo.data import completion, distinct, fitting, preference_items, read_conversations, text_completion
from matryoshka.dpo.pairs import PairCounts, make_pairs, winners
from matryoshka.dpo.parity import BOUNDS, check_policy
from matryoshka.eval.baselines import GeneratorGuidance
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.config import RunConfig, rollout_settings
from matryoshka.pilot.context import Run, Scheme
from matryoshka.pilot.episodes import Replay, failed_first_plans, policy_scheme, run_episodes, sampled_settings
from matryoshka.pilot.folder import copy_folder

logger = logging.getLogger(__name__)


def is_trained(run: Run, stage: str) -> bool:
    """Return whether the policy of `stage` exists; folders appear atomically, so it is then complete."""
    return run.policies.folder(stage).exists()


def policy_before(config: RunConfig, round: int) -> str:
    """Return the stage whose policy `round` samples from and starts from; it is the round's reference, too."""
    if round > 1:
        return f"round-{round - 1}"
    return "" if config.warmup.source == "none" else "warmup"


# Warm-up.


def warm_up(run: Run) -> str:
    """Train the warm-up policy by SFT on the data that [warmup] names, and return its stage ("" for no warm-up)."""
    config, stage = run.config.warmup, policy_before(run.config, 1)
    if not stage or is_trained(run, stage):
        return stage
    if config.source == "adapter":
        run.ranks.barrier()  # every rank has asked by now whether it is trained
        if run.world.is_first:
            copy_folder(Path(run.config.controller.adapter), run.policies.folder(stage))
        run.ranks.barrier()
        return stage
    if config.source == "file":
        items = read_conversations(Path(config.data), run.tokenizer)
    elif config.source == "generator":
        items = _generator_wins(run)
    else:
        items = [sft_item(run.task, run.tokenizer, example) for example in run.problems["warmup"]]
    _train(run, stage, "", items, config.train, None)
    return stage


def sft_item(task: Task, tokenizer: Tokenizer, example: Example) -> Item:
    """Return the item that teaches an example's gold guidance. Raises ValueError if it has none."""
    guidance = gold_text(task, example)
    if guidance is None:
        what = f"example {example.id} has no gold guidance"
        raise ValueError(f"[warmup] source and gold_per_group ask for gold, but {what}; use source = 'file'")
    return Item((text_completion(tokenizer, task.first_prompt(example), guidance),), example.id)


def gold_text(task: Task, example: Example) -> str | None:
    """Return the example's gold guidance, None where it has none. Raises ValueError for anything else than a text."""
    found: object = task.gold_guidance(example)
    if not isinstance(found, str | None):
        what = f"task {task.name}: `gold_guidance` returned {found!r:.60} for example {example.id}"
        raise ValueError(f"{what}; expected a text, or None where there is none")
    return found


def _generator_wins(run: Run) -> list[Item]:
    """Return SFT items of what the generator wrote for itself and succeeded with, and of gold where that is too few."""
    config, examples = run.config.warmup, run.problems["warmup"]
    seed = run.config.seed if config.seed < 0 else config.seed
    settings = sampled_settings(run.config, stable_seed("warmup", seed), config.samples)
    episodes = run_episodes(run, generator_scheme(run.config), ["warmup"], settings, "warmup runs")
    kept: dict[str, list[Item]] = {example.id: [] for example in examples}
    prompts = {example.id: run.task.first_prompt(example) for example in examples}
    for _, _, sample, id in winners(episodes):
        if len(kept[id]) < config.wins_per_example:
            kept[id].append(Item((text_completion(run.tokenizer, prompts[id], sample.text),), id))
    found = Counter(run.task.group(example) for example in examples for _ in kept[example.id])
    for example in examples:
        if not kept[example.id] and found[run.task.group(example)] < config.gold_per_group:
            kept[example.id].append(sft_item(run.task, run.tokenizer, example))
            found[run.task.group(example)] += 1
    items = [item for items in kept.values() for item in items]
    if not items:
        runs = f"{len(kept)} examples x {config.samples} episodes"
        raise ValueError(f"[warmup] source = 'generator', but none of {runs} succeeded; use another source")
    return items


def generator_scheme(config: RunConfig) -> Scheme:
    """Return the scheme in which the generator guides itself, sampled at the collection temperature."""
    return Scheme("generator", lambda run, _: GeneratorGuidance(run.generator), rollout_settings(config, greedy=False))


# Collection.


def collect(run: Run, round: int) -> list[Trajectory]:
    """Return K sampled episodes for each training problem under the policy that `round` starts from."""
    scheme = policy_scheme(run, policy_before(run.config, round))
    settings = sampled_settings(run.config, episodes_seed("collect", run.config, round), run.config.rollout.samples)
    only = {example.id for example in examples_of(run.config, run.problems["train"], round)}
    done = run_episodes(run, scheme, ["train"], settings, f"collect {round}", only=only)
    done += replanned(run, scheme, round, done)
    return done + bootstrapped(run, round, done)


def examples_of(config: RunConfig, train: Sequence[Example], round: int) -> list[Example]:
    """Return the training examples that `round` samples: the next [rollout] examples of `train`, which is a ring."""
    count = min(config.rollout.examples or len(train), len(train))
    return [train[((round - 1) * count + place) % len(train)] for place in range(count)]


def episodes_seed(kind: Literal["collect", "replan", "bootstrap"], config: RunConfig, round: int) -> int:
    """Return the seed of the episodes of `round`: samples of the policy, new plans in one state, or the generator's."""
    return stable_seed(kind, config.seed, round)


def replanned(run: Run, scheme: Scheme, round: int, done: Sequence[Trajectory]) -> list[Trajectory]:
    """Return episodes that go on from one failed first plan of each problem in `done`, without that plan's own turn.

    The first plan is replayed and the generator, which is greedy, answers as before, so that all of a problem's
    episodes come to the same state; there `scheme` plans anew, another draw in each.
    """
    table = failed_first_plans(done)
    samples = run.config.rollout.replans
    if not samples or not table:
        return []

    def make(run: Run, sampler: TokenSampler) -> Controller:
        # A failed episode that a restart completes may change the table. Recorded new plans came after a failed plan of
        # the same policy all the same, and are not paid for again.
        return Replay(scheme.make(run, sampler), table, "failures")

    settings = sampled_settings(run.config, episodes_seed("replan", run.config, round), samples)
    failed = {trajectory.example_id for trajectory in done if len(trajectory.turns) > 1}
    replay = Scheme(f"{scheme.name} again", make, scheme.settings)
    episodes = run_episodes(run, replay, ["train"], settings, f"re-plan {round}", only=failed)
    return [after_first_turn(episode) for episode in episodes]


def after_first_turn(episode: Trajectory) -> Trajectory:
    """Return an episode without its first turn, which was replayed."""
    return replace(episode, turns=episode.turns[1:])


def collected(run: Run) -> list[Trajectory]:
    """Return the episodes of every round that can be collected, which are those whose starting policy is trained."""
    rows: list[Trajectory] = []
    for round in range(1, run.config.rounds + 1):
        before = policy_before(run.config, round)
        if before and not is_trained(run, before):
            break
        rows += collect(run, round)
    return rows


def bootstrapped(run: Run, round: int, done: Sequence[Trajectory]) -> list[Trajectory]:
    """Return episodes that the generator guides, for each training problem that no episode of `done` solved."""
    samples = run.config.rollout.bootstrap
    solved = {trajectory.example_id for trajectory in done if trajectory.reward > 0.5}
    hard = {trajectory.example_id for trajectory in done} - solved
    if not samples or not hard:
        return []
    settings = sampled_settings(run.config, episodes_seed("bootstrap", run.config, round), samples)
    episodes = run_episodes(run, generator_scheme(run.config), ["train"], settings, f"bootstrap {round}", only=hard)
    return [in_controller_tokens(run.tokenizer, episode) for episode in episodes]


def in_controller_tokens(tokenizer: Tokenizer, episode: Trajectory) -> Trajectory:
    """Return `episode` with its guidance in the controller's tokens, as if it had drawn it, to be trained on."""

    def tokenized(turn: Turn) -> Turn:
        ids = tokenizer.render(turn.prompt, add_generation_prompt=True).ids
        text_ids = (*tokenizer.encode(turn.action.text), tokenizer.eos_id)
        return replace(turn, prompt_ids=ids, action=replace(turn.action, token_ids=text_ids))

    return replace(episode, turns=tuple(map(tokenized, episode.turns)))


# Training.


def write_pairs(run: Run, trajectories: Sequence[Trajectory]) -> tuple[list[Preference], PairCounts]:
    """Return the preference pairs of all trajectories so far, having written them to preferences.jsonl."""
    pairs, counts = pairs_so_far(run, trajectories)
    if not pairs:
        logger.warning("no pairs: %s", counts.why_none())
    if counts.left_out:
        what = f"{counts.left_out} episodes, since other draws of their groups failed"
        logger.warning("pairs: left out %s; a run that is started again completes the groups", what)
    if run.world.is_first:
        write_jsonl(run.folder / "preferences.jsonl", [to_json(pair) for pair in pairs])
    return pairs, counts


def pairs_so_far(run: Run, trajectories: Sequence[Trajectory]) -> tuple[list[Preference], PairCounts]:
    """Return the preference pairs of all trajectories so far, by the task's rule."""
    rule = replace(run.task.pair_rule, cap=run.config.dpo.pairs_per_example)
    return make_pairs(trajectories, rule, run.config.seed)


def train_round(run: Run, round: int, pairs: Sequence[Preference], trajectories: Sequence[Trajectory]) -> str:
    """Train the policy of `round` on `pairs` and return its stage; the learning rate is chosen on validation problems.

    trajectories: where the pairs come from; their log-probs are compared with the trainer's first. Without pairs the
    policy stays what it was.
    """
    stage, before, config = f"round-{round}", policy_before(run.config, round), run.config.dpo
    if is_trained(run, stage):
        return stage
    items, repeated = distinct(preference_items(pairs))
    if repeated:
        logger.warning("%s: %d pairs repeat those of an equal prompt and are left out", stage, repeated)
    if not items:
        logger.warning("round %d: there are no pairs, so the policy stays as it was", round)
        run.policies.keep(before, stage)
        return stage
    check_parity(run, trajectories, before)
    rates = config.learning_rates or (config.train.learning_rate,)
    results = []
    for rate in rates:
        candidate = f"{stage}/lr-{rate:g}" if len(rates) > 1 else f"{stage}/train"
        _train(run, candidate, before, items, replace(config.train, learning_rate=rate), config.objective)
        episodes = run_episodes(run, policy_scheme(run, candidate), ["validation"])
        scored = run.task.score(episodes)[run.task.main_metric]
        results.append({"learning_rate": rate, "stage": candidate, "validation": to_json(scored)})
    best = max(results, key=lambda row: row["validation"]["value"])
    if run.world.is_first:
        write_json(run.folder / stage / "selection.json", {"chosen": best, "candidates": results})
        copy_folder(run.policies.folder(best["stage"]), run.policies.folder(stage))
    run.ranks.barrier()
    return stage


def run_round(run: Run, round: int) -> dict[str, Any]:
    """Collect, pair and train one round alone and return its summary; round 1 warms up first.

    round: 0 is the first one that is not trained yet. Raises ValueError for a round that the configuration does not
    have, or whose starting policy is not trained.
    """
    rounds = run.config.rounds
    if round < 0:
        raise ValueError(f"round {round} must be at least 1, or 0 for the first one that is not trained yet")
    round = round or next((n for n in range(1, rounds + 1) if not is_trained(run, f"round-{n}")), rounds + 1)
    if not 1 <= round <= rounds:
        raise ValueError(f"round {round}: the run has rounds = {rounds}; a larger number (--rounds) adds rounds to it")
    stage, before = f"round-{round}", policy_before(run.config, round)
    if round == 1:
        warm_up(run)
    elif not is_trained(run, before):
        raise ValueError(f"round {round} starts from the policy of {before}, which is not trained; run that one first")
    summary: dict[str, Any] = {"round": round, "starts_from": before or "untrained"}
    if not is_trained(run, stage):
        trajectories = [episode for earlier in range(1, round + 1) for episode in collect(run, earlier)]
        pairs, counts = write_pairs(run, trajectories)
        train_round(run, round, pairs, trajectories)
        summary |= {"episodes": len(trajectories), **counts.as_dict()}
    return {**summary, "policy": str(run.policies.folder(stage))}


def train_star(run: Run, trajectories: Sequence[Trajectory]) -> None:
    """Train the STaR control: SFT on round 1's distinct winning guidances, starting where round 1 started."""
    before = policy_before(run.config, 1)
    if is_trained(run, "star"):
        return
    won = winners(trajectories)
    if not won:
        logger.warning("star: no sample won, so there is nothing to imitate; the policy stays as it was")
        run.policies.keep(before, "star")
        return
    check_parity(run, trajectories, before)
    items = [Item((completion(ids or (), sample),), example) for ids, _, sample, example in won]
    config = replace(run.config.warmup.train, epochs=run.config.dpo.train.epochs)
    _train(run, "star", before, items, config, None)


def check_parity(run: Run, trajectories: Sequence[Trajectory], stage: str) -> None:
    """Raise ValueError if the log-probs of the samples of `stage`'s policy are not those that training computes."""
    config = run.config.controller
    bound = max(BOUNDS[dtype] for dtype in {config.dtype, config.vllm.dtype or config.dtype})
    with run.policies.computing(stage):
        found = check_policy(run.model, trajectories, run.policies.name(stage), bound, run.config.seed)
    if found is not None:
        logger.info("parity of %s: %.2g nats a token (bound %g)", stage or "the base model", found.rms, bound)


def _train(
    run: Run,
    stage: str,
    start: str,
    items: Sequence[Item],
    config: TrainConfig,
    objective: objectives.Preference | None,
) -> None:
    """Train from the policy of `start` and save the result as the policy of `stage`; objective None is SFT."""
    if is_trained(run, stage):
        return
    context = run.model.config.max_position_embeddings
    items, skipped = fitting(items, context, run.config.overlong)
    if skipped:
        logger.warning("%s: %d items exceed the context of %d tokens and are left out", stage, skipped, context)
        if run.world.is_first:
            write_json(run.folder / stage / "left_out.json", skipped)
    with run.seconds.timed(f"train {stage}"):
        run.policies.train(stage, start, items, config, objective)
    for checkpoint in (run.folder / stage).glob("step-*") if run.world.is_first else ():
        shutil.rmtree(checkpoint)  # the policy is complete; the optimizer's state is not needed again


def left_out(run: Run) -> dict[str, int]:
    """Return how much did not fit the context, by split of problems and by stage of training; {} if everything fits."""
    files = sorted(run.folder.glob("**/left_out.json"))
    items = {f"{path.parent.relative_to(run.folder)} items": json.loads(path.read_text()) for path in files}
    return {**{f"{split} problems": n for split, n in run.skipped_problems.items()}, **items}
