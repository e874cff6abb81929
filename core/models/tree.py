"""A batch of token sequences as a forest: a prefix that several sequences share is stored, and computed, once.

Each node is one token with its position and its parent. A token attends to its ancestors only, so log-probs and
gradients equal those of the sequences one at a time (a test holds this in float64). The last token of a sequence is
predicted but never read, so it gets no node. Nodes lie in preorder, siblings in the order of their ids: a subtree is a
range, and token q sees token k exactly where k <= q < end[k]. The layout depends on the set of sequences, not on their
order.

Shapes: T tree tokens, S scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.core.packed import packed

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """One tokenised conversation: ids and, of the same length, 1 where a token is scored (trained on)."""

    ids: Sequence[int]
    mask: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("ids", "mask"):
            object.__setattr__(self, name, packed(getattr(self, name)))
        if len(self.ids) != len(self.mask):
            raise ValueError(f"tokens: {len(self.ids)} ids but {len(self.mask)} mask entries; they go in pairs")
        if wrong := set(self.mask) - {0, 1}:
            raise ValueError(f"tokens: the mask has {min(wrong)}; expected 1 where a token is trained on, else 0")
        if self.ids and self.mask[0]:
            raise ValueError("tokens: the first token cannot be scored; nothing stands before it")


@dataclass(frozen=True)
class TokenTree:
    """A packed forest.

    ids_T, positions_T: int64. parent_T: index of each token's parent, -1 at a root. end_T: index after the last token
    of its subtree. source_S: index of the tree token whose hidden state predicts scored token s; target_S: its id;
    sequence_S: which input sequence it belongs to, in order. num_padded: tokens of the padded layout that this tree
    stands for.
    """

    ids_T: Tensor
    positions_T: Tensor
    parent_T: Tensor
    end_T: Tensor
    source_S: Tensor
    target_S: Tensor
    sequence_S: Tensor
    num_sequences: int
    num_padded: int

    def attention_mask(self) -> Tensor:
        """Return the [T, T] bool mask: true where column is the row itself or one of its ancestors."""
        rows_T = np.arange(len(self.end_T), dtype=np.int32)
        before_end_TT = rows_T[:, None] < self.end_T.numpy().astype(np.int32)  # numpy compares five times faster here
        return torch.from_numpy(before_end_TT).tril_()

    def sum_by_sequence(self, values_S: Tensor) -> Tensor:
        """Return the sum of per-scored-token values over each input sequence, [num_sequences].

        A segment sum, the sequences standing in order: index_add adds in another order each time on CUDA.
        """
        lengths = torch.bincount(self.sequence_S, minlength=self.num_sequences)
        return torch.segment_reduce(values_S, "sum", lengths=lengths.to(values_S.device))

    def chains(self) -> npt.NDArray[np.int64]:
        """Return the starts of the longest runs of tokens without a branch in between, and the number of tokens."""
        parent = self.parent_T.numpy()
        jump = np.flatnonzero(parent != np.arange(len(parent)) - 1)
        branching = parent[jump]
        return np.unique(np.concatenate(([0, len(parent)], jump, branching[branching >= 0] + 1)))

    def padded(self, size: int) -> "TokenTree":
        """Return the tree with `size` tokens. The added ones are roots of id 0: no token sees them, none is scored."""
        added = size - len(self.ids_T)
        if added < 0:
            raise ValueError(f"tree: {len(self.ids_T)} tokens cannot be padded to {size}")
        return replace(
            self,
            ids_T=F.pad(self.ids_T, (0, added)),
            positions_T=F.pad(self.positions_T, (0, added)),
            parent_T=F.pad(self.parent_T, (0, added), value=-1),
            end_T=torch.cat((self.end_T, torch.arange(size - added, size) + 1)),
        )


def build_tree(sequences: Sequence[Tokens]) -> TokenTree:
    """Return the forest of `sequences`, shared prefixes merged token by token."""
    reads = read_ids(sequences)
    order, shared = shared_prefixes(reads)
    size = sum(map(len, reads)) - sum(shared)
    ids, positions, parents, ends = (np.empty(size, dtype=np.int64) for _ in range(4))
    paths: dict[int, Ids] = {}
    path, start = np.empty(0, dtype=np.int64), 0
    for index, common in zip(order, shared, strict=True):
        read = reads[index]
        stop = start + len(read) - common
        ends[path[common:]] = start  # the branch that this one leaves is complete
        path = np.concatenate((path[:common], np.arange(start, stop)))
        paths[index] = path
        ids[start:stop] = read[common:]
        positions[start:stop] = np.arange(common, len(read))
        parents[path[common:]] = np.concatenate(([-1], path))[common : len(read)]
        start = stop
    ends[path] = size
    return _tree(sequences, [paths[index] for index in range(len(sequences))], (ids, positions, parents, ends))


def packed_sequences(sequences: Sequence[Tokens]) -> TokenTree:
    """Return the forest in which every sequence is a tree of its own: packed one after the other, nothing shared."""
    reads = read_ids(sequences)
    stops = np.cumsum([len(read) for read in reads], dtype=np.int64)
    starts = stops - np.array([len(read) for read in reads], dtype=np.int64)
    positions = [np.arange(len(read)) for read in reads]
    at_parent = np.arange(stops[-1] if len(stops) else 0) - 1
    at_parent[starts[starts < stops]] = -1
    paths = [start + own for start, own in zip(starts, positions, strict=True)]
    joined = (np.concatenate([np.empty(0, dtype=np.int64), *parts]) for parts in (reads, positions))
    return _tree(sequences, paths, (*joined, at_parent, np.repeat(stops, stops - starts)))


def _tree(sequences: Sequence[Tokens], paths: Sequence[Ids], nodes: Sequence[Ids]) -> TokenTree:
    """Return the tree. paths: the nodes of each sequence; nodes: ids, positions, parents and ends."""
    scored: list[Ids] = [np.empty((3, 0), dtype=np.int64)]
    for index, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        (at,) = np.nonzero(np.array(sequence.mask))
        targets = np.array(sequence.ids, dtype=np.int64)[at]
        scored.append(np.stack((path[at - 1], targets, np.full(len(at), index))))
    ids_T, positions_T, parent_T, end_T = map(torch.from_numpy, nodes)
    source_S, target_S, sequence_S = torch.from_numpy(np.concatenate(scored, axis=1))
    return TokenTree(
        ids_T, positions_T, parent_T, end_T, source_S, target_S, sequence_S, len(sequences), padded_size(sequences)
    )


def tree_size(sequences: Sequence[Tokens]) -> int:
    """Return how many tokens the forest of `sequences` has, without building it."""
    reads = read_ids(sequences)
    return sum(map(len, reads)) - sum(shared_prefixes(reads)[1])


def padded_size(sequences: Sequence[Tokens]) -> int:
    """Return the tokens of the padded layout: as many rows as sequences, all as long as the longest."""
    return len(sequences) * max((len(s.ids) for s in sequences), default=0)


def read_ids(sequences: Sequence[Tokens]) -> list[Ids]:
    """Return the ids that a model reads of each sequence: all but the last."""
    return [np.array(sequence.ids[:-1], dtype=np.int64) for sequence in sequences]


def shared_prefixes(reads: Sequence[Ids]) -> tuple[list[int], list[int]]:
    """Return the indices of `reads` in lexicographic order and how many first ids each shares with the one before.

    In that order no earlier sequence shares a longer prefix with a sequence than the one right before it does.
    """
    keys = [read.astype(">i8").tobytes() for read in reads]  # bytes compare as ids do
    order = sorted(range(len(reads)), key=keys.__getitem__)
    shared = [0, *(_shared(reads[one], reads[two]) for one, two in zip(order, order[1:], strict=False))]
    return order, shared[: len(reads)]


def _shared(one: Ids, two: Ids) -> int:
    size = min(len(one), len(two))
    differs = one[:size] != two[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size
