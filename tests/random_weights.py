"""Random weights that matter: without them norms would be 1, adapters the identity, and faults in them invisible."""

from collections.abc import Sequence

import torch
from torch import nn

from matryoshka.lora.linear import layers_with

PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


def randomise(
    model: nn.Module, scale: float, norm_scale: float = 0.1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Give every parameter normal numbers of deviation `scale`, norms numbers around 1 of deviation `norm_scale`.

    dtype: of the draws; the same seed gives other numbers in another one.
    """
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draws, dtype=dtype)
            weight.copy_(1 + norm_scale * noise if name.endswith("norm.weight") else scale * noise)


def randomise_adapter(
    model: nn.Module, name: str, scale: float, seed: int = 0, parts: Sequence[str] = PARTS,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Give these parts of adapter `name` normal numbers of deviation `scale` in every layer; dtype: of the draws."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_with(model, name):
            for part, parameters in layer.parts(name).items():
                if part in parts:
                    weight = parameters[name]
                    weight.copy_(scale * torch.randn(weight.shape, generator=draws, dtype=dtype))
