"""SFT and preference training on a user's own file, of an adapter or of all weights: `matryoshka sft | dpo --data`."""

import json
import logging
import os
from pathlib import Path
from typing import Protocol

import torch

from matryoshka.core.distributed import World, open_world
from matryoshka.core.models.load import empty_model
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.data import distinct, fitting, read_conversations, read_preferences
from matryoshka.dpo.objectives import Preference
from matryoshka.lora.files import load_adapter
from matryoshka.lora.files import read_config as adapter_config
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.pilot.training import DTYPES, POLICY, QUANTIZATIONS, load_base, train_policy, train_weights

TUNES = ("adapter", "full")
logger = logging.getLogger(__name__)


class Settings(Protocol):
    """What both commands have in common; `stages.py` documents the fields."""

    @property
    def data(self) -> Path: ...
    @property
    def model(self) -> Path: ...
    @property
    def out(self) -> Path: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def overlong(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def tune(self) -> str: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def lora(self) -> LoraConfig: ...
    @property
    def train(self) -> TrainConfig: ...


def finetune(settings: Settings, preference: Preference | None, reference_cache: Path | None = None) -> None:
    """Train an adapter and write it to `out/adapter`, or all weights and write the model to `out/model`.

    The last line printed is a summary as JSON.

    Processes that torchrun started share every batch; the first one prints and writes.

    preference None is SFT. reference_cache: a file that keeps reference log-probs. Pairs that repeat an earlier one are
    left out and counted. Raises ValueError, FileNotFoundError for wrong settings and malformed data.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype {settings.dtype!r} is unknown; choose from {list(DTYPES)}")
    if settings.quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization {settings.quantization!r} is unknown; choose from {list(QUANTIZATIONS)}")
    if settings.tune not in TUNES:
        raise ValueError(f"tune {settings.tune!r} is unknown; choose from {list(TUNES)}")
    if settings.tune == "full" and settings.adapter:
        raise ValueError(f"adapter {settings.adapter}: there is none where all weights are trained; merge it first")
    if settings.tune == "full" and settings.quantization != "none":
        raise ValueError(f"quantization {settings.quantization!r} is for a frozen base; train an adapter on it")
    with open_world(settings.device, settings.train.rank_timeout_s) as world:
        _finetune(settings, preference, reference_cache, world)


def _finetune(settings: Settings, preference: Preference | None, reference_cache: Path | None, world: World) -> None:
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // world.local_size))
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
    model = load_base(
        settings.model, dtype, settings.quantization, full, lora, items, settings.train, settings.parallel, world
    )
    title, written = "sft" if preference is None else "dpo", "model" if full else "adapter"
    job = (model, settings.model, items, settings.train, preference, settings.out, title)
    if full:
        last = train_weights(*job, dtype, reference_cache, settings.tensorboard, world)
    else:
        if settings.adapter:
            load_adapter(model, POLICY, settings.adapter, world.device)
        else:
            add_adapter(model, POLICY, lora, settings.train.seed, world.device)
        last = train_policy(*job, settings.adapter is None, reference_cache, settings.tensorboard, world)
    if not world.is_first:
        return
    counts = {"items": len(items), "skipped": skipped, "repeated": repeated}
    print(json.dumps({**counts, written: str(settings.out / written), **last}))
