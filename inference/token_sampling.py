"""Next tokens from logits: greedy or nucleus sampling, each row with its own temperature, top-p and random numbers.

A row's draw depends on its own seed and logits alone, not on the rest of its batch. Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.core.records import Sampling


def draw_tokens(
    logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], unknown_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (ids_B, logps_B): drawn ids, and their log-probs under the untempered, untruncated softmax.

    uniforms: one number in [0, 1) per row; a sampled row takes the first token at which the cumulative probability
    passes it (tokens in id order; in order of falling probability where top_p < 1 truncates the tail). unknown_V: true
    at ids that are never drawn (rows of a padded embedding beyond the vocabulary); they stay in the softmax.
    A row with NaN or infinity among its logits gets an arbitrary id and the log-prob NaN; other rows do not notice.
    """
    normalizer_B = logits_BV.logsumexp(-1)
    finite_B = normalizer_B.isfinite()
    if not finite_B.all():
        # An index drawn from NaN would lie outside the vocabulary, which on CUDA ends the process.
        logits_BV = logits_BV.masked_fill(~finite_B[:, None], 0.0)
        normalizer_B = normalizer_B.masked_fill(~finite_B, float("nan"))
    open_BV = logits_BV if unknown_V is None else logits_BV.masked_fill(unknown_V, float("-inf"))
    highest_B, ids_B = open_BV.max(-1)
    # Logits are shifted so that the highest is 0: divided by a tiny temperature the others go to -inf, and the draw to
    # the greedy token. The temperature itself must not become 0 in the logits' dtype, or 0 / 0 would be NaN.
    least = torch.finfo(logits_BV.dtype).tiny
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0 and sampling.top_p < 1:
            scaled_V = (open_BV[row] - highest_B[row]) / max(sampling.temperature, least)
            ids_B[row] = _nucleus(scaled_V, sampling.top_p, uniforms[row])
    plain = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and sampling.top_p >= 1]
    if plain:
        rows = torch.tensor(plain, device=logits_BV.device)
        temperatures = logits_BV.new_tensor([max(samplings[row].temperature, least) for row in plain])
        # cumsum of exp(z - max): the normaliser is its last entry, so no separate softmax pass is needed.
        scaled = (open_BV[rows] - highest_B[rows, None]) / temperatures[:, None]
        uniform_B1 = logits_BV.new_tensor([uniforms[row] for row in plain])[:, None]
        ids_B[rows] = _passing(scaled.exp_().cumsum(-1), uniform_B1).squeeze(1)
    chosen_B = logits_BV.gather(1, ids_B[:, None]).squeeze(1)
    return ids_B, chosen_B - normalizer_B


def _nucleus(logits_V: Tensor, top_p: float, uniform: float) -> Tensor:
    """Return a draw from the smallest set of most probable tokens whose mass reaches top_p. Source: Holtzman 2019."""
    probs_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    before_V = probs_V.cumsum(-1) - probs_V
    kept = probs_V * (before_V < top_p)
    return order_V[_passing(kept.cumsum(-1), kept.new_tensor([uniform]))].squeeze(0)


def _passing(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose cumulative weight passes uniform x total; never one of weight 0."""
    total = cumulative[..., -1:]
    # A uniform near 1 rounds to 1 in fp32; held below the total, the threshold is still passed by a real entry.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)
