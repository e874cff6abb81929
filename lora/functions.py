"""Computes the LoRA product, with its gradient by hand, and DoRA's weight norm. Frozen weights get no gradient.

Layers that read the same input (q, k, v; gate, up) can be computed together: one product takes all A, and the matrix
products themselves sum the gradient of the input. The backward pass keeps the input, which other layers keep as well,
and R numbers for each row and layer: 0.5% of the activations at rank 8, for one read of the input less. A dropout mask
is drawn again from its seed. A weight that is packed in four bits (`lora/quantized.py`) is made dense for each product,
in the backward pass too, and dropped after it.

Shapes: M rows (all leading dimensions), I inputs, O outputs, R rank, S the ranks of all layers together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryoshka.lora.nf4 import NF4, dense


class BaseFunction(torch.autograd.Function):
    """Computes x W^T + bias for a packed W as F.linear does, but keeps only the packed bytes for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: NF4, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.scales, ctx.dtype = scales, x.dtype
        return F.linear(x, dense(packed, scales, x.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        grad_x = grads[0] @ dense(packed, ctx.scales, ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class LoraFunction(torch.autograd.Function):
    """Computes x W^T + bias + scale * (dropout(x) A^T) B^T for each layer, in x's dtype; W and bias are frozen.

    drop: probability of dropout. seed: decides the mask, which all layers share. scales: those of each packed weight,
    None for other layers. layers: weight_OI, bias_O (or None), a_RI, b_OR of each layer, one layer after the other. A
    and B may have a wider dtype than x: the products round them to x's, and their gradients have their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, drop: float, seed: int, scales: Sequence[NF4 | None], *layers: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (layers[i::4] for i in range(4))
        scale /= 1 - drop
        z_MI = x.reshape(-1, x.shape[-1])
        if drop:
            z_MI = z_MI * _mask(z_MI, drop, seed)
        s_MS = F.linear(z_MI, _stacked(downs, x.dtype))
        ctx.save_for_backward(x, s_MS, *weights, *downs, *ups)
        ctx.scale, ctx.drop, ctx.seed, ctx.scales = scale, drop, seed, scales
        outputs = []
        for i, (b_OR, s_MR) in enumerate(zip(ups, _by_layer(s_MS, downs, 1), strict=True)):
            y = F.linear(x, dense(weights[i], scales[i], x.dtype), biases[i])
            y.view(-1, y.shape[-1]).addmm_(s_MR, b_OR.to(x.dtype).T, alpha=scale)
            outputs.append(y)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s_MS, *layers = ctx.saved_tensors
        weights, downs, ups = (layers[i : i + len(grads)] for i in range(0, 3 * len(grads), len(grads)))
        grads_MO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        z_MI = x.reshape(-1, x.shape[-1])
        mask_MI = _mask(z_MI, ctx.drop, ctx.seed) if ctx.drop else None
        grad_MS = torch.cat([grad @ b_OR.to(x.dtype) for grad, b_OR in zip(grads_MO, ups, strict=True)], dim=1)
        grad_MS.mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            down_SI = _stacked(downs, x.dtype)
            grad_x = grad_MS @ down_SI if mask_MI is None else (grad_MS @ down_SI).mul_(mask_MI)
            for grad_MO, weight, scales in zip(grads_MO, weights, ctx.scales, strict=True):
                grad_x.addmm_(grad_MO, dense(weight, scales, x.dtype))
            grad_x = grad_x.view(x.shape)
        grad_layers: list[Tensor | None] = [None] * (4 * len(grads))
        if any(ctx.needs_input_grad[1:]):
            grad_SI = grad_MS.T @ (z_MI if mask_MI is None else z_MI * mask_MI)
            slices = zip(_by_layer(grad_SI, downs, 0), _by_layer(s_MS, downs, 1), strict=True)
            for i, (grad_RI, s_MR) in enumerate(slices):
                grad_RO = (s_MR.T @ grads_MO[i]).mul_(ctx.scale)  # half the time of its transpose [O, M] x [M, R]
                grad_layers[4 * i + 2 : 4 * i + 4] = grad_RI.to(downs[i].dtype), grad_RO.T.to(ups[i].dtype)
        return grad_x, None, None, None, None, *grad_layers


def _stacked(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([a_RI.to(dtype) for a_RI in downs])


def _by_layer(stacked: Tensor, downs: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """Return the slice of each layer of a tensor whose dimension `dim` is S."""
    slices: tuple[Tensor, ...] = torch.split(stacked, [len(a_RI) for a_RI in downs], dim)
    return slices


def _mask(like_MI: Tensor, drop: float, seed: int) -> Tensor:
    """Return 0 with probability `drop`, else 1, a pure function of seed, shape and device."""
    draws = torch.Generator(like_MI.device).manual_seed(seed)
    return torch.empty_like(like_MI).bernoulli_(1 - drop, generator=draws)


def weight_norm(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return ||W + scale B A|| of every row, [O], in A's dtype; the sum itself, [O, I], is never made.

    ||w + d||^2 = ||w||^2 + 2 w.d + ||d||^2 with d = scale b A: both products go through the rank.
    """
    base_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=a_RI.dtype).square()
    cross_O = ((weight_OI @ a_RI.T.to(weight_OI.dtype)).to(a_RI.dtype) * b_OR).sum(1)
    delta_O = ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
    squared_O: Tensor = base_O + 2 * scale * cross_O + scale**2 * delta_O
    return squared_O.clamp_min(0).sqrt()
