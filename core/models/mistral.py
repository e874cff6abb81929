"""Mistral 7B and its descendants: Llama whose layers all have a sliding window, where config.json asks for one."""

from typing import Any

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import SEPARATE_PROJECTIONS, Config, DecoderModel, Defaults, read_common

LORA_TARGETS = SEPARATE_PROJECTIONS


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed.

    A `sliding_window` that is left out is 4096, one that is null is none: transformers reads it so.
    """
    fields = Fields(data, "Mistral")
    fields.fixed(hidden_act="silu", layer_types=None)
    config = read_common(fields, Defaults(max_position_embeddings=4096 * 32))
    return config.with_attention([fields.window(4096)] * config.num_hidden_layers)


class Model(DecoderModel):
    """A Mistral language model."""
