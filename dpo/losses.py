"""Preference losses: pure functions of log-prob vectors, one equation each, no model in sight.

All inputs are [P] vectors, one entry per preference pair: natural log-probs summed over the response's tokens. All
outputs are [P] losses; the caller divides by the global number of pairs. `margin` is what training drives up.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_margin(
    policy_chosen_P: Tensor, policy_rejected_P: Tensor, reference_chosen_P: Tensor, reference_rejected_P: Tensor
) -> Tensor:
    """Return h = log(pi(y_w)/ref(y_w)) - log(pi(y_l)/ref(y_l)), [P]; 0 where policy and reference agree."""
    return (policy_chosen_P - reference_chosen_P) - (policy_rejected_P - reference_rejected_P)


def dpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), [P].

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; eps > 0 is conservative DPO (Mitchell 2023, eq. 3).
    """
    logits_P = beta * dpo_margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return smoothed_logistic(logits_P, label_smoothing)


def ipo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
) -> Tensor:
    """Return (h - 1 / (2 beta))^2, [P], on summed log-probs. Source: Azar et al. 2023 (arXiv 2310.12036) eq. 17."""
    margin_P = dpo_margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return (margin_P - 1 / (2 * beta)).square()


def simpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    chosen_length_P: Tensor,
    rejected_length_P: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the logistic loss of beta (mean logp_w - mean logp_l - gamma/beta), [P]; no reference.

    Lengths are numbers of scored tokens. Source: Meng et al. 2024 (arXiv 2405.14734) eq. 6.
    """
    margin_P = policy_chosen_P / chosen_length_P - policy_rejected_P / rejected_length_P
    return smoothed_logistic(beta * (margin_P - gamma_beta_ratio), label_smoothing)


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return -(1 - eps) log sigmoid(z) - eps log sigmoid(-z): the label is flipped with probability eps.

    Computed as eps z - log sigmoid(z), which is the same and exactly ln 2 at z = 0 for every eps.
    """
    return label_smoothing * logits - F.logsigmoid(logits)
