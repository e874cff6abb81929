"""dpo/head.py: the oracle is the eager computation in float64, differentiated by autograd, and finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matryoshka.dpo import head
from matryoshka.dpo.head import (
    eager_logps,
    extra_bytes,
    token_logps,
)
from matryoshka.dpo.head_state import Scored

TILES = [(1, 1), (5, 7), (1024, 2048)]  # rows, columns: single numbers, sizes that divide nothing, all at once


def case(rows: int, size: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and targets in float64; a third of the rows has an almost certain target."""
    draws = torch.Generator().manual_seed(seed)
    hidden_SD = torch.randn(rows, size, generator=draws, dtype=torch.float64)
    head_VD = torch.randn(vocabulary, size, generator=draws, dtype=torch.float64)
    target_S = torch.randint(0, vocabulary, (rows,), generator=draws)
    sure = rows // 3
    hidden_SD[:sure] = 3 * head_VD[target_S[:sure]]
    return hidden_SD, head_VD, target_S


def weighted(logps: Tensor) -> Tensor:
    """Return the sum of the log-probs with weights that tell the rows apart."""
    return (logps * torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)).sum()


def set_tiles(patch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    patch.setattr(head, "ROWS", rows)
    patch.setattr(head, "COLUMNS", columns)


def test_eager_by_hand() -> None:
    """Oracle: logits (ln 2, 0, ln 5): p = 2/8, 1/8, 5/8."""
    hidden = torch.ones(3, 1, dtype=torch.float64)
    weights = torch.tensor([[math.log(2)], [0.0], [math.log(5)]], dtype=torch.float64)
    expected = torch.tensor([math.log(p / 8) for p in (2, 1, 5)], dtype=torch.float64)
    for function in (eager_logps, token_logps):
        torch.testing.assert_close(function(hidden, weights, torch.arange(3)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (1, 5, 7), (13, 7, 31), (64, 16, 53)])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_equals_eager_in_float64(
    rows: int,
    size: int,
    vocabulary: int,
    tiles: tuple[int, int],
    trainable: bool,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: `eager_logps` and its autograd, 1e-12, for the hidden states and for a head that is trained."""
    set_tiles(monkeypatch, *tiles)
    hidden, weights, target = case(rows, size, vocabulary)
    inputs = [hidden.requires_grad_(), weights.requires_grad_()][: 1 + trainable]
    weights.requires_grad_(trainable)
    expected, got = (function(hidden, weights, target, softcap) for function in (eager_logps, token_logps))
    assert got.dtype == torch.float64
    assert got.grad_fn is not None and "FlashHead" in type(got.grad_fn).__name__
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(weighted(got), inputs), torch.autograd.grad(weighted(expected), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_heads_gradient_by_hand() -> None:
    """Oracle: sum over s of (onehot(y_s) - p_s) h_s^T."""
    hidden, weights, target = case(9, 4, 13)
    weights.requires_grad_()
    (got,) = torch.autograd.grad(token_logps(hidden, weights, target).sum(), weights)
    probs = (hidden @ weights.detach().T).softmax(-1)
    by_hand = torch.zeros_like(got).index_add(0, target, hidden) - probs.T @ hidden
    torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's finite differences in float64, over tile boundaries, for both inputs."""
    set_tiles(monkeypatch, 4, 5)
    hidden, weights, target = case(6, 3, 11)
    inputs = hidden.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, target, softcap), inputs)


def test_no_second_derivative() -> None:
    """Oracle: by definition; a gradient that cannot be differentiated must say so, not be taken for a constant."""
    hidden, weights, target = case(3, 4, 5)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(hidden, weights, target).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


def test_no_scored_tokens() -> None:
    """Oracle: by definition; an empty sum has a zero gradient."""
    hidden, weights = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logps = token_logps(hidden, weights, torch.zeros(0, dtype=torch.int64))
    assert logps.shape == (0,)
    logps.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weights.grad is not None and not weights.grad.any()


def test_certain_tokens() -> None:
    """Oracle: log 1 = 0 and a gradient of 0, where all other logits are 200 and more lower; no NaN."""
    weights = torch.tensor([[200.0, 0.0], [0.0, 1.0], [-200.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    logps = token_logps(hidden, weights, torch.tensor([0, 1, 2]))
    assert logps.tolist() == [0.0, -200.0, 0.0]
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    expected = torch.tensor([[0.0, 0.0], [-200.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("trainable", [False, True])
def test_relative_accuracy_near_one(gap: float, trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64, target first: logp = -log1p(r) with r = sum e^(z_j - z_y), down to 1 - p = e^-80.

    Relative 1e-4 of a log-prob and a gradient that 1 - p scales; 1 - p taken from an fp32 log-prob, as eager does it,
    is off by all of it at a gap of 20.
    """
    set_tiles(monkeypatch, 4, 3)
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 6, generator=draws)
    weights[:, 0] = 0.0
    weights[2, 0] = gap
    hidden = torch.randn(5, 6, generator=draws) / 8
    hidden[:, 0] = 1.0
    target = torch.full((5,), 2)
    exact = hidden.double().requires_grad_()
    wide = weights.double().requires_grad_()
    z = exact @ wide.T
    others = [0, 1, 3, 4, 5, 6, 7]
    truth = -torch.log1p((z[:, others] - z[:, 2:3]).exp().sum(1))
    inputs = (exact, wide) if trainable else (exact,)
    expected = torch.autograd.grad(truth.sum(), inputs)
    ours = [hidden.requires_grad_(), weights.requires_grad_(trainable)][: len(inputs)]
    got = token_logps(hidden, weights, target)
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=0)
    for grad, wanted in zip(torch.autograd.grad(got.sum(), ours), expected, strict=True):
        assert (grad.double() - wanted).norm() <= 1e-4 * wanted.norm()
    if gap >= 20:
        eager = eager_logps(hidden.detach(), weights.detach(), target).double()
        assert ((eager - truth) / truth).abs().max() > 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_is_as_good_as_eager(seed: int, trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64 on the same bf16 numbers; root-mean-square errors at most 1.5 times those of the eager twin.

    A third of the rows has p near 1. A floor of one fp32 rounding keeps the ratio meaningful where eager is lucky.
    """
    set_tiles(monkeypatch, 32, 100)
    hidden, weights, target = case(100, 64, 501, seed)
    hidden, weights = (0.5 * hidden).bfloat16(), (0.5 * weights).bfloat16()
    results: list[list[Tensor]] = []
    for function, dtype in ((eager_logps, torch.float64), (eager_logps, None), (token_logps, None)):
        leaf = hidden.to(dtype or hidden.dtype).requires_grad_()
        inputs = [leaf, weights.to(leaf.dtype).requires_grad_(trainable)]
        logps = function(inputs[0], inputs[1], target)
        assert logps.dtype == (dtype or torch.float32)
        grads = torch.autograd.grad(weighted(logps), inputs[: 1 + trainable])
        assert all(grad.dtype == leaf.dtype for grad in grads)
        results.append([logps.detach().double(), *(grad.double() for grad in grads)])
    for truth, eager, ours in zip(*results, strict=True):
        floor = 2**-24 * truth.abs().max()
        eager_error, our_error = ((x - truth).square().mean().sqrt() for x in (eager, ours))
        assert our_error <= 1.5 * eager_error + floor, (our_error, eager_error)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_mixed_dtypes_are_not_rounded_down(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Oracle: eager in float64 on the same numbers; the wider dtype decides, gradients have their input's."""
    hidden, weights, target = case(6, 4, 9)
    hidden, weights = hidden.to(dtypes[0]).requires_grad_(), weights.to(dtypes[1]).requires_grad_()
    logps = token_logps(hidden, weights, target)
    assert logps.dtype == dtypes[1]
    expected = eager_logps(hidden.double(), weights.double(), target)
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(logps.sum(), (hidden, weights))
    assert tuple(grad.dtype for grad in grads) == dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_pass_has_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the pass with gradients, bit by bit: without them, and again."""
    set_tiles(monkeypatch, 16, 50)
    hidden, weights, target = case(40, 8, 301)
    hidden, weights = hidden.to(dtype).requires_grad_(), weights.to(dtype)
    trained = token_logps(hidden, weights, target)
    (grad,) = torch.autograd.grad(weighted(trained), hidden)
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, weights, target), trained)
    again = token_logps(hidden, weights, target)
    assert torch.equal(again, trained)
    assert torch.equal(torch.autograd.grad(weighted(again), hidden)[0], grad)


def test_a_pass_without_gradients_forms_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the arguments: tiles give log-probs alone where autograd is off, though a leaf wants a gradient
    elsewhere, and for a frozen hidden state."""
    asked: list[tuple[bool | None, ...]] = []
    tiles = head.score_tiles

    def note(*arguments: Any) -> Scored:
        asked.append(arguments[3:])
        return tiles(*arguments)

    monkeypatch.setattr(head, "score_tiles", note)
    hidden, weights, target = case(3, 4, 5)
    token_logps(hidden, weights.requires_grad_(), target)
    hidden.requires_grad_()
    with torch.no_grad():
        assert not token_logps(hidden, weights, target).requires_grad
    token_logps(hidden, weights, target)
    assert asked == [(None, False), (None, False), (None, True)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("tiles", TILES)
def test_what_is_not_finite_shows_in_its_row_alone(
    bad: float, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: eager: NaN in the row whose hidden state, or whose logits, are not finite; the others as without it."""
    set_tiles(monkeypatch, *tiles)
    hidden, weights, target = (x.float() if x.is_floating_point() else x for x in case(9, 4, 13))
    clean = token_logps(hidden.requires_grad_(), weights, target)
    (clean_grad,) = torch.autograd.grad(clean.sum(), hidden)
    spoiled = hidden.detach().clone()
    spoiled[4, 1] = bad
    spoiled.requires_grad_()
    logps = token_logps(spoiled, weights, target)
    (grad,) = torch.autograd.grad(logps.sum(), spoiled)
    rest = torch.arange(9) != 4
    assert not logps[4].isfinite() and not eager_logps(spoiled, weights, target)[4].isfinite()
    assert bad == 3e38 or logps[4].isnan()
    assert torch.equal(logps[rest], clean[rest]) and torch.equal(grad[rest], clean_grad[rest])
    assert not grad[4].isfinite().all() or bad == 3e38


def test_an_infinite_logit_of_the_target_is_no_certainty() -> None:
    """Oracle: eager: inf - inf is NaN, also where all other logits are -inf and p would look like 1."""
    weights = torch.tensor([[1.0, -1.0], [2.0, -3.0], [1.0, 2.0]])
    hidden = torch.tensor([[1.0, math.inf]], requires_grad=True)
    for function in (eager_logps, token_logps):
        logps = function(hidden, weights, torch.tensor([2]))
        assert logps.isnan().all() and torch.autograd.grad(logps.sum(), hidden)[0].isnan().any()


def test_autograd_keeps_nothing_of_the_vocabularys_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what autograd keeps for a frozen head: one [S, D] direction."""
    set_tiles(monkeypatch, 8, 100)
    hidden, weights, target = case(40, 4, 1000)
    hidden.requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logps(hidden, weights, target)
    assert kept == [40 * 4]


class LargestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that any operation inside gives back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("trainable", [False, True])
def test_the_logits_matrix_never_exists(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: every operation's result, forward and backward: a tile, or the head's gradient; the logits are 40,000."""
    set_tiles(monkeypatch, 8, 100)
    hidden, weights, target = case(40, 8, 1000)
    with LargestResult() as largest:
        token_logps(hidden.requires_grad_(), weights.requires_grad_(trainable), target).sum().backward()  # type: ignore[no-untyped-call]
    assert largest.numel == (8 * 1000 if trainable else 8 * 100)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return what torch's CPU allocator held at its highest during `work`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("sizes", [(300, 64, 4999), (300, 256, 6000), (1500, 64, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_memory_as_predicted(sizes: tuple[int, int, int], dtype: torch.dtype, training: bool) -> None:
    """Oracle: the allocator's peak, within 10%."""
    hidden, weights, target = (x.to(dtype) if x.is_floating_point() else x for x in case(*sizes))

    def work() -> None:
        leaf = hidden.requires_grad_(training)
        leaf.grad = None
        logps = token_logps(leaf, weights, target)
        if training:
            logps.sum().backward()  # type: ignore[no-untyped-call]

    work()
    assert peak_bytes(work) == pytest.approx(extra_bytes(*sizes, dtype, gpu=False, training=training), rel=0.1)


def test_memory_on_a_gpu_by_hand() -> None:
    """Oracle: the tiles of 8192 tokens of Llama 3 in bf16, added up: 370.5 MiB in training, 32 without gradients."""
    by_hand = 1024 * 8192 * 4 + 1024 * 128256 * 2 + 1024 * 4096 * (4 + 2) + 8192 * 4096 * 2
    assert extra_bytes(8192, 4096, 128256, torch.bfloat16, gpu=True, training=True) == by_hand
    assert by_hand / 2**20 == pytest.approx(370.5)
    assert extra_bytes(8192, 4096, 128256, torch.bfloat16, gpu=True, training=False) == 32 * 2**20


@pytest.mark.parametrize(
    ("shapes", "targets", "message"),
    [
        (((3, 4), (9, 5)), [0, 1, 2], r"hidden states \[3, 4\] and head \[9, 5\]; expected \[S, D\] and \[V, D\]"),
        (((2, 3, 4), (9, 4)), [0, 1], r"hidden states \[2, 3, 4\]"),
        (((3, 4), (9, 4)), [0, 1], r"\[2\] targets for 3 hidden states"),
        (((2, 4), (9, 4)), [0, 9], "targets from 0 to 9, but the head has rows 0 to 8"),
        (((2, 4), (9, 4)), [-100, 1], "targets from -100 to 1"),
    ],
)
def test_errors(shapes: tuple[tuple[int, ...], tuple[int, ...]], targets: list[int], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=message):
        token_logps(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.tensor(targets))
