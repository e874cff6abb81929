"""Messages between the ranks of a run, beside training: small sums and texts, over gloo whatever the devices are.

Every method is a collective: all ranks call it, in the same order. In a single process each is the identity.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from matryoshka.core.distributed import ALONE, TIMEOUT_S, World
from matryoshka.core.protocols import GeneratorError

T = TypeVar("T")


class Ranks:
    """The processes of a run, with a process group of their own, so that messages do not mix with gradients.

    A rank that sends nothing for TIMEOUT_S is taken to be dead.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self._group = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))

    @property
    def node(self) -> int:
        """The number of this rank's machine, as torchrun lays ranks out."""
        return self.world.rank // self.world.local_size

    @property
    def num_nodes(self) -> int:
        return self.world.size // self.world.local_size

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Return the sum over the ranks of each number. Raises RuntimeError when a rank is dead."""
        total = torch.tensor(numbers, dtype=torch.int64)
        if self.world.size > 1:
            dist.all_reduce(total, group=self._group)
        return [int(number) for number in total]

    def texts(self, text: str) -> list[str]:
        """Return the text of every rank, in rank order. Raises RuntimeError when a rank is dead."""
        texts = [text] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(texts, text, group=self._group)
        return texts

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.sums([0])

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Continue only if the block succeeds on every rank: the first rank that fails raises, the others exit.

        For errors that a user has to mend: they are then reported once, not once a rank.
        """
        problem = ""
        try:
            yield
        except (ValueError, OSError, GeneratorError) as err:
            problem = str(err) or type(err).__name__
            if next(i for i, text in enumerate(self.texts(problem)) if text) == self.world.rank:
                raise
            sys.exit(2)
        if not problem and any(self.texts("")):
            sys.exit(2)

    def agree(self, text: str, what: str) -> None:
        """Raise ValueError unless every rank has the same `text`; `what` names it."""
        texts = self.texts(text)
        if odd := [rank for rank, other in enumerate(texts) if other != texts[0]]:
            raise ValueError(
                f"{what} of rank {odd[0]} are not those of rank 0; give all ranks the same code, data and "
                "configuration, and a run directory on a file system that all of them share"
            )


def deal(items: Sequence[T], owners: Sequence[str], count: int) -> list[list[T]]:
    """Return `items` in `count` shares: owner i of the list has all its items in share i modulo `count`."""
    order = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    shares: list[list[T]] = [[] for _ in range(count)]
    for item, owner in zip(items, owners, strict=True):
        shares[order[owner] % count].append(item)
    return shares
