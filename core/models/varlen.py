"""A token tree's attention by FlashAttention's kernels for sequences of any length, without a mask.

Each chain of the tree without branches is one sequence of queries, and its keys are its whole path from the root: the
causal kernels align queries with the end of their keys, so each token sees its path, as far as the window reaches.
Chains that share a prefix read copies of its keys; sequences that share nothing are read in place. The kernel is
`flash_attn_varlen_func` where the package flash-attn is installed, else torch's own `varlen_attn`; on a CPU it is
`attend_sequences`, a twin with flash-attn's signature, which is the specification.

Shapes: T tokens, N query heads, G key/value heads, H head size; S sequences.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.core.models.tree import TokenTree

# flash_attn_varlen_func's own signature, as far as it is used.
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Sequences:
    """Which queries attend to which keys: sequence s has queries starts_q[s]..starts_q[s + 1] of the tree's tokens, and
    as many keys of `keys` (None: all tokens in order) as starts_k says. Starts are int32, as the kernels want them."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    keys: Tensor | None


def sequences_of(tree: TokenTree, device: torch.device) -> Sequences:
    """Return the chains of `tree` as sequences, each with its path as keys."""
    parent = tree.parent_T.numpy()
    size = len(parent)
    jump = np.flatnonzero(parent != np.arange(size) - 1)
    branching = parent[jump]
    edges = np.unique(np.concatenate(([0, size], jump, branching[branching >= 0] + 1)))
    paths: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    path_of: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}  # the path that ends with a chain's last token
    for start, stop in zip(edges, edges[1:], strict=False):
        above = path_of[int(parent[start])] if parent[start] >= 0 else np.empty(0, dtype=np.int64)
        path = np.concatenate((above, np.arange(start, stop)))
        path_of[int(stop) - 1] = path
        paths.append(path)
    lengths_k = np.array([len(path) for path in paths], dtype=np.int64)
    keys = np.concatenate([np.empty(0, dtype=np.int64), *paths])
    in_order = len(keys) == size
    return Sequences(
        starts_q=torch.from_numpy(edges.astype(np.int32)).to(device),
        starts_k=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths_k))).astype(np.int32)).to(device),
        longest_q=int(np.diff(edges).max(initial=0)),
        longest_k=int(lengths_k.max(initial=0)),
        keys=None if in_order else torch.from_numpy(keys).to(device),
    )


class Varlen:
    """Attention of a token tree by a kernel for sequences of any length; low precision alone on CUDA."""

    def __init__(self, tree: TokenTree, device: torch.device) -> None:
        self.sequences = sequences_of(tree, device)
        self._kernel = cuda_kernel() if device.type == "cuda" else attend_sequences

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        if len(q_BNTH) != 1:
            raise ValueError(f"attention: {len(q_BNTH)} rows; a token tree lies in one row")
        if q_BNTH.is_cuda and q_BNTH.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"attention: FlashAttention takes bf16 or fp16, not {q_BNTH.dtype}; use backend auto")
        at = self.sequences
        q, k, v = (x[0].transpose(0, 1) for x in (q_BNTH, k_BGTH, v_BGTH))
        if at.keys is not None:
            k, v = k.index_select(0, at.keys), v.index_select(0, at.keys)
        out_TNH = self._kernel(
            q,
            k,
            v,
            at.starts_q,
            at.starts_k,
            at.longest_q,
            at.longest_k,
            softmax_scale=layer.scale,
            causal=True,
            window_size=(-1 if layer.window is None else layer.window - 1, 0),
            softcap=layer.softcap or 0.0,
        )
        return out_TNH.transpose(0, 1)[None]


@functools.cache
def cuda_kernel() -> Kernel:
    """Return flash-attn's function, or torch's under the same signature."""
    if importlib.util.find_spec("flash_attn") is not None:
        module = importlib.import_module("flash_attn")
        # Its faster backward pass adds in another order every time.
        return functools.partial(module.flash_attn_varlen_func, deterministic=True)
    return _torch_kernel


def _torch_kernel(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    if softcap:
        raise ValueError("attention: torch's varlen_attn has no soft-cap; install flash-attn, or use backend auto")
    assert causal  # window_size says so to torch: (-1, 0), or (left, 0)
    out = varlen_attn(
        q_TNH, k_TGH, v_TGH, starts_q, starts_k, longest_q, longest_k,
        scale=softmax_scale, window_size=window_size, enable_gqa=q_TNH.shape[1] != k_TGH.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def attend_sequences(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """Return flash_attn_varlen_func's result by plain torch, [T, N, H]: each sequence alone, queries aligned with the
    end of their keys. window_size: keys to the left and right of a query that it sees, -1 for all."""
    groups = q_TNH.shape[1] // k_TGH.shape[1]
    outputs = [q_TNH.new_empty(0, *q_TNH.shape[1:])]
    bounds_q, bounds_k = starts_q.tolist(), starts_k.tolist()
    for s in range(len(bounds_q) - 1):
        q = q_TNH[bounds_q[s] : bounds_q[s + 1]].transpose(0, 1)
        k, v = (x[bounds_k[s] : bounds_k[s + 1]].transpose(0, 1).repeat_interleave(groups, 0) for x in (k_TGH, v_TGH))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(1, 2) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # How far a key stands to the right of a query, the last query beside the last key.
        right = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
        hidden = (right > 0) & torch.tensor(causal)
        if window_size[0] >= 0:
            hidden |= right < -window_size[0]
        if window_size[1] >= 0:
            hidden |= right > window_size[1]
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append((probs @ v.to(wide)).to(q.dtype).transpose(0, 1))
    return torch.cat(outputs)
