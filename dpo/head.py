"""Log-probs of chosen tokens straight from hidden states and a head: the [tokens, vocab] matrix never exists.

The gradient of logp(y) with respect to the hidden state is (1 - p_y) (W[y] - E[W_j | j != y]), which needs nothing that
the forward pass does not have at hand. So the forward pass forms it tile by tile (two vocabulary products in training,
one without gradients) and the backward pass is a row scale. The target stands apart from the other tokens throughout:
log-prob and gradient keep their relative accuracy where p is near 1. A trainable head gets its own gradient from tiles
that are computed again (two more products). A soft-cap c makes a logit z into c tanh(z / c); each row of W then counts
times its slope 1 - tanh(z / c)^2. `eager_logps` is the specification.

Every pass over the same hidden states takes the same tiles in the same order: policy and reference get the same bits.
A NaN in a hidden state makes the log-prob of its own row NaN, and that of no other row.

Shapes: S scored tokens, T tokens, D hidden, V vocabulary.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryoshka.core.models.language_model import product
from matryoshka.dpo.head_state import Scored, new_state, summary, to_direction

# Torch's path: 1024 x 2048 fp32 logits stay in a CPU's cache between the products; more rows than that read the head
# once per row tile. The head's own gradient on a GPU takes larger ones: its accumulator passes through memory.
ROWS, COLUMNS = 1024, 2048
GPU_ROWS, GPU_COLUMNS = 4096, 8192
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


def eager_logps(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor, softcap: float | None = None) -> Tensor:
    """Return log softmax(cap(h W^T))[y], [S], in at least fp32: the plain computation, for autograd."""
    dtype = _wide(hidden_SD, head_VD)
    logits_SV = hidden_SD.to(dtype) @ head_VD.to(dtype).T
    if softcap is not None:
        logits_SV = softcap * torch.tanh(logits_SV / softcap)
    return logits_SV.log_softmax(-1).gather(1, target_S.unsqueeze(1)).squeeze(1)


def token_logps(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor, softcap: float | None = None) -> Tensor:
    """Return the log-prob of target_S[s] given hidden_SD[s], [S], in at least fp32. softcap: of the logits.

    Differentiable in the hidden states and, where it requires a gradient, in the head; not twice. Raises ValueError for
    shapes that do not fit and, on a CPU, targets outside the vocabulary (elsewhere such a log-prob is not a number).
    """
    if hidden_SD.ndim != 2 or head_VD.ndim != 2 or hidden_SD.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"head: hidden states {list(hidden_SD.shape)} and head {list(head_VD.shape)}; expected [S, D] and [V, D]"
        )
    if target_S.shape != hidden_SD.shape[:1]:
        raise ValueError(f"head: {list(target_S.shape)} targets for {len(hidden_SD)} hidden states; expected one each")
    if target_S.device.type == "cpu" and len(target_S) and not 0 <= target_S.min() <= target_S.max() < len(head_VD):
        raise ValueError(
            f"head: targets from {target_S.min()} to {target_S.max()}, but the head has rows 0 to {len(head_VD) - 1}; "
            "tokenizer and model differ, or a padding id was scored"
        )
    if not torch.is_grad_enabled():  # otherwise the pass would form gradients for leaves that require one
        hidden_SD, head_VD = hidden_SD.detach(), head_VD.detach()
    logps_S: Tensor = FlashHead.apply(hidden_SD, head_VD, target_S, softcap)  # type: ignore[no-untyped-call]
    return logps_S


def extra_bytes(
    num_tokens: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    gpu: bool,
    training: bool,
    softcap: float | None = None,
) -> int:
    """Return the most bytes that `token_logps` with a frozen head and its backward hold beyond their inputs.

    dtype: of hidden states and head alike. gpu: the Triton path. Scratch space inside MKL or cuBLAS is not counted.
    """
    size = dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    if gpu and dtype in KERNEL_DTYPES:
        from matryoshka.dpo.kernels import tile_shape

        rows, columns = tile_shape(num_tokens, vocabulary, dtype)
        tiles = rows * columns * wide + (rows * (vocabulary * size + hidden_size * (wide + size)) if training else 0)
        kept = num_tokens * hidden_size * size if training else 0
    else:
        rows, columns = _balanced(num_tokens, ROWS), min(COLUMNS, vocabulary)
        converted = 0 if size == wide else (rows + 2 * columns) * hidden_size * wide
        slopes = rows * columns * wide if training and softcap is not None else 0
        tiles = rows * columns * wide + slopes + max(converted, rows * hidden_size * size if training else 0)
        kept = num_tokens * hidden_size * wide if training else 0
    gradient = num_tokens * hidden_size * size if training else 0
    return kept + max(tiles, gradient)


class FlashHead(torch.autograd.Function):
    """Computes `token_logps`."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor, softcap: float | None) -> Tensor:
        for_hidden, for_head = ctx.needs_input_grad[:2]
        if _takes_kernels(hidden_SD, head_VD):
            from matryoshka.dpo import kernels

            scored = kernels.score_tiles(hidden_SD, head_VD, target_S, softcap, for_hidden)
        else:
            scored = score_tiles(hidden_SD, head_VD, target_S, softcap, for_hidden)
        again = (hidden_SD, head_VD, target_S, scored.logps_S, scored.logsumexp_S) if for_head else (None,) * 5
        ctx.save_for_backward(scored.direction_SD, *again)
        ctx.hidden_dtype, ctx.softcap = hidden_SD.dtype, softcap
        return scored.logps_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        direction_SD, hidden_SD, head_VD, target_S, logps_S, logsumexp_S = ctx.saved_tensors
        grad_hidden = grad_head = None
        if direction_SD is not None:
            grad_hidden = torch.empty_like(direction_SD, dtype=ctx.hidden_dtype)
            torch.mul(direction_SD, grad_S.unsqueeze(1), out=grad_hidden)
        if head_VD is not None:
            grad_head = head_gradient(hidden_SD, head_VD, target_S, (logps_S, logsumexp_S), grad_S, ctx.softcap)
        return grad_hidden, grad_head, None, None


def _takes_kernels(hidden_SD: Tensor, head_VD: Tensor) -> bool:
    """Whether Triton computes this: bf16 or fp32 on a GPU, or anywhere under Triton's interpreter."""
    same = hidden_SD.dtype == head_VD.dtype and hidden_SD.dtype in KERNEL_DTYPES
    return same and (hidden_SD.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def score_tiles(
    hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor, softcap: float | None, with_direction: bool
) -> Scored:
    """Return log-probs, log-sum-exps and, where asked for, directions, on any device and dtype."""
    dtype = _wide(hidden_SD, head_VD)
    (num_tokens, size), vocabulary = hidden_SD.shape, len(head_VD)
    rows, columns = _balanced(num_tokens, ROWS), min(COLUMNS, vocabulary)
    logits = hidden_SD.new_empty(rows * columns, dtype=dtype)
    state_3S = new_state(hidden_SD, dtype)
    direction_SD = hidden_SD.new_zeros(num_tokens, size, dtype=dtype) if with_direction else None
    for start in range(0, num_tokens, rows):
        tile = slice(start, start + rows)
        hidden, target = hidden_SD[tile].to(dtype), target_S[tile].unsqueeze(1)
        reference, rest, own = state_3S[:, tile].unsqueeze(2)
        for first in range(0, vocabulary, columns):
            weight = head_VD[first : first + columns].to(dtype)
            shape = len(hidden), len(weight)
            z = torch.mm(hidden, weight.T, out=logits[: math.prod(shape)].view(shape))
            slope = None
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1 - z.square() if with_direction else None
                z.mul_(softcap)
            column, here = _local(target, first, len(weight))
            picked = z.gather(1, column)
            own.copy_(torch.where(here, picked, own))
            z.scatter_(1, column, picked.masked_fill_(here, torch.finfo(dtype).min))
            highest = torch.maximum(reference, z.amax(1, keepdim=True))
            keep = (reference - highest).exp()
            reference.copy_(highest)
            mass = z.sub_(highest).exp_()
            rest.mul_(keep).add_(mass.sum(1, keepdim=True))
            if direction_SD is not None:
                direction_SD[tile].mul_(keep).addmm_(mass if slope is None else mass.mul_(slope), weight)
        if direction_SD is not None:
            to_direction(direction_SD[tile], head_VD, target_S[tile], state_3S[:, tile], softcap)
    return summary(state_3S, direction_SD)


def head_gradient(
    hidden_SD: Tensor,
    head_VD: Tensor,
    target_S: Tensor,
    scores: tuple[Tensor, Tensor],
    grad_S: Tensor,
    softcap: float | None,
) -> Tensor:
    """Return the sum over s of grad_S[s] slope (onehot(y_s) - p_s) h_s^T, [V, D] in the head's dtype.

    scores: log-probs and log-sum-exps of the scored tokens.
    """
    logps_S, logsumexp_S = scores
    dtype = logps_S.dtype
    on_tensor_cores = hidden_SD.is_cuda and hidden_SD.dtype == head_VD.dtype == torch.bfloat16
    operand = torch.bfloat16 if on_tensor_cores else dtype
    most_rows, most_columns = (GPU_ROWS, GPU_COLUMNS) if on_tensor_cores else (ROWS, COLUMNS)
    rows, columns = _balanced(len(hidden_SD), most_rows), min(most_columns, len(head_VD))
    grad_head = torch.zeros_like(head_VD)
    logits = hidden_SD.new_empty(rows * columns, dtype=dtype)
    own_S = -torch.expm1(logps_S) * grad_S
    for first in range(0, len(head_VD), columns):
        weight = head_VD[first : first + columns].to(operand)
        result = grad_head[first : first + columns]
        total = result if result.dtype == dtype else torch.zeros_like(result, dtype=dtype)
        for start in range(0, len(hidden_SD), rows):
            tile = slice(start, start + rows)
            hidden = hidden_SD[tile].to(operand)
            shape = len(hidden), len(weight)
            z = product(hidden, weight.T, out=logits[: math.prod(shape)].view(shape))
            slope = None
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1 - z.square()
                z.mul_(softcap)
            z.sub_(logsumexp_S[tile].unsqueeze(1)).exp_().mul_(-grad_S[tile].unsqueeze(1))
            column, here = _local(target_S[tile].unsqueeze(1), first, len(weight))
            z.scatter_(1, column, torch.where(here, own_S[tile].unsqueeze(1), z.gather(1, column)))
            if slope is not None:
                z.mul_(slope)
            if operand == dtype:
                total.addmm_(z.T, hidden)
            else:
                total += product(z.to(operand).T, hidden)
        if total is not result:
            result.copy_(total)
    return grad_head


def _local(target: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return each target's column in the tile that begins at token `first`, any column where it is not in it, and
    whether it is."""
    column = (target - first).clamp_(0, num_columns - 1)
    return column, column + first == target


def _balanced(total: int, most: int) -> int:
    """Return the size of the parts, `most` at most, that `total` is cut into."""
    num_parts = max(1, -(-total // most))
    return max(1, -(-total // num_parts))


def _wide(hidden_SD: Tensor, head_VD: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_SD.dtype, head_VD.dtype), torch.float32)
