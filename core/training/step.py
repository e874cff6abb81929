"""Forward and backward of one optimizer step: a global batch, cut into micro-batches and over the ranks.

In order, for each micro-batch of this rank: reference log-probs -> policy log-probs -> objective, divided by the global
count of items or tokens -> backward. Then gradients, losses and metrics are summed over the ranks in one message. All
ranks make the same number of passes, since sharded weights are gathered in every pass by all of them: a rank with fewer
micro-batches runs a dummy item of two tokens and multiplies its loss by 0.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.models.attention import bucket, tree_attention
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree
from matryoshka.core.training.memory import MemoryPlan
from matryoshka.core.training.packing import Item, Plan, split


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


LogProbs = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]  # (hidden_SD, head_VD, target_S, softcap) -> [S]
Reference = Callable[[], AbstractContextManager[None]]  # inside of it the model computes the reference policy


class ReferenceCache(Protocol):
    """Reference log-probs that were computed before (`dpo/reference.py`)."""

    def verify(self, items: Sequence[Item], compute: Callable[[Item], Tensor]) -> None:
        """Compare some stored values of `items` with `compute`. Raises ValueError where they differ."""
        ...

    def get(self, items: Sequence[Item], compute: Callable[[], Tensor], agree: Callable[[bool], bool] = bool) -> Tensor:
        """Return the [S] log-probs of all items' scored tokens; `compute` gives those that are not stored yet.

        agree: says whether to compute, from whether that is needed here.
        """
        ...


@dataclass(frozen=True)
class Evaluation:
    """Items that are not trained on, whose loss is computed every so many steps and after the last one.

    patience: training ends after this many evaluations in a row without a new lowest loss, and keeps the parameters
    with the lowest; 0: it never ends early and keeps the last ones.
    """

    items: Sequence[Item]
    every: int
    patience: int = 0

    def __post_init__(self) -> None:
        if not self.items or self.every < 1 or self.patience < 0:
            raise ValueError(
                f"train: an evaluation of {len(self.items)} items every {self.every} steps with patience "
                f"{self.patience}; expected items, at least every step, and a patience that is not negative"
            )


@dataclass(frozen=True)
class TrainContext:
    """The parts of a training beside its model, data and objective.

    reference: inside of this context the model computes the reference policy (None: the objective has no reference).
    first_loss: the mean loss of the first micro-batch (ln 2 for DPO, where policy and reference are equal), which is
    checked to 1e-5 of it, and of 1 where it is below. cache: keeps reference log-probs. reference_first: the reference
    is the model as it comes, so that the cache is filled before the first step. world: the ranks that share every
    batch. start: tells the weights that training starts from, frozen ones included, from others of their shape.
    evaluation: items whose loss is computed between the steps.
    """

    reference: Reference | None = None
    first_loss: float | None = None
    cache: ReferenceCache | None = None
    reference_first: bool = False
    world: World = ALONE
    start: str = ""
    evaluation: Evaluation | None = None


class MicroBatch:
    """Items whose token tree the model computes as often as asked: for the reference, for the policy."""

    def __init__(
        self, model: LanguageModel, token_logps: LogProbs, items: Sequence[Item], max_tokens: int, device: torch.device,
        memory: MemoryPlan, attention: str = "auto",
    ) -> None:  # fmt: skip
        """max_tokens: the budget; it decides which lengths CUDA's attention is compiled for. attention: the backend."""
        self._model, self._token_logps, self._memory = model, token_logps, memory
        self.tree = tree = build_tree([sequence for item in items for sequence in item.sequences])
        if device.type == "cuda":
            tree = tree.padded(bucket(len(tree.ids_T), max_tokens))
        self._attend = tree_attention(tree, device, attention)
        self._ids_T, self._positions_T = tree.ids_T.to(device), tree.positions_T.to(device)
        # Siblings often go on with the same token: one prediction, scored once however many sequences share it.
        pairs_2S = torch.stack((tree.source_S, tree.target_S))
        pairs_2U, of_S = torch.unique(pairs_2S, dim=1, return_inverse=True)
        (self._source_U, self._target_U), self._of_S = pairs_2U.to(device), of_S.to(device)

    def hidden(self) -> Tensor:
        """Return the [U, D] hidden states that predict the distinct scored tokens."""
        with self._memory.activations(len(self._ids_T)):
            hidden_TD: Tensor = self._model(self._ids_T[None], self._positions_T[None], self._attend)[0]
        return hidden_TD[self._source_U]

    def logps(self) -> Tensor:
        """Return the [S] log-probs of the scored tokens."""
        hidden_UD = self.hidden()  # before the head is looked at: a sharded head is whole only after a forward pass
        head_VD, softcap = self._model.head_weight, self._model.config.final_logit_softcapping
        return self._token_logps(hidden_UD, head_VD, self._target_U, softcap)[self._of_S]

    def reference_logps(self, reference: Reference) -> Tensor:
        """Return the reference's [S] log-probs of the scored tokens; it never has dropout."""
        with torch.no_grad(), reference(), without_dropout(self._model):
            return self.logps()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Compute in evaluation mode inside the block, in the mode of before after it."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def accumulate(
    batch: Sequence[Item],
    max_tokens: int,
    objective: Objective,
    micro_batch: Callable[[Sequence[Item]], MicroBatch],
    context: TrainContext,
    where: str,
    replicated: Sequence[Tensor],
    stop: bool,
) -> tuple[dict[str, float], bool]:
    """Leave the gradient of the batch's loss on every rank; return the row of metrics, and whether a rank has `stop`.

    The row: loss, per-item metrics, token counts of all ranks and, where there are several, imbalance: the most tree
    tokens that a rank has over the mean. replicated: the parameters whose gradients are summed here.
    """
    reference, first_loss, world = context.reference, context.first_loss, context.world
    totals = Totals(len(batch), sum(sum(s.mask) for item in batch for s in item.sequences))
    plans = split(batch, max_tokens, world.size)
    own = plans[world.rank].micro_batches
    losses: list[Tensor] = []
    sums: dict[str, list[Tensor]] = {}
    for items, counts in _passes(plans, batch, world):
        micro = micro_batch(items)
        reference_S = None
        if reference is not None:
            known = None if first_loss is not None else context.cache
            reference_S = _reference(micro, items if counts else (), reference, known, world)
        logps_S = micro.logps()
        loss, metrics = objective(logps_S, reference_S, micro.tree, totals)
        if first_loss is not None:
            _check_first(loss.item() * totals.items / len(items), first_loss, world)
            first_loss = None
        (loss if counts else 0 * loss).backward()  # type: ignore[no-untyped-call]
        if counts:
            losses.append(loss.detach())
        for name, value in metrics.items():
            sums.setdefault(name, []).extend([value] if counts else [])
    # The device was not waited for until here.
    values = torch.stack(losses).tolist() if losses else []
    found = [sum(torch.stack(parts).tolist()) if parts else 0.0 for parts in sums.values()]
    message = torch.tensor([sum(values), float(stop), *found], dtype=torch.float64, device=world.device)
    world.sum([*(parameter.grad for parameter in replicated if parameter.grad is not None), message])
    total, stopping, *found = message.tolist()
    if not math.isfinite(total):
        _check_hidden(zip(own, values, strict=True), _idle(batch), micro_batch, where, world)
    tokens = [plan.tree_tokens for plan in plans]
    row = {"loss": total, **{name: value / totals.items for name, value in zip(sums, found, strict=True)}}
    row |= {"tokens": sum(tokens), "padded_tokens": sum(plan.padded_tokens for plan in plans)}
    if world.size > 1:
        row["imbalance"] = max(tokens) * world.size / sum(tokens)
    return row, stopping > 0


def evaluated(
    items: Sequence[Item],
    batch_size: int,
    max_tokens: int,
    objective: Objective,
    micro_batch: Callable[[Sequence[Item]], MicroBatch],
    context: TrainContext,
) -> dict[str, float]:
    """Return "eval_loss" and the objective's metrics by item under "eval_NAME"; nothing is updated.

    The ranks share the items, and all of them get the same numbers. The model must be in evaluation mode.
    """
    world = context.world
    totals = Totals(len(items), sum(sum(s.mask) for item in items for s in item.sequences))
    sums: dict[str, float] = {"loss": 0.0}
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        for part, counts in _passes(split(batch, max_tokens, world.size), batch, world):
            micro = micro_batch(part)
            with torch.no_grad():
                reference_S = None
                if context.reference is not None:
                    own = part if counts else ()
                    reference_S = _reference(micro, own, context.reference, context.cache, world)
                loss, metrics = objective(micro.logps(), reference_S, micro.tree, totals)
            for name, value in {"loss": loss * totals.items, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + (value.item() if counts else 0.0)
    message = torch.tensor(list(sums.values()), dtype=torch.float64, device=world.device)
    world.sum([message])
    return {f"eval_{name}": value / totals.items for name, value in zip(sums, message.tolist(), strict=True)}


def fill_cache(
    batch: Sequence[Item],
    max_tokens: int,
    micro_batch: Callable[[Sequence[Item]], MicroBatch],
    context: TrainContext,
) -> None:
    """Compute and keep the reference log-probs of a batch that the cache does not have, all ranks together."""
    assert context.reference is not None
    for items, counts in _passes(split(batch, max_tokens, context.world.size), batch, context.world):
        _reference(micro_batch(items), items if counts else (), context.reference, context.cache, context.world)


def _passes(plans: Sequence[Plan], batch: Sequence[Item], world: World) -> Iterator[tuple[Sequence[Item], bool]]:
    """Yield each micro-batch of this rank and whether it counts; dummy items make their number equal on all ranks."""
    own = plans[world.rank].micro_batches
    yield from ((items, True) for items in own)
    for _ in range(max(len(plan.micro_batches) for plan in plans) - len(own)):
        yield _idle(batch), False


def _idle(batch: Sequence[Item]) -> tuple[Item]:
    """Return a dummy item: two tokens a sequence, and as many sequences as an item of the batch has."""
    item = batch[0]
    firsts = [sequence.mask.index(1) for sequence in item.sequences]
    pairs = [s.ids[first - 1 : first + 1] for s, first in zip(item.sequences, firsts, strict=True)]
    return (Item(tuple(Tokens(pair, (0, 1)) for pair in pairs), item.group),)


def _reference(
    micro: MicroBatch, items: Sequence[Item], reference: Reference, cache: ReferenceCache | None, world: World
) -> Tensor:
    """Return the reference's [S] log-probs, computed on all ranks or on none; items: none where nothing counts."""
    compute = partial(micro.reference_logps, reference)
    if cache is None:
        return compute()
    if items:
        return cache.get(items, compute, world.any)
    return compute() if world.any(False) else torch.zeros(len(micro.tree.target_S), device=world.device)


def _check_hidden(
    micros: Iterable[tuple[Sequence[Item], float]],
    idle: Sequence[Item],
    micro_batch: Callable[[Sequence[Item]], MicroBatch],
    where: str,
    world: World,
) -> None:
    """Raise FloatingPointError naming the examples whose hidden states are not finite, if there are any.

    micros: this rank's, each with its loss; idle: what to pass over where it has fewer. Each example is computed alone:
    0 x NaN is NaN, so in a common tree one that is not finite spoils its neighbours.
    """
    suspects = [(item, len(items)) for items, loss in micros if not math.isfinite(loss) for item in items]
    counts = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    counts[world.rank] = len(suspects)
    world.sum([counts])
    bad = []
    with torch.no_grad():
        for index in range(int(counts.max())):  # all ranks make as many passes
            own = index < len(suspects)
            finite = micro_batch([suspects[index][0]] if own else idle).hidden().isfinite().all()
            if own and not finite:
                bad.append(suspects[index])
    if world.any(bool(bad)):
        who = f"example {bad[0][0].group!r} ({len(bad)} of {bad[0][1]} in its micro-batch)" if bad else "another rank"
        raise FloatingPointError(
            f"{where}: the hidden states of {who} are not finite; nothing was updated. Lower the learning rate, or "
            "look at that example and at the adapter that training started from"
        )


def _check_first(loss: float, expected: float, world: World) -> None:
    wrong = abs(loss - expected) > 1e-5 * max(1.0, expected)
    if world.any(wrong):
        found = f"{loss:.8f}" if wrong else "another on another rank"
        raise ValueError(
            f"train: the first loss is {found} but policy and reference are equal, so it must be {expected:.8f}; "
            "the reference adapter differs from the policy, or dropout is on"
        )
