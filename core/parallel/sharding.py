"""A model sharded over ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`), block by block.

Adapters are copied under every layout: FSDP2 manages the parameters that are there when `shard` is called, and adapters
come after. Where the weights themselves are trained, FSDP2 sums their gradients over the ranks (losses are divided by
global counts already, so nothing is averaged). Importing this takes as long as torch itself: import it where it is
used.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from matryoshka.core.distributed import World
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.parallel.layout import Layout, ParallelConfig


def make_mesh(layout: Layout, world: World) -> DeviceMesh:
    """Return the mesh that "shard" or "hybrid" cut over, the latter with one copy a row."""
    if layout.name == "shard":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = world.size // layout.group, layout.group
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: LanguageModel, mesh: DeviceMesh, config: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Cut up the parameters of `model` (usually without weights yet) over the ranks of `mesh`.

    dtype, device: those of the computation; parameters may be kept wider. Gradients are summed in at least fp32.
    The root holds embedding, last norm and head, and stays gathered between forward and backward: the head is used in
    between.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.offload else OffloadPolicy()
    mixed = MixedPrecisionPolicy(dtype, at_least_fp32(dtype), cast_forward_inputs=False)  # rotary tables are wider
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard, mp_policy=mixed, offload_policy=offload)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=mixed, offload_policy=offload)
    parts: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    blocks: list[FSDPModule] = [block for block in model.blocks if isinstance(block, FSDPModule)]
    for index, part in enumerate(blocks):
        part.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + config.prefetch])
        part.set_modules_to_backward_prefetch(blocks[max(0, index - config.prefetch) : index][::-1])
    model.compute_dtype, model.compute_device = dtype, device
