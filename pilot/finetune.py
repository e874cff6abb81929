"""SFT and preference training on a user's own file, of an adapter or of all weights: `matryoshka sft | dpo --data`."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka.core.distributed import World, open_world
from matryoshka.core.machine import usable_cores
from matryoshka.core.models.load import empty_model
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.data import distinct, fitting, read_conversations, read_preferences
from matryoshka.dpo.objectives import Preference
from matryoshka.lora.files import load_adapter
from matryoshka.lora.files import read_config as adapter_config
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.pilot.training import DTYPES, POLICY, Base, Training, load_base, train_policy, train_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SftCommand:
    """Supervised training on your own rows ({prompt, completion} or {messages}), one JSON object a line."""

    data: Path
    """The JSONL file of rows."""
    model: Path
    """A Hugging Face folder."""
    out: Path
    """Takes the adapter (PEFT layout), metrics and checkpoints; an unfinished training found there is continued."""
    adapter: Path | None = None
    """An adapter folder to start from, which is then the reference, too; by default a fresh adapter is trained."""
    overlong: Literal["error", "skip"] = "error"
    """The treatment of a row that does not fit the context: "skip" leaves it out and counts it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the base model's weights."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4" holds the frozen base in four bits (QLoRA; the extra `cuda`)."""
    device: str = "cpu"
    """Where to train: "cpu" or "cuda"."""
    threads: int = 0
    """CPU threads of torch, 0 for as many as there are cores."""
    tensorboard: bool = False
    """Write the metrics as TensorBoard events, too (the extra `track`)."""
    tune: Literal["adapter", "full"] = "adapter"
    """The trained part: an adapter, or all weights ("full"), which are written to out/model."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model lies on the ranks that torchrun starts."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))
    """How to train."""


@dataclass(frozen=True)
class DpoCommand(SftCommand):
    """Preference training on your own rows (prompt, chosen, rejected, as TRL has them), one JSON object a line."""

    train: TrainConfig = TrainConfig()
    """How to train."""
    objective: Preference = Preference()
    """The preference loss."""
    reference_cache: Path | None = None
    """A file that keeps reference log-probs, so that later epochs and runs need no reference pass; none by default.

    With tune = "full" they are always kept: the model as it comes is the reference, whose log-probs are computed before
    training (by default in out/reference.sqlite).
    """


def finetune(
    settings: SftCommand, preference: Preference | None, reference_cache: Path | None = None
) -> dict[str, Any] | None:
    """Train an adapter and write it to `out/adapter`, or all weights and write the model to `out/model`.

    Return counts, the path written and the last metrics on the first rank, None on the others: processes that torchrun
    started share every batch. preference None is SFT. reference_cache: a file that keeps reference log-probs. Pairs
    that repeat an earlier one are left out and counted. Raises ValueError, FileNotFoundError for
    settings that exclude each other, malformed data, and a model that does not fit.
    """
    if settings.tune == "full" and settings.adapter:
        raise ValueError(f"adapter {settings.adapter}: there is none where all weights are trained; merge it first")
    if settings.tune == "full" and settings.quantization != "none":
        raise ValueError(f"quantization {settings.quantization!r} is for a frozen base; train an adapter on it")
    with open_world(settings.device, settings.train.rank_timeout_s) as world:
        return _finetune(settings, preference, reference_cache, world)


def _finetune(
    settings: SftCommand, preference: Preference | None, reference_cache: Path | None, world: World
) -> dict[str, Any] | None:
    torch.set_num_threads(settings.threads or max(1, usable_cores() // world.local_size))
    tokenizer = Tokenizer.load(settings.model)
    items = (read_conversations if preference is None else read_preferences)(settings.data, tokenizer)
    items, skipped = fitting(items, empty_model(settings.model).config.max_position_embeddings, settings.overlong)
    if skipped:
        logger.warning("%s: %d rows exceed the context and are left out", settings.data, skipped)
    repeated = 0
    if preference is not None:
        items, repeated = distinct(items)
    if repeated:
        logger.warning("%s: %d rows repeat an earlier pair and are left out", settings.data, repeated)
    full, dtype = settings.tune == "full", DTYPES[settings.dtype]
    lora = adapter_config(settings.adapter) if settings.adapter else settings.lora
    base = Base(settings.model, dtype, settings.quantization, full, lora, settings.parallel)
    model = load_base(base, items, settings.train, world)
    training = Training(
        model=model,
        base=settings.model,
        items=items,
        config=settings.train,
        objective=preference,
        folder=settings.out,
        title="sft" if preference is None else "dpo",
        reference_cache=reference_cache,
        tensorboard=settings.tensorboard,
        world=world,
    )
    if full:
        last = train_weights(training, dtype)
    else:
        if settings.adapter:
            load_adapter(model, POLICY, settings.adapter, world.device)
        else:
            add_adapter(model, POLICY, lora, settings.train.seed, world.device)
        last = train_policy(training, fresh=settings.adapter is None)
    written = "model" if full else "adapter"
    counts = {"items": len(items), "skipped": skipped, "repeated": repeated}
    return {**counts, written: str(settings.out / written), **last} if world.is_first else None
