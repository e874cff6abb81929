"""Shared by the flash head's two implementations: the state of each row while its tiles of logits are folded.

`head.py` folds in torch and is the specification; `kernels.py` folds in a Triton kernel.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scored(NamedTuple):
    """The results of a pass over the vocabulary for each scored token, in at least fp32.

    direction_SD: d logp / d hidden, in fp32 (Triton: the hidden states' dtype); None where it was not asked for.
    """

    logps_S: Tensor
    logsumexp_S: Tensor
    direction_SD: Tensor | None


def new_state(hidden_SD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the state of each row in a pass over the vocabulary, [3, S], as it is before the first tile.

    Over all tokens but the target: reference, a logit near the highest; rest, the sum of e^(z - reference). Then own,
    the target's logit, which is not a number until its tile comes.
    """
    state_3S = hidden_SD.new_zeros(3, len(hidden_SD), dtype=dtype)
    state_3S[0] = torch.finfo(dtype).min / 2  # above the value in place of a left-out logit, below any logit
    state_3S[2] = math.nan
    return state_3S


def summary(state_3S: Tensor, direction_SD: Tensor | None) -> Scored:
    """Return the results of a finished state. With o the log odds against the target, logp = -log(1 + e^o)."""
    logps = F.logsigmoid(-_odds(state_3S))
    return Scored(logps, state_3S[2] - logps, direction_SD)


def to_direction(
    sums_SD: Tensor, head_VD: Tensor, target_S: Tensor, state_3S: Tensor, softcap: float | None
) -> None:
    """Turn sums of e^(z - reference) slope W over all tokens but the target into the gradient's direction, in place:
    (1 - p) (slope[y] W[y] - sums / rest), where the slopes are 1 without a soft-cap."""
    away = _odds(state_3S).sigmoid().unsqueeze(1)
    # Where all of the rest underflows, so does `away`.
    rest = state_3S[1].clamp_min(torch.finfo(sums_SD.dtype).tiny).unsqueeze(1)
    own = head_VD[target_S.clamp(0, len(head_VD) - 1)]
    slope = 1.0 if softcap is None else (1 - (state_3S[2] / softcap).square()).unsqueeze(1)
    sums_SD.mul_(-away / rest).addcmul_(own, away * slope)


def _odds(state_3S: Tensor) -> Tensor:
    """Return log((1 - p) / p) of the targets; not a number where the target's logit is infinite."""
    reference, rest, own = state_3S
    odds: Tensor = rest.log() + (reference - own) + 0 * own
    return odds
