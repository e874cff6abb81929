"""One rank of a cluster that is not there: the model is built, cut and run without memory and without peers.

torch's fake tensors have shapes and no numbers, its fake process group answers every collective at once. What remains
is what torch would do: which collectives run with how many bytes, and what is held at the highest point, as
`FSDPMemTracker` counts it. The rank is the first of all; it computes as on a CPU, so that the head's workspace and what
attention holds are a CPU's.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from matryoshka.core.activations import activations
from matryoshka.core.cluster import Job
from matryoshka.core.distributed import World
from matryoshka.core.hardware import Cluster
from matryoshka.core.language_model import LanguageModel
from matryoshka.core.traffic import Collective, listen
from matryoshka.dpo.head import FlashHead
from matryoshka.lora.linear import LoraConfig, active, add_adapter, set_active, trainable_parameters

POLICY = "policy"


def dry_run(model: type[LanguageModel], config: Any, job: Job, cluster: Cluster, layout: str, policy: str) -> dict[str, Any]:
    """Return what the first rank does in a step of one micro-batch under `layout` and the activation policy `policy`:
    stored_bytes, collectives by kind (count and bytes sent), peak_bytes by category and in all, seconds it took here.

    model, config: the architecture and what it takes. Raises ValueError for a base in four bits.
    """
    if any(weight.packed for weight in job.weights):
        raise ValueError("plan: a dry run has no base in four bits; leave --quantization or --dry-run out")
    began = time.perf_counter()
    with _nobody(cluster.size), FakeTensorMode():
        built = _build(model, config, job)
        adapter = trainable_parameters(built, POLICY) if job.rank else {}
        if layout != "replicate":
            _cut(built, job, cluster, layout, set(adapter.values()))
        weights = [parameter for parameter in built.parameters() if parameter not in set(adapter.values())]
        stored = sum(_local(parameter).nbytes for parameter in weights)
        trained = list(adapter.values()) or list(built.parameters())
        optimizer = torch.optim.AdamW(trained, foreach=False)
        for parameter in trained:  # a step makes the moments that a later one finds
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tracker = FSDPMemTracker(built, optimizer) if layout != "replicate" else None
        with tracker or nullcontext(), listen() as heard:
            _step(built, job, policy)
            if adapter:
                World(0, cluster.size).sum([p.grad for p in trained if p.grad is not None])
        peak = {} if tracker is None else _peak(tracker)
    return {
        "layout": layout,
        "stored_bytes": stored,
        "collectives": _by_kind(heard),
        "peak_bytes": peak,
        "seconds": time.perf_counter() - began,
    }


@contextmanager
def _nobody(size: int) -> Iterator[None]:
    """Be rank 0 of `size` that are not there."""
    if dist.is_initialized():
        raise ValueError("plan: a dry run stands in for a cluster; start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(model: type[LanguageModel], config: Any, job: Job) -> LanguageModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(job.dtype, torch.float32) if job.full else job.dtype)
    try:
        built = model(config)
    finally:
        torch.set_default_dtype(before)
    if job.rank:
        for parameter in built.parameters():
            parameter.requires_grad_(False)
        add_adapter(built, POLICY, LoraConfig(job.rank, targets=job.targets, dora=job.dora), seed=0)
        set_active(built, POLICY)
    return built


def _cut(model: LanguageModel, job: Job, cluster: Cluster, layout: str, whole: set[nn.Parameter]) -> None:
    hybrid = layout == "hybrid"
    sizes = (cluster.nodes, cluster.gpus_per_node) if hybrid else (cluster.size,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard") if hybrid else ("shard",))
    mixed = MixedPrecisionPolicy(job.dtype, torch.promote_types(job.dtype, torch.float32), cast_forward_inputs=False)
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=mixed, ignored_params=whole)


def _step(model: LanguageModel, job: Job, policy: str) -> None:
    """Run the passes of one micro-batch as the trainer does."""
    ids_BT = torch.zeros(1, job.micro_batch_tokens, dtype=torch.long)

    def logps() -> torch.Tensor:
        with activations(policy):
            hidden_TD = model(ids_BT)[0]
        out: torch.Tensor = FlashHead.apply(hidden_TD, model.head_weight, ids_BT[0], False)[0]  # type: ignore[no-untyped-call]
        return out

    if job.reference and job.rank:
        with torch.no_grad(), active(model, None):
            logps()
    logps().sum().backward()  # type: ignore[no-untyped-call]


def blocks_of(model: LanguageModel) -> list[nn.Module]:
    return list(model.model.layers)  # type: ignore[union-attr, arg-type]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _by_kind(heard: list[Collective]) -> dict[str, dict[str, float]]:
    counts = Counter(one.kind for one in heard)
    return {kind: {"count": n, "sent_bytes": sum(x.sent for x in heard if x.kind == kind)} for kind, n in counts.items()}


def _peak(tracker: FSDPMemTracker) -> dict[str, int]:
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(kind, "value", kind)).lower(): size for kind, size in snapshot.items() if size}
