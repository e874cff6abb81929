"""A configuration checked before anything is paid for: everything of a run but models and calls.

Files, splits and sizes are read as the run reads them; one episode of the task is played between two players that
always fail, so that every kind of prompt is shown; tokens are counted and priced. All parts are checked, and all faults
are reported together.
"""

import asyncio
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka.core.models.load import empty_model
from matryoshka.core.models.weights import check_weights
from matryoshka.core.protocols import Controller, Task
from matryoshka.core.records import Example, Messages, RolloutSettings, Sample, Sampling, Trajectory, Usage
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.packing import check_budget
from matryoshka.dpo.data import fitting, read_conversations
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.llama_cpp import check_gguf
from matryoshka.inference.prices import Price
from matryoshka.lora.files import read_config
from matryoshka.lora.linear import with_targets
from matryoshka.pilot.config import RunConfig, rollout_settings
from matryoshka.pilot.context import Problems, fitting_problems, load_problems, open_task
from matryoshka.pilot.estimate import num_episodes, num_guided
from matryoshka.pilot.generator import scripted_generator
from matryoshka.pilot.stages import sft_item
from matryoshka.tasks.rollout import Job, Setup, play_episode

COUNTED = 8  # training examples whose requests are counted
COLLECTING = ("warm-up", "collect", "re-plan, at most", "bootstrap, at most")
NOT_KNOWN = "(here stands what the {} wrote)"


@dataclass
class Checked:
    """The findings of a check. lines: one for each sound part; faults: the errors that keep a run from starting."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    prompts: dict[str, Messages] = field(default_factory=dict)
    """Kind of prompt -> the first one of that kind."""
    numbers: dict[str, Any] = field(default_factory=dict)

    def part(self, check: Callable[[], str]) -> bool:
        """Run one check, note its line or its fault, and return whether it passed."""
        try:
            self.lines.append(check())
        except (ValueError, OSError) as err:
            if str(err) not in self.faults:  # controller and generator may miss the same folder
                self.faults.append(str(err))
            return False
        return True


def check_run(config: RunConfig) -> Checked:
    """Return what is right and what is wrong with `config`. Nothing is sent, trained or written."""
    checked = Checked()
    model = checked.part(partial(_model, config))
    price: list[Price | None] = []
    checked.part(partial(_generator, config, price))
    if not model:  # the files are read all the same, so that all that is missing is reported together
        checked.part(partial(_files, config))
        return checked
    tokenizer = Tokenizer.load(config.controller.folder)

    def count(prompt: Messages) -> int:
        return len(tokenizer.render(prompt, add_generation_prompt=True).ids)

    problems: dict[str, Sequence[Example]] = {}
    tasks: list[Task] = []
    if checked.part(partial(_problems, config, count, tasks, problems)):
        checked.part(partial(_warm_up, config, tokenizer, tasks[0], problems))
        checked.part(partial(_longest_pair, config, tasks[0], problems))
        checked.part(partial(_cost, config, checked, tasks[0], problems, price[0] if price else None))
    return checked


def _model(config: RunConfig) -> str:
    controller = config.controller
    folder = controller.folder
    model = empty_model(folder)
    check_weights(model, folder)
    Tokenizer.load(folder)
    adapter = f", adapter {controller.adapter}" if controller.adapter else ""
    if controller.adapter:
        read_config(Path(controller.adapter))
    elif controller.tune == "adapter":
        with_targets(model, config.lora)
    if controller.engine == "vllm" and not controller.vllm.base_url:
        program = shlex.split(controller.vllm.command)[0]
        if shutil.which(program) is None:
            what = f"[controller.vllm] command: there is no program {program!r}"
            raise FileNotFoundError(f"{what}; docs/vllm.md says how to install vLLM")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    context = model.config.max_position_embeddings
    return f"controller: {folder}, {size:,.1f} million parameters, context of {context:,} tokens{adapter}"


def _generator(config: RunConfig, price: list[Price | None]) -> str:
    """Check [generator] or [serve] and leave the price of the model's tokens, None where there is none."""
    serve = config.serve
    if serve.scripted:
        return f"generator: {scripted_generator(config).name}, a script"
    if serve.model:
        if serve.engine == "llama.cpp":
            check_gguf(Path(serve.model))
        else:
            check_weights(empty_model(Path(serve.model)), Path(serve.model))
        if serve.adapter_folder:
            read_config(serve.adapter_folder)
        return f"generator: {serve.model}, served by engine {serve.engine}"

    async def opened() -> OpenAIGenerator:
        generator = OpenAIGenerator(config.generator)  # this reads keys and prices, and sends nothing
        await generator.aclose()
        return generator

    generator = asyncio.run(opened())
    price.append(generator.price)
    dollars = generator.price and f"{generator.price.input:g} USD and {generator.price.output:g} USD"
    known = f"a million tokens cost {dollars}, read and written" if dollars else "no price is known"
    return f"generator: {generator.name}, not asked; {known}"


def _problems(
    config: RunConfig, count: Callable[[Messages], int], tasks: list[Task], problems: dict[str, Sequence[Example]]
) -> str:
    task = open_task(config, count)
    context = empty_model(config.controller.folder).config.max_position_embeddings
    context = min(context, config.controller.vllm.context or context)
    found, skipped = fitting_problems(config, task, load_problems(task), context)
    tasks.append(task)
    problems.update(found)
    left_out = f"; beyond the context and left out: {skipped}" if skipped else ""
    return f"problems: {task.name}, {_sizes(found)}{left_out}"


def _files(config: RunConfig) -> str:
    task = open_task(config, lambda prompt: 0)
    return f"problems: {task.name}, {_sizes(load_problems(task))}; not compared with the context"


def _sizes(problems: Problems) -> str:
    return ", ".join(f"{len(examples):,} {split}" for split, examples in problems.items() if examples)


def _warm_up(config: RunConfig, tokenizer: Tokenizer, task: Task, problems: Problems) -> str:
    source, limit = config.warmup.source, config.warmup.train.micro_batch_tokens
    if source == "gold":
        items = [sft_item(task, tokenizer, example) for example in problems["warmup"]]
    elif source == "file":
        items = read_conversations(Path(config.warmup.data), tokenizer)
    else:
        return f"warm-up: {source}"
    if not items:
        raise ValueError(f"[warmup] source = {source!r}, but [task] warmup is 0, so there is nothing to learn from")
    context = empty_model(config.controller.folder).config.max_position_embeddings
    items, skipped = fitting(items, context, config.overlong)
    check_budget(items, limit)
    longest = max(len(item.sequences[0].ids) for item in items)
    left_out = f", {skipped} beyond the context left out" if skipped else ""
    return f"warm-up: {source}, {len(items):,} rows, the longest has {longest:,} tokens{left_out}"


def _longest_pair(config: RunConfig, task: Task, problems: Problems) -> str:
    """Check that a pair of the longest prompt and two whole guidances fits a micro-batch.

    The prompt of a new plan has the guidance before it, and is as much longer as it is after the longest first prompt.
    """
    if not config.rounds:
        return "pairs: none, since rounds is 0"
    count, settings = task.setting.count_tokens, rollout_settings(config, greedy=False)
    guidance = settings.controller.max_tokens
    example = max(problems["train"], key=lambda example: count(task.first_prompt(example)))
    prompts = _play(task, example, settings).guided
    longest = max(count(prompt) + guidance * bool(turn) for turn, prompt in enumerate(prompts))
    most = longest + 2 * guidance
    if most > config.dpo.train.micro_batch_tokens:
        raise ValueError(
            f"[dpo.train] micro_batch_tokens {config.dpo.train.micro_batch_tokens}: a pair may take {most} tokens (the "
            f"longest prompt of {longest} and two guidances of {guidance}); raise it"
        )
    return f"pairs: at most {most:,} tokens each, within micro-batches of {config.dpo.train.micro_batch_tokens:,}"


class _Player(Controller):
    """A controller and generator that says one sentence, which is no program and no plan, and keeps what it is asked:
    prompts, and the token limits of a generator's answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[tuple[Messages, int]] = []

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        self.asked.append((prompt, 0))
        return [Sample(NOT_KNOWN.format(self.name))] * n

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        self.asked.append((prompt, sampling.max_tokens))
        return Sample(NOT_KNOWN.format(self.name))


def _cost(config: RunConfig, checked: Checked, task: Task, problems: Problems, price: Price | None) -> str:
    """Show a prompt of each kind, and count what the run's requests take if every call is as long as it may be."""
    episodes, guided = num_episodes(config, task, problems), num_guided(config, task, problems)
    examples, played = problems["train"][:COUNTED], dict[RolloutSettings, list[_Played]]()
    once, most, calls = Usage(), Usage(), 0.0
    for greedy in (False, True):
        settings = replace(rollout_settings(config, greedy), controller=Sampling(max_tokens=0))  # as it says nothing
        if settings not in played:
            played[settings] = [_play(task, example, settings) for example in examples]
        guidance = rollout_settings(config, greedy).controller.max_tokens
        number, own = (
            sum(n for stage, n in counted.items() if (stage in COLLECTING) is not greedy) / len(examples)
            for counted in (episodes, guided)
        )
        for episode in played[settings]:
            once = _plus(once, number, _usage(task, episode.asked[:1], guidance))
            most = _plus(most, number, _usage(task, episode.asked, guidance))
            calls += number * len(episode.asked) + own * len(episode.guided)
            plans = [(prompt, guidance) for prompt in episode.guided]
            once = _plus(once, own, _usage(task, plans[:1], 0))
            most = _plus(most, own, _usage(task, plans, 0))
    for first, *_ in reversed(played.values()):  # of a kind that both have, the collection's is shown
        checked.prompts |= _kinds(first.trajectory)
    usd = {name: None if price is None else price.usd(usage) for name, usage in (("once", once), ("most", most))}
    checked.numbers = {
        "episodes": episodes, "calls_at_most": round(calls), "tokens": once.prompt_tokens + once.completion_tokens,
        "tokens_at_most": most.prompt_tokens + most.completion_tokens, "usd": usd["once"], "usd_at_most": usd["most"],
    }  # fmt: skip

    def cost(usage: Usage, dollars: float | None) -> str:
        shown = "" if dollars is None else f", {dollars:,.2f} USD"
        return f"{usage.prompt_tokens + usage.completion_tokens:,} tokens{shown}"

    return (
        f"cost, in the controller's tokens: {sum(episodes.values()):,} episodes; with one answer each "
        f"{cost(once, usd['once'])}, and at most {calls:,.0f} calls and {cost(most, usd['most'])}; answers are counted "
        "as long as they may be"
    )


@dataclass(frozen=True)
class _Played:
    """An episode in which every attempt failed, the generator's requests with their token limits, and the prompts of
    the controller, which the generator gets where it guides itself."""

    trajectory: Trajectory
    asked: Sequence[tuple[Messages, int]]
    guided: Sequence[Messages]


def _play(task: Task, example: Example, settings: RolloutSettings) -> _Played:
    controller, generator = _Player("controller"), _Player("generator")
    trajectory = asyncio.run(play_episode(Setup(task, controller, generator), Job("", example, settings)))
    return _Played(trajectory, generator.asked, [prompt for prompt, _ in controller.asked])


def _usage(task: Task, asked: Sequence[tuple[Messages, int]], guidance: int) -> Usage:
    """Return the tokens of these requests, with guidance and earlier answers in them as long as they may be."""
    read = [task.setting.count_tokens(prompt) + guidance + limit * bool(i) for i, (prompt, limit) in enumerate(asked)]
    return Usage(sum(read), sum(limit for _, limit in asked))


def _plus(total: Usage, times: float, usage: Usage) -> Usage:
    read, written = (round(times * number) for number in (usage.prompt_tokens, usage.completion_tokens))
    return Usage(total.prompt_tokens + read, total.completion_tokens + written)


def _kinds(trajectory: Trajectory) -> dict[str, Messages]:
    """Return the first prompt of each kind of an episode in which everything failed."""
    first, *later = trajectory.turns
    found = {"controller: guidance": first.prompt}
    if later:
        found["controller: new guidance after a failure"] = later[0].prompt
    for name, call in zip(("generator: first request", "generator: second request"), first.calls, strict=False):
        found[name] = call.prompt
    return found
