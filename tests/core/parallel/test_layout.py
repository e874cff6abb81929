"""core/parallel/layout.py: oracles are the sizes of a small model written out, and the layouts in their order."""

from dataclasses import dataclass

import pytest

from matryoshka.core.distributed import World
from matryoshka.core.parallel.layout import LAYOUTS, Layout, ParallelConfig, choose_layout

NODE = World(size=4, local_size=4)
NODES = World(size=8, local_size=4)


@dataclass(frozen=True)
class Sizes:
    """A model of 1000 numbers of two bytes. Sharding cuts a part of it; 1050 bytes come on top."""

    full: bool = False

    def needed(self, config: ParallelConfig, ranks: int) -> int:
        return 2050 if ranks == 1 else 2000 // ranks + 1050


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
    """Oracle: by hand, from the bytes of a rank: 2050 whole, 1550 in four parts, 1300 in eight; a tenth stays free."""
    sizes = Sizes(trained)
    layout = choose_layout(ParallelConfig(), sizes, free * 10 // 9 + 1, world)
    assert (layout.name, layout.group) == expected
    assert layout.reason.startswith(f"layout {expected[0]}: a rank needs under replicate 0.00 GiB, hybrid ")
    assert f"free for each of {world.size}" in layout.reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_asked_for_is_taken(name: str) -> None:
    """Oracle: identity."""
    layout = choose_layout(ParallelConfig(name, group=2), Sizes(), 10**9, NODE)
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
        choose_layout(config, Sizes(), free, world)


def test_bad_settings() -> None:
    """Oracle: messages."""
    with pytest.raises(ValueError, match="layout 'ddp' is unknown; choose from"):
        ParallelConfig("ddp")
    with pytest.raises(ValueError, match="group -1 must not be negative"):
        ParallelConfig(group=-1)
    with pytest.raises(ValueError, match="prefetch -1 must not be negative"):
        ParallelConfig(prefetch=-1)
