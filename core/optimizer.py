"""How trainable parameters are grouped for the optimizer."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(parameters: Mapping[str, nn.Parameter], lora_plus_ratio: float) -> list[dict[str, Any]]:
    """Return optimizer groups with `ratio`, what the learning rate is multiplied by: lora_plus_ratio for LoRA's B.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B starts at zero and learns best at a higher rate than A. The rest
    comes first; ratio 1 gives one group. Raises ValueError where there is a ratio but no B.
    """
    if lora_plus_ratio == 1:
        return [{"params": list(parameters.values()), "ratio": 1.0}]
    ups = {name for name in parameters if ".lora_B." in name}
    if not ups:
        raise ValueError(
            f"train: lora_plus_ratio {lora_plus_ratio} wants LoRA's B matrices among the trained parameters, there are "
            "none; train an adapter, or leave the ratio at 1"
        )
    rest = [parameter for name, parameter in parameters.items() if name not in ups]
    return [
        {"params": rest, "ratio": 1.0},
        {"params": [parameters[name] for name in parameters if name in ups], "ratio": lora_plus_ratio},
    ]
