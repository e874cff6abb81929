"""Training of the policy: what the pilot's stages and `matryoshka sft | dpo` share."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.files import write_json
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import empty_model, fill_model, load_model, read_config
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.models.weights import sampled_digest, save_weights
from matryoshka.core.parallel.cluster import job_of, memory_of
from matryoshka.core.parallel.layout import ParallelConfig, choose_layout
from matryoshka.core.training.step import Reference
from matryoshka.core.training.train import Item, TrainConfig, free_share, longest_micro_batch, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.dpo.reference import ReferenceLogps, open_reference
from matryoshka.lora.files import adapter_digest, save_adapter
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    copy_adapter,
    layers_with,
    prepare_linears,
    set_active,
    trainable_parameters,
)
from matryoshka.lora.quantized import quantize_linears
from matryoshka.pilot.export import WEIGHT_SUFFIXES
from matryoshka.pilot.progress import Progress
from matryoshka.pilot.tracking import scalar_writer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZATIONS: dict[str, Callable[[nn.Module], None] | None] = {"none": None, "nf4": quantize_linears}
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
    nf4 = any(layer.scales is not None for layer in layers_with(model, POLICY))
    start = f"{sampled_digest(base)} {model.dtype} {nf4} {adapter_digest(model, POLICY)}"
    with ExitStack() as stack:
        reference: Reference | None = None
        cache: ReferenceLogps | None = None
        if preference is not None and preference.needs_reference:
            if not fresh:
                copy_adapter(model, POLICY, REFERENCE)
            name = None if fresh else REFERENCE
            reference = partial(active, model, name)
            if reference_cache is not None:
                cache = stack.enter_context(open_reference(reference_cache, base, model, name, world))
        parameters = trainable_parameters(model, POLICY)
        row = _train(
            *(model, parameters, items, config, preference, folder, title, reference, cache, tensorboard, world, start)
        )
    set_active(model, None)
    if world.is_first:
        save_adapter(model, POLICY, folder / "adapter", str(base))
    world.barrier()
    return row


def train_weights(
    model: LanguageModel,
    base: Path,
    items: Sequence[Item],
    config: TrainConfig,
    preference: Preference | None,
    folder: Path,
    title: str,
    dtype: torch.dtype,
    reference_cache: Path | None = None,
    tensorboard: bool = False,
    world: World = ALONE,
) -> dict[str, float]:
    """Train all weights of `model`, save it as the Hugging Face folder `folder/model` and return the last metrics row.

    The model as it comes is the reference, whose log-probs are computed before training and kept in `reference_cache`,
    default `folder/reference.sqlite`. dtype: of the file. The rest as in `train_policy`.
    """
    parameters = dict(model.requires_grad_(True).named_parameters())
    with ExitStack() as stack:
        reference: Reference | None = None
        cache: ReferenceLogps | None = None
        if preference is not None and preference.needs_reference:
            reference, path = nullcontext, reference_cache or folder / "reference.sqlite"
            cache = stack.enter_context(open_reference(path, base, model, None, world))
        start = sampled_digest(base)
        row = _train(
            *(model, parameters, items, config, preference, folder, title, reference, cache, tensorboard, world, start)
        )
    save_model(model, base, folder / "model", dtype, world)
    return row


def _train(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    config: TrainConfig,
    preference: Preference | None,
    folder: Path,
    title: str,
    reference: Reference | None,
    cache: ReferenceLogps | None,
    tensorboard: bool,
    world: World,
    start: str,
) -> dict[str, float]:
    """Train `parameters`, the first rank showing progress, and return the last metrics row."""
    model.train(preference is None)  # dropout is for SFT; policy and reference are compared without it
    steps = train(
        *(model, parameters, items, config, preference or SFT(), token_logps, folder, reference),
        *(preference.first_loss if preference else None, cache, world),
        reference_first=reference is nullcontext,
        start=start,
    )
    total = config.epochs * math.ceil(len(items) / config.batch_size)
    row: dict[str, float] = {}
    write = tensorboard and world.is_first
    with Progress(title, total) as progress, scalar_writer(folder, write) as write_scalars:
        for row in steps:
            if not world.is_first:
                continue
            write_scalars(row)
            extra = f" margin {row['margin']:.3f} acc {row['accuracy']:.2f}" if "margin" in row else ""
            progress.update(int(row["step"]), f"loss {row['loss']:.4f}{extra}")
    model.eval()
    return row


def save_model(model: LanguageModel, base: Path, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Write `model` as a Hugging Face folder that appears whole, with configuration and tokenizer of `base`."""
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        save_weights(model, temporary, dtype=dtype, write=world.is_first)
        if world.is_first:
            for file in base.iterdir():
                if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                    shutil.copyfile(file, temporary / file.name)
            config = read_config(base)
            name = "dtype" if "dtype" in config else "torch_dtype"
            write_json(temporary / "config.json", config | {name: str(dtype).removeprefix("torch.")})
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def load_base(
    base: Path,
    dtype: torch.dtype,
    quantization: str,
    full: bool,
    lora: LoraConfig,
    items: Sequence[Item] | None,
    config: TrainConfig,
    parallel: ParallelConfig,
    world: World,
) -> LanguageModel:
    """Return the model that is to be trained on `items` as this rank holds it, under the layout that fits.

    quantization: one of QUANTIZATIONS. full: all weights are trained; they are then kept in fp32 at least. items: None
    where they are not known yet, for micro-batches as long as `config` allows. Says on the first rank which layout and
    why.
    Raises ValueError where the layout does not fit, before anything is loaded, or where it needs torchrun.
    """
    stored, convert = at_least_fp32(dtype) if full else dtype, QUANTIZATIONS[quantization]
    if "RANK" not in os.environ:
        if parallel.layout in ("shard", "hybrid") or stored != dtype:
            what = f"layout {parallel.layout!r}" if stored == dtype else f"training all weights in {dtype}"
            raise ValueError(f"parallel: {what} is for ranks; start with torchrun, one rank being enough")
        return load_model(base, dtype, world.device, convert)
    model = empty_model(base)
    longest = config.micro_batch_tokens if items is None else longest_micro_batch(items, config)
    job = job_of(
        model, nf4=quantization == "nf4", dtype=dtype, rank=0 if full else lora.rank, dora=lora.dora and not full,
        targets=lora.targets, eight_bit=config.optimizer != "adamw",
        micro_batch_tokens=longest, activations=config.activations,
        device_type=world.device.type, reshard=parallel.reshard, prefetch=parallel.prefetch, offload=parallel.offload,
    )  # fmt: skip
    free = int(world.least(free_share(world.device, world)))
    layout = choose_layout(parallel, job, free, world)
    if world.is_first:
        print(layout.reason, file=sys.stderr)
    if convert is not None:
        convert(model)
    if layout.name == "replicate":
        if stored != dtype:
            raise ValueError(f"parallel: training all weights in {dtype} keeps them in fp32 beside; use layout 'shard'")
        return fill_model(model, base, dtype, world.device)
    if config.compile_blocks:
        raise ValueError(f"parallel: compile_blocks does not go with layout {layout.name!r}; leave one of them out")
    from matryoshka.core.parallel.sharding import make_mesh, shard

    if not full:
        prepare_linears(model)
    model.requires_grad_(full)
    shard(model, make_mesh(layout, world), parallel, dtype, world.device)
    model.gathered_bytes = memory_of(job, layout.group, free).gathered
    return fill_model(model, base, stored, "cpu" if parallel.offload else world.device)
