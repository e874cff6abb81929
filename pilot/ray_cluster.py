"""The Ray cluster that `--executor ray` uses: joining it, and how many tasks it takes."""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def joined_cluster() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine that ends with the block.

    Raises ValueError naming the extra where Ray is not installed. Does nothing where the cluster is joined already.
    """
    try:
        import ray
    except ImportError as err:
        raise ValueError("executor = 'ray' needs the extra `cluster`: pip install 'matryoshka-pilot[cluster]'") from err
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        ray.shutdown()


def machines() -> list[dict[str, Any]]:
    """Return what Ray knows of each machine that is alive."""
    ray: Any = importlib.import_module("ray")
    return [node for node in ray.nodes() if node["Alive"]]


def num_places(device: str) -> int:
    """Return how many tasks the cluster takes at once: one for each GPU or, on CPUs, for each machine."""
    alive = machines()
    if device.startswith("cuda"):
        return max(1, int(sum(machine["Resources"].get("GPU", 0) for machine in alive)))
    return len(alive)
