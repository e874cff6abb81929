"""Which tokens attend to which: the training-side forms of `Attend`. Cached decoding has its own in `inference`.

`Masked`, which computes every score of a tree, is the specification. `Branches` (CPU) and `Flex` (CUDA) compute the
same without the scores that no token sees; `tree_attention` picks.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head size; Q queries and K keys of one block.
"""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from matryoshka.core.models.layer_attention import Attend, LayerAttention
from matryoshka.core.models.tree import TokenTree
from matryoshka.core.models.varlen import Varlen


class Causal:
    """Every token sees itself and the tokens before it in its row, as far as the layer's window reaches."""

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        tokens = q_BNTH.shape[2]
        if layer.softcap is None and (layer.window is None or layer.window >= tokens):
            return F.scaled_dot_product_attention(
                q_BNTH, k_BGTH, v_BGTH, is_causal=True, scale=layer.scale, enable_gqa=True
            )
        at_T = torch.arange(tokens, device=q_BNTH.device)
        return _dense(layer, q_BNTH, k_BGTH, v_BGTH, (at_T <= at_T[:, None]), at_T)


class Masked:
    """Tokens of a tree see themselves and their ancestors, as far as the layer's window; every score is computed."""

    def __init__(self, tree: TokenTree, device: torch.device | None = None) -> None:
        self.mask_TT, self.positions_T = tree.attention_mask().to(device), tree.positions_T.to(device)

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        return _dense(layer, q_BNTH, k_BGTH, v_BGTH, self.mask_TT, self.positions_T)


def _dense(
    layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, mask_TT: Tensor, positions_T: Tensor
) -> Tensor:
    """Return attention under a mask, every score computed; positions_T: by which the window counts."""
    if layer.window is not None:
        mask_TT = mask_TT & (positions_T[:, None] - positions_T < layer.window)
    if layer.softcap is None:
        return F.scaled_dot_product_attention(
            q_BNTH, k_BGTH, v_BGTH, attn_mask=mask_TT, scale=layer.scale, enable_gqa=True
        )
    q, k, v = _grouped(q_BNTH, k_BGTH, v_BGTH)
    scores = layer.softcap * torch.tanh(layer.scale / layer.softcap * (q @ k.unsqueeze(1).transpose(2, 3)))
    out = scores.masked_fill(~mask_TT, -torch.inf).softmax(-1) @ v.unsqueeze(1)
    return out.view(q_BNTH.shape).to(q_BNTH.dtype)


BACKENDS = ("auto", "varlen")


def tree_attention(tree: TokenTree, device: torch.device, backend: str = "auto") -> Attend:
    """Return the attention of `tree` for tensors on `device`. On CUDA the tree has a multiple of BLOCK tokens.

    backend: "auto" is Branches on a CPU and Flex on CUDA; "varlen" is FlashAttention over sequences of any length
    (`varlen.py`), which on a CPU is its slow twin. Raises ValueError for another one.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend {backend!r} is unknown; choose from {BACKENDS}")
    if backend == "varlen":
        return Varlen(tree, device)
    return Flex(tree, device) if device.type == "cuda" else Branches(tree)


# On CPU: dense attention over each branch and its ancestors.

PIECE = 256  # queries of one block of a long chain: keys that the first of them do not see are computed in vain
Indices = np.ndarray[Any, np.dtype[np.int64]]
CALL = 2048  # the cost of a block beside its Q x K scores, in scores (measured: 0.2 ms; a score takes 0.1 us)


@dataclass(frozen=True)
class Block:
    """Queries start..stop of a tree and every key that one of them sees, their own last.

    hidden_QL: which of the last L keys a query does not see. All queries see the keys before those; without a window
    L counts the block's own keys, with one it counts all.
    """

    start: int
    stop: int
    keys_K: Tensor
    hidden_QL: Tensor


def blocks(tree: TokenTree, window: int | None = None) -> list[Block]:
    """Return the blocks of least cost that cover the tree: a subtree is one block where splitting it does not pay.

    window: as `LayerAttention` has it; it leaves out the keys of a path that are too far above a block.
    """
    end, parent, depth = (x.numpy() for x in (tree.end_T, tree.parent_T, tree.positions_T))
    size = len(end)
    starts, stops = _pieces(tree.chains())
    parents = np.searchsorted(starts, parent[starts], side="right") - 1  # -1 at a root
    sizes, above = end[starts] - starts, np.minimum(depth[starts], (window or len(end) + 1) - 1)
    whole = CALL + sizes * (above + sizes)
    alone = CALL + (stops - starts) * (above + stops - starts)
    below = np.zeros(len(starts) + 1, dtype=np.int64)  # cost of the pieces below each piece; last: below none
    for piece in range(len(starts) - 1, -1, -1):
        below[parents[piece]] += min(whole[piece], alone[piece] + below[piece])
    if CALL + size * size <= below[-1]:
        return [_block(end, depth, window, 0, size)]
    found, piece = [], 0
    while piece < len(starts):
        together = whole[piece] <= alone[piece] + below[piece]
        stop = end[starts[piece]] if together else stops[piece]
        found.append(_block(end, depth, window, int(starts[piece]), int(stop)))
        piece = int(np.searchsorted(starts, stop))
    return found


def _pieces(edges: Indices) -> tuple[Indices, Indices]:
    """Return starts and stops of a tree's chains, cut where they are longer than PIECE. edges: its `chains()`."""
    cut = [np.arange(start, stop, PIECE) for start, stop in zip(edges, edges[1:], strict=False)]
    starts = np.concatenate([np.empty(0, dtype=np.int64), *cut])
    return starts, np.append(starts[1:], edges[-1])[: len(starts)]


def _block(end: Indices, depth: Indices, window: int | None, start: int, stop: int) -> Block:
    own = np.arange(start, stop)
    above = np.flatnonzero(end[:start] > start)
    hidden = (own[:, None] >= end[own]) | (own[:, None] < own)
    if window is not None:
        above = above[depth[above] > depth[start] - window]
        too_far = depth[own][:, None] - depth[np.concatenate((above, own))] >= window
        too_far[:, len(above) :] |= hidden
        hidden = too_far
    return Block(start, stop, torch.from_numpy(np.concatenate((above, own))), torch.from_numpy(hidden))


class Branches:
    """A token tree's attention, block by block: exact, and no score between branches is computed."""

    def __init__(self, tree: TokenTree) -> None:
        self._tree = tree
        self._longest = int(tree.positions_T.max()) + 1 if len(tree.positions_T) else 0
        self._blocks: dict[int | None, list[Block]] = {}

    def blocks(self, window: int | None) -> list[Block]:
        """Return the blocks for layers of that window, made once; a window that no path exceeds is none."""
        window = None if window is None or window >= self._longest else window
        if window not in self._blocks:
            self._blocks[window] = blocks(self._tree, window)
        return self._blocks[window]

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        found = self.blocks(layer.window)
        out: Tensor = BlockwiseAttention.apply(q_BNTH, k_BGTH, v_BGTH, found, layer)  # type: ignore[no-untyped-call]
        return out


class BlockwiseAttention(torch.autograd.Function):
    """softmax(cap(scale q k^T)) v over the visible keys; probabilities are computed again in the backward pass.

    dv = p^T g;  ds = p * (g v^T - rowsum(g * out)) * cap';  dq = scale ds k;  dk = scale ds^T q, where
    cap(s) = c tanh(s / c) and so cap' = 1 - tanh(s / c)^2, or 1 without a soft-cap.
    Computes in at least fp32. Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.2.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, blocks: list[Block], layer: LayerAttention
    ) -> Tensor:
        q, k, v = _grouped(q_BNTH, k_BGTH, v_BGTH)
        out = torch.empty_like(q)
        for block in blocks:
            p, *_ = _probabilities(q, k, block, layer)
            rows = slice(block.start, block.stop)
            out[:, :, rows] = (p @ v.index_select(1, block.keys_K)).view(out[:, :, rows].shape)
        ctx.save_for_backward(q_BNTH, k_BGTH, v_BGTH)
        ctx.blocks, ctx.layer = blocks, layer
        return out.view(q_BNTH.shape).to(q_BNTH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q, k, v = _grouped(*saved)
        g = grads[0].to(q.dtype).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.blocks:
            rows, keys_K = slice(block.start, block.stop), block.keys_K
            p, q_rows, k_block, slope = _probabilities(q, k, block, ctx.layer)
            g_rows = g[:, :, rows].flatten(1, 2)
            dv.index_add_(1, keys_K, p.transpose(1, 2) @ g_rows)
            ds = g_rows @ v.index_select(1, keys_K).transpose(1, 2)
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dq[:, :, rows] = (ds @ k_block).view(dq[:, :, rows].shape)
            dk.index_add_(1, keys_K, ds.transpose(1, 2) @ q_rows)
        dq.mul_(ctx.layer.scale)  # q_rows carry the scale already, so dk has it
        dq, dk, dv = (d.view(x.shape).to(x.dtype) for d, x in zip((dq, dk, dv), saved, strict=True))
        return dq, dk, dv, None, None


def _grouped(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [BG, N/G, T, H], k and v [BG, T, H] in the dtype to compute in: one matrix product serves a group."""
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    rows, heads, tokens, size = q_BNTH.shape
    groups = rows * k_BGTH.shape[1]
    q = q_BNTH.to(dtype).reshape(groups, rows * heads // groups, tokens, size)
    # Contiguous: `index_select` would copy the whole of a strided tensor for every block.
    k, v = (x.to(dtype).reshape(groups, tokens, size).contiguous() for x in (k_BGTH, v_BGTH))
    return q, k, v


def _probabilities(
    q: Tensor, k: Tensor, block: Block, layer: LayerAttention
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return of one block p [BG, N/G Q, K], its scaled queries [BG, N/G Q, H], its keys [BG, K, H] and cap' or None."""
    q_rows = (q[:, :, block.start : block.stop] * layer.scale).flatten(1, 2)
    k_block = k.index_select(1, block.keys_K)
    scores, slope = q_rows @ k_block.transpose(1, 2), None
    if layer.softcap is not None:
        scores.div_(layer.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(layer.softcap)
    num_queries, num_hidden = block.hidden_QL.shape
    by_query = scores.view(*q.shape[:2], num_queries, -1)
    by_query[..., by_query.shape[-1] - num_hidden :].masked_fill_(block.hidden_QL, -torch.inf)
    return scores.softmax(-1), q_rows, k_block, slope


# On CUDA: flex attention, which skips blocks of scores that no token sees.

BLOCK = 128  # tokens of one side of a block of scores
GRAPHS: dict[tuple[int, bool], int] = {}  # (tokens, with gradients) -> how often its attention was compiled


class Flex:
    """A token tree's attention as a compiled kernel: one for each length, mode (with gradients or not) and kind."""

    def __init__(self, tree: TokenTree, device: torch.device, backend: str = "inductor") -> None:
        """backend: of torch.compile. Raises ValueError for a tree whose length is not a multiple of BLOCK."""
        self._tree, self._device, self._backend = tree, device, backend
        self._masks: dict[int | None, BlockMask] = {None: block_mask(tree, device)}

    def mask(self, window: int | None) -> BlockMask:
        """Return the mask for layers of that window, made once."""
        if window not in self._masks:
            self._masks[window] = block_mask(self._tree, self._device, window)
        return self._masks[window]

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        kind = FlexKind(layer.scale, layer.softcap, layer.window)
        attend = _compiled(q_BNTH.shape[2], torch.is_grad_enabled(), kind, self._backend)
        return attend(q_BNTH, k_BGTH, v_BGTH, self.mask(layer.window), layer.scale, layer.softcap)


def bucket(tokens: int, max_tokens: int) -> int:
    """Return the length to pad a tree of `tokens` to: one of at most eight up to max_tokens, so eight compilations."""
    step = BLOCK * max(1, math.ceil(max_tokens / (8 * BLOCK)))
    return math.ceil(tokens / step) * step


def attend_flex(
    q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """Return torch's flex attention under `mask`. As it stands it is the dense computation; `Flex` compiles it."""

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    modify = None if softcap is None else capped
    out: Tensor = flex_attention(
        q_BNTH, k_BGTH, v_BGTH, score_mod=modify, block_mask=mask, scale=scale, enable_gqa=True
    )
    return out


@dataclass(frozen=True)
class FlexKind:
    """The constants that are compiled into a kernel, beside its length: layers that agree on it share the kernel."""

    scale: float
    softcap: float | None
    window: int | None


@functools.cache
def _compiled(tokens: int, gradients: bool, kind: FlexKind, backend: str) -> Callable[..., Tensor]:
    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        GRAPHS[tokens, gradients] = GRAPHS.get((tokens, gradients), 0) + 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    # Dynamo counts graphs by code object and gives up at eight: each length and kind gets a code object of its own.
    own: Any = types.FunctionType(attend_flex.__code__.replace(), attend_flex.__globals__)
    return torch.compile(own, backend=count, dynamic=False, fullgraph=True)


def block_mask(tree: TokenTree, device: torch.device, window: int | None = None) -> BlockMask:
    """Return which blocks of BLOCK x BLOCK scores are all, partly or not visible; raises ValueError as `Flex`.

    Key k is seen by queries k..end[k]-1, so a block of keys before a block of queries is partly visible where some end
    lies beyond the first query, and wholly where every end lies beyond the last. A window hides a block of keys that
    all lie too far above all queries; where only some do, the block counts as partly visible.
    """
    if len(tree.end_T) % BLOCK:
        raise ValueError(f"attention: a tree of {len(tree.end_T)} tokens; pad it to a multiple of {BLOCK}")
    last_K, first_K = (f(tree.end_T.view(-1, BLOCK), 1) for f in (torch.amax, torch.amin))
    num = len(last_K)
    start_Q = torch.arange(num)[:, None] * BLOCK
    before_QK = torch.ones(num, num, dtype=torch.bool).tril_(-1)
    full_QK = before_QK & (first_K >= start_Q + BLOCK)
    some_QK = before_QK & (last_K > start_Q) | torch.eye(num, dtype=torch.bool)
    if window is not None:
        deepest, highest = (f(tree.positions_T.view(-1, BLOCK), 1) for f in (torch.amax, torch.amin))
        full_QK &= deepest[:, None] - highest < window
        some_QK &= highest[:, None] - deepest < window
    end_T, positions_T = tree.end_T.to(device), tree.positions_T.to(device)

    def on_path(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    def in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert window is not None
        return (key <= query) & (query < end_T[key]) & (positions_T[query] - positions_T[key] < window)

    def listed(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many key blocks each query block has and their indices, first ones first, as flex wants them."""
        order = blocks_QK.int().argsort(dim=1, descending=True, stable=True)
        return blocks_QK.sum(1).int()[None, None].to(device), order.int()[None, None].to(device)

    visible = on_path if window is None else in_window
    counts = listed(some_QK & ~full_QK), listed(full_QK)
    return BlockMask.from_kv_blocks(*counts[0], *counts[1], BLOCK_SIZE=BLOCK, mask_mod=visible)
