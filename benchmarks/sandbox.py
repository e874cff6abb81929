"""`matryoshka bench sandbox`: runs a second, start-up and cost of generated programs, with and without the boundary.

Four ways to run the same small program take turns: behind the whole boundary, behind it without bubblewrap, with limits
alone (isolation "none"), and a fresh interpreter for each run, as sandboxes usually do it. CPU time is that of this
process and of all processes below it, so other jobs on the machine disturb the rates and the start-up times, not the
costs. The soak repeats the bounded run many times and records memory, descriptors and processes, which must stay flat.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matryoshka.benchmarks.measure import MIB, alternate
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.tasks.sandbox import run_solution
from matryoshka.tasks.sandbox_backends import SCRIPT, LocalSandbox, Sandbox
from matryoshka.tasks.sandbox_command import CommandSandbox

RUNS_PER_S, START_MS = 300, 20.0
PROGRAM = "import math, time\nstarted = time.monotonic()\ndef solution():\n    math.sqrt(2)\n    return started"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Config:
    """Generated programs in the sandbox: runs a second, start-up, cost, and what a long soak leaves.

    Args:
        runs: Programs of each way in one turn.
        repeats: Turns.
        soak: Programs of the soak; 0 leaves it out.
        samples: Moments of the soak at which memory, descriptors and processes are recorded.
        plot: PNG of the soak; "" for none.
        workers: Programs at once; 0 for one a core.
    """

    runs: int = 200
    repeats: int = 5
    soak: int = 0
    samples: int = 100
    plot: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.runs, self.repeats, self.samples) < 1 or min(self.soak, self.workers) < 0:
            raise ValueError("bench sandbox: runs, repeats and samples must be at least 1, soak and workers at least 0")
        if self.plot and not self.soak:
            raise ValueError("bench sandbox: --plot shows the soak; give --soak, such as 100000")


@dataclass(frozen=True)
class Turn:
    """One turn of one way. start_s: from asking for a run to the first line of its program, for each run."""

    seconds: float
    cpu_s: float
    start_s: tuple[float, ...]


def run(config: Config) -> BenchResult:
    """Return rates, start-up times and costs of the four ways, their ratios, and the soak's growth."""
    workers = config.workers or len(os.sched_getaffinity(0))
    bounded, unbounded = LocalSandbox("required"), LocalSandbox("none")
    direct = LocalSandbox("required", use_bubblewrap=False)
    ways: dict[str, Sandbox] = {
        "bounded": bounded,
        "bounded, no namespaces": direct,
        "limits alone": unbounded,
        "fresh interpreter": CommandSandbox(("env", "-i")),
    }
    for sandbox in ways.values():
        sandbox.start(SCRIPT)

    def turn(sandbox: Sandbox) -> Callable[[], Turn]:
        return lambda: asyncio.run(_turn(sandbox, config.runs, workers))

    turns = alternate({name: turn(sandbox) for name, sandbox in ways.items()}, config.repeats + 1)
    turns = {name: taken[1:] for name, taken in turns.items()}
    rows = []
    for name, taken in turns.items():
        starts = [1e3 * start for one in taken for start in one.start_s]
        rate = statistics.median(config.runs / one.seconds for one in taken)
        details = {"workers": workers, "runs": config.runs * config.repeats}
        goal: dict[str, object] = {"target": RUNS_PER_S, "holds": rate >= RUNS_PER_S} if name == "bounded" else {}
        rows.append(Row(name, rate, "runs/s", {**details, **goal}))
        p99 = statistics.quantiles(starts, n=100)[98]
        goal = {"target": START_MS, "holds": p99 < START_MS} if name == "bounded" else {}
        rows.append(Row(f"{name}, start p99", p99, "ms", {"median": statistics.median(starts), **goal}))
        cost = statistics.median(1e3 * one.cpu_s / config.runs for one in taken)
        rows.append(Row(f"{name}, CPU", cost, "ms", {"runs/s on two cores": 2e3 / cost}))
    costs = {name: statistics.median(one.cpu_s for one in taken) for name, taken in turns.items()}
    rows.append(Row("boundary over limits alone", costs["bounded"] / costs["limits alone"], "x CPU"))
    if config.soak:
        rows += _soak(config, bounded, workers)
    for sandbox in (bounded, direct, unbounded):
        sandbox.close()
    return BenchResult("sandbox", rows, costs["fresh interpreter"] / costs["bounded"])


async def _turn(sandbox: Sandbox, runs: int, workers: int) -> Turn:
    starts: list[float] = []
    slots = asyncio.Semaphore(workers)
    left = runs

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            asked = time.monotonic()
            outcome = await run_solution(PROGRAM, 30.0, 256 * MIB, slots, sandbox)
            if outcome.value is None:
                raise RuntimeError(f"bench sandbox: the program failed: {outcome.error}")
            starts.append(outcome.value - asked)

    cpu, began = _cpu_s(), time.monotonic()
    await asyncio.gather(*(work() for _ in range(workers)))
    return Turn(time.monotonic() - began, _cpu_s() - cpu, tuple(starts))


def _soak(config: Config, sandbox: LocalSandbox, workers: int) -> list[Row]:
    """Return what memory, descriptors and processes grew by from the soak's first tenth to its end."""
    series: dict[str, list[float]] = {"runs": [], "MiB": [], "descriptors": [], "processes": []}
    step = max(1, config.soak // config.samples)
    began = time.monotonic()
    for done in range(step, config.soak + 1, step):
        asyncio.run(_turn(sandbox, step, workers))
        held = [os.getpid(), *_below()]
        for name, value in {
            "runs": done,
            "MiB": sum(_resident_bytes(pid) for pid in held) / MIB,
            "descriptors": sum(_descriptors(pid) for pid in held),
            "processes": len(held),
        }.items():
            series[name].append(value)
    seconds = time.monotonic() - began
    if config.plot:
        _draw(series, Path(config.plot))
    early = len(series["runs"]) // 10
    rows = [Row("soak", config.soak / seconds, "runs/s", {"runs": config.soak, "minutes": seconds / 60})]
    for name in ("MiB", "descriptors", "processes"):
        first, last = series[name][early], series[name][-1]
        details = {"after a tenth": first, "at the end": last, "highest": max(series[name])}
        rows.append(Row(f"soak, growth of {name}", last - first, name, details))
    return rows


def _draw(series: dict[str, list[float]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ValueError("bench: --plot needs matplotlib; pip install 'matryoshka-pilot[report]'") from err
    figure = Figure(figsize=(7, 6), layout="constrained")
    for place, name in enumerate(("MiB", "descriptors", "processes"), start=1):
        axes = figure.add_subplot(3, 1, place)
        axes.plot(series["runs"], series[name])
        axes.set_ylim(0, 1.2 * max(series[name]))
        axes.set_ylabel(name)
    axes.set_xlabel("programs run")
    figure.savefig(path, dpi=120)


def _below() -> list[int]:
    """Return the processes below this one."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        except OSError:  # ended meanwhile
            continue
        below = [int(number) for text in lists for number in text.split()]
        found += below
        waiting += below
    return found


def _cpu_s() -> float:
    """Return the CPU seconds of this process, of all below it, and of those of them that have ended."""
    ticks = 0
    for pid in [os.getpid(), *_below()]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime of proc(5)
    return ticks * TICK_S


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # a server hides itself from an ordinary user
        return 0
