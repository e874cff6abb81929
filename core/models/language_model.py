"""The interface of every controller architecture, so that trainer, sampler and adapters work with a new one unchanged.

`core/models/<model_type>.py` exports `Model`, a `LanguageModel`; `read_config`, which makes its configuration of
config.json's fields; and `LORA_TARGETS`. Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from matryoshka.core.models.layer_attention import Attend, LayerAttention


class ModelConfig(Protocol):
    """The facts that a cache, the head and the memory planner need, sizes under Llama's `config.json` names."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def attention(self) -> tuple[LayerAttention, ...]: ...
    @property
    def final_logit_softcapping(self) -> float | None: ...
    @property
    def extra_kept(self) -> int: ...
    @property
    def extra_recomputed(self) -> int: ...


HEAD_ROWS = 8192  # of a head in low precision, made fp32 at a time


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right, accumulated and returned in at least fp32: on a GPU straight from the tensor cores.

    There it has no gradient by autograd, so where gradients are recorded both sides are converted first.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype == right.dtype != dtype and not torch.is_grad_enabled():
        return torch.mm(left, right, out_dtype=dtype, out=out)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def project_together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Return the output of every layer for the same input; layers with a method `forward_together` may share work."""
    shared = getattr(layers[0], "forward_together", None)
    if shared is not None:
        outputs: tuple[Tensor, ...] | None = shared(x, layers)
        if outputs is not None:
            return outputs
    return tuple(layer(x) for layer in layers)


class LanguageModel(nn.Module):
    """A decoder whose `forward` gives hidden states; callers that need logits apply the head where they need them."""

    config: ModelConfig
    # Set where weights are kept in another dtype, or on another device, than they are computed in.
    compute_dtype: torch.dtype | None = None
    compute_device: torch.device | None = None
    gathered_bytes: int = 0  # memory that gathered weights take for a while, beside the weights that are kept

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self.compute_dtype or self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.compute_device or self.head_weight.device

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that `forward` hands to `run_block`, in order; sharding over ranks cuts the model at them."""
        raise TypeError(f"{type(self).__name__} does not define blocks")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The LORA_TARGETS of the file that defines this model: the last names of its blocks' linear layers."""
        targets: tuple[str, ...] = sys.modules[type(self).__module__].LORA_TARGETS
        return targets

    @property
    def head_weight(self) -> Tensor:
        """The [V, D] output matrix."""
        raise TypeError(f"{type(self).__name__} does not define head_weight")

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Return the [B, T, D] hidden states after the last norm, in the model's dtype.

        positions_BT: int64, default 0..T-1 in every row. attend: which tokens see which, default causal.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the [..., V] logits of hidden states, soft-capped where the model does so, in at least fp32.

        A head in low precision is never fp32 as a whole, whose memory each decoded token would take and fill again.
        """
        head_VD, rows = self.head_weight, hidden_BTD.flatten(0, -2)
        parts = torch.split(head_VD, HEAD_ROWS if head_VD.itemsize < 4 else len(head_VD))
        logits_BTV = torch.cat([product(rows, part.T) for part in parts], dim=-1).view(*hidden_BTD.shape[:-1], -1)
        cap = self.config.final_logit_softcapping
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)
