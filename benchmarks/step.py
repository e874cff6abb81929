"""`matryoshka bench step`: whole optimizer steps on the same rows by the token tree, by padded batches and by TRL.

A block is a training run of `steps` optimizer steps from a fresh adapter; blocks of the trainers alternate, and the
number is the median over all their steps: reference pass, forward, backward, clipping and optimizer included, loading
and tokenising not. All trainers see the same batches from the same adapter, so their losses must agree: the largest
difference is a row of its own.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.benchmarks.measure import alternate, check_peers, dtype_of, prepare, require
from matryoshka.benchmarks.pal_rows import pal_items
from matryoshka.benchmarks.result import BenchResult, Row, speed_up
from matryoshka.benchmarks.shapes import SHAPES, random_model
from matryoshka.benchmarks.step_memory import memory_row
from matryoshka.benchmarks.step_profile import profile_chart
from matryoshka.benchmarks.training import Block, Recipe, new_adapter, packed_block, padded_block, tree_block
from matryoshka.benchmarks.trl_training import TrlSettings, trl_block
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import load_model, read_config
from matryoshka.core.models.tree import Tokens
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item
from matryoshka.dpo.data import fitting
from matryoshka.lora.linear import LoraConfig

PEERS = ("padded", "packed", "trl", "trl-liger")
OWN_PEERS = {"padded": ("padded", padded_block), "packed": ("packed without sharing", packed_block)}
OURS = "token tree"
Trainer = Callable[[Sequence[Item], Recipe], Block]
GIB = 2**30
TARGETS = {"cpu": 4.0, "cuda": 12.0}


@dataclass(frozen=True)
class Config:
    """Optimizer steps per second on PAL prompts: token tree against padded batches and TRL."""

    device: str = "cpu"
    """Where to compute: "cpu" or "cuda"."""
    against: tuple[str, ...] = ("padded",)
    """Peers to measure: any of padded, packed (without sharing), trl, trl-liger."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    shape: str = ""
    """Random weights of this shape instead of the model's own: llama3-8b, llama-small, qwen3-small, gemma3-small or
    gemma3-narrow. The tokenizer is still from `model`."""
    data: Path | None = None
    """JSONL with question and answer, or prompt and response; default: the embedded word problems."""
    style: str = "full"
    """Style of the prompts: full or compact."""
    objective: str = "dpo"
    """"dpo", or "sft" on rows of random ids that share nothing."""
    sequence_length: int = 4096
    """Tokens of a row, for objective "sft"."""
    questions: int = 2
    """Prompts in a batch."""
    pairs: int = 5
    """Pairs of each prompt."""
    steps: int = 2
    """Optimizer steps in a block."""
    repeats: int = 2
    """Blocks."""
    micro_batch_tokens: int = 8192
    """Most tree tokens in flight at once."""
    activations: str = "auto"
    """The activation policy of the token tree, as in `matryoshka dpo`."""
    compile_blocks: bool = False
    """Compile whole blocks of the token tree with torch.compile."""
    padded_pairs: int = 5
    """Pairs in a micro-batch of padded rows."""
    trl_pairs: tuple[int, ...] = (5,)
    """Pairs in a micro-batch of TRL: every size is measured, the best one counts."""
    trl_checkpointing: bool = False
    """Turn on TRL's gradient checkpointing."""
    rank: int = 8
    """Rank of the adapter."""
    learning_rate: float = 1e-4
    """Learning rate."""
    compare_losses: int = 0
    """Steps of a longer comparison of losses with TRL, 0 for none."""
    compare_pairs: int = 2
    """Pairs in each step of that comparison."""
    profile: Path | None = None
    """File that takes a chart of one step."""
    dtype: str = ""
    """Data type; "" is float32 on a CPU, bfloat16 on a GPU."""
    threads: int = 0
    """CPU threads, 0 for as many as there are cores."""
    cpu_time: bool = False
    """Compare CPU seconds of this process instead of seconds of the clock, where other programs use the same cores."""
    seed: int = 0
    """Seed of everything random."""
    target: float | None = None
    """Ratio that must be reached; default: 4 on a CPU, 12 on a GPU."""

    def __post_init__(self) -> None:
        check_peers("step", self.against, PEERS)
        if self.objective not in ("dpo", "sft"):
            raise ValueError(f"bench step: objective {self.objective!r} is unknown; choose dpo or sft")
        if {"trl", "trl-liger"} <= set(self.against):
            raise ValueError("bench step: Liger's kernels change transformers for the whole process; measure trl alone")
        if self.objective == "sft" and (self._trl or self.compare_losses):
            raise ValueError("bench step: objective sft is measured against padded and packed only; leave trl out")
        if self.shape and self.shape not in SHAPES:
            raise ValueError(f"bench step: shape {self.shape!r} is unknown; choose from {list(SHAPES)}")
        numbers = (self.questions, self.pairs, self.steps, self.repeats, self.padded_pairs, self.compare_pairs)
        if min(*numbers, *self.trl_pairs) < 1 or self.sequence_length < 2:
            raise ValueError(
                "bench step: questions, pairs, steps, repeats, padded_pairs, trl_pairs and compare_pairs must be at "
                "least 1, sequence_length at least 2"
            )

    @property
    def _trl(self) -> list[str]:
        return [peer for peer in self.against if peer.startswith("trl")]


@dataclass(frozen=True)
class Bench:
    """Shared by all trainers: the model, its config.json, the items of the timed steps, the recipe."""

    model: LanguageModel
    model_config: dict[str, Any]
    items: Sequence[Item]
    recipe: Recipe


def run(config: Config) -> BenchResult:
    """Return speeds of all trainers, their losses' differences and the graphs that were compiled."""
    packages = require(["trl", *config.against] if config._trl or config.compare_losses else config.against)
    prepare(config.device, config.threads)
    bench = load_bench(config)
    trainers = _trainers(config, bench)
    on_gpu = torch.device(config.device).type == "cuda"
    graphs = [compiled_graphs()]
    too_large = _warm_up(trainers, bench, on_gpu)
    graphs.append(compiled_graphs())
    blocks = alternate(
        {name: partial(_with_cpu_time, trainers[name], bench) for name in trainers if name not in too_large},
        config.repeats,
    )
    graphs.append(compiled_graphs())
    per_step, unit = _unit(config, bench)
    rows = speed_rows(blocks, per_step, unit, config.cpu_time)
    rows += [Row(name, None, unit, {"note": "not measured: out of memory"}) for name in too_large]
    rows += [_difference(name, blocks[OURS][0], blocks[name][0]) for name in blocks if name != OURS]
    if on_gpu:
        rows += [
            Row("graphs compiled over the first epoch of ragged batches", graphs[1] - graphs[0], "graphs"),
            Row("graphs compiled over the epochs after it", graphs[2] - graphs[1], "graphs"),
        ]
    if config.compare_losses:
        rows.append(_compare(config, bench))
    first = bench.items[: bench.recipe.batch_size]
    rows.append(memory_row(bench.model, first, bench.recipe))
    if config.profile is not None:
        rows += profile_chart(partial(tree_block, bench.model, first, bench.recipe), config.profile, config.device)
    ratio = speed_up(_speed(rows, OURS), [_speed(rows, name) for name in blocks if name != OURS], True)
    target = config.target or (TARGETS["cuda" if on_gpu else "cpu"] if config.objective == "dpo" else None)
    return BenchResult("step", rows, ratio, target, [*packages, *(("peft", "transformers") if config._trl else ())])


def _warm_up(trainers: Mapping[str, Trainer], bench: Bench, on_gpu: bool) -> list[str]:
    """Run every trainer once and return the names of those that run out of memory.

    On a GPU ours meets all the shapes before it is timed, since it compiles for each; TRL and padded batches do not.
    """
    one = (bench.items[:1], replace(bench.recipe, batch_size=1))
    step = (bench.items[: bench.recipe.batch_size], bench.recipe)
    too_large = []
    for name, block in trainers.items():
        try:
            block(*((bench.items, bench.recipe) if name == OURS else step) if on_gpu else one)
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
            too_large.append(name)
    return too_large


def _with_cpu_time(trainer: Trainer, bench: Bench) -> Block:
    began = time.process_time()
    block = trainer(bench.items, bench.recipe)
    return replace(block, cpu_seconds=(time.process_time() - began) / len(block.seconds))


def speed_rows(blocks: dict[str, list[Block]], per_step: float, unit: str, cpu_time: bool = False) -> list[Row]:
    """Return a row per trainer: `per_step` units over the median seconds of all its steps, or of all its blocks' mean
    CPU seconds."""
    rows = []
    for name, taken in blocks.items():
        seconds = [value for block in taken for value in ([block.cpu_seconds] if cpu_time else block.seconds)]
        median = statistics.median(seconds)
        details: dict[str, object] = {"seconds_per_step": median, "min_s": min(seconds), "max_s": max(seconds)}
        details |= {"steps": sum(len(block.seconds) for block in taken), "clock": "cpu" if cpu_time else "wall"}
        details |= {"tokens_per_step": taken[0].tokens / len(taken[0].seconds)}
        if taken[0].peak_bytes is not None:
            details["peak_gib"] = round(max(block.peak_bytes or 0 for block in taken) / GIB, 2)
        rows.append(Row(name, per_step / median, unit, details))
    return rows


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    import torch._dynamo.utils

    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def load_bench(config: Config) -> Bench:
    """Return model, rows and recipe that `config` describes."""
    dtype = dtype_of(config.dtype, config.device)
    if config.shape:
        model_config = SHAPES[config.shape]
        model = random_model(model_config, dtype, config.device, config.seed)
    else:
        model_config = read_config(config.model)
        model = load_model(config.model, dtype, config.device)
    batch = config.questions * config.pairs if config.objective == "dpo" else config.questions
    if config.objective == "dpo":
        questions = config.questions * config.steps
        tokenizer = Tokenizer.load(config.model)
        items = pal_items(tokenizer, questions, config.pairs, config.style, config.data, config.seed)
        fitting(items, model.config.max_position_embeddings, "error")
    else:
        draws = torch.Generator().manual_seed(config.seed)
        shape = (config.questions * config.steps, config.sequence_length)
        ids = torch.randint(model.config.vocab_size, shape, generator=draws).tolist()
        mask = (0, *(1,) * (config.sequence_length - 1))
        items = [Item((Tokens(tuple(row), mask),), str(index)) for index, row in enumerate(ids)]
    recipe = Recipe(
        preference=config.objective == "dpo",
        batch_size=batch,
        learning_rate=config.learning_rate,
        micro_batch_tokens=config.micro_batch_tokens,
        padded_items=config.padded_pairs,
        lora=LoraConfig(rank=config.rank),
        seed=config.seed,
        device=config.device,
        activations=config.activations,
        compile_blocks=config.compile_blocks,
    )
    return Bench(model, model_config, items, recipe)


def _trainers(config: Config, bench: Bench) -> dict[str, Trainer]:
    trainers: dict[str, Trainer] = {OURS: partial(tree_block, bench.model)}
    for peer in config.against:
        if peer in OWN_PEERS:
            name, block = OWN_PEERS[peer]
            trainers[name] = partial(block, bench.model)
            continue
        for pairs in config.trl_pairs:
            trainers[f"{peer}, {pairs} pairs"] = _trl(config, bench, pairs, peer == "trl-liger")
    return trainers


def _trl(config: Config, bench: Bench, pairs: int, liger: bool) -> Trainer:
    def block(items: Sequence[Item], recipe: Recipe) -> Block:
        settings = TrlSettings(min(pairs, recipe.batch_size), config.trl_checkpointing, liger)
        initial = _initial_adapter(bench.model, recipe)
        return trl_block(bench.model, bench.model_config, str(config.model), items, recipe, settings, initial)

    return block


def _initial_adapter(model: LanguageModel, recipe: Recipe) -> dict[str, Tensor]:
    with new_adapter(model, recipe) as parameters:
        return {name: value.detach().clone() for name, value in parameters.items()}


def _compare(config: Config, bench: Bench) -> Row:
    """Return the largest difference between our losses and TRL's over `compare_losses` steps on the same data."""
    pairs = config.compare_pairs
    questions = -(-pairs * config.compare_losses // config.pairs)
    tokenizer = Tokenizer.load(config.model)
    items = pal_items(tokenizer, questions, config.pairs, config.style, config.data, config.seed)
    items = items[: pairs * config.compare_losses]
    recipe = replace(bench.recipe, batch_size=pairs)
    ours = tree_block(bench.model, items, recipe)
    theirs = _trl(config, bench, pairs, "trl-liger" in config.against)(items, recipe)
    return _difference(f"trl over {len(ours.losses)} steps", ours, theirs)


def _difference(name: str, ours: Block, theirs: Block) -> Row:
    gaps = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    details = {"mean": statistics.mean(gaps), "steps": len(gaps), "last_loss": ours.losses[-1]}
    return Row(f"largest difference of the losses, {OURS} and {name}", max(gaps), "nats", details)


def _unit(config: Config, bench: Bench) -> tuple[float, str]:
    if config.objective == "dpo":
        return float(bench.recipe.batch_size), "pairs/s"
    return float(bench.recipe.batch_size * config.sequence_length), "tokens/s"


def _speed(rows: Sequence[Row], name: str) -> float:
    return next(row.value for row in rows if row.name == name and row.value is not None)
