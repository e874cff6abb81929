"""A token tree's attention by FlashAttention's kernels for sequences of any length, without a mask.

A chain is a run of tokens without a branch; every chain is a sequence of queries. A tree takes two calls of the kernel.
In the first, the keys of a chain are its path, but for the chain at the root. In the second, all tokens below a root's
chain are queries, and that chain is their keys. The two parts of a token's softmax are merged by their log-sum-exps. So
the branches read one copy of the prefix that they share, and a tree with one root and two levels is read in place. In a
layer with a window one call is enough: each chain reads copies of the keys within its reach.

The kernel is flash-attn's where that package is installed, else torch's own; on a CPU it is `TWIN`, which is the
specification. The backward pass gives a kernel the merged output and log-sum-exp. From these it computes the
probabilities of the whole softmax, so that the gradients of both parts add up.

Shapes: T tokens, N query heads, G key/value heads, H head size; Q queries and K keys of one call.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.models.tree import TokenTree

Indices = np.ndarray[Any, np.dtype[np.int64]]
Rows = slice | Tensor  # tokens of the tree: a slice where they stand side by side, so that reading them is no copy


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call: sequence s has the queries starts_q[s]..starts_q[s + 1] and the keys starts_k[s]..

    queries_Q, keys_K: which tokens of the tree these are. causal: the last query stands beside the last key, and keys
    to the right of a query are hidden; else all queries see all keys. Starts are int32.
    """

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    queries_Q: Rows
    keys_K: Rows
    causal: bool


def calls_of(tree: TokenTree, device: torch.device, window: int | None = None) -> list[Sequences]:
    """Return the one or two calls whose merged softmax is the attention of `tree` in a layer of that window."""
    parent, end, edges = tree.parent_T.numpy(), tree.end_T.numpy(), tree.chains()
    chains, paths, roots, below = [], [], [], []
    path_of: dict[int, Indices] = {-1: np.empty(0, dtype=np.int64)}  # the path to copy that ends with a chain's end
    for start, stop in zip(edges, edges[1:], strict=False):
        chain = np.arange(start, stop)
        path = np.concatenate((path_of[int(parent[start])], chain))
        path_of[int(stop) - 1] = path
        if window is None and parent[start] < 0 and end[start] > stop:
            path_of[int(stop) - 1] = path_of[-1]
            roots.append(chain)
            below.append(np.arange(stop, end[start]))
        chains.append(chain)
        paths.append(path if window is None else path[-(len(chain) + window - 1) :])
    calls = [_sequences(chains, paths, True, device)]
    return [*calls, _sequences(below, roots, False, device)] if roots else calls


def _sequences(queries: Sequence[Indices], keys: Sequence[Indices], causal: bool, device: torch.device) -> Sequences:
    def starts(parts: Sequence[Indices]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *map(len, parts)], dtype=np.int32)).to(device)

    def tokens(parts: Sequence[Indices]) -> Rows:
        joined = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        first, stop = (int(joined[0]), int(joined[-1]) + 1) if len(joined) else (0, 0)
        in_order = np.array_equal(joined, np.arange(first, stop))
        return slice(first, stop) if in_order else torch.from_numpy(joined).to(device)

    longest_q, longest_k = (max(map(len, parts), default=0) for parts in (queries, keys))
    return Sequences(starts(queries), starts(keys), longest_q, longest_k, tokens(queries), tokens(keys), causal)


QKV = tuple[Tensor, Tensor, Tensor]  # [Q, N, H], [K, G, H], [K, G, H], or their gradients


@dataclass(frozen=True)
class Kernel:
    """forward returns the output [Q, N, H] and the log-sum-exps [N, Q], in at least fp32.

    backward also takes the output and the log-sum-exps of the whole softmax and the output's gradient.
    """

    forward: Callable[[Sequences, LayerAttention, QKV], tuple[Tensor, Tensor]]
    backward: Callable[[Sequences, LayerAttention, QKV, Tensor, Tensor, Tensor], QKV]


class Varlen:
    """Attention of a token tree by a kernel for sequences of any length; low precision alone on CUDA."""

    def __init__(self, tree: TokenTree, device: torch.device) -> None:
        self._tree, self._device = tree, device
        self._longest = int(tree.positions_T.max()) + 1 if len(tree.positions_T) else 0
        self._calls: dict[int | None, list[Sequences]] = {}
        self._kernel = cuda_kernel() if device.type == "cuda" else TWIN

    def calls(self, window: int | None) -> list[Sequences]:
        """Return the calls for layers of that window, made once; a window that no path exceeds is none."""
        window = None if window is None or window >= self._longest else window
        if window not in self._calls:
            self._calls[window] = calls_of(self._tree, self._device, window)
        return self._calls[window]

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        if len(q_BNTH) != 1:
            raise ValueError(f"attention: {len(q_BNTH)} rows; a token tree lies in one row")
        if q_BNTH.is_cuda:
            check_flash(q_BNTH.dtype, q_BNTH.shape[-1])
        q, k, v = (x[0].transpose(0, 1) for x in (q_BNTH, k_BGTH, v_BGTH))
        out_TNH: Tensor = MergedAttention.apply(q, k, v, self._kernel, layer, self.calls(layer.window))  # type: ignore[no-untyped-call]
        return out_TNH.transpose(0, 1)[None]


class MergedAttention(torch.autograd.Function):
    """The softmax whose keys are spread over several calls of a kernel; the first call has every token as a query."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, layer: LayerAttention, calls: list[Sequences]
    ) -> Tensor:
        first, *rest = calls
        out, lse = kernel.forward(first, layer, _read(first, q, k, v))
        for call in rest:
            at = call.queries_Q
            part, its_lse = kernel.forward(call, layer, _read(call, q, k, v))
            merged_lse = torch.logaddexp(lse[:, at], its_lse)
            before, its_own = ((one - merged_lse).exp().T[..., None] for one in (lse[:, at], its_lse))
            out[at] = (out[at] * before + part * its_own).to(out.dtype)
            lse[:, at] = merged_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = kernel, layer, calls
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, layer, calls = ctx.how
        sums = [torch.zeros_like(x, dtype=at_least_fp32(x.dtype)) for x in (q, k, v)]
        for call in calls:
            at, keys = call.queries_Q, call.keys_K
            whole = out[at], lse[:, at].contiguous(), grads[0][at]
            parts = kernel.backward(call, layer, _read(call, q, k, v), *whole)
            for total, part, rows in zip(sums, parts, (at, keys, keys), strict=True):
                if isinstance(rows, slice):
                    total[rows] += part
                else:
                    total.index_add_(0, rows, part.to(total.dtype))
        return *(total.to(q.dtype) for total in sums), None, None, None


def _read(at: Sequences, q: Tensor, k: Tensor, v: Tensor) -> QKV:
    return q[at.queries_Q], k[at.keys_K], v[at.keys_K]


def check_flash(dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError for a dtype or a head size that FlashAttention's kernels do not compute."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: FlashAttention takes bf16 or fp16, not {dtype}; use backend auto")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            "attention: FlashAttention takes head sizes up to 256 that are multiples of 8, not "
            f"{head_dim}; use backend auto"
        )


@functools.cache
def cuda_kernel() -> Kernel:
    """Return flash-attn's kernel, or torch's where that package is not installed."""
    return _flash_kernel() if importlib.util.find_spec("flash_attn") is not None else TORCH


def _reach(at: Sequences, layer: LayerAttention) -> tuple[int, int]:
    """Return how many keys to the left and right a query sees, as the kernels count: -1 for all."""
    if not at.causal:
        return -1, -1
    return -1 if layer.window is None else layer.window - 1, 0


def _flash_kernel() -> Kernel:
    flash = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(at: Sequences, layer: LayerAttention, qkv: QKV) -> tuple[Tensor, Tensor]:
        left, right = _reach(at, layer)
        out, lse, *_ = flash._flash_attn_varlen_forward(
            *qkv, at.starts_q, at.starts_k, at.longest_q, at.longest_k, 0.0, layer.scale, at.causal,
            window_size_left=left, window_size_right=right, softcap=layer.softcap or 0.0,
        )  # fmt: skip
        return out, lse

    def backward(at: Sequences, layer: LayerAttention, qkv: QKV, out: Tensor, lse: Tensor, grad: Tensor) -> QKV:
        dq, dk, dv = (torch.empty_like(x) for x in qkv)
        left, right = _reach(at, layer)
        # Deterministic: the faster backward pass adds in another order every time.
        flash._flash_attn_varlen_backward(
            grad, *qkv, out, lse, dq, dk, dv, at.starts_q, at.starts_k, at.longest_q, at.longest_k, 0.0,
            layer.scale, at.causal, left, right, layer.softcap or 0.0, None, True,
        )  # fmt: skip
        return dq, dk, dv

    return Kernel(forward, backward)


def _torch_forward(at: Sequences, layer: LayerAttention, qkv: QKV) -> tuple[Tensor, Tensor]:
    if layer.softcap:
        raise ValueError("attention: torch's varlen kernel has no soft-cap; install flash-attn, or use backend auto")
    left, right = _reach(at, layer)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *qkv, at.starts_q, at.starts_k, at.longest_q, at.longest_k, 0.0, at.causal and left < 0, False,
        scale=layer.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _torch_backward(at: Sequences, layer: LayerAttention, qkv: QKV, out: Tensor, lse: Tensor, grad: Tensor) -> QKV:
    left, right = _reach(at, layer)
    no_dropout = out.new_zeros(2, dtype=torch.uint64), out.new_empty(0)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, *qkv, out, lse, at.starts_q, at.starts_k, at.longest_q, at.longest_k, 0.0, at.causal and left < 0,
        *no_dropout, scale=layer.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq, dk, dv


TORCH = Kernel(_torch_forward, _torch_backward)


def _twin_forward(at: Sequences, layer: LayerAttention, qkv: QKV) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0], dtype=at_least_fp32(q.dtype))
    for rows, keys in _ranges(at):
        scores, _ = _scores(at, layer, q[rows], k[keys])
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ _heads(v[keys], q)).to(q.dtype).transpose(0, 1)
    return out, lse


def _twin_backward(at: Sequences, layer: LayerAttention, qkv: QKV, out: Tensor, lse: Tensor, grad: Tensor) -> QKV:
    q, k, v = qkv
    dq, dk, dv = (torch.empty_like(x) for x in qkv)
    for rows, keys in _ranges(at):
        scores, slope = _scores(at, layer, q[rows], k[keys])
        probs = (scores - lse[:, rows, None]).exp()
        g, its_out, its_q = (_heads(x[rows], q) for x in (grad, out, q))
        d_scores = probs * (g @ _heads(v[keys], q).transpose(1, 2) - (g * its_out).sum(-1, keepdim=True))
        d_scores *= slope * layer.scale
        dq[rows] = (d_scores @ _heads(k[keys], q)).to(q.dtype).transpose(0, 1)
        for total, by_head in ((dk, d_scores.transpose(1, 2) @ its_q), (dv, probs.transpose(1, 2) @ g)):
            by_group = by_head.view(k.shape[1], -1, *by_head.shape[1:]).sum(1)
            total[keys] = by_group.to(total.dtype).transpose(0, 1)
    return dq, dk, dv


TWIN = Kernel(_twin_forward, _twin_backward)


def _ranges(at: Sequences) -> list[tuple[slice, slice]]:
    bounds = (starts.tolist() for starts in (at.starts_q, at.starts_k))
    by_side = ([slice(*pair) for pair in zip(starts, starts[1:], strict=False)] for starts in bounds)
    return list(zip(*by_side, strict=True))


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Return [N, rows, H] in at least fp32, groups repeated for the query heads that read them."""
    return x.to(at_least_fp32(x.dtype)).transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)


def _scores(at: Sequences, layer: LayerAttention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores [N, Q, K] of one sequence, -inf where hidden, and the slope of the soft-cap."""
    scores = _heads(q, q) @ _heads(k, q).transpose(1, 2) * layer.scale
    slope = torch.ones_like(scores)
    if layer.softcap is not None:
        capped = torch.tanh(scores / layer.softcap)
        scores, slope = layer.softcap * capped, 1 - capped.square()
    if not at.causal:
        return scores, slope
    # How far a key stands to the left of a query, the last query beside the last key.
    left = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    reach = len(k) if layer.window is None else layer.window
    return scores.masked_fill((left < 0) | (left >= reach), -torch.inf), slope
