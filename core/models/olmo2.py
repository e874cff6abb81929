"""OLMo 2: norms after attention and feed-forward layer rather than before, and norms over all queries and all keys."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import (
    MLP,
    SEPARATE_PROJECTIONS,
    Attention,
    Config,
    DecoderModel,
    Defaults,
    RMSNorm,
    both,
    read_common,
)
from matryoshka.core.models.layer_attention import Attend, LayerAttention

LORA_TARGETS = SEPARATE_PROJECTIONS
OFFSET = 0.0  # the weight multiplies before the norm's result is rounded


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "OLMo2")
    fields.fixed(hidden_act="silu")
    config = read_common(fields, Defaults(rms_norm_eps=1e-5, max_position_embeddings=2048))
    bias, hidden = fields.flag("attention_bias"), config.hidden_size
    # The norms keep their inputs: queries, keys, and the outputs of attention and feed-forward layer. No norm's output
    # is kept: nothing but a sum reads it.
    extra = config.queries + config.keys + 2 * hidden
    return replace(config, attention_bias=bias, extra_kept=extra, extra_recomputed=-2 * hidden)


class Block(nn.Module):
    """Attention and feed-forward layer, the output of each normed and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        eps, bias = config.rms_norm_eps, config.attention_bias
        norms = RMSNorm(config.queries, eps, OFFSET), RMSNorm(config.keys, eps, OFFSET)
        self.self_attn = Attention(config, qkv_bias=bias, o_bias=bias, norms=norms)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, OFFSET)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps, OFFSET)

    def forward(
        self, x_BTD: Tensor, cos_BTH: Tensor | None, sin_BTH: Tensor | None, attend: Attend, layer: LayerAttention
    ) -> Tensor:
        attended = self.self_attn(x_BTD, both(cos_BTH, sin_BTH), attend, layer)
        x_BTD = x_BTD + self.post_attention_layernorm(attended)
        out: Tensor = x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD))
        return out


class Model(DecoderModel):
    """An OLMo 2 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, Block, RMSNorm(config.hidden_size, config.rms_norm_eps, OFFSET))
