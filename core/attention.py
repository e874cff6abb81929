"""Who attends to whom: the training-side implementations of `Attend`. Cached decoding has its own in `inference`.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head size.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Softmax attention of one layer. Scale 1/sqrt(H); softmax in at least fp32; N is a multiple of G."""

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        """Return the [B, N, T, H] attention output in q's dtype."""
        ...


class Causal:
    """Every token sees itself and what stands before it in its row."""

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BNTH, k_BGTH, v_BGTH, is_causal=True, enable_gqa=True)


class Masked:
    """Token t sees token s where mask_TT[t, s] is true: a token tree laid out in one row (`core/tree.py`)."""

    def __init__(self, mask_TT: Tensor) -> None:
        self.mask_TT = mask_TT

    def __call__(self, layer: int, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BNTH, k_BGTH, v_BGTH, attn_mask=self.mask_TT, enable_gqa=True)
