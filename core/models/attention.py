"""Who attends to whom: the training-side implementations of `Attend`. Cached decoding has its own in `inference`.

`Masked` with a tree's dense mask is the specification. `Branches` (CPU) and `Flex` (CUDA) compute the same and leave
out what no token sees; `tree_attention` picks.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head size; Q queries and K keys of one block.
"""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from matryoshka.core.models.tree import TokenTree


class Attend(Protocol):
    """Softmax attention of one layer. Scale 1/sqrt(H); softmax in at least fp32; N is a multiple of G."""

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        """Return the [B, N, T, H] attention output in q's dtype."""
        ...


class Causal:
    """Every token sees itself and what stands before it in its row."""

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BNTH, k_BGTH, v_BGTH, is_causal=True, enable_gqa=True)


class Masked:
    """Token t sees token s where mask_TT[t, s] is true: a token tree laid out in one row (`core/models/tree.py`)."""

    def __init__(self, mask_TT: Tensor) -> None:
        self.mask_TT = mask_TT

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BNTH, k_BGTH, v_BGTH, attn_mask=self.mask_TT, enable_gqa=True)


def tree_attention(tree: TokenTree, device: torch.device) -> Attend:
    """Return the attention of `tree` for tensors on `device`. On CUDA the tree has a multiple of BLOCK tokens."""
    return Flex(tree, device) if device.type == "cuda" else Branches(tree)


# On CPU: dense attention over each branch and its ancestors.

PIECE = 256  # queries of one block of a long chain: keys that the first of them do not see are computed in vain
CALL = 2048  # what a block costs beside its Q x K scores, in scores (measured: 0.2 ms beside 0.1 us a score)


@dataclass(frozen=True)
class Block:
    """Queries start..stop of a tree, every key that one of them sees (their own last), and which own are hidden."""

    start: int
    stop: int
    keys_K: Tensor
    hidden_QQ: Tensor


def blocks(tree: TokenTree) -> list[Block]:
    """Return the blocks of least cost that cover the tree: a subtree is one block where splitting it does not pay."""
    end, parent, depth = (x.numpy() for x in (tree.end_T, tree.parent_T, tree.positions_T))
    size = len(end)
    starts, stops = _pieces(parent)
    parents = np.searchsorted(starts, parent[starts], side="right") - 1  # -1 at a root
    sizes, above = end[starts] - starts, depth[starts]
    whole = CALL + sizes * (above + sizes)
    alone = CALL + (stops - starts) * (above + stops - starts)
    below = np.zeros(len(starts) + 1, dtype=np.int64)  # cost of the pieces below each piece; last: below none
    for piece in range(len(starts) - 1, -1, -1):
        below[parents[piece]] += min(whole[piece], alone[piece] + below[piece])
    if CALL + size * size <= below[-1]:
        return [_block(end, 0, size)]
    found, piece = [], 0
    while piece < len(starts):
        together = whole[piece] <= alone[piece] + below[piece]
        stop = end[starts[piece]] if together else stops[piece]
        found.append(_block(end, int(starts[piece]), int(stop)))
        piece = int(np.searchsorted(starts, stop))
    return found


def _pieces(parent: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, Any]:
    """Return starts and stops of the tree's chains without branches, cut where they are longer than PIECE."""
    size = len(parent)
    jump = np.flatnonzero(parent != np.arange(size) - 1)
    branching = parent[jump]
    edges = np.unique(np.concatenate(([0, size], jump, branching[branching >= 0] + 1)))
    cut = [np.arange(start, stop, PIECE) for start, stop in zip(edges, edges[1:], strict=False)]
    starts = np.concatenate([np.empty(0, dtype=np.int64), *cut])
    return starts, np.append(starts[1:], size)[: len(starts)]


def _block(end: np.ndarray[Any, np.dtype[np.int64]], start: int, stop: int) -> Block:
    own = np.arange(start, stop)
    keys = np.concatenate((np.flatnonzero(end[:start] > start), own))
    hidden = (own[:, None] >= end[own]) | (own[:, None] < own)
    return Block(start, stop, torch.from_numpy(keys), torch.from_numpy(hidden))


class Branches:
    """A token tree's attention, block by block: exact, and no score between branches is computed."""

    def __init__(self, tree: TokenTree) -> None:
        self.blocks = blocks(tree)

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        out: Tensor = BlockwiseAttention.apply(q_BNTH, k_BGTH, v_BGTH, self.blocks)  # type: ignore[no-untyped-call]
        return out


class BlockwiseAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(H)) v over the visible keys; probabilities are computed again in the backward pass.

    dv = p^T g;  ds = p * (g v^T - rowsum(g * out));  dq = ds k / sqrt(H);  dk = ds^T q / sqrt(H).
    Computes in at least fp32. Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.2.
    """

    @staticmethod
    def forward(ctx: Any, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, blocks: list[Block]) -> Tensor:
        q, k, v = _grouped(q_BNTH, k_BGTH, v_BGTH)
        out = torch.empty_like(q)
        for block in blocks:
            p, _, _ = _probabilities(q, k, block)
            rows = slice(block.start, block.stop)
            out[:, :, rows] = (p @ v.index_select(1, block.keys_K)).view(out[:, :, rows].shape)
        ctx.save_for_backward(q_BNTH, k_BGTH, v_BGTH)
        ctx.blocks = blocks
        return out.view(q_BNTH.shape).to(q_BNTH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        q, k, v = _grouped(*saved)
        g = grads[0].to(q.dtype).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.blocks:
            rows, keys_K = slice(block.start, block.stop), block.keys_K
            p, q_rows, k_block = _probabilities(q, k, block)
            g_rows = g[:, :, rows].flatten(1, 2)
            dv.index_add_(1, keys_K, p.transpose(1, 2) @ g_rows)
            ds = g_rows @ v.index_select(1, keys_K).transpose(1, 2)
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p)
            dq[:, :, rows] = (ds @ k_block).view(dq[:, :, rows].shape)
            dk.index_add_(1, keys_K, ds.transpose(1, 2) @ q_rows)
        dq.mul_(q.shape[-1] ** -0.5)  # q_rows carry the scale already, so dk has it
        dq, dk, dv = (d.view(x.shape).to(x.dtype) for d, x in zip((dq, dk, dv), saved, strict=True))
        return dq, dk, dv, None


def _grouped(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [BG, N/G, T, H], k and v [BG, T, H] in the dtype to compute in: one matrix product serves a group."""
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    rows, heads, tokens, size = q_BNTH.shape
    groups = rows * k_BGTH.shape[1]
    q = q_BNTH.to(dtype).reshape(groups, rows * heads // groups, tokens, size)
    # Contiguous: `index_select` would copy the whole of a strided tensor for every block.
    k, v = (x.to(dtype).reshape(groups, tokens, size).contiguous() for x in (k_BGTH, v_BGTH))
    return q, k, v


def _probabilities(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return p [BG, N/G Q, K] of one block, its scaled queries [BG, N/G Q, H] and its keys [BG, K, H]."""
    q_rows = (q[:, :, block.start : block.stop] * q.shape[-1] ** -0.5).flatten(1, 2)
    k_block = k.index_select(1, block.keys_K)
    scores = q_rows @ k_block.transpose(1, 2)
    size = block.stop - block.start
    own = scores.view(*q.shape[:2], size, -1)[..., -size:]
    own.masked_fill_(block.hidden_QQ, -torch.inf)
    return scores.softmax(-1), q_rows, k_block


# On CUDA: flex attention, which skips blocks of scores that nobody sees.

BLOCK = 128  # tokens of one side of a block of scores
GRAPHS: dict[tuple[int, bool], int] = {}  # (tokens, with gradients) -> how often its attention was compiled


class Flex:
    """A token tree's attention as a compiled kernel, one for each length and mode (with and without gradients)."""

    def __init__(self, tree: TokenTree, device: torch.device, backend: str = "inductor") -> None:
        """backend: what compiles. Raises ValueError for a tree whose length is not a multiple of BLOCK."""
        self.mask = block_mask(tree, device)
        self.backend = backend

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        attend = _compiled(q_BNTH.shape[2], torch.is_grad_enabled(), self.backend)
        return attend(q_BNTH, k_BGTH, v_BGTH, self.mask)


def bucket(tokens: int, max_tokens: int) -> int:
    """Return the length to pad a tree of `tokens` to: one of at most eight up to max_tokens, so eight compilations."""
    step = BLOCK * max(1, math.ceil(max_tokens / (8 * BLOCK)))
    return math.ceil(tokens / step) * step


def attend_flex(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, mask: BlockMask) -> Tensor:
    """Return torch's flex attention under `mask`. As it stands it is the dense computation; `Flex` compiles it."""
    out: Tensor = flex_attention(q_BNTH, k_BGTH, v_BGTH, block_mask=mask, enable_gqa=True)
    return out


@functools.cache
def _compiled(tokens: int, gradients: bool, backend: str) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        GRAPHS[tokens, gradients] = GRAPHS.get((tokens, gradients), 0) + 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    # Dynamo counts graphs by code object and gives up at eight: each length gets a code object of its own.
    own: Any = types.FunctionType(attend_flex.__code__.replace(), attend_flex.__globals__)
    return torch.compile(own, backend=count, dynamic=False, fullgraph=True)


def block_mask(tree: TokenTree, device: torch.device) -> BlockMask:
    """Return which blocks of BLOCK x BLOCK scores are all, partly or not visible; raises ValueError as `Flex`.

    Key k is seen by queries k..end[k]-1, so a block of keys before a block of queries is partly visible where some end
    lies beyond the first query, and wholly where every end lies beyond the last.
    """
    if len(tree.end_T) % BLOCK:
        raise ValueError(f"attention: a tree of {len(tree.end_T)} tokens; pad it to a multiple of {BLOCK}")
    last_K, first_K = (f(tree.end_T.view(-1, BLOCK), 1) for f in (torch.amax, torch.amin))
    num = len(last_K)
    start_Q = torch.arange(num)[:, None] * BLOCK
    before_QK = torch.ones(num, num, dtype=torch.bool).tril_(-1)
    full_QK = before_QK & (first_K >= start_Q + BLOCK)
    partial_QK = before_QK & (last_K > start_Q) & ~full_QK | torch.eye(num, dtype=torch.bool)
    end_T = tree.end_T.to(device)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    def listed(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many key blocks each query block has and their indices, first ones first, as flex wants them."""
        order = blocks_QK.int().argsort(dim=1, descending=True, stable=True)
        return blocks_QK.sum(1).int()[None, None].to(device), order.int()[None, None].to(device)

    return BlockMask.from_kv_blocks(*listed(partial_QK), *listed(full_QK), BLOCK_SIZE=BLOCK, mask_mod=visible)
