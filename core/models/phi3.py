"""Phi 3, 3.5 and 4-mini: Llama whose q, k, v are one projection and gate, up another; some rotate a part of each head.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from matryoshka.core.models.activations import recomputed
from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import Block, Config, DecoderModel, Defaults, attend_heads, read_common
from matryoshka.core.models.layer_attention import Attend, LayerAttention
from matryoshka.core.models.norm_rope_swiglu import swiglu

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields({"original_max_position_embeddings": 4096, **data}, "Phi3")
    fields.fixed(hidden_act="silu", resid_pdrop=0.0, embd_pdrop=0.0)
    config = read_common(fields, Defaults(rms_norm_eps=1e-5, max_position_embeddings=4096, partial_rotary=True))
    rotary = config.rotary[0]
    if rotary is not None and rotary.rope_type not in ("default", "longrope"):
        raise ValueError(f"config.json: rope_type {rotary.rope_type!r} is not supported; Phi3 has default and longrope")
    config = config.with_attention([fields.window()] * config.num_hidden_layers)
    # Values are kept as a part of the fused projection, and so all of it is.
    return replace(config, extra_kept=config.queries + config.keys)


class FusedAttention(nn.Module):
    """Grouped-query attention whose queries, keys and values come out of one projection, in that order."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.sizes, self.head_dim = [config.queries, config.keys, config.keys], config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(config.queries, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None, attend: Attend, layer: LayerAttention
    ) -> Tensor:
        parts = self.qkv_proj(x_BTD).split(self.sizes, dim=-1)
        q_BTNH, k_BTGH, v_BTGH = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        out: Tensor = self.o_proj(attend_heads(q_BTNH, k_BTGH, v_BTGH, tables, attend, layer))
        return out


class FusedMLP(nn.Module):
    """SwiGLU whose gate and up come out of one projection, in that order."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(recomputed(swiglu, *self.gate_up_proj(x_BTD).chunk(2, dim=-1)))
        return out


class Model(DecoderModel):
    """A Phi 3 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda config: Block(config, FusedAttention(config), FusedMLP(config)))
