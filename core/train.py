"""The one training loop: SFT and every preference loss differ only in the objective that they hand in.

In order: next batch (a pure function of seed, epoch and step) -> reference log-probs -> policy log-probs -> objective,
divided by the global count of items or tokens -> backward -> clip -> non-finite check -> optimizer -> metrics ->
checkpoint. `train` is a generator: it yields one metrics row a step, and the caller shows or drops it. A run that is
killed and started again continues from its last checkpoint with the same bits (held by a test on CPU). Not here: the
model's mode. Dropout is on where the caller says model.train().
"""

import dataclasses
import hashlib
import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from matryoshka.core.attention import Masked
from matryoshka.core.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from matryoshka.core.files import write_text
from matryoshka.core.language_model import LanguageModel
from matryoshka.core.records import stable_seed
from matryoshka.core.tree import Nodes, Tokens, TokenTree, build_tree, insert


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every default is the paper's or the field's.

    batch_size counts items (conversations or preference pairs) per optimizer step; micro_batch_tokens bounds the tree
    tokens that are in flight at once. min_lr_ratio: floor of the cosine. save_every: optimizer steps between
    checkpoints (0: only at the end and on a signal).
    """

    learning_rate: float = 5e-6
    epochs: int = 1
    batch_size: int = 64
    micro_batch_tokens: int = 8192
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    save_every: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} {getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"train: learning_rate {self.learning_rate} must be above 0")


@dataclass(frozen=True)
class Item:
    """One unit of the batch: its sequences (SFT: one; preference: chosen, rejected), each with scored tokens.

    Items of one group share a prompt.
    """

    sequences: tuple[Tokens, ...]
    group: str

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            if not any(sequence.mask):
                raise ValueError(
                    f"item of group {self.group!r}: a sequence of {len(sequence.ids)} tokens has no scored token; "
                    "leave the item out, there is nothing to train on"
                )


@dataclass(frozen=True)
class Totals:
    """Global counts of the optimizer step: losses are sums divided by these, whatever the micro-batches are."""

    items: int
    tokens: int


class Objective(Protocol):
    """Loss of a micro-batch and the sums of its metrics; the loop divides metrics by `Totals.items`."""

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden_SD, head_VD, target_S) -> [S]


class Interrupted(RuntimeError):
    """SIGTERM or SIGINT came: the state is saved, starting again continues."""


def train(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    config: TrainConfig,
    objective: Objective,
    token_logps: LogProbs,
    folder: Path,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    first_loss: float | None = None,
) -> Iterator[dict[str, float]]:
    """Train `parameters` in place and yield a metrics row per optimizer step: step, epoch, loss, grad_norm, lr, ...

    reference: context in which the model computes the reference policy. first_loss: what the first micro-batch's mean
    loss must be (ln 2 for DPO, policy and reference being equal); checked to 1e-5 of it, and of 1 where it is below.
    State and metrics.jsonl go to `folder`; an unfinished run found there is continued.
    Raises ValueError for no items, another first loss, or a folder that another configuration, objective or data wrote;
    FloatingPointError before the optimizer on a non-finite loss or gradient; Interrupted on SIGTERM or SIGINT, after
    the step that runs is done and saved.
    """
    if not items:
        raise ValueError(f"train: no items to train on ({folder}); collect more samples or check the data file")
    device = next(iter(parameters.values())).device
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    num_steps = config.epochs * math.ceil(len(items) / config.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    step, run = 0, _fingerprint(config, objective, items)
    if (found := latest_checkpoint(folder)) is not None:
        step = load_checkpoint(found, parameters, optimizer, run)
    metrics_path = folder / "metrics.jsonl"
    _keep_metrics(metrics_path, step)
    with _stop_signal() as stop:
        while step < num_steps:
            started = time.perf_counter()
            epoch, batch = batch_at(items, step, config.batch_size, config.seed)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, config)
            torch.manual_seed(stable_seed("dropout", config.seed, step))
            optimizer.zero_grad(set_to_none=True)  # a step that failed in this process left its gradients behind
            expected = first_loss if step == 0 else None
            row = _accumulate(model, batch, config, objective, token_logps, reference, device, expected)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            if not math.isfinite(row["loss"]) or not torch.isfinite(norm):
                raise FloatingPointError(
                    f"train: step {step + 1}: loss {row['loss']}, gradient norm {norm.item()}; nothing was updated. "
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
            with metrics_path.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            due = config.save_every and step % config.save_every == 0
            saved = bool(due) or step == num_steps or stop.is_set()
            if saved:
                save_checkpoint(folder, step, parameters, optimizer, run)
            yield {**row, "steps": num_steps}
            # A signal that came while the caller held the row of an unsaved step waits for the next step's save.
            if saved and stop.is_set():
                raise Interrupted(f"train: stopped by signal after step {step} of {num_steps}; state saved in {folder}")


def _fingerprint(config: TrainConfig, objective: Objective, items: Sequence[Item]) -> str:
    """Return a hash of all that decides the result, so not of save_every, nor of how the batch is cut up."""
    decisive = dataclasses.replace(config, save_every=0, micro_batch_tokens=1)
    name = repr(objective) if dataclasses.is_dataclass(objective) else type(objective).__qualname__
    digest = hashlib.sha256(f"{decisive} {name}".encode())
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _accumulate(
    model: LanguageModel,
    batch: Sequence[Item],
    config: TrainConfig,
    objective: Objective,
    token_logps: LogProbs,
    reference: Callable[[], AbstractContextManager[None]] | None,
    device: torch.device,
    first_loss: float | None,
) -> dict[str, float]:
    """Run forward and backward over the batch's micro-batches and return loss, per-item metrics and token counts."""
    totals = Totals(len(batch), sum(sum(s.mask) for item in batch for s in item.sequences))
    loss_sum = 0.0
    sums: dict[str, float] = {}
    tree_tokens = padded_tokens = 0
    for micro in micro_batches(batch, config.micro_batch_tokens):
        tree = build_tree([sequence for item in micro for sequence in item.sequences])
        attend = Masked(tree.attention_mask().to(device))

        def forward(tree: TokenTree = tree, attend: Masked = attend) -> Tensor:
            hidden_TD = model(tree.ids_T.to(device)[None], tree.positions_T.to(device)[None], attend)[0]
            return token_logps(hidden_TD[tree.source_S.to(device)], model.head_weight, tree.target_S.to(device))

        reference_S = None
        if reference is not None:
            with torch.no_grad(), reference():
                reference_S = forward()
        loss, metrics = objective(forward(), reference_S, tree, totals)
        if first_loss is not None:
            _check_first(loss.item() * totals.items / len(micro), first_loss)
            first_loss = None
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        tree_tokens += len(tree.ids_T)
        padded_tokens += tree.num_padded
    means = {name: value / totals.items for name, value in sums.items()}
    return {"loss": loss_sum, **means, "tokens": tree_tokens, "padded_tokens": padded_tokens}


def _check_first(loss: float, expected: float) -> None:
    if abs(loss - expected) > 1e-5 * max(1.0, expected):
        raise ValueError(
            f"train: the first loss is {loss:.8f} but policy and reference are equal, so it must be {expected:.8f}; "
            "the reference adapter differs from the policy, or dropout is on"
        )


def batch_at(items: Sequence[Item], step: int, batch_size: int, seed: int) -> tuple[int, list[Item]]:
    """Return (epoch, items) of optimizer step `step`: groups shuffled by (seed, epoch), kept together, then cut."""
    per_epoch = math.ceil(len(items) / batch_size)
    epoch, index = divmod(step, per_epoch)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    order = sorted(groups)
    random.Random(stable_seed("batches", seed, epoch)).shuffle(order)
    shuffled = [item for name in order for item in groups[name]]
    return epoch, shuffled[index * batch_size : (index + 1) * batch_size]


def micro_batches(batch: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Yield consecutive items whose common tree has at most `max_tokens` tokens; one too large item stands alone."""
    micro: list[Item] = []
    nodes: Nodes = {}
    for item in batch:
        nodes = _grown(nodes, item)
        if micro and len(nodes) > max_tokens:
            yield micro
            micro, nodes = [], _grown({}, item)
        micro.append(item)
    if micro:
        yield micro


def _grown(nodes: Nodes, item: Item) -> Nodes:
    for sequence in item.sequences:
        insert(nodes, sequence.ids)
    return nodes


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the rate of 0-based `step`: linear warm-up over ceil(ratio x steps), then cosine down to the floor."""
    warmup = math.ceil(round(config.warmup_ratio * num_steps, 6))  # 0.07 * 100 is 7.000000000000001
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def _keep_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`: they were written after the checkpoint that training continues from."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(lines[:step]))


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set an event on SIGTERM (pre-emption) or SIGINT instead of dying within a step; a second signal acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[number])

    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
