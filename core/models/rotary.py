"""Rotary position embedding: how fast each pair of numbers of a head turns with position, in six variants.

default   theta^(-2i/H);
linear    all frequencies divided by `factor`;
dynamic   theta grows with the sequence beyond `original_max_position_embeddings` tokens;
yarn      slow pairs divided by `factor`, fast ones kept, a ramp between, and the tables scaled by `attention_factor`;
llama3    as yarn, with the ramp over wavelengths, and tables as they are;
longrope  each pair has its own divisor: `short_factor` up to the original length, `long_factor` beyond it.

"dynamic" and "longrope" turn all tokens of a sequence by its length. Sequences that share tokens in a tree, and a cache
that grows, need one rotation for a token: `same_until` is the length up to which there is one, and trainer and sampler
stay within it. A plain forward pass beyond it computes what transformers does, by the longest row.

Sources: Su et al. 2021 (arXiv 2104.09864), eq. 15; Peng et al. 2023 (2309.00071), eq. 17 to 22; Ding et al. 2024
(2402.13753); Llama 3.1's `llama3`. Error: frequencies are computed in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshka.core.models.config_fields import Fields, positive
from matryoshka.core.models.norm_rope_swiglu import rope_tables

# Variant -> the settings that it cannot do without, and those that it also knows.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
COMMON = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding; layers with equal ones share their tables. Field names are config.json's."""

    size: int
    """How many numbers of a head are turned, from its first on."""
    rope_theta: float
    rope_type: str = "default"
    original_max_position_embeddings: int = 0
    factor: float = 1.0
    attention_factor: float = 1.0
    """Both tables are multiplied by it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def same_until(self) -> int | None:
        """The length of a sequence up to which a token's rotation depends on its position alone; None: any length."""
        return self.original_max_position_embeddings if self.rope_type in ("dynamic", "longrope") else None

    def frequencies(self, length: int = 0) -> Tensor:
        """Return the [size / 2] angular frequencies in float64. length: of the sequence, where they depend on it."""
        kind, theta, size, original = self.rope_type, self.rope_theta, self.size, self.original_max_position_embeddings
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
        if kind == "dynamic" and length > original:
            theta *= (self.factor * length / original - (self.factor - 1)) ** (size / (size - 2))
        plain = theta**-exponents
        if kind in ("default", "dynamic"):
            return plain
        if kind == "linear":
            return plain / self.factor
        if kind == "longrope":
            divisors = self.long_factor if length > original else self.short_factor
            return plain / torch.tensor(divisors, dtype=torch.float64, device="cpu")
        kept = self._kept_llama3(plain) if kind == "llama3" else self._kept_yarn()
        return kept * plain + (1 - kept) * plain / self.factor

    def _kept_llama3(self, plain: Tensor) -> Tensor:
        """Return how much of each frequency stays: 1 for short wavelengths, 0 for long ones, linear between."""
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)

    def _kept_yarn(self) -> Tensor:
        """Return how much of each frequency stays: 1 for pairs that turn beta_fast times or more within the original
        length, 0 for those that turn beta_slow times or less, linear in the pair's index between."""

        def index(turns: float) -> float:
            span = math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
            return self.size * span / (2 * math.log(self.rope_theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        pairs = torch.arange(self.size // 2, dtype=torch.float64, device="cpu")
        return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0.0, 1.0)

    def tables(
        self, positions_BT: Tensor, dtype: torch.dtype, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin for `rotate`, [B, T, size] each. length: of the longest row, where the caller knows it."""
        if self.same_until is None:
            length = 0
        elif length is None:
            length = int(positions_BT.max()) + 1
        cos, sin = rope_tables(positions_BT, self.frequencies(length).to(positions_BT.device), dtype)
        return (cos, sin) if self.attention_factor == 1 else (cos * self.attention_factor, sin * self.attention_factor)


def read_rotary(
    fields: Fields, head_dim: int, max_positions: int, theta: float, partial: bool = False
) -> Rotary:
    """Return the rotary embedding that a `config.json` describes.

    theta: the family's default base. partial: whether the family turns only a part of a head where
    `partial_rotary_factor` asks for it.
    Raises ValueError for a variant or a setting that is not computed here, and for one that is missing or malformed.
    """
    # transformers 5 writes rope_parameters; earlier releases and most uploads write rope_theta and rope_scaling.
    given = fields.data.get("rope_scaling") or fields.data.get("rope_parameters") or {}
    rope: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rope.setdefault("rope_theta", fields.get("rope_theta", theta))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # its name in the first uploads of Phi 3
    if kind not in KINDS:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; choose from {sorted(KINDS)}")
    needed, known = KINDS[kind]
    if missing := [name for name in needed if name not in rope]:
        raise ValueError(f"config.json: rope_type {kind!r} needs {missing[0]!r}")
    if unknown := sorted(set(rope) - COMMON - {*needed, *known}):
        raise ValueError(
            f"config.json: the rope setting {unknown[0]!r} is not known to rope_type {kind!r}; choose another model"
        )
    share = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if not partial and share != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor {share!r} is not supported; {fields.family} rotates whole heads"
        )
    size = int(head_dim * positive("partial_rotary_factor", share))
    if size % 2 or not 0 < size <= head_dim:
        raise ValueError(
            f"config.json: {size} of a head's {head_dim} numbers are to be rotated, expected an even number of them"
        )
    name = "original_max_position_embeddings"
    original = fields.integer(name, Fields(rope, fields.family).integer(name, max_positions))
    if kind == "dynamic":  # transformers grows theta beyond the model's own context
        original = max_positions
    base = Rotary(size, positive("rope_theta", rope["rope_theta"]), kind, original)
    rotary = _with_settings(base, rope, (*needed, *known), max_positions)
    for length in (original, original + 1):  # settings that divide by zero fail here, not in the first forward pass
        rotary.frequencies(length)
    return rotary


def _with_settings(base: Rotary, rope: Mapping[str, Any], names: tuple[str, ...], max_positions: int) -> Rotary:
    """Return `base` with the settings of its variant."""
    kind, original = base.rope_type, base.original_max_position_embeddings
    values: dict[str, Any] = {}
    for name in names:
        if name in ("short_factor", "long_factor"):
            values[name] = tuple(positive(name, number) for number in rope[name])
            if len(values[name]) != base.size // 2:
                raise ValueError(
                    f"config.json: {name} has {len(values[name])} numbers, expected {base.size // 2}, one for each pair"
                )
        elif name == "truncate":
            values[name] = Fields(dict(rope), "").flag(name, True)
        elif name in rope and name not in ("mscale", "mscale_all_dim"):
            values[name] = positive(name, rope[name])
    factor = float(values.get("factor", max_positions / original))
    if kind == "yarn" and "attention_factor" not in values:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        above, below = (positive("mscale", above), positive("mscale_all_dim", below)) if above and below else (1.0, 0.0)
        values["attention_factor"] = _magnitude(factor, above) / _magnitude(factor, below)
    if kind == "longrope" and "attention_factor" not in values:
        values["attention_factor"] = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    return Rotary(base.size, base.rope_theta, kind, original, **values)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
