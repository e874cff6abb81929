"""RMSNorm, rotary embedding and gated activations with gradients by hand: few passes over memory, and only tensors that
cannot be made again are kept for the backward pass.

Each is a pair of plain functions. CUDA tensors get them compiled into one kernel each, the same one with and without
gradients, so that policy and reference agree to the bit; elsewhere they run as they stand. First derivatives only.

Shapes: B rows, T tokens, D hidden, N heads, H head size, F feed-forward.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compiled_on_cuda(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which for CUDA tensors runs as torch.compile made it: one kernel for all of its steps."""

    @functools.cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        # Within a block that is being compiled the plain function is traced.
        if isinstance(first, Tensor) and first.is_cuda and not torch.compiler.is_compiling():
            return compiled()(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), [B, T, D] in x's dtype, the division in at least fp32.

    offset: None rounds to x's dtype before the weight is multiplied, as Llama does. A number is added to the weight,
    and the product is rounded once, as Gemma (1) and OLMo 2 (0) do.
    Source: Zhang & Sennrich 2019, eq. 4. Kept for the backward pass: x and one number a token.
    """
    out: Tensor = _RMSNorm.apply(x_BTD, weight_D, eps, offset)  # type: ignore[no-untyped-call]
    return out


@compiled_on_cuda
def _normalise(x: Tensor, weight_D: Tensor, eps: float, offset: float | None) -> tuple[Tensor, Tensor]:
    wide = x.to(at_least_fp32(x.dtype))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    inverse = torch.rsqrt(mean_square + eps)
    if offset is None:
        return (wide * inverse).to(x.dtype).mul_(weight_D), inverse
    return (wide * inverse).mul_(weight_D.to(wide.dtype) + offset).to(x.dtype), inverse


@compiled_on_cuda
def _normalise_backward(grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor, offset: float | None) -> Tensor:
    wide = x.to(inverse.dtype)
    if offset is None:
        scaled = (grad * weight_D).to(inverse.dtype)
    else:
        scaled = grad.to(inverse.dtype) * (weight_D.to(inverse.dtype) + offset)
    # d/dx of x * inverse(x): the part of the gradient along x is taken out.
    along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1) * inverse.square() / -x.shape[-1]
    return scaled.addcmul_(wide, along).mul_(inverse).to(x.dtype)


@compiled_on_cuda
def _normalise_weight_grad(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    return (grad * (x.to(inverse.dtype) * inverse)).flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float | None) -> Tensor:
        out, inverse = _normalise(x, weight_D, eps, offset)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_D, inverse = ctx.saved_tensors
        grad_x = _normalise_backward(grad, x, weight_D, inverse, ctx.offset) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _normalise_weight_grad(grad, x, inverse).to(weight_D.dtype)
        return grad_x, grad_weight, None, None


def rotate(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Return x rotated by its position, halves paired (i, i + H/2), computed in the tables' dtype.

    sin_BTH: its first half negated, as `rope_tables` makes it. Nothing of x is kept for the backward pass.
    """
    out: Tensor = _Rotate.apply(x_BTNH, cos_BTH, sin_BTH)  # type: ignore[no-untyped-call]
    return out


def rope_tables(positions_BT: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the tables for `rotate`, [B, T, H] each in `dtype`, for [H/2] angular frequencies in float64."""
    angles = positions_BT.unsqueeze(-1) * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@compiled_on_cuda
def _turn(x: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    wide = x.to(cos_BTH.dtype)
    first, second = wide.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return swapped.mul_(sin_BTH.unsqueeze(2)).addcmul_(wide, cos_BTH.unsqueeze(2)).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTH, sin_BTH)
        return _turn(x, cos_BTH, sin_BTH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos_BTH, sin_BTH = ctx.saved_tensors
        return _turn(grad, cos_BTH, -sin_BTH), None, None  # the transpose of a rotation turns back


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return silu(gate) * up. Source: Shazeer 2020, eq. 6. Kept for the backward pass: gate and up."""
    out: Tensor = _Gated.apply(gate_BTF, up_BTF, _silu_gated, _silu_gated_backward)  # type: ignore[no-untyped-call]
    return out


def geglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return gelu(gate) * up with the tanh approximation. Source: Shazeer 2020, eq. 5. Kept: gate and up."""
    out: Tensor = _Gated.apply(gate_BTF, up_BTF, _gelu_gated, _gelu_gated_backward)  # type: ignore[no-untyped-call]
    return out


@compiled_on_cuda
def _silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@compiled_on_cuda
def _silu_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, F.silu(gate).mul_(grad)


@compiled_on_cuda
def _gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh").mul_(up)


@compiled_on_cuda
def _gelu_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate: Tensor = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return grad_gate, F.gelu(gate, approximate="tanh").mul_(grad)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, gated: Callable[..., Tensor], gated_backward: Callable[..., Any]
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gated_backward = gated_backward
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.gated_backward(grad, gate, up), None, None
