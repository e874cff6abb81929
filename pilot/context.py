"""A run directory and its stages: warm-up, collect, pair, train, evaluate. Each stage finds what is done and goes on.

Training is complete when its policy's folder exists, an episode when its key is in the journal, a black-box answer when
it is in the cache: so a run that was killed anywhere costs at most the work in flight.
"""

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from matryoshka.core.config import to_toml
from matryoshka.core.distributed import ALONE, World
from matryoshka.core.files import SharedJournal, write_json, write_jsonl, write_text
from matryoshka.core.protocols import Generator
from matryoshka.core.records import (
    Example,
    Messages,
    Preference,
    RolloutSettings,
    Sampling,
    Trajectory,
    Turn,
    stable_seed,
    to_json,
)
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainConfig
from matryoshka.dpo.data import completion, distinct, fitting, preference_items, read_conversations, text_completion
from matryoshka.dpo.pairs import PairCounts, make_pairs, winners
from matryoshka.dpo.parity import BOUNDS, check_policy
from matryoshka.eval.baselines import GeneratorGuidance
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.spending import Purse
from matryoshka.inference.vllm import Vllm
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.doctor import environment
from matryoshka.pilot.episodes import Scheme, Stage, run_stage
from matryoshka.pilot.folder import CONFIG, cache_path, claim, copy_folder, deal_caches
from matryoshka.pilot.generator import named, open_generator
from matryoshka.pilot.policies import open_policies
from matryoshka.pilot.problems import load_splits, make_task
from matryoshka.pilot.ranks import Ranks
from matryoshka.pilot.ray import connected, run_on_ray
from matryoshka.pilot.serving import open_vllm

logger = logging.getLogger(__name__)

class Run:
    """An open run directory. Use `open_run`, which opens the journal too; the fields are shared by the stages.

    What can be wrong with the configuration comes first, so that nobody waits for training to hear of a missing key.
    """

    journal: SharedJournal
    generator: Generator
    purse: Purse | None  # the generator's account, where it has one
    vllm: Vllm | None = None  # the controller's sampler where [controller] engine says so

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        stack: ExitStack,
        cache: Path | None = None,
        ranks: Ranks | None = None,
        trains: bool = True,
    ) -> None:
        """trains: whether anything is to be trained; else no weights are loaded that vLLM samples without."""
        self.config = config
        self.ranks = ranks = ranks or Ranks()
        alone = World(device=torch.device(config.controller.device))
        self.world = world = alone if ranks.world == ALONE else ranks.world
        self.cache = cache or cache_path(folder, str(ranks.node) if ranks.node else "")
        self.folder = folder
        self.stack = stack
        self.runner = stack.enter_context(asyncio.Runner())  # one event loop for all stages: clients belong to one
        self._seconds: dict[str, float] = {}
        if (folder / "seconds.json").exists():
            self._seconds = json.loads((folder / "seconds.json").read_text())
        with ranks.together():
            splits = load_splits(config)
        self._take(open_generator(self, config.generator, config.serve))
        self.threads = config.controller.threads or max(1, (os.cpu_count() or 1) // world.local_size)
        torch.set_num_threads(self.threads)
        with ranks.together():
            self.policies = open_policies(config, folder, world, trains)
            self.model = self.policies.model
            self.tokenizer = Tokenizer.load(Path(config.controller.path))
            context = self.model.config.max_position_embeddings
            if config.controller.engine == "vllm":
                self.vllm = vllm = open_vllm(config, self.tokenizer, folder / "vllm.log", world.size)
                stack.callback(lambda: self.runner.run(vllm.aclose()))
                context = min(context, config.controller.vllm.context or context)
            self.task, self._skipped_problems = make_task(config, splits, self._count_tokens, context)
        if self._skipped_problems:
            logger.warning("problems that exceed the context are left out of everything: %s", self._skipped_problems)

    def _count_tokens(self, prompt: Messages) -> int:
        return len(self.tokenizer.render(prompt, add_generation_prompt=True).ids)

    def use_generator(self, name: str) -> None:
        """Take another black box from now on; `black_box.named` says which ones there are."""
        self._take(open_generator(self, *named(self.config, name)))

    def _take(self, generator: Generator) -> None:
        self.generator = generator
        self.purse = generator.purse if isinstance(generator, OpenAIGenerator) else None

    def is_trained(self, stage: str) -> bool:
        return self.policies.folder(stage).exists()

    def policy_before(self, round: int) -> str:
        """Return the stage whose policy round `round` starts from and is held to."""
        if round > 1:
            return f"round-{round - 1}"
        return "" if self.config.warmup.source == "none" else "warmup"

    # Training.

    def warmup(self) -> None:
        """Train the warm-up policy: SFT on gold steps, on the user's file or on the generator's own successes."""
        if self.config.warmup.source == "none" or self.is_trained("warmup"):
            return
        if self.config.warmup.source == "file":
            items = read_conversations(Path(self.config.warmup.data), self.tokenizer)
        elif self.config.warmup.source == "generator":
            items = self._own_wins()
        else:
            examples = self.task.examples("warmup")
            items = [self._gold_item(example) for example in examples]
        self._train("warmup", "", items, self.config.warmup.train, sft=True)

    def _own_wins(self) -> list[Item]:
        """Return SFT items of the plans that the generator made for itself and succeeded with."""
        config = self.config.warmup
        scheme = Scheme("generator", lambda _: GeneratorGuidance(self.generator), self.settings(greedy=False))
        sampled = self._sampled(stable_seed("warmup", self.config.seed), config.samples)
        kept: dict[str, list[Item]] = {example.id: [] for example in self.task.examples("warmup")}
        prompts = {example.id: self.task.first_prompt(example) for example in self.task.examples("warmup")}
        for _, _, sample, id in winners(self.episodes(scheme, ["warmup"], sampled, "warmup runs")):
            if len(kept[id]) < config.wins_per_example:
                kept[id].append(Item((text_completion(self.tokenizer, prompts[id], sample.text),), id))
        items = [item for items in kept.values() for item in items]
        if not items:
            runs = f"{len(kept)} examples x {config.samples} episodes"
            raise ValueError(f"[warmup] source = 'generator', but none of {runs} succeeded; use another source")
        return items

    def star(self, trajectories: Sequence[Trajectory]) -> None:
        """Train the STaR control: SFT on round 1's distinct winning guidances, from where round 1 started."""
        if self.is_trained("star"):
            return
        won = winners(trajectories)
        if not won:
            logger.warning("star: no sample won, so there is nothing to imitate; the policy stays as it was")
            self.policies.keep(self.policy_before(1), "star")
            return
        self._check_parity(trajectories, self.policy_before(1))
        items = [Item((completion(ids or (), sample),), example) for ids, _, sample, example in won]
        config = replace(self.config.warmup.train, epochs=self.config.dpo.train.epochs)
        self._train("star", self.policy_before(1), items, config, sft=True)

    def train_round(self, round: int, trajectories: Sequence[Trajectory]) -> PairCounts:
        """Train round `round` on the pairs of all trajectories so far, choosing the learning rate on validation."""
        stage, before = f"round-{round}", self.policy_before(round)
        pairs, counts = self.pairs(trajectories)
        if self.is_trained(stage):
            return counts
        items, repeated = distinct(preference_items(pairs))
        if repeated:
            logger.warning("%s: %d pairs repeat those of an equal prompt and are left out", stage, repeated)
        if not items:
            logger.warning("round %d: no problem was both solved and failed: no pairs, so nothing changes", round)
            self.policies.keep(before, stage)
            return counts
        self._check_parity(trajectories, before)
        rates = self.config.dpo.learning_rates or (self.config.dpo.train.learning_rate,)
        results = []
        for rate in rates:
            candidate = f"{stage}/lr-{rate:g}" if len(rates) > 1 else f"{stage}/train"
            self._train(candidate, before, items, replace(self.config.dpo.train, learning_rate=rate), sft=False)
            scored = self.task.score(self.episodes(self.policy(candidate), ["validation"]))[self.task.main_metric]
            results.append({"learning_rate": rate, "stage": candidate, "validation": to_json(scored)})
        best = max(results, key=lambda row: row["validation"]["value"])
        if self.world.is_first:
            write_json(self.folder / stage / "selection.json", {"chosen": best, "candidates": results})
            copy_folder(self.policies.folder(best["stage"]), self.policies.folder(stage))
        self.ranks.barrier()
        return counts

    def _check_parity(self, trajectories: Sequence[Trajectory], stage: str) -> None:
        """Raise ValueError if the samples of the policy of `stage` are not what training computes for it."""
        config = self.config.controller
        bound = max(BOUNDS[dtype] for dtype in {config.dtype, config.vllm.dtype or config.dtype})
        with self.policies.computing(stage):
            found = check_policy(self.model, trajectories, self.policies.name(stage), bound, self.config.seed)
        if found is not None:
            logger.info("parity of %s: %.2g nats a token (bound %g)", stage or "the base model", found.rms, bound)

    def pairs(self, trajectories: Sequence[Trajectory]) -> tuple[list[Preference], PairCounts]:
        """Return the pairs of all trajectories so far and write them to preferences.jsonl."""
        pairs, counts = make_pairs(trajectories, self.task.pair_rule, self.config.seed)
        if self.world.is_first:
            write_jsonl(self.folder / "preferences.jsonl", [to_json(pair) for pair in pairs])
        return pairs, counts

    def _gold_item(self, example: Example) -> Item:
        guidance = self.task.gold_guidance(example)
        if guidance is None:
            what = f"example {example.id} has no gold guidance"
            raise ValueError(f"[warmup] source = 'gold', but {what}; use source = 'file'")
        return Item((text_completion(self.tokenizer, self.task.first_prompt(example), guidance),), example.id)

    def _train(self, stage: str, start: str, items: Sequence[Item], config: TrainConfig, sft: bool) -> None:
        """Train from the policy of `start`, and save the result as `stage`'s policy."""
        if self.is_trained(stage):
            return
        context = self.model.config.max_position_embeddings
        items, skipped = fitting(items, context, self.config.overlong)
        if skipped:
            logger.warning("%s: %d items exceed the context of %d tokens and are left out", stage, skipped, context)
            if self.world.is_first:
                write_json(self.folder / stage / "left_out.json", skipped)
        started_at = time.monotonic()
        self.policies.train(stage, start, items, config, None if sft else self.config.dpo.objective)
        self._add_seconds(f"train {stage}", time.monotonic() - started_at)
        for checkpoint in (self.folder / stage).glob("step-*") if self.world.is_first else ():
            shutil.rmtree(checkpoint)  # the policy is whole; the optimizer's state is not needed again

    # Episodes.

    def settings(self, greedy: bool, **changes: Any) -> RolloutSettings:
        """Return the settings of an episode: controller greedy or at the collection temperature, generator greedy."""
        rollout = self.config.rollout
        controller = Sampling(
            temperature=0.0 if greedy else rollout.temperature,
            top_p=1.0 if greedy else rollout.top_p,
            max_tokens=rollout.guidance_tokens,
        )
        generator = Sampling(max_tokens=rollout.code_tokens)
        settings = RolloutSettings(
            controller,
            generator,
            rollout.protocol,
            rollout.inner_attempts,
            rollout.outer_turns,
            self.config.overlong,
        )
        return replace(settings, **changes)

    def policy(self, stage: str) -> Scheme:
        """Return the scheme of a trained policy ("": the base model), evaluated greedily."""
        name = self.policies.name(stage)
        return Scheme(name, lambda sampler: self.policies.controller(stage, sampler), self.settings(greedy=True))

    def collect(self, round: int) -> list[Trajectory]:
        """Return K sampled episodes for each training problem under the policy that round `round` starts from."""
        scheme = self.policy(self.policy_before(round))
        sampled = self._sampled(stable_seed("collect", self.config.seed, round), self.config.rollout.samples)
        done = self.episodes(scheme, ["train"], sampled, f"collect {round}")
        return done + self._bootstrapped(round, done)

    def _bootstrapped(self, round: int, done: Sequence[Trajectory]) -> list[Trajectory]:
        """Return episodes that the generator guides, for each training problem that no episode of `done` solved."""
        samples = self.config.rollout.bootstrap
        solved = {trajectory.example_id for trajectory in done if trajectory.reward > 0.5}
        hard = {trajectory.example_id for trajectory in done} - solved
        if not samples or not hard:
            return []
        scheme = Scheme("generator", lambda _: GeneratorGuidance(self.generator), self.settings(greedy=False))
        sampled = self._sampled(stable_seed("bootstrap", self.config.seed, round), samples)
        episodes = self.episodes(scheme, ["train"], sampled, f"bootstrap {round}", only=hard)
        return [self._in_our_tokens(episode) for episode in episodes]

    def _in_our_tokens(self, episode: Trajectory) -> Trajectory:
        """Return `episode` with its guidance in the controller's tokens, as if it had drawn it, to be trained on."""

        def ours(turn: Turn) -> Turn:
            ids = self.tokenizer.render(turn.prompt, add_generation_prompt=True).ids
            said = (*self.tokenizer.encode(turn.action.text), self.tokenizer.eos_id)
            return replace(turn, prompt_ids=ids, action=replace(turn.action, token_ids=said))

        return replace(episode, turns=tuple(map(ours, episode.turns)))

    def _sampled(self, seed: int, samples: int) -> list[RolloutSettings]:
        """Return the settings of `samples` draws at the collection temperature."""
        settings = self.settings(greedy=False)
        draws = range(samples)
        return [replace(settings, controller=replace(settings.controller, seed=seed, draw=draw)) for draw in draws]

    def episodes(
        self,
        scheme: Scheme,
        splits: Sequence[str],
        settings: Sequence[RolloutSettings] = (),
        label: str = "",
        first: int | None = None,
        only: Collection[str] | None = None,
    ) -> list[Trajectory]:
        """Return the episodes of `scheme` over `splits` (once each, or once per settings), recorded ones read back.

        first: only of so many examples. only: of those with these ids. Raises RunStopped when the budget is spent,
        Interrupted on SIGINT or SIGTERM, both when the episodes in flight have ended.
        """
        examples = [example for split in splits for example in self.task.examples(split)][:first]
        examples = [example for example in examples if only is None or example.id in only]
        started_at = time.monotonic()
        with self.open_sampler() as sampler:
            stage = Stage(
                label or scheme.name,
                self.task,
                scheme.make(sampler),
                self.generator,
                self.purse,
                self.limit,
                self.config.rollout.max_failed_share,
                partial(run_on_ray, self, scheme) if self.config.executor == "ray" else None,
            )
            jobs = stage.jobs(examples, settings or [scheme.settings])
            done = self.runner.run(run_stage(stage, jobs, self.journal, self.ranks))
        self._add_seconds(label or f"{scheme.name} {'+'.join(splits)}", time.monotonic() - started_at)
        return done

    def open_sampler(self) -> AbstractContextManager[Sampler | Vllm]:
        """Return what samples the controller: ours, to be closed before the model is trained, or vLLM."""
        if self.vllm is not None:
            return nullcontext(self.vllm)
        config = self.config.controller
        return Sampler(self.model, self.tokenizer, config.max_rows, config.deterministic, self.threads)

    @property
    def limit(self) -> int:
        """Episodes in flight in a process."""
        return 1 if self.config.controller.deterministic else self.config.rollout.limit

    def left_out(self) -> dict[str, int]:
        """Return what did not fit the context, by split of problems and by stage of training; {} if all did."""
        files = sorted(self.folder.glob("**/left_out.json"))
        items = {f"{path.parent.relative_to(self.folder)} items": json.loads(path.read_text()) for path in files}
        return {**{f"{split} problems": n for split, n in self._skipped_problems.items()}, **items}

    def spending(self) -> dict[str, Any]:
        """Return what the black box has cost over all restarts: answers, tokens, dollars; {} where nobody counts."""
        return {} if self.purse is None else self.purse.as_dict()

    def seconds(self) -> dict[str, float]:
        """Return wall-clock seconds by stage, added up over restarts (a killed stage's last part is not in them)."""
        return dict(self._seconds)

    def _add_seconds(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if self.world.is_first:
            write_json(self.folder / "seconds.json", self._seconds)


@contextmanager
def open_run(
    config: RunConfig, root: Path, cache: Path | None = None, world: World = ALONE, trains: bool = True
) -> Iterator[Run]:
    """Open or continue `root/<name>`, all ranks of `world` together, under its lock, which the first one holds.

    cache: the file of answers, by default the folder's own. trains: as `Run` takes it. Raises ValueError when it was
    started with another configuration (naming every difference) or is in use. Budgets, limits and patience may change:
    they decide how fast and how far a run goes, not what it finds.
    """
    folder, ranks = root / config.name, Ranks(world)
    with ExitStack() as stack:
        with ranks.together():
            saved, changed = claim(config, folder, stack) if world.is_first else (True, [])
            if world.is_first:
                deal_caches(folder, ranks.num_nodes)
        if config.executor == "ray":
            if world.size > 1:
                raise ValueError("executor = 'ray' and torchrun's ranks exclude each other; start one process")
            stack.enter_context(connected())
        run = Run(config, folder, stack, cache, ranks, trains)
        name = "trajectories" if world.size == 1 else f"trajectories.rank-{world.rank}"
        with ranks.together():
            run.journal = SharedJournal(folder / f"{name}.jsonl", "trajectories*.jsonl")
        stack.callback(run.journal.close)
        if world.is_first and not saved:  # a configuration that cannot start binds nobody
            write_json(folder / "environment.json", environment())
        if world.is_first and (changed or not saved):
            write_text(folder / CONFIG, to_toml(config))
        yield run
