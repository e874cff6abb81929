"""Gemma 3, text only: Gemma 2's block with normed heads; five of six layers have a window and another rotary base."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.decoder import (
    SEPARATE_PROJECTIONS,
    Config,
    DecoderModel,
    Defaults,
    RMSNorm,
    read_common,
    sliding_layers,
)
from matryoshka.core.models.gemma2 import OFFSET, SandwichBlock, gemma_config
from matryoshka.core.models.gguf_layout import HEAD_NORMS, LLAMA_LAYER, GgufLayout
from matryoshka.core.models.rotary import read_rotary

LORA_TARGETS = SEPARATE_PROJECTIONS


def _gguf_settings(metadata: Callable[[str], Any]) -> dict[str, Any]:
    """Return the fields of config.json that are Gemma's own. llama.cpp scales scores by the head size, but for the 27B
    model (62 layers), where it does so by the hidden size over the number of heads."""
    scalar = metadata("attention.key_length") or metadata("embedding_length") // metadata("attention.head_count")
    if metadata("block_count") == 62:
        scalar = metadata("embedding_length") // metadata("attention.head_count")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": metadata("rope.freq_base_swa") or 10000.0,
        "rope_theta": metadata("rope.freq_base") or 1_000_000.0,
        "final_logit_softcapping": metadata("final_logit_softcapping"),
    }


GGUF = GgufLayout(
    "gemma3",
    "Gemma3ForCausalLM",
    LLAMA_LAYER
    | HEAD_NORMS
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    norm_offset=OFFSET,
    settings=_gguf_settings,
)


def read_config(data: dict[str, Any]) -> Config:
    """Return the configuration of a `config.json`. Raises ValueError for a field that is missing or not computed."""
    fields = Fields(data, "Gemma3")
    fields.fixed(use_bidirectional_attention=False, attn_logit_softcapping=None)
    rope = _rope_of(data, "full_attention", data.get("rope_theta", 1_000_000.0), data.get("rope_scaling"))
    defaults = Defaults(max_position_embeddings=131_072, tie_word_embeddings=True, head_dim=256)
    config = read_common(Fields(rope, "Gemma3"), defaults)
    pattern = fields.integer("sliding_window_pattern", 6)
    sliding = sliding_layers(fields, config.num_hidden_layers, lambda index: (index + 1) % pattern != 0)
    local = Fields(_rope_of(data, "sliding_attention", data.get("rope_local_base_freq", 10_000.0), None), "Gemma3")
    in_window = read_rotary(local, config.head_dim, config.max_position_embeddings, 10_000.0)
    config = config.with_rotary(
        [in_window if slides else rotary for slides, rotary in zip(sliding, config.rotary, strict=True)]
    )
    config = gemma_config(fields, config, sliding, fields.softcap("final_logit_softcapping"), None)
    return replace(config, extra_kept=config.extra_kept + config.queries + config.keys)


def _rope_of(data: dict[str, Any], layer_type: str, theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return `data` with the rotary settings of one type of layer alone, as other families write them."""
    rope = {"rope_theta": theta, **((data.get("rope_parameters") or {}).get(layer_type) or {}), **(scaling or {})}
    return {**data, "rope_theta": None, "rope_scaling": None, "rope_parameters": rope}


class Model(DecoderModel):
    """A Gemma 3 language model without its image encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, gemma3_block, RMSNorm(config.hidden_size, config.rms_norm_eps, OFFSET))


def gemma3_block(config: Config) -> SandwichBlock:
    """Return one layer: Gemma 2's, with a norm over every head of queries and keys."""
    norms = (RMSNorm(config.head_dim, config.rms_norm_eps, OFFSET) for _ in range(2))
    return SandwichBlock(config, (next(norms), next(norms)))
