"""norm_rope_swiglu.py: oracles are finite differences, the equations in plain torch, and complex multiplication."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.core.models import norm_rope_swiglu as elementwise
from matryoshka.core.models.norm_rope_swiglu import rms_norm, rope_tables, rotate, swiglu


def random(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()


def tables(rows: int, tokens: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the tables of positions that differ by row, some far out."""
    positions = torch.arange(tokens).expand(rows, tokens) * torch.arange(1, rows + 1).unsqueeze(1) ** 5
    return rope_tables(positions, 100.0 ** -torch.arange(size // 2, dtype=torch.float64), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 7), (1, 0, 4)])
def test_gradients_by_finite_differences(shape: tuple[int, int, int]) -> None:
    """Oracle: torch's gradcheck in float64."""
    rows, tokens, size = shape
    x, other = random(*shape), random(*shape, seed=1)
    weight = random(size, seed=2)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x, other))
    heads = random(rows, tokens, 3, 6)
    cos, sin = tables(rows, tokens, 6)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (heads,))


def test_a_frozen_norm_weight_gets_no_gradient() -> None:
    """Oracle: by definition; and the trainable one's, summed over rows and tokens, by autograd through the equation."""
    x, weight = random(2, 5, 7), random(7, seed=2)
    rms_norm(x, weight.detach(), 1e-5).square().sum().backward()  # type: ignore[no-untyped-call]
    frozen = x.grad
    x.grad = None
    rms_norm(x, weight, 1e-5).square().sum().backward()  # type: ignore[no-untyped-call]
    assert frozen is not None and x.grad is not None and torch.equal(frozen, x.grad)
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(plain.square().sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_rotation_is_complex_multiplication() -> None:
    """Oracle: (a + i b) e^(i position frequency) for the pairs (i, i + H/2); the gradient by autograd through it."""
    x = random(2, 5, 3, 6)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 3, 4]])
    frequencies = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    cos, sin = rope_tables(positions, frequencies, torch.float64)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * positions[..., None] * frequencies).unsqueeze(2)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    got = rotate(x, cos, sin)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    probe = random(2, 5, 3, 6, seed=3).detach()
    for out in (got, expected):
        x.grad, before = None, x.grad
        (out * probe).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(before, x.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_plain_torch(dtype: torch.dtype) -> None:
    """Oracle: float64. Output and gradients err at most 1.5 times as much as autograd through the plain equations."""

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def plain_rotate(x: Tensor, _: Tensor) -> Tensor:
        cos, sin = tables(1, 64, 32, torch.float32 if x.dtype != torch.float64 else x.dtype)
        swapped = torch.cat((x[..., 16:], x[..., :16]), dim=-1)
        return (x * cos.unsqueeze(2) + swapped * sin.unsqueeze(2)).to(x.dtype)

    def own_rotate(x: Tensor, _: Tensor) -> Tensor:
        return rotate(x, *tables(1, 64, 32, torch.float32))

    cases: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]]
    cases = [
        (lambda x, weight: rms_norm(x, weight, 1e-5), plain_norm, (random(1, 64, 96), random(96, seed=1))),
        (swiglu, lambda gate, up: F.silu(gate) * up, (random(1, 64, 96), random(1, 64, 96, seed=1))),
        (own_rotate, plain_rotate, (random(1, 64, 3, 32), random(1))),
    ]
    for own, plain, inputs in cases:
        low = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        exact = [tensor.detach().double().requires_grad_() for tensor in low]
        results = []
        for function, tensors in ((own, low), (plain, low), (plain, exact)):
            out = function(*tensors)
            assert out.dtype == tensors[0].dtype
            grads = torch.autograd.grad(out.double().square().sum(), tensors, allow_unused=True)
            results.append([out, *(grad for grad in grads if grad is not None)])
        for ours, theirs, truth in zip(*results, strict=True):
            assert ours.dtype == dtype
            error, their_error = ((x.double() - truth).square().mean().sqrt().item() for x in (ours, theirs))
            assert error <= 1.5 * their_error + 1e-12, (own, error, their_error)


def test_what_is_kept() -> None:
    """Oracle: by hand. RMSNorm keeps its input and a number a token, SwiGLU its inputs, the rotation its tables."""
    x, up, weight = random(1, 5, 8), random(1, 5, 8, seed=1), random(8, seed=2)
    heads, (cos, sin) = random(1, 5, 2, 4), tables(1, 5, 4)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5)
        swiglu(x, up)
        rotate(heads, cos, sin)
    own = [tensor for tensor in kept if tensor.data_ptr() not in {t.data_ptr() for t in (x, up, weight, cos, sin)}]
    assert [tuple(tensor.shape) for tensor in own] == [(1, 5, 1)]


def test_second_derivatives_are_refused() -> None:
    """Oracle: the message."""
    x = random(1, 2, 4)
    for out in (rms_norm(x, x[0, 0].detach(), 1e-5), swiglu(x, x), rotate(x.unsqueeze(2), *tables(1, 2, 4))):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiler_takes_what_cuda_runs() -> None:
    """Oracle: the functions uncompiled, fp32, 1e-5 of the largest; same dtype and strides, for two lengths in turn."""
    gated = ("_silu_gated", "_silu_gated_backward", "_gelu_gated", "_gelu_gated_backward")
    names = ("_normalise", "_normalise_backward", "_normalise_weight_grad", "_turn", *gated)
    plain = {name: getattr(elementwise, name).__wrapped__ for name in names}
    compiled = {name: torch.compile(function) for name, function in plain.items()}
    for tokens in (5, 9):
        x, other, grad = (random(1, tokens, 24, seed=seed).detach().float() for seed in range(3))
        weight, heads = random(24, seed=3).detach().float(), x.view(1, tokens, 3, 8)
        _, inverse = plain["_normalise"](x, weight, 1e-5, None)
        arguments: dict[str, tuple[Any, ...]] = {
            "_normalise": (x, weight, 1e-5, None),
            "_normalise_backward": (grad, x, weight, inverse, None),
            "_normalise_weight_grad": (grad, x, inverse),
            "_turn": (heads, *tables(1, tokens, 8, torch.float32)),
            **{name: (grad, x, other) if name.endswith("backward") else (x, other) for name in gated},
        }
        for name in names:
            outputs, expected = (functions[name](*arguments[name]) for functions in (compiled, plain))
            for got, wanted in zip(_tuple(outputs), _tuple(expected), strict=True):
                assert got.stride() == wanted.stride(), name
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item(), msg=name)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.gpu
def test_compiled_kernels_are_as_good() -> None:
    """Oracle: the same functions uncompiled, in float64 on the CPU; and the same bits with and without gradients."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for tokens in (64, 130, 7):
        x, up, weight = random(1, tokens, 96), random(1, tokens, 96, seed=1), random(96, seed=2)
        cos, sin = tables(1, tokens, 32)
        functions: list[Callable[..., Tensor]] = [
            lambda x, up, weight, cos, sin: rms_norm(x, weight, 1e-5),
            lambda x, up, weight, cos, sin: swiglu(x, up),
            lambda x, up, weight, cos, sin: rotate(x.unflatten(2, (3, 32)), cos, sin),
        ]
        for function in functions:
            low = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in (x, up, weight)]
            exact = [t.detach().double().cpu().requires_grad_() for t in low]
            out = function(*low, cos.to("cuda", torch.float32), sin.to("cuda", torch.float32))
            with torch.no_grad():
                again = function(*low, cos.to("cuda", torch.float32), sin.to("cuda", torch.float32))
            assert torch.equal(out, again)
            truth = function(*exact, cos, sin)
            grads = torch.autograd.grad(out.float().square().sum(), low, allow_unused=True)
            expected = torch.autograd.grad(truth.square().sum(), exact, allow_unused=True)
            for got, wanted in ((out, truth), *zip(grads, expected, strict=True)):
                assert (got is None) == (wanted is None)
                if got is not None and wanted is not None:
                    torch.testing.assert_close(got.double().cpu(), wanted, rtol=3e-2, atol=3e-2 * wanted.std().item())
