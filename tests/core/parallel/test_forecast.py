"""forecast.py and core/parallel/hardware.py: oracles are rings and operations by hand, a published rate, invariants."""

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

from matryoshka.core.parallel.cluster import Job, job_of
from matryoshka.core.parallel.forecast import forecast, head_seconds, pass_seconds, table
from matryoshka.core.parallel.hardware import (
    HARDWARE,
    Cluster,
    Cost,
    Hardware,
    gather,
    known_hardware,
    reduce,
    reduce_across,
)
from matryoshka.pilot.plan import architecture_of

PLAIN = Hardware(1e12, 0.5, 1e12, 1e9, 100e9, 10e9, 1e-6, 1e-5)
GB = 10**9


def job(name: str = "llama-3-8b", **settings: Any) -> Job:
    architecture, config = architecture_of(name)
    with torch.device("meta"):
        return job_of(architecture.Model(config), **settings)


def test_ring_collectives_by_hand() -> None:
    """Oracle: by hand. 4 ranks on a node pass on 3/4 in 3 hops; 8 on two nodes 7/8, at the network's speed, 6 hops
    within and one between; an all-reduce is two of them; across nodes four GPUs share the network."""
    node, nodes = Cluster(1, 4, GB, PLAIN), Cluster(2, 4, GB, PLAIN)

    def close(cost: Cost, sent: float, seconds: float) -> bool:
        return bool(astuple(cost) == pytest.approx((sent, seconds)))

    assert gather(GB, node, 1) == Cost() and reduce_across(GB, node) == Cost()
    assert close(gather(GB, node, 4), 0.75 * GB, 0.75 * GB / 100e9 + 3e-6)
    assert gather(GB, nodes, 4) == gather(GB, node, 4)
    assert close(gather(GB, nodes, 8), 0.875 * GB, 0.875 * GB / 10e9 + 6e-6 + 1e-5)
    assert reduce(GB, nodes, 8) == gather(GB, nodes, 8) * 2
    assert close(reduce_across(GB, nodes), GB, 4 * GB / 10e9 + 2e-5)
    with pytest.raises(ValueError, match="hardware 'h10' is unknown; did you mean 'h100'"):
        known_hardware("h10")
    assert known_hardware("a100") is HARDWARE["a100"]


def test_operations_by_hand() -> None:
    """Oracle: by hand, Llama-3-8B. 6,979,321,856 numbers in the blocks' matrices; a token takes 2 for each, and in
    attention 4 x 32 layers x 4096 x half of a sequence; backward as much again for LoRA, twice for all weights."""
    matrix, adapter, tokens = 6_979_321_856, 20_971_520, 1000
    one = job(micro_batch_tokens=tokens, sequence_tokens=2000)
    assert (one.matrix, one.adapter) == (matrix, adapter)
    attention = 4 * 32 * 4096 * tokens * 1000
    forward = (2 * (matrix + adapter) * tokens + attention) / 5e11
    backward = (2 * matrix * tokens + 4 * adapter * tokens + 2.5 * attention) / 5e11
    assert pass_seconds(one, PLAIN, "none") == pytest.approx([forward, forward, backward])
    assert pass_seconds(one, PLAIN, "full") == pytest.approx([forward, forward, forward + backward])
    assert pass_seconds(replace(one, reference=False), PLAIN, "selective") == pytest.approx([forward, backward])
    moved = 2 * 32 * tokens * 4096 * 2 / 1e9
    assert pass_seconds(one, PLAIN, "offload")[2] == pytest.approx(forward + backward + moved)
    every = pass_seconds(replace(one, rank=0), PLAIN, "none")
    forward = (2 * matrix * tokens + attention) / 5e11
    assert every == pytest.approx([forward, (4 * matrix * tokens + 2.5 * attention) / 5e11])
    dense = matrix * 2.5 / 1e12  # half a byte is read and two are written a number
    packed = pass_seconds(job(micro_batch_tokens=tokens, sequence_tokens=2000, nf4=True), PLAIN, "none")
    assert packed == pytest.approx([seconds + dense for seconds in pass_seconds(one, PLAIN, "none")])
    product = 2 * tokens * 4096 * 128256 / 5e11
    assert head_seconds(one, PLAIN) == pytest.approx(3 * product)
    assert head_seconds(replace(one, reference=False), PLAIN) == pytest.approx(2 * product)
    assert head_seconds(replace(one, rank=0), PLAIN) == pytest.approx(4 * product)


def test_bytes_of_a_step_by_hand() -> None:
    """Oracle: by hand, Llama-3-8B on 2 x 4. Cut over a node: three passes over the blocks and one gathering of the
    root, 3/4 of the bytes; adapters twice 7/8. All weights: two passes, gradients in fp32, then across the nodes."""
    cluster, blocks, root, adapter = Cluster(2, 4, 80 * GB, PLAIN), 6_979_584_000, 1_050_677_248, 20_971_520
    one = job(activations="full")
    assert one.gathered_bytes([w for b in one.blocks for w in b], 4) == 2 * blocks
    whole, hybrid, shard = (forecast(one, cluster, layout) for layout in ("replicate", "hybrid", "shard"))
    sum_adapters = 2 * 7 / 8 * 4 * adapter
    assert whole.sent == {"all-gather": 0, "reduce-scatter": 0, "all-reduce": sum_adapters}
    assert hybrid.sent["all-gather"] == pytest.approx(3 / 4 * 2 * (3 * blocks + root), rel=1e-12)
    assert shard.sent["all-gather"] == pytest.approx(7 / 8 * 2 * (3 * blocks + root), rel=1e-12)
    assert hybrid.sent["all-reduce"] == shard.sent["all-reduce"] == sum_adapters
    every = forecast(replace(one, rank=0), cluster, "hybrid")
    assert every.sent["all-gather"] == pytest.approx(3 / 4 * 2 * (2 * blocks + root), rel=1e-12)
    assert every.sent["reduce-scatter"] == pytest.approx(3 / 4 * 4 * (blocks + root), rel=1e-12)
    assert every.sent["all-reduce"] == pytest.approx(2 * 1 / 2 * 4 * (blocks + root) / 4, rel=1e-12)
    twice = forecast(replace(one, micro_batches=2), cluster, "shard")
    assert twice.sent["all-gather"] == 2 * shard.sent["all-gather"] and twice.sent["all-reduce"] == sum_adapters
    kept = forecast(replace(one, reshard=False), cluster, "shard")
    assert kept.sent["all-gather"] == pytest.approx(7 / 8 * 2 * (blocks + root), rel=1e-12)


def test_seconds_add_up() -> None:
    """Oracle: invariants. A network without limits leaves the computing; with a slow one the step takes its time."""
    one = job("llama-3-70b", activations="full")
    fast = replace(HARDWARE["h100"], link=1e18, network=1e18, link_latency=0, network_latency=0)
    found = forecast(one, Cluster(8, 8, 80 * GB, fast), "shard")
    assert found.exposed_s < 1e-6 and found.step_s == pytest.approx(found.compute_s)
    alone = forecast(one, Cluster(1, 1, 80 * GB, fast), "replicate")
    assert found.tokens_per_s == pytest.approx(64 * alone.tokens_per_s, rel=1e-6)
    slow = forecast(one, Cluster(8, 8, 80 * GB, replace(fast, network=1e9)), "shard")
    assert slow.exposed_s == pytest.approx(slow.communication_s - found.compute_s, rel=0.1)
    hybrid = forecast(one, Cluster(8, 8, 80 * GB, replace(fast, network=1e9)), "hybrid")
    assert hybrid.tokens_per_s > 10 * slow.tokens_per_s  # its weights never cross the network
    rates = [forecast(one, Cluster(nodes, 8, 80 * GB), "shard").tokens_per_s for nodes in (1, 2, 4, 8)]
    assert rates == sorted(rates)
    text = table([found, slow]).splitlines()
    assert len(text) == 3 and text[0].split()[0] == "layout" and text[1].split()[0] == "shard"
    offloaded = forecast(replace(one, offload=True), Cluster(8, 8, 80 * GB, replace(fast, host=1e9)), "shard")
    assert offloaded.step_s > found.step_s and offloaded.memory.weights < found.memory.weights
    alone = forecast(replace(one, offload=True), Cluster(1, 1, 80 * GB, replace(fast, host=1e9)), "shard")
    moved = [sum(one.gathered_bytes(part, 1) for part in parts) / 1e9 for parts in (one.blocks, [one.root])]
    assert alone.exposed_s == pytest.approx(3 * moved[0] + moved[1] - sum(pass_seconds(one, fast, "full")), rel=1e-6)


def test_a_published_rate() -> None:
    """Oracle: NVIDIA's NeMo AutoModel, LoRA of rank 16 on Llama-3-8B, one H100, 32 x 4096 tokens a step: 12,473
    tokens/s without recomputing. The share of the peak is theirs: this holds the count of operations, to a tenth."""
    one = job(rank=16, micro_batch_tokens=8192, micro_batches=16, sequence_tokens=4096, reference=False)
    found = forecast(replace(one, activations="none"), Cluster(1, 1, 80 * GB), "replicate")
    assert found.tokens_per_s == pytest.approx(12473, rel=0.1)
    assert found.memory.fits
