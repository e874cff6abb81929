"""Training of a policy, as the pilot's stages and `matryoshka sft | dpo` share it."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.files import write_folder, write_json
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import empty_model, fill_model, load_model, read_config
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.models.weights import sampled_digest, save_weights
from matryoshka.core.parallel.cluster import job_of, memory_of
from matryoshka.core.parallel.layout import ParallelConfig, choose_layout
from matryoshka.core.records import content_key
from matryoshka.core.training.step import Evaluation, Reference
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, free_share, longest_micro_batch, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.dpo.reference import ReferenceLogps, open_reference
from matryoshka.lora.files import adapter_digest, save_adapter
from matryoshka.lora.linear import (
    LoraConfig,
    LoraLinear,
    active,
    copy_adapter,
    layers_with,
    prepare_linears,
    set_active,
    trainable_parameters,
)
from matryoshka.lora.quantized import quantize_linears
from matryoshka.pilot.export import copy_tokenizer
from matryoshka.pilot.progress import Progress

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZATIONS: dict[str, Callable[[nn.Module], None] | None] = {"none": None, "nf4": quantize_linears}
POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class Training:
    """One training: the trained part, the items, and the folder of the result."""

    model: LanguageModel
    base: Path
    """The Hugging Face folder that `model` was loaded from."""
    items: Sequence[Item]
    config: TrainConfig
    objective: Preference | None
    """None is SFT."""
    folder: Path
    """Takes metrics and checkpoints, and the result as `adapter` or `model`; all ranks see it."""
    title: str
    """Names the training on the progress line."""
    reference_cache: Path | None = None
    """A file that keeps the reference's log-probs."""
    tensorboard: bool = False
    world: World = ALONE
    """The ranks that train together; the first one writes files and shows progress."""
    evaluation: Evaluation | None = None
    """Items whose loss is computed between the steps."""
    wandb: str = ""
    """A project of Weights & Biases that takes the metrics, "" for none."""


def train_policy(training: Training, fresh: bool) -> dict[str, float]:
    """Train the adapter POLICY, save it as `folder/adapter` and return the last metrics row ({}: done already).

    fresh: POLICY is new, so that the base model is the reference; otherwise the reference is a copy of POLICY as it
    comes, named REFERENCE. All ranks return when the adapter is on disk.
    """
    model, world = training.model, training.world
    set_active(model, POLICY)
    nf4 = any(layer.scales is not None for layer in layers_with(model, POLICY))
    start = f"{sampled_digest(training.base)} {model.dtype} {nf4} {adapter_digest(model, POLICY)}"
    with ExitStack() as stack:
        reference: Reference | None = None
        cache: ReferenceLogps | None = None
        if training.objective is not None and training.objective.needs_reference:
            if not fresh:
                copy_adapter(model, POLICY, REFERENCE)
            name = None if fresh else REFERENCE
            reference = partial(active, model, name)
            if training.reference_cache is not None:
                opened = open_reference(training.reference_cache, training.base, model, name, world)
                cache = stack.enter_context(opened)
        row = _train(training, trainable_parameters(model, POLICY), reference, cache, start)
    set_active(model, None)
    if world.is_first:
        save_adapter(model, POLICY, training.folder / "adapter", str(training.base))
    world.barrier()
    return row


def train_weights(training: Training, dtype: torch.dtype) -> dict[str, float]:
    """Train all weights, save the model as the Hugging Face folder `folder/model` and return the last metrics row.

    The model as it comes is the reference, whose log-probs are computed before training and kept in `reference_cache`,
    default `folder/reference.sqlite`. dtype: of the file.
    """
    model, base, world = training.model, training.base, training.world
    parameters = dict(model.requires_grad_(True).named_parameters())
    with ExitStack() as stack:
        reference: Reference | None = None
        cache: ReferenceLogps | None = None
        if training.objective is not None and training.objective.needs_reference:
            reference, path = nullcontext, training.reference_cache or training.folder / "reference.sqlite"
            cache = stack.enter_context(open_reference(path, base, model, None, world))
        row = _train(training, parameters, reference, cache, sampled_digest(base))
    save_model(model, base, training.folder / "model", dtype, world)
    return row


def _train(
    training: Training,
    parameters: Mapping[str, nn.Parameter],
    reference: Reference | None,
    cache: ReferenceLogps | None,
    start: str,
) -> dict[str, float]:
    """Train `parameters`, the first rank showing progress, and return the last metrics row."""
    model, items, config, objective = training.model, training.items, training.config, training.objective
    # Without dropout policy and reference differ by training alone; the reference never has any.
    has_dropout = objective is None or objective.dropout == "policy"
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    if not has_dropout and any(config.dropout for layer in layers for config in layer.configs.values()):
        logger.warning("%s: lora.dropout is not used, since the objective's dropout is 'off'", training.title)
    start += " dropout" * (objective is not None and has_dropout)
    model.train(has_dropout)
    steps = train(
        model, parameters, items, config, objective or SFT(), token_logps, training.folder,
        TrainContext(
            reference=reference, first_loss=objective.first_loss if objective else None, cache=cache,
            reference_first=reference is nullcontext, world=training.world, start=start,
            evaluation=training.evaluation,
        ),
    )  # fmt: skip
    total = config.epochs * math.ceil(len(items) / config.batch_size)
    row: dict[str, float] = {}
    is_first = training.world.is_first
    scalars = scalar_writer(training.folder, training.tensorboard and is_first)
    online = wandb_writer(training.folder, training.wandb if is_first else "", training.title)
    with Progress(training.title, total) as progress, scalars as write_scalars, online as write_online:
        for row in steps:
            if not is_first:
                continue
            write_scalars(row)
            write_online(row)
            extra = f" margin {row['margin']:.3f} acc {row['accuracy']:.2f}" if "margin" in row else ""
            extra += f" eval {row['eval_loss']:.4f}" if "eval_loss" in row else ""
            extra += f" (best: step {row['best_step']})" if "best_step" in row else ""
            progress.update(int(row["step"]), f"loss {row['loss']:.4f}{extra}")
    model.eval()
    return row


def save_model(model: LanguageModel, base: Path, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Write `model` as a Hugging Face folder with configuration and tokenizer of `base`; all ranks call this."""
    if world.is_first:
        with write_folder(folder) as temporary:
            save_weights(model, temporary, dtype=dtype)
            copy_tokenizer(base, temporary)
            config = read_config(base)
            name = "dtype" if "dtype" in config else "torch_dtype"
            write_json(temporary / "config.json", config | {name: str(dtype).removeprefix("torch.")})
    else:
        save_weights(model, folder, dtype=dtype, write=False)
    world.barrier()


@dataclass(frozen=True)
class Base:
    """The model that training starts from, and how a rank holds it."""

    path: Path
    dtype: torch.dtype
    quantization: str
    """One of QUANTIZATIONS."""
    full: bool
    """All weights are trained; they are then kept in fp32 at least."""
    lora: LoraConfig
    parallel: ParallelConfig


def load_base(base: Base, items: Sequence[Item] | None, config: TrainConfig, world: World) -> LanguageModel:
    """Return the model that is to be trained on `items` as this rank holds it, under the layout that fits.

    items: None where they are not known yet; micro-batches are then taken to be as long as `config` allows. The first
    rank prints which layout and why. Raises ValueError where the layout does not fit, before anything is loaded, or
    where it needs torchrun.
    """
    dtype, full, lora, parallel = base.dtype, base.full, base.lora, base.parallel
    stored, convert = at_least_fp32(dtype) if full else dtype, QUANTIZATIONS[base.quantization]
    if "RANK" not in os.environ:
        if parallel.layout in ("shard", "hybrid") or stored != dtype:
            what = f"layout {parallel.layout!r}" if stored == dtype else f"training all weights in {dtype}"
            raise ValueError(f"parallel: {what} is for ranks; start with torchrun, one rank being enough")
        return load_model(base.path, dtype, world.device, convert)
    model = empty_model(base.path)
    longest = config.micro_batch_tokens if items is None else longest_micro_batch(items, config)
    job = job_of(
        model, nf4=base.quantization == "nf4", dtype=dtype, rank=0 if full else lora.rank, dora=lora.dora and not full,
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
        return fill_model(model, base.path, dtype, world.device)
    if config.compile_blocks:
        raise ValueError(f"parallel: compile_blocks does not go with layout {layout.name!r}; leave one of them out")
    from matryoshka.core.parallel.sharding import make_mesh, shard

    if not full:
        prepare_linears(model)
    model.requires_grad_(full)
    shard(model, make_mesh(layout, world), parallel, dtype, world.device)
    model.gathered_bytes = memory_of(job, layout.group, free).gathered
    return fill_model(model, base.path, stored, "cpu" if parallel.offload else world.device)


@contextmanager
def scalar_writer(folder: Path, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that writes a metrics row, which must have "step", as scalars into `folder`.

    After a resume the steps that are done again replace the old ones. Not enabled, it does nothing.
    Raises ValueError naming the extra when TensorBoard is not installed.
    """
    if not enabled:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise ValueError("tensorboard = true needs the extra `track`: pip install 'matryoshka-pilot[track]'") from err
    make_writer: Any = SummaryWriter  # its methods are not annotated
    writer: Any = None

    def write(row: Mapping[str, float]) -> None:
        nonlocal writer
        step = int(row["step"])
        if writer is None:
            writer = make_writer(folder, purge_step=step)
        for name, value in row.items():
            if name not in ("step", "steps"):
                writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def wandb_writer(folder: Path, project: str, title: str) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that logs a metrics row, which must have "step", to a run of `project` named after `folder`.

    Its own environment variables decide where it goes (WANDB_MODE=offline keeps it in `folder`). With project "" it
    does nothing. A continued training continues its run. Raises ValueError naming the extra without the package wandb.
    """
    if not project:
        yield lambda row: None
        return
    try:
        import wandb
    except ImportError as err:
        raise ValueError("wandb needs the extra `wandb`: pip install 'matryoshka-pilot[wandb]'") from err
    folder.mkdir(parents=True, exist_ok=True)
    identity = content_key(project, str(folder.absolute()))[:16]
    run = wandb.init(project=project, name=folder.name, group=title, dir=folder, id=identity, resume="allow")

    def write(row: Mapping[str, float]) -> None:
        run.log({name: value for name, value in row.items() if name not in ("step", "steps")}, step=int(row["step"]))

    try:
        yield write
    finally:
        run.finish()
