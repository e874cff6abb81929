"""How the benchmarks take their numbers: one process, warm-up passes, alternating order, medians, allocator peaks.

Candidates are timed in turn, forwards and then backwards, so that a machine that slows down or warms up does so for
all of them. Memory is what torch's allocator held at its highest beyond what it held at the start: exact, and on both
kinds of device the same notion; scratch space inside MKL or cuBLAS is not in it.
"""

import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from matryoshka.core.config import nearest
from matryoshka.core.machine import usable_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MIB = 2**20
T = TypeVar("T")
# Peer -> (import name, distribution) of what it needs.
PACKAGES = {
    "liger": ("liger_kernel", "liger-kernel"),
    "cce": ("cut_cross_entropy", "cut-cross-entropy"),
    "trl": ("trl", "trl"),
    "trl-liger": ("liger_kernel", "liger-kernel"),
    "transformers": ("transformers", "transformers"),
}


def check_peers(bench: str, against: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for a peer that this bench does not know, naming the nearest one."""
    for peer in against:
        if peer not in known:
            raise ValueError(f"bench {bench}: --against {peer!r} is unknown; {nearest(peer, known)}")


def require(peers: Sequence[str]) -> list[str]:
    """Return the distributions that these peers need. Raises ValueError naming the first that is not installed."""
    needed = []
    for peer in peers:
        module, distribution = PACKAGES.get(peer, (None, ""))
        if module is None:
            continue
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"bench: --against {peer} needs the package {distribution}, which is not installed; "
                f"pip install {distribution}, or leave {peer} out"
            )
        needed.append(distribution)
    return needed


def peer(module: str) -> Any:
    """Return an installed package of a peer. Its type is Any, since types must not depend on the installed packages."""
    return importlib.import_module(module)


def prepare(device: str, threads: int) -> None:
    """Set torch's threads (0: one for each core). Raises ValueError for a device that this machine does not have."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler behind `peak_bytes` writes lines to stderr
    torch.set_num_threads(threads or usable_cores())
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"bench: device {device!r} is not measured here; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda, but torch finds no GPU here; `matryoshka doctor` says what it finds")


def dtype_of(name: str, device: str) -> torch.dtype:
    """Return the dtype of that name; "" is bfloat16 on a GPU and float32 on a CPU."""
    name = name or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    if name not in DTYPES:
        raise ValueError(f"bench: dtype {name!r} is unknown; choose from {list(DTYPES)}")
    return DTYPES[name]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str) -> Callable[[], float]:
    """Return a function that does `work` and returns the seconds that it took, the device's included."""

    def run() -> float:
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - began

    return run


def alternate(candidates: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Return the results of `repeats` calls of each candidate, called in turn, every second round in reverse order."""
    taken: dict[str, list[T]] = {name: [] for name in candidates}
    for round_ in range(repeats):
        for name in list(candidates)[:: -1 if round_ % 2 else 1]:
            taken[name].append(candidates[name]())
    return taken


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Return the most bytes that torch's allocator held during `work` beyond what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    return highest(events_of(profile))


def events_of(profile: torch.profiler.profile) -> list[Any]:
    """Return everything that `profile` has noted, in the order of time."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def highest(events: Sequence[Any]) -> int:
    """Return the most bytes that a profile's events held beyond what was held before."""
    most: int = max(itertools.accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))
    return most
