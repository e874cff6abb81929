"""dpo/head.py: the oracle is the eager computation in float64, differentiated by autograd, and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from matryoshka.dpo import head
from matryoshka.dpo.head import FrozenHead, eager_logps, token_logps


def case(rows: int, size: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and targets in float64; a third of the rows has an almost certain target."""
    draws = torch.Generator().manual_seed(seed)
    hidden_SD = torch.randn(rows, size, generator=draws, dtype=torch.float64)
    head_VD = torch.randn(vocabulary, size, generator=draws, dtype=torch.float64)
    target_S = torch.randint(0, vocabulary, (rows,), generator=draws)
    sure = rows // 3
    hidden_SD[:sure] = 3 * head_VD[target_S[:sure]]
    return hidden_SD, head_VD, target_S


def gradient(logps: Tensor, hidden: Tensor) -> Tensor:
    """Return d(sum of weighted logps) / d hidden, with weights that tell the rows apart."""
    weights = torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)
    (out,) = torch.autograd.grad((logps * weights).sum(), hidden)
    return out


def test_eager_by_hand() -> None:
    """Oracle: logits (ln 2, 0, ln 5): p = 2/8, 1/8, 5/8."""
    hidden = torch.ones(3, 1, dtype=torch.float64)
    weights = torch.tensor([[math.log(2)], [0.0], [math.log(5)]], dtype=torch.float64)
    expected = torch.tensor([math.log(p / 8) for p in (2, 1, 5)], dtype=torch.float64)
    for function in (eager_logps, token_logps):
        torch.testing.assert_close(function(hidden, weights, torch.arange(3)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (1, 5, 7), (13, 7, 31), (64, 16, 53)])
@pytest.mark.parametrize("tile", [1, 5, 256])
def test_equals_eager_in_float64(
    rows: int, size: int, vocabulary: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `eager_logps` and its autograd, 1e-12; sizes that divide nothing, tiles of one row, some, all."""
    monkeypatch.setattr(head, "ROWS_PER_TILE", tile)
    hidden, weights, target = case(rows, size, vocabulary)
    hidden.requires_grad_()
    expected, got = eager_logps(hidden, weights, target), token_logps(hidden, weights, target)
    assert got.dtype == torch.float64
    assert got.grad_fn is not None and "FrozenHead" in type(got.grad_fn).__name__
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(got, hidden), gradient(expected, hidden), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(token_logps(hidden, weights, target), expected, rtol=0, atol=1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's finite differences in float64, over a tile boundary."""
    monkeypatch.setattr(head, "ROWS_PER_TILE", 4)
    hidden, weights, target = case(6, 3, 11)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: FrozenHead.apply(h, weights, target), (hidden,))  # type: ignore[no-untyped-call]


def test_no_scored_tokens() -> None:
    """Oracle: by definition; an empty sum has a zero gradient."""
    hidden = torch.zeros(0, 4, requires_grad=True)
    logps = token_logps(hidden, torch.randn(9, 4), torch.zeros(0, dtype=torch.int64))
    assert logps.shape == (0,)
    logps.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_certain_tokens() -> None:
    """Oracle: log 1 = 0 from below and a gradient of 0, where all other logits are 100 and more lower; no NaN."""
    weights = torch.tensor([[200.0, 0.0], [0.0, 1.0], [-200.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    logps = token_logps(hidden, weights, torch.tensor([0, 1, 2]))
    assert logps.tolist() == [0.0, -200.0, 0.0]
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    expected = torch.tensor([[0.0, 0.0], [-200.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_is_as_good_as_eager(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64 on the same bf16 numbers; root-mean-square errors at most 1.5 times those of the eager twin.

    A third of the rows has p near 1. A floor of one fp32 rounding keeps the ratio meaningful where eager is lucky.
    """
    monkeypatch.setattr(head, "ROWS_PER_TILE", 32)
    hidden, weights, target = case(100, 64, 501, seed)
    hidden, weights = (0.5 * hidden).bfloat16(), (0.5 * weights).bfloat16()
    values, grads = [], []
    for function, dtype in ((eager_logps, torch.float64), (eager_logps, None), (token_logps, None)):
        leaf = hidden.to(dtype or hidden.dtype).requires_grad_()
        logps = function(leaf, weights.to(leaf.dtype), target)
        assert logps.dtype == (dtype or torch.float32)
        values.append(logps.detach().double())
        grad = gradient(logps, leaf)
        assert grad.dtype == leaf.dtype
        grads.append(grad.double())
    for truth, eager, ours in (values, grads):
        floor = 2**-24 * truth.abs().max()
        eager_error, our_error = ((x - truth).square().mean().sqrt() for x in (eager, ours))
        assert our_error <= 1.5 * eager_error + floor, (our_error, eager_error)


def test_a_trainable_head_gets_its_gradient() -> None:
    """Oracle: autograd in float64: with requires_grad the head's own gradient must not be lost."""
    hidden, weights, target = case(9, 4, 13)
    hidden.requires_grad_()
    weights.requires_grad_()
    got = torch.autograd.grad(token_logps(hidden, weights, target).sum(), (hidden, weights))
    expected = torch.autograd.grad(eager_logps(hidden, weights, target).sum(), (hidden, weights))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    probs = (hidden @ weights.T).softmax(-1)
    by_hand = torch.zeros_like(weights).index_add(0, target, hidden) - probs.T @ hidden
    torch.testing.assert_close(got[1], by_hand, rtol=0, atol=1e-12)


def test_the_logits_matrix_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what autograd keeps: one [S, D] direction and nothing of the vocabulary's size."""
    monkeypatch.setattr(head, "ROWS_PER_TILE", 8)
    hidden, weights, target = case(40, 4, 1000)
    hidden.requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logps(hidden, weights, target)
    assert kept == [40 * 4]
