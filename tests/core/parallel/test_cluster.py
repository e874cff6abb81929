"""core/parallel/cluster.py: oracles are published parameter counts, sums by hand on a small model, and invariants."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from matryoshka.core.models.llama import LORA_TARGETS
from matryoshka.core.parallel.cluster import Job, Weight, job_of, layouts, memory_of, rows_of, shards_of
from matryoshka.core.parallel.hardware import Cluster
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.training.memory import MARGIN, Footprint, MemoryPlan
from matryoshka.lora.linear import LoraConfig, add_adapter, trainable_parameters
from matryoshka.pilot.plan import MODELS, architecture_of

GB = 10**9
# 2 blocks; q, o 12 x 12, k, v 4 x 12, MLP 3 x 12 x 20, two norms; root: embedding 11 x 12, tied, and a norm.
TINY = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True,
}  # fmt: skip
BLOCK = 2 * 12 * 12 + 2 * 4 * 12 + 3 * 12 * 20 + 2 * 12
ROOT = 11 * 12 + 12


def model_of(data: dict[str, Any]) -> Any:
    from matryoshka.core.models.llama import Model, read_config

    with torch.device("meta"):
        return Model(read_config(data))


def tiny(**settings: Any) -> Job:
    return job_of(model_of(TINY), **{"micro_batch_tokens": 64, **settings})


@pytest.mark.parametrize(
    ("name", "parameters", "adapter"),
    [
        ("smollm2-135m", 134_515_008, None),
        ("llama-3.2-1b", 1_235_814_400, None),
        ("llama-3.2-3b", 3_212_749_824, None),
        ("llama-3-8b", 8_030_261_248, 20_971_520),
        ("llama-3-70b", 70_553_706_496, 103_546_880),
        ("llama-3.1-405b", 405_853_388_800, None),
    ],
)
def test_known_models_have_their_published_sizes(name: str, parameters: int, adapter: int | None) -> None:
    """Oracle: parameter counts of the model cards; LoRA rank 8 on all projections as PEFT counts it for 8B, and by hand
    for 70B: 8 x 80 x (2 x (8192 + 8192) + 2 x (8192 + 1024) + 3 x (8192 + 28672))."""
    assert set(MODELS) >= {name}
    architecture, config = architecture_of(name)
    with torch.device("meta"):
        model = architecture.Model(config)
    job = job_of(model)
    assert sum(weight.numel for weight in job.weights) == parameters
    assert len(job.blocks) == config.num_hidden_layers
    if adapter is not None:
        assert job.adapter == adapter


def test_targets_are_those_of_lora() -> None:
    """Oracle: LoRA's own default; the adapter is the one that is really made, with and without DoRA's lengths."""
    assert tiny().targets == LORA_TARGETS
    for dora in (False, True):
        model = model_of(TINY)
        add_adapter(model, "policy", LoraConfig(rank=3, dora=dora), 0)
        made = sum(p.numel() for p in trainable_parameters(model, "policy").values())
        assert tiny(rank=3, dora=dora).adapter == made


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 12, 64])
def test_the_shards_are_the_whole(ranks: int) -> None:
    """Oracle: all ranks together hold the model, rank 0 holds the most, and torch.chunk cuts the same rows."""
    for job in (tiny(), tiny(rank=0), tiny(nf4=True)):
        held = [job.stored_bytes(ranks, rank) for rank in range(ranks)]
        assert sum(held) == job.stored_bytes(1) and max(held) == held[0]
        assert job.gathered_bytes(job.weights, ranks) >= job.gathered_bytes(job.weights, 1)
    for rows in (1, 3, 11, 12, 64, 100):
        parts = [len(part) for part in torch.arange(rows).chunk(ranks)]
        assert [rows_of(rows, ranks, rank) for rank in range(ranks)] == parts + [0] * (ranks - len(parts))


def test_bytes_of_weights_by_hand() -> None:
    """Oracle: by hand. In 8 parts 12 and 20 rows are padded to 16 and 24, 4 to 8, 11 to 16."""
    assert tiny().stored_bytes(1) == 2 * (2 * BLOCK + ROOT)
    assert tiny(dtype=torch.float32).stored_bytes(1) == 4 * (2 * BLOCK + ROOT)
    assert tiny(rank=0).stored_bytes(1) == 4 * (2 * BLOCK + ROOT)  # trained weights are kept in fp32
    padded = 16 * 12 * 2 + 8 * 12 * 2 + 24 * 12 * 2 + 16 * 20 + 2 * 16
    job = tiny()
    assert job.gathered_bytes(job.blocks[0], 8) == 2 * padded
    assert job.gathered_bytes(job.root, 8) == 2 * (16 * 12 + 16)
    assert job.gathered_bytes(job.blocks[0], 8, 4) == 4 * padded
    packed = tiny(nf4=True)
    linear = BLOCK - 2 * 12
    assert packed.stored_bytes(1) == 2 * (linear // 2 + 2 * 2 * 12) + 2 * ROOT
    # 9 or 12 blocks of 64 numbers round up: 144 -> 3, 48 -> 1, 240 -> 4; one block of blocks each, 257 fp32 besides.
    scales = 2 * (3 + 3 + 1 + 1 + 4 + 4 + 4 + 7 * (4 + 4 * 257))
    assert packed.scale_bytes() == scales and job.scale_bytes() == 0
    with pytest.raises(ValueError, match="four bits cannot be trained"):
        tiny(nf4=True, rank=0)


def test_memory_of_an_adapter_by_hand() -> None:
    """Oracle: by hand. Whole: weights, adapter and its reference's copy, gradient, moments; cut: root and two blocks
    besides, as there are no more to gather ahead; 8-bit moments with a scale for 256."""
    job = tiny(rank=2, activations="full", micro_batch_tokens=4096)
    adapter = 2 * 2 * (2 * (12 + 12) + 2 * (12 + 4) + 3 * (12 + 20))
    assert job.adapter == adapter
    whole = memory_of(job, 1, GB)
    assert whole.weights == 2 * (2 * BLOCK + ROOT) + 2 * 4 * adapter
    assert (whole.gathered, whole.gradients, whole.moments) == (0, 4 * adapter, 8 * adapter)
    plan = MemoryPlan("full", Footprint(job.config, torch.bfloat16, 2), 0, "cuda")
    assert whole.activations == plan.peak_bytes(4096, "full") and whole.policy == "full"
    assert whole.room == int(GB * (1 - MARGIN)) - whole.weights - 12 * adapter
    assert whole.total == whole.weights + 12 * adapter + whole.activations and whole.fits
    cut = memory_of(job, 4, GB)
    assert cut.weights == job.stored_bytes(4) + 8 * adapter
    assert cut.gathered == job.gathered_bytes(job.root, 4) + 2 * job.gathered_bytes(job.blocks[0], 4)
    kept = memory_of(replace(job, reshard=False), 4, GB)
    assert kept.gathered == cut.gathered + job.gathered_bytes(job.blocks[0], 4)  # and the message of the last one
    small = memory_of(replace(job, eight_bit=True), 1, GB)
    assert small.moments == int(2 * adapter * (1 + 4 / 256))
    assert memory_of(replace(job, reference=False), 1, GB).weights == whole.weights - 4 * adapter
    moved = memory_of(replace(job, offload=True), 4, GB)
    assert moved.host == job.stored_bytes(4) and moved.weights == 8 * adapter


def test_memory_of_full_fine_tuning_by_hand() -> None:
    """Oracle: by hand; per rank weights, gradients and two moments in fp32, gathered in bf16."""
    job = tiny(rank=0, reference=False, activations="none")
    memory = memory_of(job, 4, GB)
    part = job.stored_bytes(4)
    assert (memory.weights, memory.gradients, memory.moments) == (part, part, 2 * part)
    block, root = job.gathered_bytes(job.blocks[0], 4), job.gathered_bytes(job.root, 4)
    head = 12 * 12 * 2  # tied to the embedding, 11 rows padded to 12
    assert memory.gathered == root + 2 * block + head + block + job.gathered_bytes(job.blocks[0], 4, 4)
    moved = memory_of(replace(job, offload=True), 4, GB)
    assert (moved.host, moved.weights, moved.gradients, moved.moments) == (4 * part, 0, 0, 0)


def test_a_tight_gpu_takes_a_leaner_policy() -> None:
    """Oracle: invariants. Less memory never gives a faster policy; `fits` turns where the leanest no longer does; the
    total at no memory at all is what `needed` says."""
    job = tiny(activations="auto", micro_batch_tokens=4096)
    order = ("none", "selective", "full", "offload")
    seen = [memory_of(job, 2, free) for free in range(4 * GB, 10**8, -(10**8))]
    ranks = [order.index(memory.policy) for memory in seen]
    assert ranks == sorted(ranks)
    leanest = job.needed(ParallelConfig(), 2)
    limit = int(leanest / (1 - MARGIN))
    assert memory_of(job, 2, limit + 2).fits and not memory_of(job, 2, limit - 2).fits


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"nf4": True}, {"eight_bit": True}])
def test_more_ranks_hold_less_each(settings: dict[str, Any]) -> None:
    """Oracle: invariant, on Llama-3-70B."""
    architecture, config = architecture_of("llama-3-70b")
    with torch.device("meta"):
        model = architecture.Model(config)
    job = job_of(model, activations="full", **settings)
    totals = [memory_of(job, ranks, 80 * GB).total for ranks in (2, 4, 8, 16, 64)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5
    longer = memory_of(replace(job, micro_batch_tokens=16384), 8, 80 * GB)
    assert longer.total > memory_of(job, 8, 80 * GB).total


def test_which_layouts_there_are() -> None:
    """Oracle: by hand; a group of one node is no hybrid, weights that are trained are not copied."""
    nodes, node, one = Cluster(8, 8, GB), Cluster(1, 8, GB), Cluster(1, 1, GB)
    assert layouts(tiny(), nodes) == ("replicate", "hybrid", "shard")
    assert layouts(tiny(), node) == ("replicate", "shard") and layouts(tiny(), one) == ("replicate",)
    assert layouts(tiny(rank=0), nodes) == ("hybrid", "shard") and layouts(tiny(rank=0), one) == ("shard",)
    assert [shards_of(layout, nodes) for layout in ("replicate", "hybrid", "shard")] == [1, 8, 64]
    with pytest.raises(ValueError, match="layout 'ddp' is unknown; choose from"):
        shards_of("ddp", node)
    assert Weight("a.weight", (3, 4)).numel == 12
