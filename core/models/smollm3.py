"""SmolLM 3: Llama in which every fourth layer does not rotate its queries and keys, so that it sees no positions."""

from dataclasses import replace
from typing import Any

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import (
    SEPARATE_PROJECTIONS,
    Config,
    DecoderModel,
    Defaults,
    read_common,
    sliding_layers,
)

LORA_TARGETS = SEPARATE_PROJECTIONS


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "SmolLM3")
    fields.fixed(hidden_act="silu")
    config = read_common(fields, Defaults(rope_theta=2_000_000.0, tie_word_embeddings=True))
    layers, interval = config.num_hidden_layers, fields.integer("no_rope_layer_interval", 4)
    rotates = fields.get("no_rope_layers", [int((index + 1) % interval != 0) for index in range(layers)])
    if not isinstance(rotates, list) or len(rotates) < layers or not set(rotates) <= {0, 1}:
        raise ValueError(
            f"config.json: no_rope_layers is {rotates!r:.200}, expected {layers} entries, 1 for a layer that rotates "
            "its queries and keys and 0 for one that does not"
        )
    window = fields.window() if fields.flag("use_sliding_window") else None
    sliding = sliding_layers(fields, layers, lambda index: window is not None and not rotates[index])
    config = config.with_attention([window if slides else None for slides in sliding])
    config = config.with_rotary([config.rotary[index] if rotates[index] else None for index in range(layers)])
    return replace(config, attention_bias=fields.flag("attention_bias"), mlp_bias=fields.flag("mlp_bias"))


class Model(DecoderModel):
    """A SmolLM 3 language model."""
