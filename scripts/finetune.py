"""SFT and preference training of one adapter on a user's own file: `matryoshka sft` and `matryoshka dpo --data`."""

import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from matryoshka.core.load import load_model
from matryoshka.core.tokenizer import Tokenizer
from matryoshka.core.train import TrainConfig, train
from matryoshka.dpo.data import fitting, read_conversations, read_preferences
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.files import load_adapter, save_adapter
from matryoshka.lora.linear import LoraConfig, active, add_adapter, copy_adapter, set_active, trainable_parameters
from matryoshka.scripts.progress import Progress
from matryoshka.scripts.tracking import scalar_writer

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POLICY, REFERENCE = "policy", "reference"


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
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def lora(self) -> LoraConfig: ...
    @property
    def train(self) -> TrainConfig: ...


def finetune(settings: Settings, preference: Preference | None) -> None:
    """Train an adapter and write it to `out/adapter`; the last line printed is a summary as JSON.

    preference None is SFT. Raises ValueError, FileNotFoundError for wrong settings and malformed data.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype {settings.dtype!r} is unknown; choose from {list(DTYPES)}")
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    tokenizer = Tokenizer.load(settings.model)
    items = (read_conversations if preference is None else read_preferences)(settings.data, tokenizer)
    model = load_model(settings.model, DTYPES[settings.dtype], settings.device)
    items, skipped = fitting(items, model.config.max_position_embeddings, settings.overlong)
    if skipped:
        logger.warning("%s: %d rows exceed the context and are left out", settings.data, skipped)
    if settings.adapter:
        load_adapter(model, POLICY, settings.adapter)
    else:
        add_adapter(model, POLICY, settings.lora, settings.train.seed)
    set_active(model, POLICY)
    reference: Callable[[], AbstractContextManager[None]] | None = None
    if preference is not None and preference.needs_reference:
        if settings.adapter:
            copy_adapter(model, POLICY, REFERENCE)
        reference = partial(active, model, REFERENCE if settings.adapter else None)
    model.train(preference is None)
    steps = train(
        model,
        trainable_parameters(model, POLICY),
        items,
        settings.train,
        SFT() if preference is None else preference,
        token_logps,
        settings.out,
        reference,
        preference.first_loss if preference is not None else None,
    )
    last: dict[str, float] = {}
    total = settings.train.epochs * math.ceil(len(items) / settings.train.batch_size)
    name = "sft" if preference is None else "dpo"
    with Progress(name, total) as progress, scalar_writer(settings.out, settings.tensorboard) as write_scalars:
        for last in steps:
            write_scalars(last)
            progress.update(int(last["step"]), f"loss {last['loss']:.4f}")
    save_adapter(model, POLICY, settings.out / "adapter", str(settings.model))
    print(json.dumps({"items": len(items), "skipped": skipped, "adapter": str(settings.out / "adapter"), **last}))
