"""A batch of token sequences as a forest: what they share at their beginnings stands, and is computed, once.

Each node is one token with its position and its parent; attention sees ancestors only, so log-probs and gradients equal
those of the sequences one at a time (held in float64 by a test). A sequence's last token is only ever predicted, never
read, so it gets no node.

Shapes: T tree tokens, S scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """One tokenised conversation: ids and, of the same length, 1 where a token is scored (trained on)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.mask):
            raise ValueError(f"tokens: {len(self.ids)} ids but {len(self.mask)} mask entries; they go in pairs")
        if self.ids and self.mask[0]:
            raise ValueError("tokens: the first token cannot be scored; nothing stands before it")


@dataclass(frozen=True)
class TokenTree:
    """A packed forest.

    ids_T, positions_T: int64. parent_T: index of each token's parent, -1 at a root. source_S: index of the tree token
    whose hidden state predicts scored token s; target_S: its id; sequence_S: which input sequence it belongs to, in
    order. num_padded: tokens of the padded layout that this tree stands for.
    """

    ids_T: Tensor
    positions_T: Tensor
    parent_T: Tensor
    source_S: Tensor
    target_S: Tensor
    sequence_S: Tensor
    num_sequences: int
    num_padded: int

    def attention_mask(self) -> Tensor:
        """Return the [T, T] bool mask: true where column is the row itself or one of its ancestors."""
        size = len(self.ids_T)
        mask_TT = torch.zeros(size, size, dtype=torch.bool)
        for token, parent in enumerate(self.parent_T.tolist()):
            if parent >= 0:
                mask_TT[token] = mask_TT[parent]
            mask_TT[token, token] = True
        return mask_TT

    def sum_by_sequence(self, values_S: Tensor) -> Tensor:
        """Return the sum of per-scored-token values over each input sequence, [num_sequences]."""
        return values_S.new_zeros(self.num_sequences).index_add(0, self.sequence_S.to(values_S.device), values_S)


Nodes = dict[tuple[int, int], int]  # (parent node, -1 at a root; token id) -> node, numbered in order of insertion


def insert(nodes: Nodes, ids: Sequence[int]) -> list[int]:
    """Return the nodes of ids[:-1] from the root down, made where the forest `nodes` lacks them."""
    path = []
    node = -1
    for token in ids[:-1]:
        node = nodes.setdefault((node, token), len(nodes))
        path.append(node)
    return path


def build_tree(sequences: Sequence[Tokens]) -> TokenTree:
    """Return the forest of `sequences`, shared prefixes merged token by token, in order of first appearance."""
    nodes: Nodes = {}
    scored: list[tuple[int, int, int]] = []
    for index, sequence in enumerate(sequences):
        path = insert(nodes, sequence.ids)
        scored += [(path[at - 1], sequence.ids[at], index) for at, is_scored in enumerate(sequence.mask) if is_scored]
    positions: list[int] = []
    for parent, _ in nodes:
        positions.append(positions[parent] + 1 if parent >= 0 else 0)
    columns = torch.tensor(scored, dtype=torch.int64).reshape(-1, 3)
    return TokenTree(
        ids_T=torch.tensor([token for _, token in nodes], dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        parent_T=torch.tensor([parent for parent, _ in nodes], dtype=torch.int64),
        source_S=columns[:, 0],
        target_S=columns[:, 1],
        sequence_S=columns[:, 2],
        num_sequences=len(sequences),
        num_padded=len(sequences) * max((len(s.ids) for s in sequences), default=0),
    )


def tree_size(sequences: Sequence[Tokens]) -> int:
    """Return how many tokens the forest of `sequences` has, without building tensors."""
    nodes: Nodes = {}
    for sequence in sequences:
        insert(nodes, sequence.ids)
    return len(nodes)
