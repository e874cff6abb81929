"""Opens a run: its folder, its problems, its generator, its model, its journal.

Every stage sees its finished work by itself: training is complete when its policy's folder exists, an episode when its
key is in the journal, a generator's answer when it is in the cache. A run that is killed anywhere loses at most the
work that was in flight.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from matryoshka.core.config import to_toml
from matryoshka.core.distributed import ALONE, World
from matryoshka.core.files import Journal, SharedJournal, UnwrittenJournal, write_json, write_text
from matryoshka.core.machine import usable_cores
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.protocols import Controller, Generator, Task, TaskSetting
from matryoshka.core.records import Example, Messages, RolloutSettings, Sample, Sampling, content_key
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import read_conversations
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.spending import GeneratorAccount
from matryoshka.inference.vllm import Vllm
from matryoshka.lora.files import read_config
from matryoshka.pilot.config import SPLITS, RunConfig, rollout_settings
from matryoshka.pilot.environment import environment
from matryoshka.pilot.folder import CONFIG, StageSeconds, cache_path, claim, deal_caches
from matryoshka.pilot.generator import RecordedGenerator, open_generator
from matryoshka.pilot.policies import Policies, open_policies
from matryoshka.pilot.progress import StatusLine
from matryoshka.pilot.ranks import Ranks
from matryoshka.pilot.ray_cluster import joined_cluster
from matryoshka.pilot.serving import open_vllm
from matryoshka.tasks.episode import check_prompt
from matryoshka.tasks.find import make_task

ENVIRONMENT = "environment.json"  # the machine and the versions that a run was started with
logger = logging.getLogger(__name__)
Problems = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Run:
    """An open run; `open_run` makes one. The stages are functions that take it."""

    config: RunConfig
    folder: Path
    ranks: Ranks
    """The processes that share the run's episodes and its training."""
    runner: asyncio.Runner
    """The one event loop of all stages: the clients of the generator and of vLLM belong to it."""
    cache: Path
    """The file of the generator's answers."""
    task: Task
    problems: Problems
    """The problems of each split that fit the controller's context."""
    skipped_problems: Mapping[str, int]
    """How many problems of each split do not fit the controller's context and are left out."""
    generator: Generator
    policies: Policies
    tokenizer: Tokenizer
    journal: Journal
    """Every episode that has ended."""
    seconds: StageSeconds
    threads: int
    """Threads of torch in this process."""
    vllm: Vllm | None = None
    """The controller's sampler where [controller] engine = "vllm"."""
    is_read: bool = False
    """Whether the run is only read: then a missing episode is an error, and no model and no generator is opened."""

    @property
    def world(self) -> World:
        """The ranks as training sees them, with this rank's device."""
        return self.policies.world

    @property
    def model(self) -> LanguageModel:
        return self.policies.model

    @property
    def account(self) -> GeneratorAccount | None:
        """The account of the generator's calls, if it has one."""
        return self.generator.account if isinstance(self.generator, OpenAIGenerator) else None

    @property
    def limit(self) -> int:
        """Episodes in flight in one process."""
        return 1 if self.config.controller.deterministic else self.config.rollout.limit

    def stop_sending(self) -> None:
        """Let the generator send no further request; those that were sent are still answered."""
        if isinstance(self.generator, OpenAIGenerator):
            self.generator.stop_sending()

    def open_sampler(self) -> AbstractContextManager[TokenSampler]:
        """Return what samples the controller: vLLM, or our own sampler, to be closed before the model is trained."""
        if self.is_read:
            return nullcontext(_NoSampler(self.tokenizer))
        if self.vllm is not None:
            return nullcontext(self.vllm)
        config = self.config.controller
        return Sampler(self.model, self.tokenizer, config.max_rows, config.deterministic, self.threads)


class _NoSampler:
    """The sampler of a run that is only read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Sample:
        """Raise RuntimeError."""
        raise RuntimeError("the controller was asked although the run is only read")


@dataclass(frozen=True)
class Scheme:
    """One way to guide the generator, with the settings that its episodes run under.

    make: returns the controller in the given run, for the given open sampler. It must not refer to a run itself: with
    executor = "ray" it is called in other processes, each with a run of its own.
    """

    name: str
    make: Callable[[Run, TokenSampler], Controller]
    settings: RolloutSettings


@contextmanager
def open_run(
    config: RunConfig,
    root: Path,
    cache: Path | None = None,
    world: World = ALONE,
    trains: bool = True,
    is_read: bool = False,
) -> Iterator[Run]:
    """Open or continue the run in `root/<name>` on all ranks of `world`; the first rank holds the folder's lock.

    cache: the file of answers, by default the folder's own. trains: whether anything will be trained; if not, no
    weights are loaded where vLLM samples. is_read: the record alone is read; nothing is asked and no weights are
    loaded. Raises ValueError when the run was started with another configuration (naming every difference) or is in
    use. Budgets, limits and patience may change: they decide how fast and how far a run goes, not what it finds.
    """
    folder, ranks = root / config.name, Ranks(world)
    with ExitStack() as stack:
        saved, changed = True, list[str]()
        with ranks.all_or_none():
            if world.is_first:
                saved, changed = claim(config, folder, stack)
                deal_caches(folder, ranks.num_nodes)
        if config.executor == "ray":
            if world.size > 1:
                raise ValueError("executor = 'ray' and torchrun's ranks exclude each other; start one process")
            stack.enter_context(joined_cluster())
        cache = cache or cache_path(folder, str(ranks.node) if ranks.node else "")
        run = assemble(config, folder, cache, ranks, stack, trains and not is_read, is_read)
        name = "trajectories" if world.size == 1 else f"trajectories.rank-{world.rank}"
        with ranks.all_or_none():
            journal = SharedJournal(folder / f"{name}.jsonl", "trajectories*.jsonl")
        stack.callback(journal.close)
        if world.is_first and not saved:  # a configuration that cannot start must not bind the folder's name
            write_json(folder / ENVIRONMENT, environment())
        if world.is_first and (changed or not saved):
            write_text(folder / CONFIG, to_toml(config))
        yield replace(run, journal=journal)


def assemble(
    config: RunConfig, folder: Path, cache: Path, ranks: Ranks, stack: ExitStack, trains: bool, is_read: bool = False
) -> Run:
    """Return the run in `folder`, its episodes not being recorded on disk; `stack` closes what this opens.

    The cheap parts are checked first, so that a missing key or file is reported before a model is loaded.
    """
    world = World(device=torch.device(config.controller.device)) if ranks.world == ALONE else ranks.world
    if config.controller.adapter:  # it is trained further as it is
        with ranks.all_or_none():
            config = replace(config, lora=read_config(Path(config.controller.adapter)))
    runner = stack.enter_context(asyncio.Runner())
    with ranks.all_or_none():
        tokenizer = Tokenizer.load(config.controller.folder)

        def count_tokens(prompt: Messages) -> int:
            return len(tokenizer.render(prompt, add_generation_prompt=True).ids)

        task = open_task(config, count_tokens)
        problems = load_problems(task)
    generator: Generator
    if is_read:
        generator = RecordedGenerator(config)
    else:
        generator = stack.enter_context(open_generator(config, folder, ranks, runner, cache))
    threads = config.controller.threads or max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    vllm = None
    with ranks.all_or_none():
        policies = open_policies(config, folder, world, trains, not is_read)
        context = policies.model.config.max_position_embeddings
        if config.controller.engine == "vllm":
            if not is_read:
                line = stack.enter_context(StatusLine())
                vllm = opened = open_vllm(config, tokenizer, folder / "vllm.log", world.size, line.show)
                stack.callback(lambda: runner.run(opened.aclose()))
            context = min(context, config.controller.vllm.context or context)
        problems, skipped = fitting_problems(config, task, problems, context)
        if trains and not policies.folder("warmup").exists():
            check_warmup(config, problems, tokenizer)
    if skipped:
        logger.warning("problems that exceed the context are left out of everything: %s", skipped)
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        runner=runner,
        cache=cache,
        task=task,
        problems=problems,
        skipped_problems=skipped,
        generator=generator,
        policies=policies,
        tokenizer=tokenizer,
        journal=UnwrittenJournal(),
        seconds=StageSeconds(folder / "seconds.json", writes=world.is_first and not is_read),
        threads=threads,
        vllm=vllm,
        is_read=is_read,
    )


def check_warmup(config: RunConfig, problems: Problems, tokenizer: Tokenizer) -> None:
    """Raise ValueError or FileNotFoundError if the warm-up has nothing to learn from."""
    source = config.warmup.source
    if source == "file":
        read_conversations(Path(config.warmup.data), tokenizer)
    elif source in ("gold", "generator") and not problems["warmup"]:
        what = f"[warmup] source = {source!r}, but [task] warmup is 0, so there is nothing to learn from"
        raise ValueError(f"{what}; take source = 'none', or give it problems")


def open_task(config: RunConfig, count_tokens: Callable[[Messages], int]) -> Task:
    """Return the task that [task] names. count_tokens: of a prompt in the controller's context.

    Raises ValueError for options or settings that the task does not have.
    """
    wants_gold = config.warmup.source == "gold" or config.warmup.gold_per_group > 0
    setting = TaskSetting(config.task.sizes, config.seed, count_tokens, wants_gold)
    task = make_task(config.task.name, config.task.options, setting)
    for greedy in (False, True):
        task.check(rollout_settings(config, greedy))
    return task


def load_problems(task: Task) -> Problems:
    """Return the problems of each split: warmup, train, validation, test, held_out.

    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short, and for a task that gives
    anything but examples with ids of their own, a question and an answer.
    """
    found = {split: task.examples(split) for split in SPLITS}
    split_of: dict[str, str] = {}
    for split, examples in found.items():
        where = f"task {task.name}, {split}"
        rows: object = examples
        if not isinstance(rows, Sequence) or not all(isinstance(r, Example) and isinstance(r.id, str) for r in rows):
            expected = "expected a list of Example(id, fields), the id a text"
            raise ValueError(f"{where}: `examples` returned {rows!r:.80}; {expected}")
        for example in examples:
            if missing := {"question", "answer"} - example.fields.keys():
                has = ", ".join(map(str, example.fields))
                raise ValueError(f"{where}: example {example.id!r} has no field {min(missing)!r}; it has {has}")
            try:
                content_key(example.fields)
            except (TypeError, ValueError) as err:
                raise ValueError(f"{where}: the fields of example {example.id!r} cannot be JSON: {err}") from err
            if example.id in split_of:
                also = f"the id {example.id!r} stands in {split_of[example.id]}, too"
                raise ValueError(f"{where}: {also}; each problem needs an id of its own, and belongs to one split")
            split_of[example.id] = split
    return found


def fitting_problems(
    config: RunConfig, task: Task, problems: Problems, context_length: int
) -> tuple[Problems, dict[str, int]]:
    """Return the problems that fit the context, and how many of each split are left out.

    A problem fits if the controller's first prompt and guidance_tokens fit the context together. That is the sampler's
    own comparison, made before anything is drawn, so that every condition has the same problems. With overlong =
    "error" the first one that does not fit raises ValueError; so does a split that "skip" would leave without problems.
    """
    guidance_tokens = max(rollout_settings(config, greedy).controller.max_tokens for greedy in (False, True))
    room = context_length - guidance_tokens
    kept: dict[str, Sequence[Example]] = {}
    for split, examples in problems.items():
        prompts = [task.first_prompt(example) for example in examples]
        for prompt in prompts:
            check_prompt(prompt, f"task {task.name}: `first_prompt` returned")
        sizes = [task.setting.count_tokens(prompt) for prompt in prompts]
        kept[split] = [example for example, size in zip(examples, sizes, strict=True) if size <= room]
        if len(kept[split]) < len(examples) and (config.overlong == "error" or not kept[split]):
            raise ValueError(
                f"[task] {split}: {len(examples) - len(kept[split])} of {len(examples)} prompts (the longest has "
                f"{max(sizes)} tokens) and guidance_tokens {guidance_tokens} exceed the controller's "
                f"context of {context_length}; lower guidance_tokens, use shorter problems or set overlong = 'skip'"
            )
    return kept, {split: n for split, examples in problems.items() if (n := len(examples) - len(kept[split]))}
