"""One rank of `bench scale`: it trains and counts the bytes that it sends."""

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matryoshka.benchmarks.pal_rows import pal_items
from matryoshka.benchmarks.ranked import trained_part
from matryoshka.core.distributed import World, open_world
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.training import DTYPES, Base, load_base

# Kind -> the functions of torch.distributed that do it, of which the first that there is calls none of the others, and
# how often the ring algorithm goes round.
KINDS = {
    "all-gather": (("all_gather_single", "all_gather_into_tensor"), 1),
    "reduce-scatter": (("reduce_scatter_single", "reduce_scatter_tensor"), 1),
    "all-reduce": (("all_reduce",), 2),
}


class Watch:
    """Seconds in collectives; and by kind how often they were called, and how many bytes this rank sends."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.sent = 0.0, Counter[str](), Counter[str]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count every collective inside the block, each waited for on the spot."""
        with ExitStack() as stack:
            for kind, (names, turns) in KINDS.items():
                name = next(name for name in names if hasattr(dist, name))
                function = getattr(dist, name)
                setattr(dist, name, partial(self._counted, function, kind, turns))
                stack.callback(setattr, dist, name, function)
            yield

    def _counted(self, function: Callable[..., Any], kind: str, turns: int, *args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        ranks = dist.get_world_size(kwargs.get("group"))
        began = time.perf_counter()
        work = function(*args, **kwargs)
        if work is not None:
            work.wait()
        self.seconds += time.perf_counter() - began
        self.calls[kind] += 1
        self.sent[kind] += max(tensor.nbytes for tensor in tensors) * turns * (ranks - 1) // ranks


def measure(settings: dict[str, Any], world: World) -> dict[str, Any]:
    """Return seconds of the timed steps, and of the watched ones what was communicated."""
    torch.set_num_threads(1)
    model_folder, steps, full = Path(settings["model"]), settings["steps"], settings["full"]
    batch = settings["questions"] * settings["pairs"]
    config = TrainConfig(batch_size=batch, epochs=1, micro_batch_tokens=settings["micro_batch_tokens"])
    tokenizer = Tokenizer.load(model_folder)
    questions = settings["questions"] * (2 + 2 * steps)  # the last step, which saves, is not reached
    items = pal_items(tokenizer, questions, settings["pairs"], "full", None, settings["seed"])
    if full:
        items = [Item(item.sequences[:1], item.group) for item in items]
    parallel = ParallelConfig(settings["layout"], group=2 if settings["layout"] == "hybrid" else 0)
    dtype = DTYPES[settings["dtype"]]
    base = Base(model_folder, dtype, "none", full, LoraConfig(), parallel)
    model = load_base(base, items, config, world)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    parameters, objective, reference = trained_part(model, full, world)
    with tempfile.TemporaryDirectory() as folder:
        job = (model, parameters, items, config, objective, token_logps, Path(folder))
        rows = train(*job, TrainContext(reference, world=world))
        first = next(rows)
        timed = list(itertools.islice(rows, steps))
        watch = Watch()
        with watch.listening():
            watched = list(itertools.islice(rows, steps))
    return {
        "parameters": numbers,
        "first_loss": first["loss"],
        "seconds": [row["seconds"] for row in timed],
        "tokens": sum(row["tokens"] for row in timed) / steps,
        "imbalance": max(row.get("imbalance", 1.0) for row in timed + watched),
        "watched_s": sum(row["seconds"] for row in watched),
        "communication_s": watch.seconds,
        "calls": {kind: count / steps for kind, count in watch.calls.items()},
        "sent": {kind: size / steps for kind, size in watch.sent.items()},
    }


def main(settings: dict[str, Any]) -> None:
    with open_world() as world:
        found = measure(settings, world)
        if world.is_first:
            Path(settings["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
