"""The attention of one layer as one record, and the protocol of its implementations.

The record travels with q, k and v: to token trees and padded batches (`attention.py`, `varlen.py`), and to the
sampler's cache (`inference/kv_cache.py`); the memory planner reads the same records from the configuration.

Shapes: B rows, T tokens, N query heads, G key/value heads, H head size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class LayerAttention:
    """The settings of one layer's attention. They travel with q, k and v to every implementation."""

    index: int
    """The layer's place in the model, from 0; a cache finds the layer's keys by it."""
    scale: float
    """Scores are scale * q k."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap); None leaves them as they are."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it on its path; None lets it see its whole path."""
    causal: bool = True
    """A token sees no later token. Trees, caches and the sampler rely on it, so False is refused."""

    def __post_init__(self) -> None:
        if not self.causal:
            raise ValueError(
                f"attention: layer {self.index} sees later tokens; a controller writes from left to right, so every "
                "layer must be causal"
            )
        for name in ("scale", "softcap", "window"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"attention: {name} of layer {self.index} is {value!r}, expected a positive number")


class Attend(Protocol):
    """Softmax attention of one layer, softmax in at least fp32; N is a multiple of G."""

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        """Return the [B, N, T, H] attention output in q's dtype."""
        ...
