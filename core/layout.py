"""How a model lies on the ranks, and which way needs the least communication of those that fit in memory.

replicate  every rank holds the weights; nothing is communicated but gradients of what is trained, once a step;
shard      each rank holds its part of every weight; a block's weights are gathered before it runs and freed after it;
hybrid     the ranks of a node share one copy as under `shard`, the nodes hold a copy each.
"""

from dataclasses import dataclass

import torch

from matryoshka.core.distributed import World
from matryoshka.core.language_model import LanguageModel
from matryoshka.core.memory import GIB, MARGIN

LAYOUTS = ("replicate", "hybrid", "shard")  # from the least communication to the least memory


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies on the ranks that torchrun starts; a single process holds all of it.

    layout: "replicate", "shard", "hybrid", or "auto", the one that communicates least among those that fit. group: how
    many ranks share one copy under hybrid, 0 for those of a node. reshard: free a block's weights after its forward
    pass and gather them again for the backward pass, else keep them in between. prefetch: how many blocks ahead are
    being gathered. offload: keep each rank's part in the host's memory (with AdamW's moments, where it is trained).
    """

    layout: str = "auto"
    group: int = 0
    reshard: bool = True
    prefetch: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.layout not in ("auto", *LAYOUTS):
            raise ValueError(f"parallel: layout {self.layout!r} is unknown; choose from {['auto', *LAYOUTS]}")
        for name in ("group", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"parallel: {name} {getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class Sizes:
    """What a rank has to hold, in bytes, taken from a model without weights.

    stored, computed: of a number as it is kept, and as it is computed with. extra: what every rank holds beside the
    model: adapters with their gradients and moments, activations.
    """

    total: int
    root: int
    block: int
    stored: int
    computed: int
    trained: bool
    extra: int

    @classmethod
    def of(cls, model: LanguageModel, stored: torch.dtype, computed: torch.dtype, trained: bool, extra: int) -> "Sizes":
        """Return the sizes of `model`; trained: its own weights are, by AdamW."""
        total = sum(parameter.numel() for parameter in model.parameters())
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
        root = total - sum(blocks)
        return cls(total, root, max(blocks), stored.itemsize, computed.itemsize, trained, extra)

    def needed(self, config: ParallelConfig, ranks: int) -> int:
        """Return the bytes that each of `ranks` ranks needs that share one copy; 1: it is a rank's own, uncut."""
        kept = self.stored * (4 if self.trained else 1)  # with gradient and two moments
        if ranks == 1:
            return self.total * kept + self.extra
        part = 0 if config.offload else -(-self.total // ranks) * kept
        return part + self.gathered(config) + self.extra

    def gathered(self, config: ParallelConfig) -> int:
        """Return the bytes of what is whole on a rank for a while, where the weights are cut up."""
        # A block that is gathered ahead lies in the message and outside of it for a while.
        gathered = self.root + min(self.block * (1 + 2 * config.prefetch), self.total - self.root)
        whole = (gathered if config.reshard else self.total) * self.computed
        if self.trained:  # gradients before they are cut up, and what they are summed in
            whole += (self.root + self.block) * (self.computed + max(self.computed, 4))
        return whole


@dataclass(frozen=True)
class Layout:
    """A layout that was chosen. group: how many ranks share one copy of the weights. reason: why, for people."""

    name: str
    group: int
    reason: str


def choose_layout(config: ParallelConfig, sizes: Sizes, free: int, world: World) -> Layout:
    """Return the layout that `config` asks for, or under "auto" the first of LAYOUTS whose share fits in `free` bytes.

    Where the weights are trained, "auto" cuts them up: what would be copied is four times as much. Raises ValueError
    where it does not fit, listing what each layout would need, and where the ranks cannot be grouped.
    """
    groups = {"replicate": 1, "hybrid": config.group or world.local_size, "shard": world.size}
    room = int(free * (1 - MARGIN))
    needed = {name: sizes.needed(config, group) for name, group in groups.items()}
    plan = ", ".join(f"{name} {needed[name] / GIB:.2f} GiB" for name in LAYOUTS)
    plan = f"a rank needs under {plan}; {room / GIB:.2f} GiB are free for each of {world.size}"
    if config.layout == "auto":
        tried = [name for name in LAYOUTS if name != "replicate" or not sizes.trained]
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
