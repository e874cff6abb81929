"""`matryoshka bench load`: a checkpoint folder into memory, ours against transformers' from_pretrained.

Every load has a process of its own, so that nothing is warm but the disk's cache, and its peak is its own: the highest
resident memory above what the imports took, and of it the part that is not the mapped file (which the system takes
back when it needs room). A load ends when every weight has been read once, since a mapped file is read only then.
Importing is not timed. The two processes alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from matryoshka.benchmarks.measure import DTYPES, MIB, alternate, check_peers, dtype_of, peer, prepare, require
from matryoshka.benchmarks.result import BenchResult, Row, speed_up

PEERS = ("transformers",)
OURS = "streaming load"
STATUS = Path("/proc/self/status")
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Config:
    """Time and peak memory of loading a model folder."""

    device: str = "cpu"
    """Where to compute: "cpu" or "cuda"."""
    against: tuple[str, ...] = ("transformers",)
    """Peers to measure: transformers, or none."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    dtype: str = ""
    """Data type; "" is float32 on a CPU, bfloat16 on a GPU."""
    repeats: int = 5
    """Measurements; their median counts."""
    threads: int = 0
    """CPU threads, 0 for as many as there are cores."""

    def __post_init__(self) -> None:
        check_peers("load", self.against, PEERS)
        if self.repeats < 1:
            raise ValueError(f"bench load: repeats {self.repeats} must be at least 1")


def run(config: Config) -> BenchResult:
    """Return medians of seconds and of peak memory, in a process each."""
    packages = require(config.against)
    prepare(config.device, config.threads)
    dtype = str(dtype_of(config.dtype, config.device)).removeprefix("torch.")
    stored = sum(path.stat().st_size for path in config.model.glob("*.safetensors"))
    if not stored:
        raise FileNotFoundError(f"{config.model}: no safetensors in this folder; expected a Hugging Face model folder")
    children = {name: partial(_child, name, config, dtype) for name in (OURS, *config.against)}
    children[OURS]()  # fills the disk's cache
    taken = alternate(children, config.repeats)
    rows = []
    for name, loads in taken.items():
        peaks = [key for key in loads[0] if key != "seconds"]
        details: dict[str, object] = {f"peak_{key}_mib": _median(loads, key) / MIB for key in peaks}
        details |= {"max_s": max(load["seconds"] for load in loads), "stored_mib": stored / MIB, "dtype": dtype}
        rows.append(Row(name, _median(loads, "seconds"), "s", details))
    seconds = {row.name: row.value for row in rows if row.value is not None}
    ratio = speed_up(seconds[OURS], [seconds[name] for name in config.against], higher_is_better=False)
    return BenchResult("load", rows, ratio, None, packages)


def _median(loads: list[dict[str, float]], key: str) -> float:
    return statistics.median(load[key] for load in loads)


def _child(name: str, config: Config, dtype: str) -> dict[str, float]:
    """Load in a new process and return its seconds and peaks in bytes. Raises ValueError with what it complained of."""
    # The package may run in place, through a link that only this process's path knows.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "matryoshka.benchmarks.load"]
    command += [name, str(config.model), dtype, config.device, str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"bench load: {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Watch(threading.Thread):
    """Samples this process's anonymous memory, of which the system keeps no highest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peak = 0

    def run(self) -> None:
        while not self.done.wait(SAMPLE_S):
            self.peak = max(self.peak, memory("RssAnon"))


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def measure(name: str, folder: Path, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Load the model in this process and return seconds and peak bytes above those at the start."""
    load: Any
    if name == OURS:
        from matryoshka.core.models.load import load_model

        load = partial(load_model, folder, dtype, device)
    else:
        found = peer("transformers").AutoModelForCausalLM
        settings = {"device_map": device} if torch.device(device).type == "cuda" else {}
        load = partial(found.from_pretrained, folder, dtype=dtype, **settings)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.zeros(1, device=device)  # the context is not the load's
        torch.cuda.reset_peak_memory_stats()
    resident, anonymous = memory("VmRSS"), memory("RssAnon")
    watch = _Watch()
    watch.start()
    began = time.perf_counter()
    model = load()
    for parameter in model.parameters():
        parameter.sum()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    watch.done.set()
    watch.join()
    peaks = {
        "resident": max(0, memory("VmHWM") - resident),
        "anonymous": max(watch.peak, memory("RssAnon")) - anonymous,
    }
    if on_gpu:
        peaks["device"] = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, **peaks}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for argument in ("name", "folder", "dtype", "device", "threads"):
        parser.add_argument(argument)
    given = parser.parse_args()
    torch.set_num_threads(int(given.threads))
    print(json.dumps(measure(given.name, Path(given.folder), DTYPES[given.dtype], given.device)))
