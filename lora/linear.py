"""LoRA layers by hand: y = x W^T + b + (alpha / r) * dropout(x) A^T B^T, W and b frozen.

A layer holds several named adapters of which at most one is active: "policy" is trained, "reference" is the frozen
policy of the round before, none is the base model. The backward pass is written out: the frozen weight gets no
gradient, and x A^T is recomputed rather than kept. Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3.

Shapes: M rows (all leading dimensions), I inputs, O outputs, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraConfig:
    """rank r, alpha (scale = alpha / r), dropout on the adapter's input, and which projections carry an adapter."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora: rank {self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora: dropout {self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraFunction(torch.autograd.Function):
    """x W^T + scale * (z A^T) B^T, with z = dropout(x) (z is x itself where dropout is 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(z, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        return F.linear(x, weight_OI).add_(F.linear(F.linear(z, a_RI), b_OR), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_MO, z_MI = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1])
        grad_MR = (grad_MO @ b_OR).mul_(ctx.scale)
        grad_x = (grad @ weight_OI) if ctx.needs_input_grad[0] else None
        grad_z = (grad_MR @ a_RI).view(z.shape) if ctx.needs_input_grad[1] else None
        grad_a = grad_MR.T @ z_MI
        grad_b = (grad_MO.T @ (z_MI @ a_RI.T)).mul_(ctx.scale)
        return grad_x, grad_z, None, grad_a, grad_b, None


class LoraLinear(nn.Module):
    """A frozen linear layer (`weight`, `bias`: the checkpoint's names) with named adapters beside it.

    Adapter matrices are fp32 (float64 beside a float64 base) and cast to the input's dtype in the product.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}
        self.active: str | None = None
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None or self.active not in self.configs:
            return F.linear(x, self.weight, self.bias)
        config = self.configs[self.active]
        z = F.dropout(x, config.dropout) if self.training and config.dropout else x
        a_RI, b_OR = self.lora_A[self.active].to(x.dtype), self.lora_B[self.active].to(x.dtype)
        y: Tensor = LoraFunction.apply(x, z, self.weight, a_RI, b_OR, config.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def delta(self, name: str) -> Tensor:
        """Return scale * B A of adapter `name`, [O, I], in the adapter's dtype."""
        product: Tensor = self.lora_B[name] @ self.lora_A[name]
        return self.configs[name].scale * product


def add_adapter(model: nn.Module, name: str, config: LoraConfig, seed: int) -> None:
    """Give every linear layer whose last name is in `config.targets` an adapter `name`, trainable, identity at first.

    A ~ U(-1/sqrt(I), 1/sqrt(I)) (Kaiming-uniform with a = sqrt 5, as in the LoRA release), B = 0.
    Raises ValueError when a target matches no linear layer, or when `name` exists already or holds a dot.
    """
    # The head is applied through its weight alone (`Model.head_weight`): an adapter there would never be computed.
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | LoraLinear) and not path.endswith("lm_head")
    }
    names = sorted({path.rpartition(".")[2] for path in linears})
    for target in config.targets:
        if target not in names:
            raise ValueError(f"lora: target {target!r} matches no linear layer; choose from {names}")
    if "." in name or any(name in module.configs for module in _lora_layers(model)):
        raise ValueError(f"lora: adapter {name!r} exists already or has a dot in its name; choose another name")
    now_active = _active(model)
    draws = torch.Generator().manual_seed(seed)
    for path, module in linears.items():
        parent_path, _, leaf = path.rpartition(".")
        if leaf not in config.targets:
            continue
        if isinstance(module, nn.Linear):
            module = LoraLinear(module)
            module.active = now_active
            setattr(model.get_submodule(parent_path), leaf, module)
        outputs, inputs = module.weight.shape
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(inputs)
        a_RI = (torch.rand(config.rank, inputs, generator=draws, dtype=torch.float64) * 2 - 1) * bound
        module.lora_A[name] = nn.Parameter(a_RI.to(module.weight.device, dtype))
        module.lora_B[name] = nn.Parameter(torch.zeros(outputs, config.rank, device=module.weight.device, dtype=dtype))
        module.configs[name] = config


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget adapter `name`. Raises ValueError when the model has no such adapter."""
    for module in layers_with(model, name):
        del module.lora_A[name], module.lora_B[name], module.configs[name]
        if module.active == name:
            module.active = None


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Make `target` a frozen copy of adapter `source` (the reference policy of the round that begins)."""
    for module in layers_with(model, source):
        module.lora_A[target] = nn.Parameter(module.lora_A[source].detach().clone(), requires_grad=False)
        module.lora_B[target] = nn.Parameter(module.lora_B[source].detach().clone(), requires_grad=False)
        module.configs[target] = module.configs[source]


def layers_with(model: nn.Module, name: str) -> list[LoraLinear]:
    """Return the layers that hold adapter `name`, in module order. Raises ValueError when there are none."""
    layers = _lora_layers(model)
    if found := [m for m in layers if name in m.configs]:
        return found
    known = sorted({key for m in layers for key in m.configs})
    raise ValueError(f"lora: the model has no adapter {name!r}; it has {known}")


def set_active(model: nn.Module, name: str | None) -> None:
    """Compute with adapter `name` from now on; None is the base model. Raises ValueError for an unknown name."""
    if name is not None:
        layers_with(model, name)
    for module in _lora_layers(model):
        module.active = name


@contextmanager
def active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with adapter `name` inside the block, with what was active before after it."""
    before = _active(model)
    set_active(model, name)
    try:
        yield
    finally:
        set_active(model, before)


def trainable_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter `name` by their full names; every other parameter is frozen by the call."""
    layers_with(model, name)
    chosen = {path: p for path, p in model.named_parameters() if path.endswith((f"lora_A.{name}", f"lora_B.{name}"))}
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in chosen)
    return chosen


def target_names(model: nn.Module, name: str) -> Sequence[str]:
    """Return the sorted last names of the layers that carry adapter `name`."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLinear)]
    return sorted({path.rpartition(".")[2] for path, m in layers if name in m.configs})


def _lora_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _active(model: nn.Module) -> str | None:
    return next((module.active for module in _lora_layers(model)), None)
