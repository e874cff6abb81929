"""Keys and values of the tokens already read: one common prefix, kept once, and a private tail per row.

The common prefix (a few-shot header, a system prompt) is attended to by every row as one matrix product; only what
follows it is stored per row. `CachedAttention` gives the model the same numbers as attention over the whole sequence;
layers with a window read the keys within it alone.

Shapes: B rows, T new tokens, C prefix tokens, L tail capacity, N query heads, G key/value heads, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.core.models.layer_attention import LayerAttention


@dataclass
class Prefix:
    """Keys and values of a common prefix: per layer [1, G, C, H], and the token ids they stand for."""

    ids: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]


class CachedAttention:
    """Attention over prefix, tail and new tokens; the new tokens' keys and values are appended to the tail.

    lengths_B: valid tail tokens per row before this call. Row b's new token t sees the prefix, its tail up to
    lengths_B[b], and new tokens up to t. The caller advances lengths_B afterwards.
    """

    def __init__(
        self, prefix: Prefix | None, num_layers: int, rows: int, heads: int, head_dim: int, like: Tensor
    ) -> None:
        self.prefix = prefix
        self.room, self.capacity = rows, 0  # rows and tail tokens that the tensors can hold
        shape = (rows, heads, 0, head_dim)
        self.keys = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=like.device)

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    def reserve(self, capacity: int) -> None:
        """Make room for at least `capacity` tail tokens per row (grown by half, so that growth is rare)."""
        if capacity > self.capacity:
            self._resize(self.room, max(capacity, self.capacity + self.capacity // 2 + 16))

    def _resize(self, room: int, capacity: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                _, heads, _, size = old.shape
                new = old.new_zeros(room, heads, capacity, size)  # zeros: 0 x garbage could be nan
                new[: self.rows, :, : self.capacity] = old[: self.rows, :, : self.capacity]
                tensors[layer] = new
        self.room, self.capacity = room, capacity

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (indices, repeats allowed: a prompt read once serves all its samples)."""
        self.keys = [tensor[rows] for tensor in self.keys]
        self.values = [tensor[rows] for tensor in self.values]
        self.lengths_B = self.lengths_B[rows]
        self.room = self.rows

    def drop(self, finished: set[int]) -> list[int]:
        """Take rows out in place and return which old row each remaining one was: the last fill the holes."""
        count = self.rows - len(finished)
        movers = iter(row for row in range(count, self.rows) if row not in finished)
        order = [next(movers) if row in finished else row for row in range(count)]
        moved = [row for row in range(count) if order[row] != row]
        if moved:
            sources = [order[row] for row in moved]
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[moved] = tensor[sources]
        self.lengths_B = self.lengths_B[torch.tensor(order, dtype=torch.int64, device=self.lengths_B.device)]
        return order

    def extend(self, other: "CachedAttention") -> None:
        """Append the rows of `other`, which must have the same prefix."""
        rows, used = self.rows, int(other.lengths_B.max())
        self.reserve(used)
        if rows + other.rows > self.room:
            self._resize(max(rows + other.rows, self.room + self.room // 2), self.capacity)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for tensor, new in zip(mine, theirs, strict=True):
                tensor[rows : rows + other.rows, :, :used] = new[: other.rows, :, :used]
                tensor[rows : rows + other.rows, :, used:] = 0  # rows that left may have left NaN here: 0 x NaN is NaN
        self.lengths_B = torch.cat((self.lengths_B, other.lengths_B))

    def begin(self, new_tokens: int) -> None:
        """Prepare for one forward pass over `new_tokens` tokens per row; all layers share masks and slots."""
        longest = int(self.lengths_B.max())
        self.reserve(longest + new_tokens)
        self.width = longest + new_tokens
        self.shortest = int(self.lengths_B.min())
        self.slots_BT = self.lengths_B[:, None] + torch.arange(new_tokens, device=self.lengths_B.device)
        self._views: dict[int | None, View] = {}

    def _view(self, window: int | None) -> "View":
        """Return what layers of that window read in this pass, made once."""
        prefix = len(self.prefix.ids) if self.prefix else 0
        if window is not None and window >= prefix + self.width:
            window = None
        if window not in self._views:
            # The first query of the shortest row reaches furthest back.
            first = 0 if window is None else max(0, prefix + self.shortest - window + 1)
            head_start, start = min(first, prefix), max(0, first - prefix)
            columns_L = torch.arange(start, self.width, device=self.lengths_B.device)
            hidden_BTL = columns_L > self.slots_BT[..., None]
            head_hidden_BTC = None
            if window is not None:
                hidden_BTL |= columns_L <= self.slots_BT[..., None] - window
                columns_C = torch.arange(head_start, prefix, device=self.lengths_B.device)
                head_hidden_BTC = columns_C <= prefix + self.slots_BT[..., None] - window
            self._views[window] = View(head_start, start, hidden_BTL, head_hidden_BTC)
        return self._views[window]

    def __call__(self, layer: LayerAttention, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        rows, heads, tokens, size = q_BNTH.shape
        groups = k_BGTH.shape[1]
        keys, values = self.keys[layer.index][:rows], self.values[layer.index][:rows]
        index = torch.arange(rows, device=keys.device)[:, None]
        keys[index, :, self.slots_BT] = k_BGTH.transpose(1, 2)
        values[index, :, self.slots_BT] = v_BGTH.transpose(1, 2)
        view = self._view(layer.window)
        read = slice(view.start, self.width)
        # Query heads of one group share its keys: fold them into the token dimension.
        per_group = heads // groups
        q = q_BNTH.reshape(rows, groups, per_group * tokens, size) * layer.scale
        tail = _scores(q @ keys[:, :, read].transpose(-1, -2), layer.softcap)
        tail = _hidden(tail, view.hidden_BTL, per_group)
        if self.prefix is None or view.head_start == len(self.prefix.ids):
            out = tail.softmax(-1).to(q.dtype) @ values[:, :, read]
            return out.view(rows, heads, tokens, size)
        shared_k, shared_v = (x[layer.index][0, :, view.head_start :] for x in (self.prefix.keys, self.prefix.values))
        q_shared = q.transpose(0, 1).reshape(groups, -1, size)  # [G, B * N/G * T, H]: one product for all rows
        head = _scores(q_shared @ shared_k.transpose(-1, -2), layer.softcap)
        head = head.view(groups, rows, per_group * tokens, -1).transpose(0, 1)
        if view.head_hidden_BTC is not None:
            head = _hidden(head, view.head_hidden_BTC, per_group)
        probs = torch.cat((head, tail), dim=-1).softmax(-1).to(q.dtype)
        shared = shared_k.shape[1]
        out_head = probs[..., :shared].transpose(0, 1).reshape(groups, -1, shared) @ shared_v
        out_tail = probs[..., shared:] @ values[:, :, read]
        out = out_head.view(groups, rows, -1, size).transpose(0, 1) + out_tail
        return out.reshape(rows, heads, tokens, size)


@dataclass(frozen=True)
class View:
    """What the layers of one window read: the prefix from head_start on, the tail from `start` on, less the hidden."""

    head_start: int
    start: int
    hidden_BTL: Tensor
    head_hidden_BTC: Tensor | None


def _scores(products: Tensor, softcap: float | None) -> Tensor:
    """Return scores in at least fp32, soft-capped where the layer does so."""
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    return wide if softcap is None else (wide / softcap).tanh_().mul_(softcap)


def _hidden(scores: Tensor, hidden_BTK: Tensor, per_group: int) -> Tensor:
    """Return scores [B, G, N/G T, K] with -inf where a token does not see a key."""
    rows, groups, _, keys = scores.shape
    by_token = scores.reshape(rows, groups, per_group, -1, keys)
    return by_token.masked_fill(hidden_BTK[:, None, None], float("-inf")).view(scores.shape)
