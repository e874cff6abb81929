"""Training of the policy adapter in a loaded model: what the pilot's stages and `matryoshka sft | dpo` share."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import torch

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.language_model import LanguageModel
from matryoshka.core.train import Item, TrainConfig, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.dpo.reference import ReferenceLogps, open_reference
from matryoshka.lora.files import save_adapter
from matryoshka.lora.linear import active, copy_adapter, set_active, trainable_parameters
from matryoshka.scripts.progress import Progress
from matryoshka.scripts.tracking import scalar_writer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POLICY, REFERENCE = "policy", "reference"


def train_policy(
    model: LanguageModel,
    base: Path,
    items: Sequence[Item],
    config: TrainConfig,
    preference: Preference | None,
    folder: Path,
    title: str,
    fresh: bool,
    reference_cache: Path | None = None,
    tensorboard: bool = False,
    world: World = ALONE,
) -> dict[str, float]:
    """Train the adapter POLICY of `model`, save it as `folder/adapter` and return the last metrics row ({}: all done).

    preference None is SFT. base: the model's folder. title: of the progress line. fresh: POLICY is new, so that the
    base model is the reference; otherwise a copy of POLICY as it comes is, named REFERENCE. reference_cache: a file
    that keeps reference log-probs. world: the ranks that train together; the first one writes files and shows progress,
    and all return when the adapter is there.
    """
    set_active(model, POLICY)
    reference: Callable[[], AbstractContextManager[None]] | None = None
    cache: ReferenceLogps | None = None
    with ExitStack() as stack:
        if preference is not None and preference.needs_reference:
            if not fresh:
                copy_adapter(model, POLICY, REFERENCE)
            name = None if fresh else REFERENCE
            reference = partial(active, model, name)
            if reference_cache is not None:
                cache = stack.enter_context(open_reference(reference_cache, base, model, name))
        model.train(preference is None)  # dropout is for SFT; policy and reference are compared without it
        steps = train(
            model,
            trainable_parameters(model, POLICY),
            items,
            config,
            preference or SFT(),
            token_logps,
            folder,
            reference,
            preference.first_loss if preference else None,
            cache,
            world,
        )
        total = config.epochs * math.ceil(len(items) / config.batch_size)
        progress = stack.enter_context(Progress(title, total))
        write_scalars = stack.enter_context(scalar_writer(folder, tensorboard and world.is_first))
        row: dict[str, float] = {}
        for row in steps:
            if not world.is_first:
                continue
            write_scalars(row)
            extra = f" margin {row['margin']:.3f} acc {row['accuracy']:.2f}" if "margin" in row else ""
            progress.update(int(row["step"]), f"loss {row['loss']:.4f}{extra}")
    model.eval()
    set_active(model, None)
    if world.is_first:
        save_adapter(model, POLICY, folder / "adapter", str(base))
    world.barrier()
    return row
