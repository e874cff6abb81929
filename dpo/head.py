"""Log-probs of chosen tokens from hidden states and a frozen head, without ever holding the [tokens, vocab] matrix.

For a frozen head W the gradient of logp(y) with respect to the hidden state is W[y] - softmax(h W^T) W: it needs
nothing that the forward pass does not have at hand. So the forward pass forms it tile by tile (two vocabulary products
in training, one without gradients) and the backward pass is a row scale. `eager_logps` is the specification.

Shapes: S scored tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

ROWS_PER_TILE = 256  # 256 rows x 49k..128k vocabulary x 4 bytes = 50..130 MB of logits at a time


def eager_logps(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> Tensor:
    """Return log softmax(h W^T)[y], [S], in at least fp32: the plain computation, which autograd differentiates."""
    dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
    logits_SV = hidden_SD.to(dtype) @ head_VD.to(dtype).T
    return logits_SV.log_softmax(-1).gather(1, target_S.unsqueeze(1)).squeeze(1)


class FrozenHead(torch.autograd.Function):
    """logp_S of (hidden_SD, frozen head_VD, target_S); the gradient direction is formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        head = head_VD.to(dtype)
        logps_S = hidden_SD.new_empty(len(target_S), dtype=dtype)
        direction_SD = torch.empty_like(hidden_SD, dtype=dtype) if ctx.needs_input_grad[0] else None
        for start in range(0, len(target_S), ROWS_PER_TILE):
            rows = slice(start, start + ROWS_PER_TILE)
            logits = hidden_SD[rows].to(dtype) @ head.T
            target = target_S[rows].unsqueeze(1)
            logsumexp = logits.logsumexp(-1, keepdim=True)
            logps_S[rows] = (logits.gather(1, target) - logsumexp).squeeze(1)
            if direction_SD is not None:
                probs = logits.sub_(logsumexp).exp_()
                direction_SD[rows] = head[target.squeeze(1)] - probs @ head
        if direction_SD is not None:
            ctx.save_for_backward(direction_SD)
        ctx.hidden_dtype = hidden_SD.dtype
        return logps_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (direction_SD,) = ctx.saved_tensors
        return (direction_SD * grads[0].unsqueeze(1)).to(ctx.hidden_dtype), None, None


def token_logps(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> Tensor:
    """Return the log-prob of target_S[s] given hidden_SD[s], [S], in at least fp32.

    A frozen head takes the tiled path; a trainable head is differentiated by autograd through `eager_logps`.
    """
    if head_VD.requires_grad and torch.is_grad_enabled():
        return eager_logps(hidden_SD, head_VD, target_S)
    logps: Tensor = FrozenHead.apply(hidden_SD, head_VD, target_S)  # type: ignore[no-untyped-call]
    return logps
