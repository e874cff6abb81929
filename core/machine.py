"""Cores and memory that this process may use: those of the machine, within the limits of its control groups.

Containers and batch systems limit a process through Linux control groups, of version 1 (a folder for each controller)
or 2 (one folder for all), and a limit may be set on the process's own group or on any group around it. Elsewhere than
on Linux there are no limits to read.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO, GROUPS, MEMBERSHIP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # version 1 writes about 2**63 where there is no limit


def usable_cores() -> int:
    """Return how many cores this process can keep busy, at least 1."""
    scheduled = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [float(scheduled)]
    for group in _groups("cpu"):
        if (limit := _words(group / "cpu.max")) and limit[0] != "max":
            shares.append(int(limit[0]) / int(limit[1]))
        quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            shares.append(int(quota[0]) / int(period[0]))
    return max(1, math.floor(min(shares)))


def available_memory() -> int:
    """Return how many more bytes this process can take; half of the machine's where the system does not tell."""
    if not MEMINFO.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = [int(_table(MEMINFO)["MemAvailable:"]) * 1024]
    for group in _groups("memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _words(group / limit_name), _words(group / used_name)
            if limit and used and limit[0] != "max" and int(limit[0]) < UNLIMITED:
                cache = int(_table(group / "memory.stat").get(cache_name, 0))  # given back when memory is short
                free.append(int(limit[0]) - int(used[0]) + cache)
    return max(0, min(free))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups of `controller` and of all groups around them, where they are seen.

    In a container the folders may begin at its own group, whose path, as the process knows it, then leads nowhere.
    """
    roots = {"": GROUPS, controller: GROUPS / controller}  # version 2 names no controller
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, names, path = line.split(":", 2)
        for name in {"", controller}.intersection(names.split(",")):
            parts = Path(path.lstrip("/")).parts
            if ".." not in parts and (root := roots.pop(name, None)):
                yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))
    yield from roots.values()


def _words(path: Path) -> list[str]:
    """Return the words of a small file of the kernel, none where there is no such file or it may not be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _table(path: Path) -> dict[str, str]:
    """Return the first two columns of a table of the kernel."""
    try:
        return {line.split()[0]: line.split()[1] for line in path.read_text().splitlines()}
    except OSError:
        return {}
