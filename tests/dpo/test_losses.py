"""dpo/losses.py: oracles are the papers' equations in plain Python, and derivatives by hand against autograd."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from matryoshka.dpo.losses import dpo_loss, dpo_margin, ipo_loss, simpo_loss, smoothed_logistic

# log pi(y_w), log pi(y_l), log ref(y_w), log ref(y_l) of four pairs; the last has a margin of exactly 0.
FOUR = (
    torch.tensor([-10.0, -3.5, -80.0, -2.0], dtype=torch.float64),
    torch.tensor([-12.0, -3.0, -20.0, -7.0], dtype=torch.float64),
    torch.tensor([-11.0, -4.0, -90.0, -1.0], dtype=torch.float64),
    torch.tensor([-11.5, -2.5, -95.0, -6.0], dtype=torch.float64),
)
MARGINS = [1.5, 1.0, -65.0, 0.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_margins_by_hand() -> None:
    """Oracle: (-10 + 11) - (-12 + 11.5) = 1.5 and so on."""
    assert dpo_margin(*FOUR).tolist() == MARGINS


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_by_hand(beta: float, eps: float) -> None:
    """Oracle: Rafailov et al. eq. 7 (eps = 0) and Mitchell's eq. 3, pair by pair."""
    expected = [
        -(1 - eps) * math.log(sigmoid(beta * h)) - eps * math.log(sigmoid(-beta * h)) for h in MARGINS
    ]
    got = dpo_loss(*FOUR, beta, eps)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_margin_zero_is_exactly_log_two(dtype: torch.dtype, eps: float) -> None:
    """Oracle: ln 2 rounded to the dtype, to the bit, whatever the smoothing."""
    logps = torch.tensor([-123.456], dtype=dtype)
    loss = dpo_loss(logps, logps, logps, logps, 0.1, eps)
    assert loss.dtype == dtype
    assert torch.equal(loss, torch.tensor([math.log(2)], dtype=dtype))


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_slope_at_margin_zero(eps: float) -> None:
    """Oracle: d loss / d margin = -beta (1 - 2 eps) / 2 at 0, and the opposite for the rejected side."""
    chosen, rejected, reference = (torch.tensor([-5.0], dtype=torch.float64, requires_grad=True) for _ in range(3))
    loss = dpo_loss(chosen, rejected, reference, reference, 0.3, eps)
    grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert grads[0].item() == pytest.approx(-0.3 * (1 - 2 * eps) / 2, rel=1e-14)
    assert grads[1].item() == pytest.approx(0.3 * (1 - 2 * eps) / 2, rel=1e-14)


def test_swapping_the_sides_flips_the_margin() -> None:
    """Oracle: antisymmetry; and loss(h) - loss(-h) = -beta (1 - 2 eps) h, since log s(z) - log s(-z) = z."""
    swapped = (FOUR[1], FOUR[0], FOUR[3], FOUR[2])
    assert torch.equal(dpo_margin(*swapped), -dpo_margin(*FOUR))
    difference = dpo_loss(*FOUR, 0.2, 0.1) - dpo_loss(*swapped, 0.2, 0.1)
    torch.testing.assert_close(difference, -0.2 * 0.8 * dpo_margin(*FOUR), rtol=1e-13, atol=1e-15)


def dpo_slope(h: float) -> float:
    return -0.2 * (1 - 0.1) * sigmoid(-0.2 * h) + 0.2 * 0.1 * sigmoid(0.2 * h)


def ipo_slope(h: float) -> float:
    return 2 * (h - 1 / (2 * 0.2))


@pytest.mark.parametrize(
    ("loss", "slope"),
    [(partial(dpo_loss, beta=0.2, label_smoothing=0.1), dpo_slope), (partial(ipo_loss, beta=0.2), ipo_slope)],
)
def test_gradients_by_hand(loss: Callable[..., Tensor], slope: Callable[[float], float]) -> None:
    """Oracle: d loss / d h by hand; h has derivative 1, -1, -1, 1 in its four log-probs. Also gradcheck."""
    four = [logps.clone().requires_grad_() for logps in FOUR]
    grads = torch.autograd.grad(loss(*four).sum(), four)
    expected = torch.tensor([slope(h) for h in MARGINS], dtype=torch.float64)
    for grad, sign in zip(grads, (1, -1, -1, 1), strict=True):
        torch.testing.assert_close(grad, sign * expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(loss, four)


def test_ipo_by_hand_and_its_minimum() -> None:
    """Oracle: (h - 1 / (2 beta))^2, 0 exactly at h = 1 / (2 beta), growing on both sides, 1 / (4 beta^2) at 0."""
    expected = torch.tensor([(h - 2.5) ** 2 for h in MARGINS], dtype=torch.float64)
    torch.testing.assert_close(ipo_loss(*FOUR, 0.2), expected, rtol=1e-14, atol=0)
    zero = torch.zeros(3, dtype=torch.float64)
    h = torch.tensor([2.0, 2.5, 3.0], dtype=torch.float64)
    assert ipo_loss(h, zero, zero, zero, 0.2).tolist() == [0.25, 0.0, 0.25]
    assert ipo_loss(zero, zero, zero, zero, 0.2).tolist() == [6.25] * 3


def test_simpo_by_hand() -> None:
    """Oracle: Meng et al. eq. 6: -log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma).

    gamma is beta times the ratio that is given; the slope in the chosen log-prob is -beta / |y_w| s(-z).
    """
    chosen = torch.tensor([-10.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-12.0, -8.0], dtype=torch.float64)
    chosen_length, rejected_length = (torch.tensor(n, dtype=torch.float64) for n in ([5.0, 2.0], [4.0, 10.0]))
    loss = simpo_loss(chosen, rejected, chosen_length, rejected_length, 2.0, 0.5)
    z = [2.0 * (-10 / 5 + 12 / 4) - 1.0, 2.0 * (-3 / 2 + 8 / 10) - 1.0]
    expected = torch.tensor([-math.log(sigmoid(value)) for value in z], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), chosen)
    slopes = torch.tensor([-2.0 / 5 * sigmoid(-z[0]), -2.0 / 2 * sigmoid(-z[1])], dtype=torch.float64)
    torch.testing.assert_close(grad, slopes, rtol=1e-12, atol=0)
    smoothed = simpo_loss(chosen, rejected, chosen_length, rejected_length, 2.0, 0.5, 0.1)
    expected = torch.tensor(
        [-0.9 * math.log(sigmoid(v)) - 0.1 * math.log(sigmoid(-v)) for v in z], dtype=torch.float64
    )
    torch.testing.assert_close(smoothed, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_far_from_zero_nothing_overflows(eps: float) -> None:
    """Oracle: the asymptotes eps z and -(1 - eps) z of the logistic loss; gradients stay finite."""
    z = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    loss = smoothed_logistic(z, eps)
    expected = torch.tensor([(1 - eps) * 1e4, (1 - eps) * 200, eps * 200, eps * 1e4])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(grad, torch.tensor([eps - 1, eps - 1, eps, eps]), rtol=1e-6, atol=1e-30)
