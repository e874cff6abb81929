"""The processes of one run: their ranks, how they connect, and the few collectives that everything else uses.

`torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK and the address at which ranks meet; without it, a run is one process and
nothing here communicates. Ranks exchange sums and not means: every loss is divided by global counts before its gradient
is taken, so the gradients and metrics of the ranks add up.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class World:
    """One process of a run. With size 1 every collective is the identity. device: the device of this rank."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files that all share and prints for all."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place; those of one dtype travel as one message."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on at least one rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def least(self, value: float) -> float:
        """Return the smallest of the ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return float(values.item())

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ranks hold a part of `tensor` each (a DTensor, whose module takes as long to import as torch)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part of `tensor` that lies on this rank; of a tensor that is not sharded, all of it."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def full_tensor(tensor: Any) -> Tensor:
    """Return a sharded tensor with the parts of all ranks, all of which must call this; other tensors as they are."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def forget_gathered(model: nn.Module) -> None:
    """Free weights that FSDP2 holds gathered after a pass without backward, so that they cannot outlive a change."""
    for module in model.modules():
        if (reshard := getattr(module, "reshard", None)) is not None:
            reshard()


def as_part(like: Any, part: Tensor) -> Tensor:
    """Return `part` as this rank's part of a tensor that is sharded as `like` is."""
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    tensor: Tensor = type(like).from_local(part, like.device_mesh, like.placements, **layout)
    return tensor


def local_rows(tensor: Any) -> tuple[int, int]:
    """Return [first, last) of the rows of a sharded tensor that lie here: equal parts, the last ones short or empty.

    Raises ValueError for a tensor that is cut along another dimension.
    """
    start, stop = 0, tensor.shape[0]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            if not placement.is_shard(0):
                raise ValueError(f"distributed: a tensor is cut along dimension {placement.dim}, expected 0")
            part = -(-(stop - start) // tensor.device_mesh.size(axis))
            first = start + part * tensor.device_mesh.get_local_rank(axis)
            start, stop = min(first, stop), min(first + part, stop)
    return start, stop


@contextmanager
def open_world(device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Join the processes that torchrun started, NCCL on GPUs and gloo elsewhere, and leave them at the end.

    device: "cpu", or "cuda" for the GPU of the local rank. timeout_s: a collective that waits longer for a rank fails.
    Every rank but the first logs errors alone.
    Raises ValueError for a GPU that this machine does not have.
    """
    if "RANK" not in os.environ:
        yield World(device=torch.device(device))
        return
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    place = torch.device(device)
    if place.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"distributed: rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}; lower "
                "--nproc-per-node"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if rank:
        logging.getLogger("matryoshka").setLevel(logging.ERROR)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",  # gloo sums offloaded tensors
        timeout=timedelta(seconds=timeout_s),
        device_id=place if place.type == "cuda" else None,
    )
    try:
        yield World(rank, size, local_rank, local_size, place)
    finally:
        dist.destroy_process_group()
