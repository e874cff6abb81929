"""Limits of control groups, versions 1 and 2, in folders that look like the kernel's. Oracles: sums by hand."""

import os
from pathlib import Path

import pytest

from matryoshka.core import machine
from matryoshka.core.machine import available_memory, usable_cores

MEMORY_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
MEMORY_V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of groups on a machine with 2000 kB available and eight cores."""
    (tmp_path / "meminfo").write_text("MemTotal:       4000 kB\nMemAvailable:   2000 kB\nActive(anon): 5 kB\n")
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path / "groups"


def limit(group: Path, names: tuple[str, str, str], most: str, used: int, cache: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text(f"{most}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 600000\n{names[2]} {cache}\n")


@pytest.mark.parametrize(
    ("names", "membership", "group"),
    [
        (MEMORY_V2, "", ""),
        (MEMORY_V2, "0::/\n", ""),
        (MEMORY_V2, "0::/a/b\n", "a/b"),
        (MEMORY_V2, "0::/a/b\n", "a"),  # a limit on a group around the process's own
        (MEMORY_V2, "0::/docker/0123\n", ""),  # the container's own group is mounted as the root
        (MEMORY_V1, "", "memory"),
        (MEMORY_V1, "9:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n", "memory/a/b"),
        (MEMORY_V1, "4:memory:/a/b\n", "memory/a"),
        (MEMORY_V1, "4:memory:/docker/0123\n", "memory"),
        (MEMORY_V1, "4:hugetlb,memory:/a\n", "memory/a"),
        (MEMORY_V1, "4:memory:/../..\n", "memory"),
    ],
)
def test_a_limit_of_memory_counts(groups: Path, names: tuple[str, str, str], membership: str, group: str) -> None:
    """Oracle: limit 1000 kB less 700 in use, of which 100 are cache."""
    (groups.parent / "membership").write_text(membership)
    assert available_memory() == 2000 * 1024
    limit(groups / group, names, "max" if names is MEMORY_V2 else str(2**63 - 4096), 700_000, 100_000)
    assert available_memory() == 2000 * 1024
    limit(groups / group, names, "1000000", 700_000, 100_000)
    assert available_memory() == 400_000
    limit(groups / group, names, "1000000", 1_500_000, 0)
    assert available_memory() == 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_a_limit_of_cores_counts(groups: Path, files: dict[str, str], cores: int) -> None:
    """Oracle: the quota over its period, rounded down, at least 1 and at most the cores that there are."""
    for name, text in files.items():
        (groups / name).parent.mkdir(exist_ok=True)
        (groups / name).write_text(f"{text}\n")
    assert usable_cores() == cores


def test_this_machine() -> None:
    """Oracle: the value lies between the memory that a running test needs and the memory of the machine."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 20 * 2**20 < available_memory() < total
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_system_that_does_not_tell(groups: Path) -> None:
    """Oracle: half of the physical memory."""
    (groups.parent / "meminfo").unlink()
    assert available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
