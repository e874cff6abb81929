"""Predicts the time of a training step on a cluster and the bytes that its ranks send, for each layout.

Every number is a prediction: products at the rate that a step reaches, collectives as rings at the speed of their
slowest link, hidden behind the computing of the block before where that takes longer. `docs/multi_node.md` says how far
the predictions were from what was measured.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matryoshka.core.parallel.cluster import Job, Memory, Weight, memory_of, shards_of
from matryoshka.core.parallel.hardware import Cluster, Cost, Hardware, gather, reduce, reduce_across
from matryoshka.core.training.memory import GIB

KINDS = ("all-gather", "reduce-scatter", "all-reduce")


@dataclass(frozen=True)
class Forecast:
    """The prediction for one layout. sent: bytes that a rank sends in a step, by kind of collective. Seconds of a
    step: compute_s, communication_s, and exposed_s, the part of it that computing does not hide. tokens_per_s: of the
    whole cluster."""

    layout: str
    memory: Memory
    sent: dict[str, float]
    compute_s: float
    communication_s: float
    exposed_s: float
    tokens_per_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def sent_bytes(self) -> float:
        return sum(self.sent.values())

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        own = {"layout": self.layout, "fits": self.memory.fits, "memory_bytes": memory, "sent_bytes": self.sent}
        times = ("compute_s", "communication_s", "exposed_s", "step_s", "tokens_per_s")
        return own | {name: getattr(self, name) for name in times}


def pass_seconds(job: Job, hardware: Hardware, policy: str) -> list[float]:
    """Return how long the blocks take in each pass over a micro-batch: reference, forward, and last backward.

    Products, forward: two operations a weight; backward: two for the input's gradient, and two for the weight's own
    where it is trained. Attention's scores and values: 4 H operations a head and pair of tokens, half of the pairs;
    backward 2.5 times that. Policies "full" and "offload" add a forward pass.
    """
    config, tokens = job.config, job.micro_batch_tokens
    width = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * width * tokens * job.sequence_tokens / 2
    forward = 2 * (job.matrix + job.adapter) * tokens + attention
    backward = 2 * ((2 if job.full else 1) * job.matrix + 2 * job.adapter) * tokens + 2.5 * attention
    again = policy in ("full", "offload")
    rate = hardware.flops * hardware.share
    # Packed weights are read and written dense before each product.
    packed = sum(w.numel for w in job.weights if w.packed)
    dense_s = packed * (0.5 + job.dtype.itemsize) / hardware.memory
    moved = config.num_hidden_layers * tokens * config.hidden_size * job.dtype.itemsize if policy == "offload" else 0
    passes = [forward / rate + dense_s] * (1 + (job.reference and not job.full))
    return [*passes, (backward + again * forward) / rate + (1 + again) * dense_s + 2 * moved / hardware.host]


def head_seconds(job: Job, hardware: Hardware) -> float:
    """Return how long log-probs take in a micro-batch, all tokens scored: one product with the head for the reference,
    two for the policy with its gradient, two more where the head is trained."""
    products = 2 + (2 if job.full else int(job.reference))
    operations = 2 * products * job.micro_batch_tokens * job.config.hidden_size * job.config.vocab_size
    return operations / (hardware.flops * hardware.share)


def forecast(job: Job, cluster: Cluster, layout: str) -> Forecast:
    """Return the forecast of a step under `layout`. Raises ValueError for a layout or policy that is unknown."""
    shards, hardware = shards_of(layout, cluster), cluster.hardware
    memory = memory_of(job, shards, cluster.memory)
    costs = dict.fromkeys(KINDS, Cost())

    def pay(kind: str, cost: Cost) -> float:
        costs[kind] += cost
        return cost.seconds

    def sum_gradients(weights: Sequence[Weight]) -> float:
        size = job.gathered_bytes(weights, shards, job.wide)
        seconds = pay("reduce-scatter", gather(size, cluster, shards))
        across = reduce_across(size // shards, cluster) if layout == "hybrid" else Cost()
        return seconds + pay("all-reduce", across)

    def fetch(weights: Sequence[Weight]) -> float:
        size = job.gathered_bytes(weights, shards)
        moved = size / shards / hardware.host if job.offload else 0.0
        return moved + pay("all-gather", gather(size, cluster, shards))

    passes = pass_seconds(job, hardware, memory.policy)
    exposed = fetch(job.root)
    for index, seconds in enumerate(passes):
        for block in job.blocks:
            cost = fetch(block) if job.reshard or index == 0 else 0.0
            if job.full and index == len(passes) - 1:
                cost += sum_gradients(block)
            exposed += max(0.0, cost - seconds / len(job.blocks))
    if job.full:
        exposed += sum_gradients(job.root)
    costs = {kind: cost * job.micro_batches for kind, cost in costs.items()}
    exposed *= job.micro_batches
    exposed += pay("all-reduce", reduce(job.wide * job.adapter, cluster, cluster.size))
    compute = job.micro_batches * (sum(passes) + head_seconds(job, hardware))
    trained = job.stored_bytes(shards) if job.full else job.wide * job.adapter
    compute += 7 * trained / hardware.memory  # AdamW reads four numbers for each that is trained and writes three
    communication = sum(cost.seconds for cost in costs.values())
    tokens = job.micro_batches * job.micro_batch_tokens * cluster.size
    sent = {kind: cost.sent for kind, cost in costs.items()}
    return Forecast(layout, memory, sent, compute, communication, exposed, tokens / (compute + exposed))


def table(found: Sequence[Forecast]) -> str:
    """Return the forecasts as lines of text: memory of a rank in GiB, bytes sent by a rank in a step, time, rate."""
    rows: list[tuple[str, ...]] = [
        ("layout", "weights", "gathered", "grads", "moments", "activations", "total GiB", "fits", "sent GB/step",
         "step s", "hidden", "tokens/s")
    ]  # fmt: skip
    for x in found:
        memory = x.memory
        parts = (memory.weights, memory.gathered, memory.gradients, memory.moments)
        hidden = 1 - x.exposed_s / x.communication_s if x.communication_s else 1.0
        rows.append((
            x.layout, *(f"{part / GIB:.1f}" for part in parts), f"{memory.activations / GIB:.1f} {memory.policy}",
            f"{memory.total / GIB:.1f}", "yes" if memory.fits else "no", f"{x.sent_bytes / 1e9:.2f}",
            f"{x.step_s:.2f}", f"{hidden:.0%}", f"{x.tokens_per_s:,.0f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
