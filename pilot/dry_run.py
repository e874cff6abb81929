"""One rank of a simulated cluster: the model is built, sharded and run without memory and without other ranks.

torch's fake tensors have shapes and no numbers, and its fake process group answers every collective at once. They show
what torch would do: which collectives run with how many bytes, and the peak memory, as `FSDPMemTracker` counts it. The
rank is rank 0. It computes as on a CPU, so the workspaces of head and attention are a CPU's.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from matryoshka.core.distributed import World, local_part
from matryoshka.core.models.activations import activations
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.parallel.cluster import Job, shards_of
from matryoshka.core.parallel.collective_log import Collective, listen
from matryoshka.core.parallel.hardware import Cluster
from matryoshka.core.parallel.layout import Layout, ParallelConfig
from matryoshka.core.parallel.sharding import make_mesh, shard
from matryoshka.dpo.head import FlashHead
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    prepare_linears,
    set_active,
    trainable_parameters,
)

POLICY = "policy"


def dry_run(
    model: type[LanguageModel], config: Any, job: Job, cluster: Cluster, layout: str, policy: str, with_peak: bool
) -> dict[str, Any]:
    """Return what rank 0 does in one micro-batch and the sum after it, under `layout` and activation `policy`.

    stored_bytes; collectives by kind, with count and sent_bytes; peak_bytes by category and "total", {} without
    with_peak (which takes minutes) and for a model that is not sharded; seconds that the dry run took here. model,
    config: the architecture and its configuration. Raises ValueError for a base in four bits, and under torchrun.
    """
    if any(weight.packed for weight in job.weights):
        raise ValueError("plan: a dry run has no base in four bits; leave --quantization or --dry-run out")
    began = time.perf_counter()
    is_sharded = layout != "replicate"
    with _simulated_world(cluster) as world:
        mesh = make_mesh(Layout(layout, shards_of(layout, cluster), ""), world) if is_sharded else None
        with FakeTensorMode():
            done = _first_rank(model, config, job, policy, with_peak, world, mesh)
    return done | {"seconds": time.perf_counter() - began}


def _first_rank(
    model: type[LanguageModel],
    config: Any,
    job: Job,
    policy: str,
    with_peak: bool,
    world: World,
    mesh: DeviceMesh | None,
) -> dict[str, Any]:
    built = _build(model, config, at_least_fp32(job.dtype) if job.full else job.dtype)
    if not job.full:
        prepare_linears(built)
    built.requires_grad_(job.full)
    if mesh is not None:
        parallel = ParallelConfig(reshard=job.reshard, prefetch=job.prefetch)
        shard(built, mesh, parallel, job.dtype, world.device)
    stored = sum(local_part(parameter).nbytes for parameter in built.parameters())
    trained = list(built.parameters())
    if not job.full:
        add_adapter(built, POLICY, LoraConfig(job.rank, targets=job.targets, dora=job.dora), 0, world.device)
        set_active(built, POLICY)
        trained = list(trainable_parameters(built, POLICY).values())
    optimizer = torch.optim.AdamW(trained, foreach=False)
    for parameter in trained:  # the first step allocates the moments
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with listen() as heard:
        _micro_batch(built, job, policy, job.reference and not job.full)
        if not job.full:
            world.sum([parameter.grad for parameter in trained if parameter.grad is not None])
    optimizer.zero_grad()
    peak = _peak(built, optimizer, trained, job, policy) if with_peak and mesh is not None else {}
    return {"stored_bytes": stored, "collectives": _by_kind(heard), "peak_bytes": peak}


@contextmanager
def _simulated_world(cluster: Cluster) -> Iterator[World]:
    """Opens a simulated World as rank 0, using torch's fake process group."""
    if dist.is_initialized():
        raise ValueError("plan: a dry run stands in for a cluster; start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=cluster.size)
    try:
        yield World(0, cluster.size, 0, cluster.gpus_per_node)
    finally:
        dist.destroy_process_group()


def _build(model: type[LanguageModel], config: Any, dtype: torch.dtype) -> LanguageModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be exchanged for those of another dtype
    try:
        return model(config)
    finally:
        torch.set_default_dtype(before)


def _micro_batch(model: LanguageModel, job: Job, policy: str, reference: bool) -> None:
    """Run the passes of one micro-batch as the trainer does; every token is scored."""
    ids_BT = torch.zeros(1, job.micro_batch_tokens, dtype=torch.long)

    def logps() -> torch.Tensor:
        with activations(policy):
            hidden_TD = model(ids_BT)[0]
        cap = model.config.final_logit_softcapping
        out: torch.Tensor = FlashHead.apply(hidden_TD, model.head_weight, ids_BT[0], cap)  # type: ignore[no-untyped-call]
        return out

    if reference:
        with torch.no_grad(), active(model, None):
            logps()
    logps().sum().backward()  # type: ignore[no-untyped-call]


def _by_kind(heard: list[Collective]) -> dict[str, dict[str, float]]:
    counts = Counter(one.kind for one in heard)
    sent = {kind: sum(one.sent for one in heard if one.kind == kind) for kind in counts}
    return {kind: {"count": count, "sent_bytes": sent[kind]} for kind, count in counts.items()}


def _peak(model: LanguageModel, optimizer: Any, trained: list[Any], job: Job, policy: str) -> dict[str, int]:
    """Return the bytes by category at the highest point of the policy's forward and backward."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker  # loads the compiler

    tracker = FSDPMemTracker(model, optimizer)
    if not job.full:
        tracker.track_external(*trained)
    with tracker:
        _micro_batch(model, job, policy, reference=False)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(kind, "value", kind)).lower(): size for kind, size in snapshot.items() if size}
