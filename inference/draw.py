"""Next tokens from logits: greedy or nucleus sampling, each row with its own temperature, top-p and random numbers.

A row's draw depends on its own seed and logits alone, never on what shares its batch. Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.core.records import Sampling


def draw_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (ids_B, logps_B): drawn ids, and their log-probs under the untempered, untruncated softmax.

    uniforms: one number in [0, 1) per row; a sampled row takes the first token at which the cumulative probability
    passes it (tokens in id order; in order of falling probability where top_p < 1 truncates the tail).
    """
    ids_B = logits_BV.argmax(-1)
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0 and sampling.top_p < 1:
            ids_B[row] = _nucleus(logits_BV[row] / sampling.temperature, sampling.top_p, uniforms[row])
    plain = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and sampling.top_p >= 1]
    if plain:
        rows = torch.tensor(plain, device=logits_BV.device)
        temperatures = logits_BV.new_tensor([samplings[row].temperature for row in plain])
        # cumsum of exp(z - max): the normaliser is its last entry, so no separate softmax pass is needed.
        scaled = logits_BV[rows] / temperatures[:, None]
        cumulative = (scaled - scaled.amax(-1, keepdim=True)).exp_().cumsum(-1)
        thresholds = logits_BV.new_tensor([uniforms[row] for row in plain]) * cumulative[:, -1]
        drawn = torch.searchsorted(cumulative, thresholds[:, None], right=True).squeeze(1)
        ids_B[rows] = drawn.clamp_(max=logits_BV.shape[-1] - 1)
    chosen_B = logits_BV.gather(1, ids_B[:, None]).squeeze(1)
    return ids_B, chosen_B - logits_BV.logsumexp(-1)


def _nucleus(logits_V: Tensor, top_p: float, uniform: float) -> Tensor:
    """Return a draw from the smallest set of most probable tokens whose mass reaches top_p. Source: Holtzman 2019."""
    probs_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    before_V = probs_V.cumsum(-1) - probs_V
    kept = probs_V * (before_V < top_p)
    cumulative = kept.cumsum(-1)
    index = torch.searchsorted(cumulative, uniform * cumulative[-1:], right=True)
    return order_V[index.clamp_(max=int((before_V < top_p).sum()) - 1)].squeeze(0)
