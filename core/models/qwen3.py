"""Qwen 3: Llama with a norm over every head of queries and keys, heads of a size of their own, and Qwen 2's windows."""

from dataclasses import replace
from typing import Any

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import (
    MLP,
    SEPARATE_PROJECTIONS,
    Attention,
    Block,
    Config,
    DecoderModel,
    Defaults,
    RMSNorm,
    read_common,
)
from matryoshka.core.models.gguf_layout import HEAD_NORMS, LLAMA_LAYER, GgufLayout
from matryoshka.core.models.qwen2 import qwen_windows

LORA_TARGETS = SEPARATE_PROJECTIONS
GGUF = GgufLayout(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA_LAYER | HEAD_NORMS,
    settings=lambda metadata: {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
)


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "Qwen3")
    fields.fixed(hidden_act="silu")
    config = qwen_windows(fields, read_common(fields, Defaults(head_dim=128)))
    # The norms keep their inputs: queries and keys as they were projected.
    return replace(config, attention_bias=fields.flag("attention_bias"), extra_kept=config.queries + config.keys)


class Model(DecoderModel):
    """A Qwen 3 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, qwen3_block)


def qwen3_block(config: Config) -> Block:
    """Return one layer: pre-norm attention with normed heads, and SwiGLU."""
    norms = RMSNorm(config.head_dim, config.rms_norm_eps), RMSNorm(config.head_dim, config.rms_norm_eps)
    attention = Attention(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, norms=norms)
    return Block(config, attention, MLP(config))
