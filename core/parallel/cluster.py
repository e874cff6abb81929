"""The memory that a rank of a cluster needs to train a model, for each layout, computed from shapes alone.

replicate  every rank holds the whole model;
hybrid     the GPUs of a node share one copy of the model, and every node has a copy;
shard      all GPUs share one copy of the model.

Where ranks share a copy, FSDP2 gathers a block for each pass over it and drops it after the pass; embedding, head and
last norm (the root) stay gathered through a micro-batch. Adapters are whole on every rank under any layout. Full
fine-tuning cuts weights (fp32), gradients and moments alike, and gathers in the dtype that is computed in.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from matryoshka.core.models.language_model import LanguageModel, ModelConfig
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.parallel.hardware import Cluster
from matryoshka.core.parallel.layout import LAYOUTS, ParallelConfig
from matryoshka.core.training import optimizer
from matryoshka.core.training.memory import MARGIN, Footprint, MemoryPlan

NF4_BLOCK, NF4_SCALES = 64, 256  # numbers that share a scale, scales that share one


class Weight(NamedTuple):
    """A parameter's name and shape. packed: in four bits."""

    name: str
    shape: tuple[int, ...]
    packed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self, rows: int, itemsize: int) -> int:
        """Return the size of `rows` rows; itemsize: of numbers that are not packed."""
        numbers = rows * self.numel // self.shape[0]
        return numbers // 2 if self.packed else numbers * itemsize


def rows_of(rows: int, ranks: int, rank: int) -> int:
    """Return how many of `rows` rows rank `rank` holds: FSDP2 cuts into equal parts, the last ones short or empty."""
    part = -(-rows // ranks)
    return max(0, min(part, rows - rank * part))


@dataclass(frozen=True)
class Job:
    """The training to be planned; `job_of` makes one of a model.

    dtype: that of the computation. rank: of the adapter, 0 for full fine-tuning. eight_bit: AdamW's moments in 8 bits.
    A rank goes over micro_batches of micro_batch_tokens tokens each in a step, in sequences of sequence_tokens.
    reference: a pass of the reference policy in every step. activations: a policy of `activations.py`, or "auto".
    device_type: "cuda" or "cpu". reshard, prefetch, offload: as `ParallelConfig` has them.
    """

    config: ModelConfig
    blocks: tuple[tuple[Weight, ...], ...]
    root: tuple[Weight, ...]
    dtype: torch.dtype = torch.bfloat16
    rank: int = 8
    dora: bool = False
    targets: tuple[str, ...] = ()
    eight_bit: bool = False
    micro_batch_tokens: int = 8192
    micro_batches: int = 1
    sequence_tokens: int = 2048
    reference: bool = True
    activations: str = "auto"
    device_type: str = "cuda"
    reshard: bool = True
    prefetch: int = 1
    offload: bool = False

    @property
    def full(self) -> bool:
        return self.rank == 0

    @property
    def wide(self) -> int:
        """Bytes of a number that is trained: fp32 at least."""
        return at_least_fp32(self.dtype).itemsize

    @property
    def weights(self) -> list[Weight]:
        return [weight for block in self.blocks for weight in block] + list(self.root)

    @property
    def matrix(self) -> int:
        """How many numbers a token is multiplied with in the blocks, adapters left out."""
        return sum(w.numel for block in self.blocks for w in block if len(w.shape) == 2)

    @property
    def adapter(self) -> int:
        """How many numbers the adapter has."""
        if self.full:
            return 0
        linear = [w for block in self.blocks for w in block if len(w.shape) == 2]
        adapted = [w for w in linear if w.name.split(".")[-2] in self.targets]
        return sum(self.rank * sum(w.shape) + self.dora * w.shape[0] for w in adapted)

    def stored_bytes(self, ranks: int, rank: int = 0) -> int:
        """Return what rank `rank` of `ranks` holds of the model's weights, NF4's scales left out; rank 0 has most."""
        size = self.wide if self.full else self.dtype.itemsize
        return sum(w.bytes(rows_of(w.shape[0], ranks, rank), size) for w in self.weights)

    def gathered_bytes(self, weights: Iterable[Weight], ranks: int, itemsize: int | None = None) -> int:
        """Return what gathering `weights` gives, rows padded to equal parts. itemsize: another than the dtype's."""
        return sum(w.bytes(-(-w.shape[0] // ranks) * ranks, itemsize or self.dtype.itemsize) for w in weights)

    def needed(self, config: ParallelConfig, ranks: int) -> int:
        """Return the bytes that each of `ranks` ranks needs that share one copy, under the leanest policy for
        activations where the job says "auto"."""
        parallel = replace(self, reshard=config.reshard, prefetch=config.prefetch, offload=config.offload)
        return memory_of(parallel, ranks, 0).total

    def scale_bytes(self) -> int:
        """Return the size of NF4's scales, which every rank holds whole."""
        blocks = [-(-w.numel // NF4_BLOCK) for w in self.weights if w.packed]
        return sum(n + 4 * -(-n // NF4_SCALES) + 4 * (NF4_SCALES + 1) for n in blocks)


def job_of(model: LanguageModel, nf4: bool = False, **settings: Any) -> Job:
    """Return the job of training `model`, which may lie on the meta device.

    nf4: the linear layers of its blocks are stored in four bits. settings: fields of Job. Raises ValueError for NF4 and
    full fine-tuning at once.
    """
    settings["targets"] = settings.get("targets") or model.lora_targets
    names = {id(module): f"{path}." for path, module in model.named_modules()}
    parts: dict[str, list[Weight]] = {names[id(block)]: [] for block in model.blocks}
    root: list[Weight] = []
    for name, parameter in model.named_parameters():
        part = next((part for part in parts if name.startswith(part)), None)
        weight = Weight(name, tuple(parameter.shape), nf4 and part is not None and parameter.dim() == 2)
        (root if part is None else parts[part]).append(weight)
    job = Job(model.config, tuple(map(tuple, parts.values())), tuple(root), **settings)
    if nf4 and job.full:
        raise ValueError("plan: weights in four bits cannot be trained; leave --full or --quantization out")
    return job


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs the most, at the highest point of a step.

    weights: all stored ones, adapters and scales included. gathered: weights that are whole for a while, with
    gradients. activations: those of `policy`, and the head's workspace. room: what there is for them. host: bytes of
    the host's memory, where the model is offloaded.
    """

    weights: int
    gathered: int
    gradients: int
    moments: int
    activations: int
    policy: str
    room: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.moments + self.activations

    @property
    def fits(self) -> bool:
        return self.activations <= self.room


def layouts(job: Job, cluster: Cluster) -> tuple[str, ...]:
    """Return the layouts that differ on this cluster, in the order in which "auto" tries them."""
    if cluster.size == 1:
        return ("shard",) if job.full else ("replicate",)
    left_out = {"replicate"} if job.full else set()
    if cluster.nodes == 1 or cluster.gpus_per_node == 1:
        left_out.add("hybrid")
    return tuple(layout for layout in LAYOUTS if layout not in left_out)


def shards_of(layout: str, cluster: Cluster) -> int:
    """Return over how many ranks a model is cut. Raises ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose from {LAYOUTS}")
    return {"replicate": 1, "hybrid": cluster.gpus_per_node, "shard": cluster.size}[layout]


def memory_of(job: Job, shards: int, free: int) -> Memory:
    """Return the memory of a rank that has `free` bytes, where `shards` ranks share a model; 1: each has its own.

    Where the job says "auto", with the fastest policy for activations that fits, or else the leanest. A tenth stays
    free (`core/training/memory.py`). Raises ValueError for an unknown policy.
    """
    wide = job.wide
    narrower = job.full and wide > job.dtype.itemsize
    cut = shards > 1 or job.offload or narrower  # a copy is gathered, fetched, or made to compute with
    weights = job.stored_bytes(shards)
    trained = weights // wide if job.full else job.adapter
    gradients = trained * wide
    moments = int(2 * trained * (1 + 4 / optimizer.BLOCK)) if job.eight_bit else 2 * trained * wide
    host = early = 0
    if cut and job.offload:
        host, weights = weights, 0
        if job.full:
            host, gradients, moments = host + gradients + moments, 0, 0
    weights += job.scale_bytes() + wide * job.adapter * (1 + job.reference)
    gathered = max((w.numel for w in job.weights if w.packed), default=0) * job.dtype.itemsize  # one made dense
    if cut:
        sizes = [job.gathered_bytes(block, shards) for block in job.blocks]
        root, block = job.gathered_bytes(job.root, shards), max(sizes)
        # A block that is gathered ahead lies in the message and outside of it for a while.
        ahead = (1 + 2 * job.prefetch) * block
        gathered += root + (min(ahead, sum(sizes)) if job.reshard else sum(sizes) + block)
        early = 2 * (root + block)  # the root's message is there until the first block is, activations not yet
        if job.full:  # gradients of the head and of a block, and the message in which they are summed
            gathered += max(job.gathered_bytes([weight], shards) for weight in job.root) + block
            gathered += max(job.gathered_bytes(block, shards, wide) for block in job.blocks)
    room = int(free * (1 - MARGIN)) - weights - gathered - gradients - moments
    plan = MemoryPlan(job.activations, Footprint(job.config, job.dtype, job.rank, job.dora), room, job.device_type)
    policy = plan.policy_for(job.micro_batch_tokens)
    peak = max(plan.peak_bytes(job.micro_batch_tokens, policy), early - gathered)
    return Memory(weights, gathered, gradients, moments, peak, policy, room, host)
