"""A log of the collectives that run inside a block of code, with their bytes.

torch's dispatcher reports each one, whether it runs on NCCL, on gloo, or in the fake process group of a dry run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The dispatcher's name of a collective -> its usual name.
NAMES = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "c10d::broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    """kind: "all-gather", "reduce-scatter", "all-reduce" or torch's name; size: bytes of the whole (the output of an
    all-gather, the input of a reduce-scatter); ranks: how many take part."""

    kind: str
    size: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends by the ring algorithm. Raises ValueError for a kind that has none here."""
        turns = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
        if self.kind not in turns:
            raise ValueError(f"traffic: {self.kind} has no count here; expected one of {', '.join(turns)}")
        return turns[self.kind] * (self.ranks - 1) / self.ranks * self.size


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name
            tensors = [x for argument in args for x in (argument if isinstance(argument, list) else [argument])]
            sizes = [x.nbytes for x in tensors if isinstance(x, Tensor)]
            groups = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
            ranks = dist.ProcessGroup.unbox(groups[0]).size()
            kind = NAMES.get(name, name)
            size = sum(sizes) if kind == "all-reduce" else max(sizes, default=0)
            self.heard.append(Collective(kind, size, ranks))
        return func(*args, **(kwargs or {}))


@contextmanager
def listen() -> Iterator[list[Collective]]:
    """Yield a list to which every collective of this rank inside the block is added, those of backward passes too."""
    listener = _Listener()
    with listener:
        yield listener.heard
