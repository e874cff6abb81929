"""What the training loop minimises: SFT's cross-entropy and the preference losses, over a token tree's scored tokens.

An objective divides by the global counts it is given, so accumulation over micro-batches adds up to one exact mean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.core.train import Totals
from matryoshka.core.tree import TokenTree
from matryoshka.dpo.losses import dpo_loss, ipo_loss, simpo_loss

LOSSES = ("dpo", "ipo", "simpo")


class SFT:
    """Mean negative log-likelihood of the scored tokens: -sum_S logp / (global number of scored tokens)."""

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -logps_S.sum() / totals.tokens, {}


@dataclass(frozen=True)
class Preference:
    """A preference loss over items (chosen, rejected), divided by the global number of pairs.

    loss: "dpo" (label_smoothing > 0: conservative DPO), "ipo" or "simpo" (no reference; length-normalised).
    nll_coefficient adds that times the chosen response's mean token cross-entropy, which keeps its likelihood up
    (Pang et al. 2024, arXiv 2404.19733, eq. 1; there the coefficient is 1).
    """

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.55
    nll_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"dpo: loss {self.loss!r} is unknown; choose from {list(LOSSES)}")
        if not self.beta > 0:
            raise ValueError(f"dpo: beta {self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo: label_smoothing {self.label_smoothing} must lie in [0, 0.5)")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"

    @property
    def first_loss(self) -> float | None:
        """The mean loss where policy and reference are equal: ln 2 (any smoothing), 1 / (4 beta^2) for IPO."""
        if self.nll_coefficient or self.loss == "simpo":
            return None
        return math.log(2) if self.loss == "dpo" else 1 / (4 * self.beta**2)

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen_P, rejected_P = tree.sum_by_sequence(logps_S).view(-1, 2).unbind(1)
        chosen_length_P, rejected_length_P = tree.sum_by_sequence(torch.ones_like(logps_S)).view(-1, 2).unbind(1)
        if self.loss == "simpo":
            lengths = (chosen_length_P, rejected_length_P)
            losses_P = simpo_loss(
                chosen_P, rejected_P, *lengths, self.beta, self.gamma_beta_ratio, self.label_smoothing
            )
            rewards = self.beta * chosen_P / chosen_length_P, self.beta * rejected_P / rejected_length_P
        else:
            if reference_S is None:
                raise ValueError(f"dpo: loss {self.loss!r} needs reference log-probs and got none")
            ref_chosen_P, ref_rejected_P = tree.sum_by_sequence(reference_S).view(-1, 2).unbind(1)
            four = (chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
            if self.loss == "dpo":
                losses_P = dpo_loss(*four, self.beta, self.label_smoothing)
            else:
                losses_P = ipo_loss(*four, self.beta)
            rewards = self.beta * (chosen_P - ref_chosen_P), self.beta * (rejected_P - ref_rejected_P)
        if self.nll_coefficient:
            losses_P = losses_P - self.nll_coefficient * chosen_P / chosen_length_P
        metrics = {
            "margin": (rewards[0] - rewards[1]).detach().sum(),
            "accuracy": (rewards[0] > rewards[1]).sum(),
            "chosen_reward": rewards[0].detach().sum(),
            "rejected_reward": rewards[1].detach().sum(),
        }
        return losses_P.sum() / totals.items, metrics


