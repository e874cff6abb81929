"""Speeds of a cluster's parts, and the cost of a ring collective on them: bytes that each rank sends, and seconds.

Every figure is a constant to plan with, not a promise. Bandwidths are of one direction.
"""

from dataclasses import dataclass

from matryoshka.core.config import nearest


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links, in FLOP/s, bytes/s and seconds.

    flops: of a large bf16 matrix product. share: of `flops` that a training step reaches in its passes. memory: copies
    within the GPU. host: GPU to host memory. link: a GPU to its node's others. network: a node to the other nodes, all
    its cards together. Latencies are those of one hop of a ring.
    """

    flops: float
    share: float
    memory: float
    host: float
    link: float
    network: float
    link_latency: float = 3.4e-6
    network_latency: float = 14e-6


# H100: product (of 989e12 on the data sheet) and copies measured; the share is what NVIDIA publishes for LoRA with
# Llama-3-8B on one (NeMo AutoModel, 402e12). Links: data sheets (NVLink 450e9, eight network cards of 50e9, PCIe 5
# x16 64e9), times 0.8, which large collectives reach. A100: its data sheet (312e12, 2.0e12, PCIe 4 x16 32e9, NVLink
# 300e9, eight cards of 25e9) times the same shares; nothing of it is measured. Latencies: NCCL's own model of a ring
# under the simple protocol (src/graph/tuning.cc).
HARDWARE = {
    "h100": Hardware(790e12, 0.5, 3.0e12, 51e9, 360e9, 320e9),
    "a100": Hardware(250e12, 0.5, 1.8e12, 25e9, 240e9, 160e9),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. memory: bytes of one GPU that a run may take."""

    nodes: int
    gpus_per_node: int
    memory: int
    hardware: Hardware = HARDWARE["h100"]

    @property
    def size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Cost:
    """The cost of collectives for one rank: bytes sent, and seconds."""

    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.sent + other.sent, self.seconds + other.seconds)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.sent * times, self.seconds * times)


def gather(size: int, cluster: Cluster, ranks: int) -> Cost:
    """Return the cost of an all-gather to `size` bytes, or of a reduce-scatter from them, among `ranks` neighbours.

    Each rank passes on (ranks - 1) / ranks of the bytes. Ranks fill nodes one after the other; a ring through several
    nodes leaves each of them over all of its cards, and is as fast as the slower of links and network.
    """
    if ranks == 1:
        return Cost()
    hardware, nodes = cluster.hardware, -(-ranks // cluster.gpus_per_node)
    sent = (ranks - 1) / ranks * size
    speed = hardware.link if nodes == 1 else min(hardware.link, hardware.network)
    hops = (ranks - nodes) * hardware.link_latency + (nodes - 1) * hardware.network_latency
    return Cost(sent, sent / speed + hops)


def reduce(size: int, cluster: Cluster, ranks: int) -> Cost:
    """Return the cost of an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return gather(size, cluster, ranks) * 2


def reduce_across(size: int, cluster: Cluster) -> Cost:
    """Return the cost of an all-reduce of `size` bytes with the same rank of every other node, as all ranks do at once:
    they share the node's network."""
    nodes, hardware = cluster.nodes, cluster.hardware
    if nodes == 1:
        return Cost()
    sent = 2 * (nodes - 1) / nodes * size
    seconds = sent * cluster.gpus_per_node / hardware.network + 2 * (nodes - 1) * hardware.network_latency
    return Cost(sent, seconds)


def known_hardware(name: str) -> Hardware:
    """Return HARDWARE[name]. Raises ValueError naming the nearest for one that is not there."""
    if name not in HARDWARE:
        raise ValueError(f"plan: hardware {name!r} is unknown; {nearest(name, HARDWARE)}")
    return HARDWARE[name]
