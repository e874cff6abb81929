"""The optimizers, all of them AdamW, and how trainable parameters are grouped for them.

"adamw" is torch's. "adamw8bit" and "paged_adamw8bit" are bitsandbytes': the two moments in 8 bits a number with a scale
for each block of 256 (Dettmers et al. 2022, arXiv 2110.02861); of parameters with fewer than SMALL numbers in fp32.
Paged moments lie in memory that a GPU moves to the host when it is short of its own; on a CPU there is nowhere to move
them, and the two are the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.core.distributed import is_sharded

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
SMALL, BLOCK = 4096, 256


def moment_bytes(parameter: Tensor, optimizer: str) -> int:
    """Return the size of one of the two moments of a parameter."""
    numbers = parameter.numel()
    if optimizer == "adamw":
        return numbers * parameter.itemsize
    return 4 * numbers if numbers < SMALL else numbers + 4 * -(-numbers // BLOCK)


def make_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """Return the optimizer `name` of OPTIMIZERS over `parameter_groups`.

    Raises ValueError for another name, and for parameters that an 8-bit optimizer cannot take: float64, which it would
    round to fp32, those that are sharded, and where bitsandbytes is missing.
    """
    groups = parameter_groups(parameters, lora_plus_ratio)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if name not in OPTIMIZERS:
        raise ValueError(f"train: optimizer {name!r} is unknown; choose from {list(OPTIMIZERS)}")
    for path, parameter in parameters.items():
        if parameter.dtype == torch.float64 or is_sharded(parameter):
            kind = "sharded" if is_sharded(parameter) else "float64"
            raise ValueError(f"train: optimizer {name!r} cannot take {path}, which is {kind}; choose 'adamw'")
    optim = bitsandbytes(f"optimizer = {name!r}").optim
    if name == "adamw8bit":
        plain: torch.optim.Optimizer = optim.AdamW8bit(groups, min_8bit_size=SMALL, **settings)
        return plain

    class Paged(optim.PagedAdamW8bit):  # type: ignore[misc, name-defined]
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            """Put moments that come from a checkpoint back into pages; bitsandbytes leaves them in the GPU's memory."""
            super().load_state_dict(state_dict, move_to_device)
            for parameter, state in self.state.items():
                for key in ("state1", "state2"):
                    pages = self.get_state_buffer(parameter, dtype=state[key].dtype)
                    if parameter.is_cuda:
                        torch.cuda.synchronize(parameter.device)  # zeros are still being written there
                    state[key] = pages.copy_(state[key])

    paged: torch.optim.Optimizer = Paged(groups, min_8bit_size=SMALL, **settings)
    return paged


def bitsandbytes(setting: str) -> Any:
    """Return the package, which is loaded where `setting` needs it alone. Raises ValueError where it is missing."""
    try:
        import bitsandbytes
    except ImportError as err:
        raise ValueError(f"{setting} needs bitsandbytes: pip install 'matryoshka-pilot[cuda]'") from err
    return bitsandbytes


def parameter_groups(parameters: Mapping[str, nn.Parameter], lora_plus_ratio: float) -> list[dict[str, Any]]:
    """Return optimizer groups with `ratio`, a factor of the learning rate: lora_plus_ratio for LoRA's B.

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
