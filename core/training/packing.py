"""Global batches of items, cut into micro-batches of a token budget in which items with common prefixes meet.

A global batch is a pure function of items, seed and step. Inside it, items are put in the order of their first
sequences, which brings common prefixes together (the few-shot header of all, then the question of some), and cut where
the fewest tokens have to be computed twice. An item is never split: a loss is a function of the whole item.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matryoshka.core.models.tree import Tokens, padded_size, read_ids, shared_prefixes, tree_size
from matryoshka.core.records import stable_seed

MICRO_BATCH = 256  # what one more micro-batch costs, in tokens: without sharing, fewer are better


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
class Plan:
    """Micro-batches and their size: the tokens of their trees, and of the same sequences padded."""

    micro_batches: tuple[tuple[Item, ...], ...]
    tree_tokens: int
    padded_tokens: int

    @property
    def saved(self) -> int:
        """How many tokens of the padded layout need not be computed."""
        return self.padded_tokens - self.tree_tokens


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


def check_budget(items: Sequence[Item], max_tokens: int) -> None:
    """Raise ValueError for the first item whose own tree has more than max_tokens tokens, naming its example."""
    for number, item in enumerate(items, start=1):
        if sum(len(sequence.ids) for sequence in item.sequences) > max_tokens:
            if (size := tree_size(item.sequences)) > max_tokens:
                raise ValueError(
                    f"item {number} (example {item.group!r}): its {len(item.sequences)} sequences take {size} tree "
                    f"tokens, micro_batch_tokens is {max_tokens}; raise micro_batch_tokens, shorten the example or "
                    "leave it out"
                )


def check_ids(items: Sequence[Item], vocabulary: int) -> None:
    """Raise ValueError for the first item with a token id that the model has no embedding of, naming its example."""
    for number, item in enumerate(items, start=1):
        for ids in (sequence.ids for sequence in item.sequences):
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                wrong = next(id for id in ids if not 0 <= id < vocabulary)
                raise ValueError(
                    f"item {number} (example {item.group!r}): token id {wrong} is outside the model's embedding of "
                    f"{vocabulary} tokens; the data were tokenised for another model, or the tokenizer's files have "
                    "tokens that were added after the model was trained"
                )


def plan(batch: Sequence[Item], max_tokens: int) -> Plan:
    """Return micro-batches of at most max_tokens tree tokens each, at the least total cost among cuts of the order.

    Takes memory and time quadratic in the number of sequences. Raises ValueError as `check_budget`.
    """
    return split(batch, max_tokens, 1)[0]


def split(batch: Sequence[Item], max_tokens: int, ranks: int) -> list[Plan]:
    """Return a plan for each of `ranks` processes, which together hold every item once; some may be empty.

    The order is cut into consecutive parts, since neighbours share the most, so that the costliest part costs as little
    as any such cut allows. Every rank has an item if there are enough of them. Raises ValueError as `check_budget`.
    """
    check_budget(batch, max_tokens)
    items = sorted(batch, key=lambda item: [sequence.ids for sequence in item.sequences])
    sizes = _sizes(items)
    # The costliest part costs more than `least` and at most `most`: all items, each in a micro-batch of its own.
    least, most = 0, int(sizes.trace()) + MICRO_BATCH * len(items)
    while ranks > 1 and most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if _cut(sizes, max_tokens, ranks, middle) is None else (least, middle)
    parts = _cut(sizes, max_tokens, ranks, most)
    assert parts is not None
    plans = []
    for edges in parts:
        bounds = list(zip(edges, edges[1:], strict=False))
        micro = tuple(tuple(items[start:stop]) for start, stop in bounds)
        padded = sum(padded_size([s for item in group for s in item.sequences]) for group in micro)
        plans.append(Plan(micro, sum(int(sizes[start, stop - 1]) for start, stop in bounds), padded))
    return plans


def _cut(sizes: npt.NDArray[np.int64], max_tokens: int, ranks: int, limit: int) -> list[list[int]] | None:
    """Return the edges of each rank's micro-batches, no rank's cost being above `limit`; None where that cannot be.

    Each rank in turn takes as many items as the limit allows, which leaves the least to the others.
    """
    parts, start = [], 0
    for left in range(ranks, 0, -1):
        best, cuts = [0], [start]  # of the items from start on: the least cost, and where the last micro-batch begins
        for stop in range(start + 1, len(sizes) - left + 2):  # one item at least for each rank that comes after
            first = start + int(np.searchsorted(-sizes[start:stop, stop - 1], -max_tokens))  # ranges shrink from there
            costs = np.array(best[first - start :]) + sizes[first:stop, stop - 1] + MICRO_BATCH
            at = int(costs.argmin())
            if costs[at] > limit:
                break
            best.append(int(costs[at]))
            cuts.append(first + at)
        edges = [start + len(best) - 1]
        while edges[-1] > start:
            edges.append(cuts[edges[-1] - start])
        parts.append(edges[::-1])
        start = edges[0]
    return parts if start == len(sizes) else None


def _sizes(items: Sequence[Item]) -> npt.NDArray[np.int64]:
    """Return [first, last] -> tree tokens of items first..last together (0 below the diagonal).

    A sequence adds its tokens after the longest prefix that it shares with one before it.
    """
    reads = read_ids([sequence for item in items for sequence in item.sequences])
    shared_SS = np.zeros((len(reads), len(reads)), dtype=np.int32)
    order, neighbours = shared_prefixes(reads)
    for at, index in enumerate(order):
        # Two sequences share what all neighbours between them share.
        shared = np.minimum.accumulate(np.array(neighbours[at + 1 :], dtype=np.int32))
        shared_SS[order[at + 1 :], index] = shared_SS[index, order[at + 1 :]] = shared
    starts = np.cumsum([0, *(len(item.sequences) for item in items)])
    sizes = np.zeros((len(items), len(items)), dtype=np.int64)
    for last in range(len(items)):
        for index in range(starts[last], starts[last + 1]):
            # Backwards running maximum: what this sequence shares with any from there up to it.
            known = np.maximum.accumulate(shared_SS[index, :index][::-1])[::-1]
            sizes[: last + 1, last] += len(reads[index]) - np.append(known, 0)[starts[: last + 1]]
    return sizes.cumsum(axis=1)
