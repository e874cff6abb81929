"""Sharded tensors on disk: every rank writes its own slices and reads whatever slices it needs of all of them.

torch.distributed.checkpoint does this, with its Hugging Face storage: safetensors files whose headers say where in the
whole tensor a slice lies. It is driven by its planner and storage interfaces, without its collectives: those would send
pickled plans between ranks, and nothing here needs them. So no rank waits for another while it writes, and any number
of ranks, or one process with plain tensors, reads what any other number wrote. It is imported when there is something
sharded, not before: that takes seconds.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from matryoshka.core.distributed import is_sharded, own


def own_slices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those DTensors of `tensors` that this rank has to write: a slice with elements, the first of its replicas.

    Raises ValueError for a tensor that is neither sharded nor replicated (a partial sum).
    """
    mine = {}
    for name, tensor in tensors.items():
        placements, coordinate = cast(Any, tensor).placements, cast(Any, tensor).device_mesh.get_coordinate()
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"checkpoint: {name!r} is a partial sum ({placements}); only whole values can be saved")
        replicas = (at for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
        if own(tensor).numel() and not any(replicas):
            mine[name] = tensor
    return mine


def write_slices(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write this rank's slices of `tensors` (DTensors in host memory), fsync them, and return the files: one or none.

    It holds the bytes of the slices once more while it writes.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if not tensors:
        return []
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # otherwise the thread opens a context on the first GPU, on every rank
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    results = writer.write_data(dataclasses.replace(plan, storage_data={"shard_index": rank + 1}), planner).wait()
    return sorted({folder / result.storage_data.relative_path for result in results})


def read_slices(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` in place (DTensors: this rank's slice) from the safetensors files in `folder`, sharded or not."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    wanted = {n: t for n, t in targets.items() if not is_sharded(t) or own(t).numel()}
    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(wanted, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
