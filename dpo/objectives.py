"""The objectives of training: SFT's cross-entropy and the preference losses, over a token tree's scored tokens.

An objective divides by the global counts it is given, so accumulation over micro-batches adds up to one exact mean.
Policy and reference are subtracted token by token before anything is summed: where they agree, the margin is exactly 0
in any order of summation.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.core.models.tree import TokenTree
from matryoshka.core.training.train import Totals
from matryoshka.dpo.losses import dpo_loss, hinge_loss, ipo_loss, nll_term, robust_loss, simpo_loss

SMOOTHED = ("dpo", "robust", "simpo")
LOSSES = (*SMOOTHED, "ipo", "ipo_mean", "hinge")


class SFT:
    """Mean negative log-likelihood of the scored tokens: -sum_S logp / (global number of scored tokens)."""

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -logps_S.sum() / totals.tokens, {}


class Pairs(NamedTuple):
    """The result of an objective for each preference pair, [P]: losses carry the gradient, the rest is for reading."""

    losses_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor
    chosen_logps_P: Tensor
    """Log-prob of the chosen response: where it falls beside a growing margin, training unlearns both responses."""
    rejected_logps_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor

    @property
    def margin_P(self) -> Tensor:
        return self.chosen_reward_P - self.rejected_reward_P


@dataclass(frozen=True)
class Preference:
    """A preference loss over items (chosen, rejected), divided by the global number of pairs.

    `dpo/losses.py` has the equations. Raises ValueError for an unknown loss, a number out of range, or smoothing where
    the loss has none.
    """

    loss: str = "dpo"
    """The loss: "dpo"; "robust" (unbiased under flipped labels); "simpo" (no reference, length-normalised); "ipo" (the
    paper's sum over tokens); "ipo_mean" (the mean over tokens, as TRL computes it); "hinge"."""
    beta: float = 0.1
    """Strength of the pull towards the reference; the paper's .1."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose label is wrong, below .5; above 0, "dpo" is conservative DPO."""
    gamma_beta_ratio: float = 0.55
    """Target margin of "simpo" over beta; other losses have none."""
    nll_coefficient: float = 0.0
    """Weight of the chosen response's mean token cross-entropy, which is added to the loss (0: nothing is added)."""
    dropout: str = field(default="off", repr=False)
    """LoRA's dropout in preference training: "off", so that policy and reference differ by training alone, or "policy",
    which drops inputs of the policy's adapter; the first loss is then not checked. The reference never has any."""

    def __post_init__(self) -> None:
        if self.dropout not in ("off", "policy"):
            raise ValueError(f"dpo: dropout {self.dropout!r} is unknown; choose 'off' or 'policy'")
        if self.loss not in LOSSES:
            raise ValueError(f"dpo: loss {self.loss!r} is unknown; choose from {list(LOSSES)}")
        if not self.beta > 0:
            raise ValueError(f"dpo: beta {self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo: label_smoothing {self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(
                f"dpo: loss {self.loss!r} has no label_smoothing, but it is {self.label_smoothing}; "
                f"set it to 0 or choose a loss from {list(SMOOTHED)}"
            )
        if not self.nll_coefficient >= 0:
            raise ValueError(f"dpo: nll_coefficient {self.nll_coefficient} must not be below 0")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"

    @property
    def first_loss(self) -> float | None:
        """The mean loss where policy and reference are equal, if all pairs have the same: ln 2 for any smoothing."""
        if self.nll_coefficient or self.loss == "simpo" or self.dropout == "policy":
            return None
        if self.loss in ("ipo", "ipo_mean"):
            return 1 / (4 * self.beta**2)
        return 1.0 if self.loss == "hinge" else math.log(2)

    def pairs(self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree) -> Pairs:
        """Return the losses and rewards of the tree's pairs from the log-probs of its scored tokens.

        Rewards are beta times the log-ratio to the reference (ipo_mean: its mean over the tokens; simpo: the mean
        log-prob). Raises ValueError where the loss needs a reference and there is none.
        """
        if not self.needs_reference:
            reference_S = None
        elif reference_S is None:
            raise ValueError(f"dpo: loss {self.loss!r} needs reference log-probs and got none")

        def sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
            chosen_P, rejected_P = tree.sum_by_sequence(values_S).view(-1, 2).unbind(1)
            return chosen_P, rejected_P

        chosen_length_P, rejected_length_P = sides(torch.ones_like(logps_S))
        chosen_P, rejected_P = sides(logps_S if reference_S is None else logps_S - reference_S)
        if self.loss in ("simpo", "ipo_mean"):
            chosen_P, rejected_P = chosen_P / chosen_length_P, rejected_P / rejected_length_P
        if self.loss == "simpo":
            losses_P = simpo_loss(chosen_P, rejected_P, self.beta, self.gamma_beta_ratio, self.label_smoothing)
        elif self.loss == "robust":
            losses_P = robust_loss(chosen_P - rejected_P, self.beta, self.label_smoothing)
        elif self.loss in ("ipo", "ipo_mean"):
            losses_P = ipo_loss(chosen_P - rejected_P, self.beta)
        elif self.loss == "hinge":
            losses_P = hinge_loss(chosen_P - rejected_P, self.beta)
        else:
            losses_P = dpo_loss(chosen_P - rejected_P, self.beta, self.label_smoothing)
        if self.nll_coefficient:
            losses_P = losses_P + nll_term(sides(logps_S)[0] / chosen_length_P, self.nll_coefficient)
        chosen_logps_P, rejected_logps_P = sides(logps_S.detach())
        return Pairs(
            losses_P,
            self.beta * chosen_P.detach(),
            self.beta * rejected_P.detach(),
            chosen_logps_P,
            rejected_logps_P,
            chosen_length_P,
            rejected_length_P,
        )

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self.pairs(logps_S, reference_S, tree)
        metrics = {
            "margin": pairs.margin_P.sum(),
            "accuracy": (pairs.margin_P > 0).sum(),
            "chosen_reward": pairs.chosen_reward_P.sum(),
            "rejected_reward": pairs.rejected_reward_P.sum(),
            "chosen_logps": pairs.chosen_logps_P.sum(),
            "rejected_logps": pairs.rejected_logps_P.sum(),
            "chosen_length": pairs.chosen_length_P.sum(),
            "rejected_length": pairs.rejected_length_P.sum(),
        }
        return pairs.losses_P.sum() / totals.items, metrics
