"""`matryoshka bench qlora`: DPO steps over a base in four bits (NF4) against the same base as it is.

Both see the same rows in the same order from the same fresh adapter. What differs is memory, time for making weights
dense, and the losses, since the base computes something else: their difference is no error of either.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from matryoshka.benchmarks import step
from matryoshka.benchmarks.measure import MIB, alternate, dtype_of, peak_bytes, prepare
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.benchmarks.shapes import SHAPES, random_model
from matryoshka.benchmarks.training import tree_block
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import load_model
from matryoshka.lora.quantized import quantize_linears


@dataclass(frozen=True)
class Config:
    """Memory, speed and losses of DPO on PAL prompts, base in four bits and base as it is."""

    device: str = "cpu"
    """Where to compute: "cpu" or "cuda"."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    shape: str = ""
    """Random weights of this shape instead of the model's own (llama3-8b); the tokenizer is still from `model`."""
    data: Path | None = None
    """JSONL with question and answer, or prompt and response; default: the embedded word problems."""
    style: str = "full"
    """Style of the prompts: full or compact."""
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
    activations: str = "none"
    """The activation policy of the forward pass. It is the same for both bases, so that their memory compares."""
    rank: int = 8
    """Rank of the adapter."""
    learning_rate: float = 1e-4
    """Learning rate."""
    dtype: str = ""
    """Data type; "" is float32 on a CPU, bfloat16 on a GPU."""
    threads: int = 0
    """CPU threads, 0 for as many as there are cores."""
    seed: int = 0
    """Seed of everything random."""

    @property
    def as_step(self) -> step.Config:
        """Return the same settings for `bench step`, without a peer."""
        return step.Config(against=(), **{name: getattr(self, name) for name in self.__dataclass_fields__})


def run(config: Config) -> BenchResult:
    """Return weights, peak and speed of both, and how far their losses are apart; ratio: plain peak over NF4's."""
    settings = config.as_step  # checked first
    prepare(config.device, config.threads)
    bench = step.load_bench(settings)
    dtype = dtype_of(config.dtype, config.device)
    plain = str(dtype).removeprefix("torch.")
    models = {plain: bench.model, "nf4": _quantised(config)}
    first = bench.items[: bench.recipe.batch_size]
    for model in models.values():
        tree_block(model, first, bench.recipe)
    rows, totals = [], {}
    for name, model in models.items():
        weights = _bytes(model)
        peak = peak_bytes(partial(tree_block, model, first, bench.recipe), config.device)
        totals[name] = weights + peak
        blocks = sum(_bytes(block) for block in model.blocks)
        rows += [
            Row(f"weights, {name}", weights / MIB, "MiB", {"blocks_mib": round(blocks / MIB, 1)}),
            Row(f"peak of a step beyond the weights, {name}", peak / MIB, "MiB"),
            Row(f"peak of a step with the weights, {name}", totals[name] / MIB, "MiB"),
        ]
    trainers = {name: partial(tree_block, model, bench.items, bench.recipe) for name, model in models.items()}
    blocks_taken = alternate(trainers, config.repeats)
    rows += step.speed_rows(blocks_taken, float(bench.recipe.batch_size), "pairs/s")
    ours, theirs = (blocks_taken[name][0].losses for name in ("nf4", plain))
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    details = {"last_nf4": ours[-1], f"last_{plain}": theirs[-1], "steps": len(ours)}
    rows.append(Row("largest difference of the losses", gap, "nats", details))
    return BenchResult("qlora", rows, totals[plain] / totals["nf4"], None, ["bitsandbytes"])


def _quantised(config: Config) -> LanguageModel:
    dtype = dtype_of(config.dtype, config.device)
    if not config.shape:
        return load_model(config.model, dtype, config.device, quantize_linears)
    model = random_model(SHAPES[config.shape], dtype, config.device, config.seed)
    quantize_linears(model)
    return model


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
