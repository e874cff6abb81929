"""QLoRA: LoRA layers over a base in four bits (`lora/nf4.py`), made dense for each product and dropped after it.

The packed bytes are the layer's parameter `weight`; the scales are buffers beside it, small (3% of the bytes) and whole
on every rank however the bytes are sharded, and never part of a state dict. Head, embeddings and norms stay as they
are. Not used: products that read packed weights directly. They round otherwise than a product with the dense weight,
and policy and reference must compute the same bits.
"""

import torch
from torch import Tensor, nn

from matryoshka.lora.linear import LoraLinear, replace_layers
from matryoshka.lora.nf4 import NF4, quantize


class QuantizedLinear(LoraLinear):
    """A LoraLinear whose base is NF4 bytes: `weight` is uint8 [O, I / 2]. It computes in its input's dtype."""

    def __init__(self, base: nn.Linear) -> None:
        """Quantise `base` at once, or where it is on the meta device when `pack` is called with its weight."""
        super().__init__(base)
        self._dtype = base.weight.dtype
        for name in NF4._fields:
            self.register_buffer(f"nf4_{name}", None, persistent=False)
        outputs, inputs = base.weight.shape
        if base.weight.is_meta:
            packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="meta")
        else:
            packed = self.pack(base.weight.detach(), self._dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def pack(self, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bytes of `weight_OI` for the parameter and keep the scales; dtype: that of the computation.

        `core/models/weights.py` calls it with each whole tensor that it reads. Raises ValueError for an odd I.
        """
        packed, scales = quantize(weight_OI)
        self._dtype = dtype
        for name, tensor in scales._asdict().items():
            setattr(self, f"nf4_{name}", tensor)
        return packed

    @property
    def scales(self) -> NF4:
        return NF4(*(getattr(self, f"nf4_{name}") for name in NF4._fields))

    @property
    def shape(self) -> torch.Size:
        outputs, half = self.weight.shape
        return torch.Size((outputs, 2 * half))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype


def quantize_linears(model: nn.Module) -> None:
    """Make every linear layer but the head a QuantizedLinear; on the meta device `load_weights` fills them."""
    replace_layers(model, nn.Linear, QuantizedLinear)
