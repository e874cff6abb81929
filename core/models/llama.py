"""Llama 2, 3, 3.1 and 3.2: the plain pre-norm decoder of `decoder.py`, all of whose parts it uses as they are."""

from dataclasses import replace
from typing import Any

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import SEPARATE_PROJECTIONS, Config, DecoderModel, Defaults, read_common
from matryoshka.core.models.gguf_layout import LLAMA_LAYER, GgufLayout

LORA_TARGETS = SEPARATE_PROJECTIONS
GGUF = GgufLayout(
    "llama",
    "LlamaForCausalLM",
    LLAMA_LAYER,
    permuted=True,
    settings=lambda metadata: {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "Llama")
    fields.fixed(hidden_act="silu")
    config = read_common(fields, Defaults(max_position_embeddings=2048))
    return replace(config, attention_bias=fields.flag("attention_bias"), mlp_bias=fields.flag("mlp_bias"))


class Model(DecoderModel):
    """A Llama language model."""
