"""Preference losses: pure functions of log-prob vectors, one equation each, no model in sight.

All inputs are [P] vectors, one entry per preference pair: natural log-probs summed over the response's tokens, or
differences of such. All outputs are [P] losses; the caller divides by the global number of pairs. Notation: y_w chosen,
y_l rejected, s the logistic function, and the margin h = log(pi(y_w)/ref(y_w)) - log(pi(y_l)/ref(y_l)), which training
drives up and which is 0 where policy and reference agree.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return -(1 - eps) log s(beta h) - eps log s(-beta h), [P].

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; eps > 0 is conservative DPO (Mitchell 2023, eq. 3), which
    stops pushing where s(beta h) = 1 - eps.
    """
    return smoothed_logistic(beta * margin_P, label_smoothing)


def robust_loss(margin_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return (-(1 - eps) log s(beta h) + eps log s(-beta h)) / (1 - 2 eps), [P].

    Its expectation under labels that are flipped with probability eps is the loss without flips; it may be negative.
    Source: Chowdhury et al. 2024 (arXiv 2403.00409), the robust DPO loss. Computed as eps z / (1 - 2 eps) subtracted
    from -log s(z), z = beta h, which is the same.
    """
    logits_P = beta * margin_P
    return -F.logsigmoid(logits_P) - label_smoothing / (1 - 2 * label_smoothing) * logits_P


def hinge_loss(margin_P: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - beta h), [P]. Source: Liu et al. 2023 (RSO, arXiv 2309.06657), after SLiC-HF
    (Zhao et al. 2023, arXiv 2305.10425)."""
    return (1 - beta * margin_P).relu()


def ipo_loss(margin_P: Tensor, beta: float) -> Tensor:
    """Return (h - 1 / (2 beta))^2, [P].

    Loss "ipo" takes h from summed log-probs, as eq. 17 of the paper does (Azar et al. 2023, arXiv 2310.12036). Loss
    "ipo_mean" averages each side's log-ratio over its tokens first: the form that the field's trainers (TRL's
    loss_type "ipo") compute since they asked the authors. Under a sum, long answers reach 1 / (2 beta) by their length.
    """
    return (margin_P - 1 / (2 * beta)).square()


def simpo_loss(
    chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0
) -> Tensor:
    """Return -log s(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma), [P], smoothed as in `dpo_loss`.

    Takes the policy's mean log-probs per scored token; there is no reference. gamma_beta_ratio: gamma / beta.
    Source: Meng et al. 2024 (arXiv 2405.14734) eq. 6.
    """
    return smoothed_logistic(beta * (chosen_mean_P - rejected_mean_P - gamma_beta_ratio), label_smoothing)


def nll_term(chosen_mean_P: Tensor, coefficient: float) -> Tensor:
    """Return -coefficient log pi(y_w) / |y_w|, [P], to be added to a preference loss; keeps y_w's likelihood up.

    Source: Pang et al. 2024 (arXiv 2404.19733) eq. 1, where the coefficient is 1.
    """
    return -coefficient * chosen_mean_P


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return -(1 - eps) log s(z) - eps log s(-z): the label is flipped with probability eps.

    Computed as eps z - log s(z), which is the same and exactly ln 2 at z = 0 for every eps.
    """
    return label_smoothing * logits - F.logsigmoid(logits)
