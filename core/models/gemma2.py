"""Gemma 2: soft-capped scores and logits, windows on every other layer, scaled embeddings, GeGLU, four norms."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from matryoshka.core.models.activations import recomputed
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
    sliding_layers,
)
from matryoshka.core.models.layer_attention import Attend, LayerAttention
from matryoshka.core.models.norm_rope_swiglu import geglu

LORA_TARGETS = SEPARATE_PROJECTIONS
OFFSET = 1.0  # the weights of Gemma's norms are stored less 1


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "Gemma2")
    fields.fixed(hidden_act="gelu_pytorch_tanh", use_bidirectional_attention=False)
    config = read_common(fields, Defaults(max_position_embeddings=8192, tie_word_embeddings=True, head_dim=256))
    sliding = sliding_layers(fields, config.num_hidden_layers, lambda index: index % 2 == 0)
    caps = fields.softcap("final_logit_softcapping", 30.0), fields.softcap("attn_logit_softcapping", 50.0)
    return gemma_config(fields, config, sliding, *caps)


def gemma_config(
    fields: Fields, config: Config, sliding: list[bool], final: float | None, scores: float | None
) -> Config:
    """Return the configuration with the settings of Gemma 2 and 3. final, scores: soft-caps of logits and scores."""
    fields.fixed(hidden_activation="gelu_pytorch_tanh")
    window = fields.window(4096)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    config = config.with_attention([window if slides else None for slides in sliding], scale, scores)
    return replace(
        config,
        attention_bias=fields.flag("attention_bias"),
        embedding_scale=config.hidden_size**0.5,
        final_logit_softcapping=final,
        extra_kept=2 * config.hidden_size,  # the inputs of the norms after attention and MLP
    )


class SandwichBlock(nn.Module):
    """Attention and feed-forward layer, each between two norms, the result added to its input."""

    def __init__(self, config: Config, norms: tuple[RMSNorm, RMSNorm] | None = None) -> None:
        super().__init__()
        size, eps, bias = config.hidden_size, config.rms_norm_eps, config.attention_bias
        self.self_attn = Attention(config, qkv_bias=bias, o_bias=bias, norms=norms)
        self.mlp = MLP(config, gated=geglu)
        self.input_layernorm = RMSNorm(size, eps, OFFSET)
        self.post_attention_layernorm = RMSNorm(size, eps, OFFSET)
        self.pre_feedforward_layernorm = RMSNorm(size, eps, OFFSET)
        self.post_feedforward_layernorm = RMSNorm(size, eps, OFFSET)

    def forward(
        self, x_BTD: Tensor, cos_BTH: Tensor | None, sin_BTH: Tensor | None, attend: Attend, layer: LayerAttention
    ) -> Tensor:
        tables = both(cos_BTH, sin_BTH)
        attended = self.self_attn(recomputed(self.input_layernorm, x_BTD), tables, attend, layer)
        x_BTD = x_BTD + self.post_attention_layernorm(attended)
        fed = self.mlp(recomputed(self.pre_feedforward_layernorm, x_BTD))
        out: Tensor = x_BTD + self.post_feedforward_layernorm(fed)
        return out


class Model(DecoderModel):
    """A Gemma 2 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, SandwichBlock, RMSNorm(config.hidden_size, config.rms_norm_eps, OFFSET))
