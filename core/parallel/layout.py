"""How a model is divided over the ranks, and the choice of the layout that fits with the least communication.

replicate  every rank holds the weights; nothing is communicated but gradients of what is trained, once a step;
shard      each rank holds its part of every weight; a block's weights are gathered before it runs and freed after it;
hybrid     the ranks of a node share one copy as under `shard`, the nodes hold a copy each.
"""

from dataclasses import dataclass
from typing import Protocol

from matryoshka.core.distributed import World
from matryoshka.core.training.memory import GIB, MARGIN

LAYOUTS = ("replicate", "hybrid", "shard")  # from the least communication to the least memory


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is divided over the ranks that torchrun starts; a single process holds all of it."""

    layout: str = "auto"
    """The layout: "replicate", "shard", "hybrid", or "auto", which takes the first that fits in memory."""
    group: int = 0
    """How many ranks share one copy under "hybrid"; 0: those of a node."""
    reshard: bool = True
    """Free a block's weights after its forward pass and gather them again for the backward pass."""
    prefetch: int = 1
    """How many blocks ahead are being gathered."""
    offload: bool = False
    """Keep each rank's part in the host's memory (with AdamW's moments, where it is trained)."""

    def __post_init__(self) -> None:
        if self.layout not in ("auto", *LAYOUTS):
            raise ValueError(f"parallel: layout {self.layout!r} is unknown; choose from {['auto', *LAYOUTS]}")
        for name in ("group", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"parallel: {name} {getattr(self, name)} must not be negative")


class Needs(Protocol):
    """The part of a training that decides the layout: `cluster.py` has it as `Job`. full: all weights are."""

    @property
    def full(self) -> bool: ...

    def needed(self, config: ParallelConfig, ranks: int) -> int:
        """Return the bytes that each of `ranks` ranks needs that share one copy; 1: it is a rank's own, uncut."""
        ...


@dataclass(frozen=True)
class Layout:
    """A layout that was chosen. group: how many ranks share one copy of the weights. reason: why, for people."""

    name: str
    group: int
    reason: str


def choose_layout(config: ParallelConfig, job: Needs, free: int, world: World) -> Layout:
    """Return the layout that `config` asks for, or under "auto" the first of LAYOUTS whose share fits in `free` bytes.

    Where the weights are trained, "auto" cuts them up: what would be copied is four times as much. Raises ValueError
    where it does not fit, listing what each layout would need, and where the ranks cannot be grouped.
    """
    groups = {"replicate": 1, "hybrid": config.group or world.local_size, "shard": world.size}
    room = int(free * (1 - MARGIN))
    needed = {name: job.needed(config, group) for name, group in groups.items()}
    plan = ", ".join(f"{name} {needed[name] / GIB:.2f} GiB" for name in LAYOUTS)
    plan = f"a rank needs under {plan}; {room / GIB:.2f} GiB are free for each of {world.size}"
    if config.layout == "auto":
        tried = [name for name in LAYOUTS if name != "replicate" or not job.full]
        if not _can_group(groups["hybrid"], world):  # one node for one
            tried.remove("hybrid")
        name = next((name for name in tried if needed[name] <= room), "")
    else:
        name = config.layout if needed[config.layout] <= room else ""
    if config.layout == "hybrid" and not _can_group(groups["hybrid"], world):
        raise ValueError(
            f"parallel: layout 'hybrid' wants {world.size} ranks in groups of {groups['hybrid']}; the size of a group "
            "must divide the number of ranks and be neither 1 ('replicate') nor all of them ('shard')"
        )
    if not name:
        raise ValueError(
            f"parallel: the model does not fit with layout = {config.layout!r}: {plan}; use more ranks, "
            "offload = true, or a lower micro_batch_tokens"
        )
    return Layout(name, groups[name], f"layout {name}: {plan}")


def _can_group(group: int, world: World) -> bool:
    return world.size % group == 0 and 1 < group < world.size
