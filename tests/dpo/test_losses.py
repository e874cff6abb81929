"""dpo/losses.py: oracles are the papers' equations in plain Python, derivatives by hand, and TRL's own code."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from matryoshka.dpo.losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    nll_term,
    robust_loss,
    simpo_loss,
    smoothed_logistic,
)

MARGINS = [1.5, 1.0, -65.0, 0.0, 12.0]
MARGIN_P = torch.tensor(MARGINS, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cdpo(h: float, beta: float, eps: float) -> float:
    """Rafailov et al. eq. 7 (eps = 0) and Mitchell's eq. 3."""
    return -(1 - eps) * math.log(sigmoid(beta * h)) - eps * math.log(sigmoid(-beta * h))


def robust(h: float, beta: float, eps: float) -> float:
    """Chowdhury et al.: the loss under either label, weighted so that its mean over flipped labels is unbiased."""
    return ((1 - eps) * cdpo(h, beta, 0) - eps * cdpo(-h, beta, 0)) / (1 - 2 * eps)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_by_hand(beta: float, eps: float) -> None:
    """Oracle: each paper's equation, pair by pair, in Python's float64."""
    cases: list[tuple[Tensor, Callable[[float], float]]] = [
        (dpo_loss(MARGIN_P, beta, eps), lambda h: cdpo(h, beta, eps)),
        (robust_loss(MARGIN_P, beta, eps), lambda h: robust(h, beta, eps)),
        (hinge_loss(MARGIN_P, beta), lambda h: max(0.0, 1 - beta * h)),
        (ipo_loss(MARGIN_P, beta), lambda h: (h - 1 / (2 * beta)) ** 2),
    ]
    for got, equation in cases:
        expected = torch.tensor([equation(h) for h in MARGINS], dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_margin_zero_is_exactly_log_two(dtype: torch.dtype, eps: float) -> None:
    """Oracle: ln 2 rounded to the dtype, to the bit, whatever the smoothing; 1 for the hinge."""
    zero = torch.zeros(1, dtype=dtype)
    for loss in (dpo_loss(zero, 0.1, eps), robust_loss(zero, 0.1, eps)):
        assert loss.dtype == dtype
        assert torch.equal(loss, torch.tensor([math.log(2)], dtype=dtype))
    assert hinge_loss(zero, 0.1).item() == 1.0


SLOPES: list[tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = [
    (
        partial(dpo_loss, beta=0.2, label_smoothing=0.1),
        lambda h: -0.2 * 0.9 * sigmoid(-0.2 * h) + 0.2 * 0.1 * sigmoid(0.2 * h),
    ),
    (
        partial(robust_loss, beta=0.2, label_smoothing=0.1),
        lambda h: (-0.2 * 0.9 * sigmoid(-0.2 * h) - 0.2 * 0.1 * sigmoid(0.2 * h)) / 0.8,
    ),
    (partial(hinge_loss, beta=0.2), lambda h: -0.2 if h < 5 else 0.0),
    (partial(ipo_loss, beta=0.2), lambda h: 2 * (h - 1 / (2 * 0.2))),
]


@pytest.mark.parametrize(("loss", "slope"), SLOPES)
def test_gradients_by_hand(loss: Callable[[Tensor], Tensor], slope: Callable[[float], float]) -> None:
    """Oracle: d loss / d h by hand, and torch's finite differences."""
    margin_P = MARGIN_P.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(margin_P).sum(), margin_P)
    expected = torch.tensor([slope(h) for h in MARGINS], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(loss, margin_P)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_slope_at_margin_zero(eps: float) -> None:
    """Oracle: d loss / d h = -beta (1 - 2 eps) / 2 at 0; undiminished, -beta / (2 (1 - 2 eps)), if robust."""
    for loss, expected in ((dpo_loss, -0.3 * (1 - 2 * eps) / 2), (robust_loss, -0.3 / (2 * (1 - 2 * eps)))):
        margin_P = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(margin_P, 0.3, eps).sum(), margin_P)
        assert grad.item() == pytest.approx(expected, rel=1e-14)


def test_swapping_the_sides() -> None:
    """Oracle: loss(h) - loss(-h) = -beta (1 - 2 eps) h, since log s(z) - log s(-z) = z."""
    difference = dpo_loss(MARGIN_P, 0.2, 0.1) - dpo_loss(-MARGIN_P, 0.2, 0.1)
    torch.testing.assert_close(difference, -0.2 * 0.8 * MARGIN_P, rtol=1e-13, atol=1e-15)


def test_smoothing_has_its_minimum_at_the_labels_certainty() -> None:
    """Oracle: by hand; conservative DPO is flat where s(beta h) = 1 - eps, and rises on both sides."""
    certain = math.log(0.9 / 0.1) / 0.2
    margin_P = torch.tensor([certain, certain - 0.5, certain + 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin_P, 0.2, 0.1)
    assert loss[0] < loss[1] and loss[0] < loss[2]
    (grad,) = torch.autograd.grad(loss[0], margin_P)
    assert abs(grad[0].item()) < 1e-16


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_robust_loss_is_unbiased(eps: float) -> None:
    """Oracle: what its paper proves: averaged over labels flipped with probability eps it is DPO without flips."""
    mean = (1 - eps) * robust_loss(MARGIN_P, 0.2, eps) + eps * robust_loss(-MARGIN_P, 0.2, eps)
    torch.testing.assert_close(mean, dpo_loss(MARGIN_P, 0.2), rtol=1e-12, atol=1e-13)


def test_ipo_has_its_minimum_at_half_the_inverse_of_beta() -> None:
    """Oracle: 0 exactly at h = 1 / (2 beta) = 2.5, growing on both sides, 1 / (4 beta^2) at 0."""
    h = torch.tensor([2.0, 2.5, 3.0, 0.0], dtype=torch.float64)
    assert ipo_loss(h, 0.2).tolist() == [0.25, 0.0, 0.25, 6.25]


def test_simpo_by_hand() -> None:
    """Oracle: Meng et al. eq. 6: -log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma).

    gamma is beta times the ratio that is given; the slope in the chosen mean is -beta s(-z).
    """
    chosen = torch.tensor([-10 / 5, -3 / 2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-12 / 4, -8 / 10], dtype=torch.float64)
    loss = simpo_loss(chosen, rejected, 2.0, 0.5)
    z = [2.0 * (-10 / 5 + 12 / 4) - 1.0, 2.0 * (-3 / 2 + 8 / 10) - 1.0]
    expected = torch.tensor([-math.log(sigmoid(value)) for value in z], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), chosen)
    slopes = torch.tensor([-2.0 * sigmoid(-value) for value in z], dtype=torch.float64)
    torch.testing.assert_close(grad, slopes, rtol=1e-12, atol=0)
    smoothed = simpo_loss(chosen, rejected, 2.0, 0.5, 0.1)
    expected = torch.tensor([cdpo(value, 1.0, 0.1) for value in z], dtype=torch.float64)
    torch.testing.assert_close(smoothed, expected, rtol=1e-13, atol=0)


def test_nll_by_hand() -> None:
    """Oracle: Pang et al. eq. 1: minus the coefficient times the mean log-prob."""
    mean_P = torch.tensor([-0.5, -2.25], dtype=torch.float64)
    assert nll_term(mean_P, 4.0).tolist() == [2.0, 9.0]


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_far_from_zero_nothing_overflows(eps: float) -> None:
    """Oracle: the asymptotes eps z and -(1 - eps) z of the logistic loss; gradients stay finite."""
    z = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    loss = smoothed_logistic(z, eps)
    expected = torch.tensor([(1 - eps) * 1e4, (1 - eps) * 200, eps * 200, eps * 1e4])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(grad, torch.tensor([eps - 1, eps - 1, eps, eps]), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_every_loss(bad: float) -> None:
    """Oracle: training refuses a loss that is not finite, so none may come out finite but where its limit is 0.

    log-probs are never +-inf out of the head (they are NaN there); a margin of +inf has the true limit 0 in some.
    """
    margin_P = torch.tensor([bad], dtype=torch.float64)
    losses = [dpo_loss(margin_P, 0.2, 0.1), robust_loss(margin_P, 0.2, 0.1), ipo_loss(margin_P, 0.2)]
    losses += [simpo_loss(margin_P, -margin_P, 2.0, 0.5, 0.1), hinge_loss(margin_P, 0.2)]
    finite = [bool(loss.isfinite()) for loss in losses]
    assert finite == [False] * 4 + [bad == math.inf]


def trl_loss(kind: str, logps: dict[str, Tensor], lengths: Tensor, beta: float, eps: float) -> Tensor:
    """Return what TRL's trainer computes for one pair a row from given log-probs: a model that only hands them out."""
    trl = pytest.importorskip("trl")
    num_pairs, width = len(logps["chosen"]), int(lengths.max())
    mask = (torch.arange(width + 1) > 0) & (torch.arange(width + 1) <= lengths.reshape(-1, 1))
    total = torch.cat((logps["chosen"], logps["rejected"]))
    per_token = torch.zeros(2 * num_pairs, width, dtype=torch.float64)
    per_token += mask[:, 1:] * (total / lengths).unsqueeze(1)
    trainer = MagicMock(
        beta=beta, label_smoothing=eps, loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl",
        precompute_ref_logps=True, ld_alpha=None, aux_loss_enabled=False, use_weighting=False,
    )  # fmt: skip
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics.side_effect = lambda value: value
    trainer.accelerator.gather.side_effect = lambda value: value
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.int64), "completion_mask": mask.long(),
        "ref_chosen_logps": logps["ref_chosen"], "ref_rejected_logps": logps["ref_rejected"],
        "attention_mask": torch.ones(mask.shape, dtype=torch.int64),
    }  # fmt: skip

    def model(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=per_token < 0)

    loss: Tensor = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "sft", "simpo"])
def test_equals_trl(kind: str) -> None:
    """Oracle: the code of TRL's own trainers on the same log-probs, in float64.

    TRL's ipo takes means per token, as our "ipo_mean" does and the paper does not; its sft term is a
    mean over all chosen tokens, so one pair is compared.
    """
    draws = torch.Generator().manual_seed(0)
    count = 1 if kind == "sft" else 6
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    logps = {name: -20 * torch.rand(count, generator=draws, dtype=torch.float64) for name in names}
    lengths = torch.randint(1, 9, (2 * count,), generator=draws)
    n_w, n_l = lengths[:count], lengths[count:]
    ratios = logps["chosen"] - logps["ref_chosen"], logps["rejected"] - logps["ref_rejected"]
    if kind == "simpo":
        trl = pytest.importorskip("trl.experimental.cpo")
        means = logps["chosen"] / n_w, logps["rejected"] / n_l
        stub = SimpleNamespace(
            alpha=0.0, beta=2.0, simpo_gamma=1.1, label_smoothing=0.1, loss_type="simpo",
            accelerator=SimpleNamespace(device="cpu"),
        )  # fmt: skip
        expected = trl.CPOTrainer.cpo_loss(stub, *means)[0].mean()
        ours = simpo_loss(*means, 2.0, 0.55, 0.1)
    else:
        expected = trl_loss(kind, logps, lengths, 0.3, 0.1)
        ours = {
            "sigmoid": dpo_loss(ratios[0] - ratios[1], 0.3),
            "robust": robust_loss(ratios[0] - ratios[1], 0.3, 0.1),
            "hinge": hinge_loss(ratios[0] - ratios[1], 0.3),
            "ipo": ipo_loss(ratios[0] / n_w - ratios[1] / n_l, 0.3),
            "sft": nll_term(logps["chosen"] / n_w, 1.0),
        }[kind]
    torch.testing.assert_close(ours.mean(), expected, rtol=1e-12, atol=0)
