"""The one training loop: SFT and every preference loss differ only in the objective that they hand in.

In order: next batch (a pure function of seed, epoch and step), packed into micro-batches (`packing.py`) ->
reference log-probs -> policy log-probs -> objective, divided by the global count of items or tokens -> backward -> clip
-> non-finite check -> optimizer -> metrics -> checkpoint. `train` is a generator: it yields one metrics row a step, and
the caller shows or drops it. A run that is killed and started again continues from its last checkpoint with the same
bits (held by a test on CPU). Not here: the model's mode. Dropout is on where the caller says model.train().
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matryoshka.core.config import check_least
from matryoshka.core.distributed import TIMEOUT_S, World, forget_gathered, full_tensor, is_sharded
from matryoshka.core.files import append_jsonl, write_text
from matryoshka.core.models.activations import POLICIES
from matryoshka.core.models.attention import BACKENDS
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.records import stable_seed
from matryoshka.core.signals import Interrupted, stop_event
from matryoshka.core.training.checkpoint import Checkpoints
from matryoshka.core.training.memory import free_bytes, plan_memory
from matryoshka.core.training.optimizer import OPTIMIZERS, make_optimizer
from matryoshka.core.training.packing import Item as Item
from matryoshka.core.training.packing import batch_at as batch_at
from matryoshka.core.training.packing import check_budget, check_ids
from matryoshka.core.training.step import Evaluation as Evaluation
from matryoshka.core.training.step import (
    LogProbs,
    MicroBatch,
    Objective,
    accumulate,
    evaluated,
    fill_cache,
    without_dropout,
)
from matryoshka.core.training.step import Totals as Totals
from matryoshka.core.training.step import TrainContext as TrainContext


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Every default is the paper's or the field's."""

    learning_rate: float = 5e-6
    """Highest learning rate, which is reached after the warm-up; LoRA takes 1e-4 or more on small models."""
    epochs: int = 1
    """How often training goes over the data."""
    batch_size: int = 64
    """Items (conversations or preference pairs) per optimizer step, on all ranks together."""
    micro_batch_tokens: int = 8192
    """Most tree tokens in flight at once on a rank. An item that alone has more is refused."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises linearly."""
    min_lr_ratio: float = 0.1
    """Floor of the cosine decay, as a share of the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm where theirs is larger."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    lora_plus_ratio: float = 1.0
    """Learning rate of LoRA's B over that of A (LoRA+; its authors use 16)."""
    optimizer: str = "adamw"
    """Optimizer: "adamw", or "adamw8bit" or "paged_adamw8bit", which keep moments in 8 bits through bitsandbytes."""
    activations: str = "auto"
    """Activations kept for the backward pass: "none" (everything), "selective", "full", "offload", or
    "auto", the fastest that fits. No bit of the result depends on it."""
    attention: str = "auto"
    """Backend of attention: "auto", which leaves out every score that no token sees, or "varlen", FlashAttention over
    sequences of any length (in bf16 on CUDA; flash-attn where it is installed, else torch's own)."""
    compile_blocks: bool = False
    """Compile whole blocks by torch.compile."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0: one at the end and one on a signal."""
    keep_checkpoints: int = 1
    """How many checkpoints stay; the newest always does."""
    max_checkpoint_gb: float = 0.0
    """How many gigabytes all checkpoints may take, the newest aside; 0: any."""
    save_asynchronously: bool = True
    """Write checkpoints while training goes on, from a copy in host memory."""
    rank_timeout_s: float = TIMEOUT_S
    """Seconds that a rank waits for another one, in a collective or for its part of a checkpoint, before it fails."""
    seed: int = 42
    """Seed of the order of the data and of dropout."""

    def __post_init__(self) -> None:
        check_least(self, "train: ", epochs=1, batch_size=1, micro_batch_tokens=1, keep_checkpoints=1)
        check_least(self, "train: ", weight_decay=0, save_every=0, max_checkpoint_gb=0)
        for name in ("warmup_ratio", "min_lr_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train: {name} {getattr(self, name)} is a share; it must lie between 0 and 1")
        if max(self.beta1, self.beta2) == 1:
            raise ValueError("train: beta1 and beta2 must be below 1; at 1 a moment would never take a gradient in")
        for name in ("learning_rate", "max_grad_norm", "lora_plus_ratio", "rank_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} {getattr(self, name)} must be above 0")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"train: optimizer {self.optimizer!r} is unknown; choose from {list(OPTIMIZERS)}")
        if self.activations not in ("auto", *POLICIES):
            raise ValueError(f"train: activations {self.activations!r} is unknown; choose from {['auto', *POLICIES]}")
        if self.attention not in BACKENDS:
            raise ValueError(f"train: attention {self.attention!r} is unknown; choose from {list(BACKENDS)}")


ALONE_WITHOUT_REFERENCE = TrainContext()


def train(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    config: TrainConfig,
    objective: Objective,
    token_logps: LogProbs,
    folder: Path,
    context: TrainContext = ALONE_WITHOUT_REFERENCE,
) -> Iterator[dict[str, float]]:
    """Train `parameters` in place and yield a metrics row per optimizer step: step, epoch, loss, grad_norm, lr, ...

    With an evaluation that has patience, the parameters end as they were after the step with the lowest evaluation
    loss, which the last row names as "best_step"; its checkpoint stays until the end.
    State and metrics.jsonl go to `folder`, which all ranks see; an unfinished run found there is continued. All ranks
    of the context's world call this with the same arguments and get the same rows. The reference of the first
    micro-batch is computed, whether it is in the cache or not.
    Raises ValueError for no items, an item beyond micro_batch_tokens, a token id beyond the model's embedding, another
    first loss, or a folder that another configuration, objective, model or data wrote; FloatingPointError before the
    optimizer on a non-finite loss or gradient, naming the example whose hidden states are not finite; Interrupted on
    SIGTERM or SIGINT, after the step that runs is done and saved.
    """
    if not items:
        raise ValueError(f"train: no items to train on ({folder}); collect more samples or check the data file")
    check_ids(items, model.config.vocab_size)
    check_budget(items, config.micro_batch_tokens)
    device, world, reference, cache = model.device, context.world, context.reference, context.cache
    longest, free = longest_micro_batch(items, config), world.least(free_share(device, world))
    memory = plan_memory(
        config.activations, model, parameters, longest, config.compile_blocks, int(free), config.optimizer
    )
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        config.optimizer, parameters, config.learning_rate, betas, config.weight_decay, config.lora_plus_ratio
    )
    evaluation, num_steps = context.evaluation, config.epochs * math.ceil(len(items) / config.batch_size)
    if evaluation is not None:
        check_ids(evaluation.items, model.config.vocab_size)
        check_budget(evaluation.items, config.micro_batch_tokens)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # weights may repeat private training data
    checkpoints = Checkpoints(
        folder,
        _fingerprint(config, objective, items, context),
        world,
        keep=config.keep_checkpoints,
        max_bytes=int(config.max_checkpoint_gb * 1e9) or None,
        asynchronous=config.save_asynchronously,
        timeout_s=config.rank_timeout_s,
    )

    def micro_batch(items: Sequence[Item]) -> MicroBatch:
        return MicroBatch(model, token_logps, items, config.micro_batch_tokens, device, memory, config.attention)

    metrics_path = folder / "metrics.jsonl"
    with stop_event() as stop, checkpoints:
        if cache is not None and reference is not None and checkpoints.latest() != num_steps:
            cache.verify(items, lambda item: micro_batch([item]).reference_logps(reference))
            for batch in _all_batches(items, evaluation, config) if context.reference_first else ():
                fill_cache(batch, config.micro_batch_tokens, micro_batch, context)
                if world.any(stop.is_set()):
                    raise Interrupted("train: stopped by signal before the first step; reference log-probs are kept")
        forget_gathered(model)
        step = checkpoints.load(parameters, optimizer)
        keeps_best = evaluation is not None and evaluation.patience > 0
        losses = _evaluated_losses(metrics_path, step, keeps_best)
        if world.is_first:
            # Later rows were written after the checkpoint that training continues from.
            lines = metrics_path.read_text().splitlines(keepends=True) if metrics_path.exists() else []
            write_text(metrics_path, "".join(lines[:step]))
        while step < num_steps and not _is_spent(losses, evaluation):
            started = time.perf_counter()
            epoch, batch = batch_at(items, step, config.batch_size, config.seed)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, config) * group["ratio"]
            torch.manual_seed(stable_seed("dropout", config.seed, step) + world.rank)
            optimizer.zero_grad(set_to_none=True)  # a step that failed in this process left its gradients behind
            where = f"train: step {step + 1}"
            checked = context if step == 0 else dataclasses.replace(context, first_loss=None)
            whole_ones = [parameter for parameter in parameters.values() if not is_sharded(parameter)]
            row, stopping = accumulate(
                batch, config.micro_batch_tokens, objective, micro_batch, checked, where, whole_ones, stop.is_set()
            )
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm))
            if not math.isfinite(row["loss"]) or not torch.isfinite(norm):
                raise FloatingPointError(
                    f"{where}: loss {row['loss']}, gradient norm {norm.item()}; nothing was updated. "
                    "Lower the learning rate or look at this step's items"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            row = {
                "step": step,
                "epoch": epoch,
                **row,
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
            }
            if evaluation is not None and (step % evaluation.every == 0 or step == num_steps):
                with without_dropout(model):
                    found = evaluated(
                        evaluation.items, config.batch_size, config.micro_batch_tokens, objective, micro_batch, context
                    )
                if not math.isfinite(found["eval_loss"]):
                    raise FloatingPointError(
                        f"{where}: the evaluation's loss is {found['eval_loss']}; nothing was saved since the last "
                        "checkpoint. Lower the learning rate or look at the items of the evaluation"
                    )
                losses[step] = found["eval_loss"]
                row |= found
                if keeps_best:
                    row |= {"best_step": _best(losses), "best_eval_loss": losses[_best(losses)]}
            is_last = step == num_steps or _is_spent(losses, evaluation)
            if world.is_first:
                append_jsonl(metrics_path, row)
            due = config.save_every and step % config.save_every == 0
            best = _best(losses) if keeps_best and losses else None
            if due or is_last or stopping or step == best:
                checkpoints.save(step, parameters, optimizer, best)
                if is_last or stopping:
                    checkpoints.wait()
            yield {**row, "steps": num_steps}
            if stopping:  # a signal that came later than this step's sum over the ranks waits for the next one's
                raise Interrupted(f"train: stopped by signal after step {step} of {num_steps}; state saved in {folder}")
        if keeps_best and _best(losses) != step:
            forget_gathered(model)
            checkpoints.load_parameters(_best(losses), parameters)


def _all_batches(
    items: Sequence[Item], evaluation: Evaluation | None, config: TrainConfig
) -> Iterator[Sequence[Item]]:
    """Yield the batches of the first epoch, then those of the evaluation."""
    size = config.batch_size
    for index in range(math.ceil(len(items) / size)):
        yield batch_at(items, index, size, config.seed)[1]
    held_out = () if evaluation is None else evaluation.items
    yield from (held_out[start : start + size] for start in range(0, len(held_out), size))


def _is_spent(losses: Mapping[int, float], evaluation: Evaluation | None) -> bool:
    """Return whether the last `patience` evaluations found no new lowest loss."""
    if evaluation is None or not evaluation.patience or not losses:
        return False
    return len(losses) - 1 - list(losses).index(_best(losses)) >= evaluation.patience


def _best(losses: Mapping[int, float]) -> int:
    """Return the step with the lowest evaluation loss, the first of several."""
    return min(losses, key=losses.__getitem__)


def _evaluated_losses(path: Path, step: int, is_needed: bool) -> dict[int, float]:
    """Return step -> the evaluation's loss in the rows up to `step`, which is where training goes on.

    is_needed: raise ValueError if rows are missing.
    """
    lines = path.read_text().splitlines()[:step] if path.exists() else []
    if is_needed and len(lines) < step:
        what = f"has {len(lines)} rows, but training goes on after step {step} and compares evaluation losses"
        raise ValueError(f"{path}: {what}; put the file back, or start in a new folder")
    return {row["step"]: row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row}


def longest_micro_batch(items: Sequence[Item], config: TrainConfig) -> int:
    """Return the most tokens in flight: no more than the largest batch without any sharing, however large the budget"""
    largest = sum(sorted(sum(len(s.ids) for s in item.sequences) for item in items)[-config.batch_size :])
    return min(config.micro_batch_tokens, largest)


def free_share(device: torch.device, world: World) -> int:
    """Return the bytes that this rank's tensors on `device` can take: ranks share the memory of their host."""
    return free_bytes(device) // (1 if device.type == "cuda" else world.local_size)


# Settings that decide how training fits the machine and what it keeps, not what comes out: a training that goes on, and
# a run that is continued, may have others.
FREE: dict[str, Any] = {
    "save_every": 0, "keep_checkpoints": 1, "max_checkpoint_gb": 0.0, "save_asynchronously": True,
    "rank_timeout_s": TIMEOUT_S, "micro_batch_tokens": 1, "activations": "auto",
}  # fmt: skip


def _fingerprint(config: TrainConfig, objective: Objective, items: Sequence[Item], context: TrainContext) -> str:
    """Return a hash of everything that decides the result; what FREE names is not among it."""
    decisive = dataclasses.replace(config, **FREE)
    name = repr(objective) if dataclasses.is_dataclass(objective) else type(objective).__qualname__
    digest = hashlib.sha256(f"{decisive} {name} {context.start}".encode())
    deciding = context.evaluation if context.evaluation and context.evaluation.patience else None
    if deciding is not None:
        digest.update(f"{deciding.every} {deciding.patience}".encode())
    for item in (*items, *(deciding.items if deciding else ())):
        digest.update(repr(item).encode())
    return digest.hexdigest()


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the rate of 0-based `step`: linear warm-up over ceil(ratio x steps), then cosine down to the floor."""
    warmup = math.ceil(round(config.warmup_ratio * num_steps, 6))  # 0.07 * 100 is 7.000000000000001
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
