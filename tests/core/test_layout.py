"""core/layout.py: oracles are the sizes of a small model written out, and the layouts in their order."""

from pathlib import Path

import pytest
import torch

from matryoshka.core.distributed import World
from matryoshka.core.layout import LAYOUTS, Layout, ParallelConfig, Sizes, choose_layout
from matryoshka.core.load import empty_model

NODE = World(size=4, local_size=4)
NODES = World(size=8, local_size=4)
SIZES = Sizes(total=1000, root=200, block=100, stored=2, computed=2, trained=False, extra=50)


def test_sizes_of_a_model(tiny_dir: Path) -> None:
    """Oracle: by hand. Tied: embedding 259 x 32 and a norm; a block: q, o 32 x 32, k, v 32 x 16, MLP 3 x 32 x 64."""
    sizes = Sizes.of(empty_model(tiny_dir), torch.float32, torch.bfloat16, True, 7)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert (sizes.root, sizes.block, sizes.total) == (259 * 32 + 32, block, 259 * 32 + 32 + 2 * block)
    assert (sizes.stored, sizes.computed, sizes.trained, sizes.extra) == (4, 2, True, 7)


def test_what_a_rank_needs_by_hand() -> None:
    """Oracle: by hand. Whole: 1000 numbers. Cut in 4: 250, and the root with three blocks while they are computed."""
    config = ParallelConfig()
    assert SIZES.needed(config, 1) == 2 * 1000 + 50
    assert SIZES.needed(config, 4) == 2 * 250 + 2 * (200 + 3 * 100) + 50
    assert SIZES.needed(ParallelConfig(prefetch=0), 4) == 2 * 250 + 2 * (200 + 100) + 50
    assert SIZES.needed(ParallelConfig(reshard=False), 4) == 2 * 250 + 2 * 1000 + 50
    assert SIZES.needed(ParallelConfig(offload=True), 4) == 2 * (200 + 3 * 100) + 50
    trained = Sizes(total=1000, root=200, block=100, stored=4, computed=2, trained=True, extra=0)
    # Weights, gradients and moments in fp32; gradients of root and a block in bf16 and in fp32 before they are cut.
    assert trained.needed(config, 4) == 4 * 4 * 250 + 2 * (200 + 3 * 100) + (2 + 4) * (200 + 100)


@pytest.mark.parametrize(
    ("world", "free", "trained", "expected"),
    [
        (NODE, 10_000, False, ("replicate", 1)),
        (NODE, 2000, False, ("shard", 4)),
        (NODES, 10_000, False, ("replicate", 1)),
        (NODES, 2000, False, ("hybrid", 4)),
        (NODES, 1500, False, ("shard", 8)),
        (NODE, 100_000, True, ("shard", 4)),
        (NODES, 100_000, True, ("hybrid", 4)),
        (World(size=8, local_size=1), 2000, False, ("shard", 8)),  # nodes of one GPU
        (World(), 10_000, False, ("replicate", 1)),
    ],
)
def test_auto_communicates_the_least_that_fits(
    world: World, free: int, trained: bool, expected: tuple[str, int]
) -> None:
    """Oracle: by hand, from what a rank needs: 2050 whole, 1550 in four parts, 1425 in eight; a tenth stays free."""
    sizes = Sizes(1000, 200, 100, 2, 2, trained, 50)
    layout = choose_layout(ParallelConfig(), sizes, free * 10 // 9 + 1, world)
    assert (layout.name, layout.group) == expected
    assert layout.reason.startswith(f"layout {expected[0]}: a rank needs under replicate 0.00 GiB, hybrid ")
    assert f"free for each of {world.size}" in layout.reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_asked_for_is_taken(name: str) -> None:
    """Oracle: identity."""
    layout = choose_layout(ParallelConfig(name, group=2), SIZES, 10**9, NODE)
    assert (layout.name, layout.group) == (name, {"replicate": 1, "hybrid": 2, "shard": 4}[name])
    assert isinstance(layout, Layout)


@pytest.mark.parametrize(
    ("config", "world", "free", "problem"),
    [
        (ParallelConfig(), NODE, 100, "does not fit with layout = 'auto': a rank needs under replicate"),
        (ParallelConfig("replicate"), NODE, 2000, "does not fit with layout = 'replicate'"),
        (ParallelConfig("shard"), NODE, 1000, "use more ranks, offload = true, or a lower micro_batch_tokens"),
        (ParallelConfig("hybrid", group=3), NODE, 10**9, "wants 4 ranks in groups of 3; .* must divide"),
        (ParallelConfig("hybrid"), NODE, 10**9, "wants 4 ranks in groups of 4; .* nor all of them"),
        (ParallelConfig("hybrid", group=1), NODE, 10**9, "neither 1 \\('replicate'\\)"),
    ],
)
def test_what_cannot_be_is_refused(config: ParallelConfig, world: World, free: int, problem: str) -> None:
    """Oracle: messages, with what each layout needs."""
    with pytest.raises(ValueError, match=problem):
        choose_layout(config, SIZES, free, world)


def test_bad_settings() -> None:
    """Oracle: messages."""
    with pytest.raises(ValueError, match="layout 'ddp' is unknown; choose from"):
        ParallelConfig("ddp")
    with pytest.raises(ValueError, match="group -1 must not be negative"):
        ParallelConfig(group=-1)
    with pytest.raises(ValueError, match="prefetch -1 must not be negative"):
        ParallelConfig(prefetch=-1)
