"""Llama 2, 3, 3.1 and 3.2 in one file: the controller's architecture, with the checkpoint's own parameter names.

Not here: how keys and values are kept or masked. `forward` hands each layer's q, k, v to an `Attend`
(`core/models/attention.py`), so that training on token trees, padded batches and cached decoding share these equations.
Norm, RoPE, softmax and head compute in at least fp32; a float64 model stays float64 throughout.

Shapes: B rows, T tokens, D hidden, N query heads, G key/value heads, H head size, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.core.models.activations import recomputed, run_attention, run_block
from matryoshka.core.models.attention import Attend, Causal
from matryoshka.core.models.language_model import LanguageModel, together
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32, rms_norm, rope_tables, rotate, swiglu

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RopeScaling:
    """Position scaling: "default", "linear" (positions / factor) or "llama3" (Llama-3.1's piecewise frequencies)."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Config:
    """The fields of a Llama `config.json` that shape the computation, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; rotary embedding rotates halves")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Config":
        """Return the Config that a Hugging Face `config.json` describes.

        Raises ValueError for a missing field, and for every setting that this file does not compute.
        """

        def need(name: str) -> Any:
            if name not in data:
                raise ValueError(f"config.json: field {name!r} is missing; a Llama config has it")
            return data[name]

        if data.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {data['hidden_act']!r} is not supported; Llama uses 'silu'")
        # transformers 5 writes rope_parameters; earlier releases and Meta's uploads write rope_theta + rope_scaling.
        scaling = data.get("rope_parameters") or data.get("rope_scaling") or {}
        rope = {"rope_theta": data.get("rope_theta"), **scaling}
        heads = need("num_attention_heads")
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or need("hidden_size") // heads,
            max_position_embeddings=data.get("max_position_embeddings", 2048),
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=data.get("tie_word_embeddings", False),
            attention_bias=data.get("attention_bias", False),
            mlp_bias=data.get("mlp_bias", False),
        )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    needed = {"default": [], "linear": ["factor"]}
    needed["llama3"] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if kind not in needed:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; choose from {sorted(needed)}")
    if missing := [name for name in needed[kind] if name not in rope]:
        raise ValueError(f"config.json: rope_type {kind!r} needs {missing[0]!r}")
    return RopeScaling(kind, **{name: rope[name] for name in needed[kind]})


def rope_frequencies(config: Config) -> Tensor:
    """Return the [H/2] angular frequencies in float64. Source: RoFormer eq. 15; Llama-3.1's `llama3` scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.rope_type == "default":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Wavelengths above context / low are divided by factor, below context / high kept, interpolated between.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the division in at least fp32. Source: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: N query heads read G key/value heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, attend: Attend, layer: int) -> Tensor:
        rows, tokens, _ = x_BTD.shape
        q_BTNH, k_BTGH, v_BTGH = (
            out.view(rows, tokens, -1, self.head_dim) for out in together(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTNH, k_BTGH = rotate(q_BTNH, cos_BTH, sin_BTH), rotate(k_BTGH, cos_BTH, sin_BTH)
        # Heads become a dimension of their own by strides alone; attention that answers in q's strides saves a copy.
        q_BNTH, k_BGTH, v_BGTH = (heads.transpose(1, 2) for heads in (q_BTNH, k_BTGH, v_BTGH))
        out_BNTH = run_attention(attend, layer, q_BNTH, k_BGTH, v_BGTH)
        out: Tensor = self.o_proj(out_BNTH.transpose(1, 2).reshape(rows, tokens, -1))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, eq. 6."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(recomputed(swiglu, *together(x_BTD, self.gate_proj, self.up_proj)))
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, attend: Attend, layer: int) -> Tensor:
        x_BTD = x_BTD + self.self_attn(recomputed(self.input_layernorm, x_BTD), cos_BTH, sin_BTH, attend, layer)
        out: Tensor = x_BTD + self.mlp(recomputed(self.post_attention_layernorm, x_BTD))
        return out


class Decoder(nn.Module):
    """Everything below the head; its name in the checkpoint is `model`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(LanguageModel):
    """A Llama language model. `forward` returns hidden states; the head is applied by who needs it, where needed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder's layers."""
        return list(self.model.layers)

    @property
    def head_weight(self) -> Tensor:
        """The [V, D] output matrix: `lm_head.weight`, or the embedding where the two are tied."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Return the [B, T, D] hidden states after the last norm, in the model's dtype.

        positions_BT: int64, default 0..T-1 in every row. attend: what sees what, default causal.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        attend = attend or Causal()
        x_BTD = self.model.embed_tokens(ids_BT)
        frequencies = rope_frequencies(self.config).to(ids_BT.device)
        cos_BTH, sin_BTH = rope_tables(positions_BT, frequencies, at_least_fp32(x_BTD.dtype))
        for index, layer in enumerate(self.model.layers):
            x_BTD = run_block(layer, x_BTD, cos_BTH, sin_BTH, attend, index)
        hidden: Tensor = self.model.norm(x_BTD)
        return hidden
