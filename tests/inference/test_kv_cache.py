"""inference/kv_cache.py: the oracle is plain causal attention over each row's whole sequence, in float64."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from matryoshka.core.models.attention import Causal
from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.inference.kv_cache import CachedAttention, Prefix

HEADS, GROUPS, SIZE, LAYERS = 4, 2, 6, 2
PLAIN = [LayerAttention(index, SIZE**-0.5) for index in range(LAYERS)]
# One layer sees all and one sees few tokens, soft-capped and scaled otherwise; windows within and beyond the prefix.
WINDOWED = [LayerAttention(0, 0.7, softcap=1.5), LayerAttention(1, 0.3, window=3)]
BOTH_WINDOWED = [LayerAttention(0, SIZE**-0.5, window=7), LayerAttention(1, 0.9, softcap=0.8, window=1)]
KINDS = pytest.mark.parametrize("kinds", [PLAIN, WINDOWED, BOTH_WINDOWED], ids=["plain", "windowed", "both"])


@dataclass
class Row:
    """One sequence's queries, keys and values: per layer [heads, tokens, size]; `read` tokens are in the cache."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    read: int
    kinds: list[LayerAttention]

    @cached_property
    def expected(self) -> list[Tensor]:
        """Causal attention over all of the row, per layer [heads, tokens, size]."""
        out = []
        for q, k, v, kind in zip(self.q, self.k, self.v, self.kinds, strict=True):
            k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
            ones = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
            hidden = ones.triu(1) | ones.tril(-(kind.window or len(ones)))
            scores = q @ k.transpose(-1, -2) * kind.scale
            if kind.softcap is not None:
                scores = kind.softcap * torch.tanh(scores / kind.softcap)
            out.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)
        return out


def make_rows(prefix: int, tails: list[int], extra: int, kinds: list[LayerAttention] = PLAIN) -> list[Row]:
    """Return rows that agree on their first `prefix` tokens, then have `tails` to prefill and `extra` to decode."""
    draws = torch.Generator().manual_seed(prefix + sum(tails))

    def random(heads: int, tokens: int) -> list[Tensor]:
        return [torch.randn(heads, tokens, SIZE, generator=draws, dtype=torch.float64) for _ in range(LAYERS)]

    shared = [random(heads, prefix) for heads in (HEADS, GROUPS, GROUPS)]
    rows = []
    for tail in tails:
        own = [random(heads, tail + extra) for heads in (HEADS, GROUPS, GROUPS)]
        q, k, v = ([torch.cat(x, 1) for x in zip(a, b, strict=True)] for a, b in zip(shared, own, strict=True))
        rows.append(Row(q, k, v, prefix, kinds))
    return rows


def feed(cache: CachedAttention, rows: list[Row], counts: list[int]) -> None:
    """Read the next counts[b] tokens of each row in one pass, shorter rows padded with junk, and check every output."""
    width = max(counts)
    cache.begin(width)
    for layer in range(LAYERS):
        parts = []
        for of in ("q", "k", "v"):
            padded = []
            for row, count in zip(rows, counts, strict=True):
                new = getattr(row, of)[layer][:, row.read : row.read + count]
                padded.append(torch.cat((new, torch.full((new.shape[0], width - count, SIZE), 1e3).double()), 1))
            parts.append(torch.stack(padded))
        q, k, v = parts
        out = cache(rows[0].kinds[layer], q, k, v)
        for row, count, got in zip(rows, counts, out, strict=True):
            wanted = row.expected[layer][:, row.read : row.read + count]
            torch.testing.assert_close(got[:, :count], wanted, rtol=0, atol=1e-12)
    cache.lengths_B = cache.lengths_B + torch.tensor(counts)
    for row, count in zip(rows, counts, strict=True):
        row.read += count


def new_cache(rows: list[Row], prefix: int) -> CachedAttention:
    shared = None
    if prefix:
        keys, values = ([x[layer][None, :, :prefix] for layer in range(LAYERS)] for x in (rows[0].k, rows[0].v))
        shared = Prefix(tuple(range(prefix)), keys, values)
    return CachedAttention(shared, LAYERS, len(rows), GROUPS, SIZE, torch.empty(0, dtype=torch.float64))


@KINDS
def test_the_oracle_is_the_trainers_attention(kinds: list[LayerAttention]) -> None:
    """Oracle: core's `Causal`, which training uses, agrees with the loop-free formula of this file."""
    (row,) = make_rows(0, [7], 0, kinds)
    out = Causal()(kinds[0], row.q[0][None], row.k[0][None], row.v[0][None])[0]
    torch.testing.assert_close(row.expected[0], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 9])
@pytest.mark.parametrize("tails", [[1], [4], [5, 1, 3], [2, 2]])
@KINDS
def test_prefill_and_decoding(prefix: int, tails: list[int], kinds: list[LayerAttention]) -> None:
    """Oracle: full attention of every row; ragged prefill, then one token a pass until the cache has grown twice."""
    rows = make_rows(prefix, tails, 40, kinds)
    cache = new_cache(rows, prefix)
    feed(cache, rows, tails)
    assert cache.lengths_B.tolist() == tails
    for _ in range(40):
        feed(cache, rows, [1] * len(rows))
    assert cache.capacity >= max(tails) + 40


@pytest.mark.parametrize("finished", [{0}, {3}, {1, 2}, {0, 3}, {0, 1, 2}, {1}, {0, 1, 2, 3}])
@pytest.mark.parametrize("prefix", [0, 6])
def test_finished_rows_make_room(prefix: int, finished: set[int]) -> None:
    """Oracle: full attention of the rows that are left, in the order that `drop` says, and of those that follow."""
    rows = make_rows(prefix, [3, 5, 2, 4], 30)
    cache = new_cache(rows, prefix)
    feed(cache, rows, [3, 5, 2, 4])
    order = cache.drop(finished)
    assert sorted(order) == [row for row in range(4) if row not in finished]
    left = [rows[row] for row in order]
    assert cache.lengths_B.tolist() == [row.read - prefix for row in left]
    if left:
        feed(cache, left, [1] * len(left))
    late = make_rows(prefix, [3, 5, 2, 4], 30)[1:]
    other = new_cache(late, prefix)
    feed(other, late, [5, 2, 4])
    cache.extend(other)
    for _ in range(20):
        feed(cache, [*left, *late], [1] * cache.rows)


@pytest.mark.parametrize("prefix", [0, 6])
@KINDS
def test_rows_come_and_go(prefix: int, kinds: list[LayerAttention]) -> None:
    """Oracle: full attention; rows dropped, repeated (one prompt, several samples), and a second cache appended."""
    rows = make_rows(prefix, [3, 5, 2], 30, kinds)
    cache = new_cache(rows, prefix)
    feed(cache, rows, [3, 5, 2])
    chosen = [rows[2], rows[0], Row(rows[0].q, rows[0].k, rows[0].v, rows[0].read, kinds)]
    cache.select(torch.tensor([2, 0, 0]))
    assert cache.rows == 3
    feed(cache, chosen, [1, 1, 1])
    late = make_rows(prefix, [3, 5, 2], 30, kinds)  # the same sequences once more: the same prefix
    other = new_cache(late, prefix)
    feed(other, late, [3, 5, 2])
    for _ in range(20):
        feed(other, late, [1, 1, 1])
    cache.extend(other)
    together = [*chosen, *late]
    for _ in range(3):
        feed(cache, together, [1] * 6)
    cache.select(torch.tensor([], dtype=torch.int64))
    assert cache.rows == 0
    cache.extend(other)
    feed(cache, [Row(row.q, row.k, row.v, row.read - 3, kinds) for row in late], [1, 1, 1])
