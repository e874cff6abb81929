"""The parts that decoder architectures have in common: attention, feed-forward layer, block, and the model around them.

A file `core/models/<model_type>.py` reads its `config.json` into a `Config` and puts its block together from these
parts or from its own; `docs/controllers.md` shows how. Parameter names are the checkpoint's. How keys and values are
kept or masked is not here: each layer hands q, k, v and its `LayerAttention` to an `Attend`, so that token trees,
padded batches and cached decoding share these equations. Norm, rotation, softmax and head compute in at least fp32; a
float64 model stays float64 throughout.

Shapes: B rows, T tokens, D hidden, N query heads, G key/value heads, H head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from matryoshka.core.models.activations import recomputed, run_attention, run_block
from matryoshka.core.models.attention import Causal
from matryoshka.core.models.config_fields import Fields
from matryoshka.core.models.language_model import LanguageModel, project_together
from matryoshka.core.models.layer_attention import Attend, LayerAttention
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32, rms_norm, rotate, swiglu
from matryoshka.core.models.rotary import Rotary, read_rotary

SEPARATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Config:
    """The numbers that shape a decoder, under config.json's names, and the attention of its layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """The longest sequence; where rotation depends on a sequence's length, the longest before it changes."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention: tuple[LayerAttention, ...]
    """Of each layer."""
    rotary: tuple[Rotary | None, ...]
    """Of each layer; None: the layer does not rotate."""
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    """Embeddings are multiplied by it, rounded to their dtype, before the first block."""
    final_logit_softcapping: float | None = None
    """Logits become c * tanh(logit / c)."""
    extra_kept: int = 0
    """How many numbers of a token a block keeps for the backward pass beyond those that Llama's keeps."""
    extra_recomputed: int = 0
    """The same for numbers that activation policy "selective" makes again instead of keeping."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def queries(self) -> int:
        """How many numbers the queries of a token have."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """How many numbers the keys of a token have, or its values."""
        return self.num_key_value_heads * self.head_dim

    def with_attention(
        self, windows: Sequence[int | None], scale: float | None = None, softcap: float | None = None
    ) -> "Config":
        """Return the configuration with these windows, one for each layer; scale: default 1 / sqrt(head_dim)."""
        scale = self.head_dim**-0.5 if scale is None else scale
        layers = (LayerAttention(i, scale, softcap, window) for i, window in enumerate(windows))
        return replace(self, attention=tuple(layers))

    def with_rotary(self, rotary: Sequence[Rotary | None]) -> "Config":
        """Return the configuration with these rotary embeddings; the context ends where one of them would change."""
        limits = [one.same_until for one in rotary if one is not None and one.same_until is not None]
        context = min([self.max_position_embeddings, *limits])
        return replace(self, rotary=tuple(rotary), max_position_embeddings=context)


@dataclass(frozen=True)
class Defaults:
    """A family's values for fields that its config.json leaves out."""

    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    partial_rotary: bool = False
    """Whether partial_rotary_factor may rotate a part of each head alone."""


def read_common(fields: Fields, defaults: Defaults) -> Config:
    """Return the fields that all families have; every layer sees its whole path and rotates alike.

    Raises ValueError for a field that is missing or malformed, and for dropout and attention in both directions, which
    are not computed.
    """
    fields.fixed(attention_dropout=0.0, is_causal=True)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", defaults.head_dim or max(1, hidden // heads))
    layers = fields.integer("num_hidden_layers")
    positions = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    rotary = read_rotary(fields, head_dim, positions, defaults.rope_theta, partial=defaults.partial_rotary)
    config = Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=fields.number("rms_norm_eps", defaults.rms_norm_eps),
        tie_word_embeddings=fields.flag("tie_word_embeddings", defaults.tie_word_embeddings),
        attention=(),
        rotary=(),
    )
    return config.with_attention([None] * layers).with_rotary([rotary] * layers)


def sliding_layers(fields: Fields, layers: int, is_sliding: Callable[[int], bool]) -> list[bool]:
    """Return which layers have a window: `layer_types` says so, or else `is_sliding` of the layer's index.

    Raises ValueError for a list of another length, and for a type of layer that is not computed.
    """
    kinds = {"full_attention": False, "sliding_attention": True}
    types = fields.get("layer_types", None)
    if types is None:
        return [is_sliding(index) for index in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(one not in kinds for one in types):
        raise ValueError(
            f"config.json: layer_types is {types!r:.200}, expected {layers} entries, each one of {sorted(kinds)}"
        )
    return [kinds[one] for one in types]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the division in at least fp32; offset: as `rms_norm` has it."""

    def __init__(self, size: int, eps: float, offset: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - (offset or 0.0)))
        self.eps, self.offset = eps, offset

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps, self.offset)


def attend_heads(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    attend: Attend,
    layer: LayerAttention,
) -> Tensor:
    """Return the attention output of rotated queries and keys, [B, T, N * H]. tables: None where nothing rotates."""
    rows, tokens = q_BTNH.shape[:2]
    if tables is not None:
        q_BTNH, k_BTGH = (_rotated(heads, *tables) for heads in (q_BTNH, k_BTGH))
    # Heads become a dimension of their own by strides alone; attention that answers in q's strides saves a copy.
    q_BNTH, k_BGTH, v_BGTH = (heads.transpose(1, 2) for heads in (q_BTNH, k_BTGH, v_BTGH))
    out_BNTH = run_attention(attend, layer, q_BNTH, k_BGTH, v_BGTH)
    return out_BNTH.transpose(1, 2).reshape(rows, tokens, -1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    if size == heads.shape[-1]:
        return rotate(heads, cos, sin)
    return torch.cat((rotate(heads[..., :size], cos, sin), heads[..., size:]), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: N query heads read G key/value heads."""

    def __init__(
        self,
        config: Config,
        qkv_bias: bool = False,
        o_bias: bool = False,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> None:
        """norms: of queries and of keys, over each head where they are as long as a head, else over all heads."""
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.queries, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.keys, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.keys, bias=qkv_bias)
        self.o_proj = nn.Linear(config.queries, config.hidden_size, bias=o_bias)
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.is_normed = norms is not None

    def forward(
        self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None, attend: Attend, layer: LayerAttention
    ) -> Tensor:
        q, k, v = project_together(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        if self.is_normed:
            q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        heads = (x.view(*x.shape[:2], -1, self.head_dim) for x in (q, k, v))
        q_BTNH, k_BTGH, v_BTGH = heads
        out: Tensor = self.o_proj(attend_heads(q_BTNH, k_BTGH, v_BTGH, tables, attend, layer))
        return out


def _normed(x_BTF: Tensor, norm: RMSNorm) -> Tensor:
    """Return x with every run of as many numbers as the norm is long normalised."""
    by_run: Tensor = norm(x_BTF.view(*x_BTF.shape[:2], -1, norm.weight.numel()))
    return by_run.view(x_BTF.shape)


class MLP(nn.Module):
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)). gated: the product in the middle, of gate and up."""

    def __init__(
        self, config: Config, bias: bool = False, gated: Callable[[Tensor, Tensor], Tensor] = swiglu
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.gated = gated

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(recomputed(self.gated, *project_together(x_BTD, self.gate_proj, self.up_proj)))
        return out


class Block(nn.Module):
    """Attention and feed-forward layer, each after a norm of its input and added to it."""

    def __init__(self, config: Config, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, cos_BTH: Tensor | None, sin_BTH: Tensor | None, attend: Attend, layer: LayerAttention
    ) -> Tensor:
        tables = both(cos_BTH, sin_BTH)
        x_BTD = x_BTD + self.self_attn(recomputed(self.input_layernorm, x_BTD), tables, attend, layer)
        out: Tensor = x_BTD + self.mlp(recomputed(self.post_attention_layernorm, x_BTD))
        return out


def plain_block(config: Config) -> Block:
    """Return Llama's layer: attention and SwiGLU, with biases where the configuration has them."""
    bias = config.attention_bias
    return Block(config, Attention(config, qkv_bias=bias, o_bias=bias), MLP(config, config.mlp_bias))


def both(cos_BTH: Tensor | None, sin_BTH: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the pair of tables, or None. `run_block` marks the lengths of tensors that it is given one by one."""
    return None if cos_BTH is None or sin_BTH is None else (cos_BTH, sin_BTH)


class Decoder(nn.Module):
    """Everything below the head; its name in the checkpoint is `model`."""

    def __init__(self, config: Config, block: Callable[[Config], nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.norm = norm


class DecoderModel(LanguageModel):
    """Embedding, blocks, last norm. `forward` returns hidden states; callers apply the head where they need it."""

    def __init__(
        self, config: Config, block: Callable[[Config], nn.Module] = plain_block, norm: nn.Module | None = None
    ) -> None:
        """block: makes one layer; its forward takes x, cos, sin, attend and the layer's `LayerAttention`. norm: the
        last one, default as in Llama."""
        super().__init__()
        self.config: Config = config
        self.model = Decoder(config, block, norm or RMSNorm(config.hidden_size, config.rms_norm_eps))
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

        positions_BT: int64, default 0..T-1 in every row. attend: which tokens see which, default causal.
        """
        length = None
        if positions_BT is None:
            length = ids_BT.shape[1]
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        attend = attend or Causal()
        x_BTD = self.model.embed_tokens(ids_BT)
        if self.config.embedding_scale != 1.0:
            x_BTD = x_BTD * x_BTD.new_full((), self.config.embedding_scale)
        dtype = at_least_fp32(x_BTD.dtype)
        tables = {one: one.tables(positions_BT, dtype, length) for one in set(self.config.rotary) if one is not None}
        for layer, rotary, block in zip(self.config.attention, self.config.rotary, self.model.layers, strict=True):
            cos_BTH, sin_BTH = (None, None) if rotary is None else tables[rotary]
            x_BTD = run_block(block, x_BTD, cos_BTH, sin_BTH, attend, layer)
        hidden: Tensor = self.model.norm(x_BTD)
        return hidden
