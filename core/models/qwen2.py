"""Qwen 2 and 2.5: Llama with biases on q, k and v, and windows on the upper layers where config.json asks for them."""

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
    read_common,
    sliding_layers,
)
from matryoshka.core.models.gguf_layout import LLAMA_LAYER, GgufLayout

LORA_TARGETS = SEPARATE_PROJECTIONS
GGUF = GgufLayout(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA_LAYER,
    biases=("attn_q", "attn_k", "attn_v"),
    settings=lambda metadata: {"hidden_act": "silu", "use_sliding_window": False},
)


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "Qwen2")
    fields.fixed(hidden_act="silu")
    return qwen_windows(fields, read_common(fields, Defaults()))


def qwen_windows(fields: Fields, config: Config) -> Config:
    """Return the configuration with Qwen's windows: off unless use_sliding_window, then from max_window_layers on."""
    window = fields.window(4096) if fields.flag("use_sliding_window") else None
    first = fields.integer("max_window_layers", 28, least=0)
    sliding = sliding_layers(fields, config.num_hidden_layers, lambda index: window is not None and index >= first)
    return config.with_attention([window if slides else None for slides in sliding])


class Model(DecoderModel):
    """A Qwen 2 or 2.5 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda config: Block(config, Attention(config, qkv_bias=True), MLP(config)))
