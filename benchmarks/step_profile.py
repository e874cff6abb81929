"""One piece of work under torch's profiler, as a bar chart of where its time went."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from matryoshka.benchmarks.result import Row
from matryoshka.core.files import write_atomic

BARS = 15


def profile_chart(work: Callable[[], Any], path: Path, device: str) -> list[Row]:
    """Run `work`, write the chart of its costliest operators to `path`, and return their milliseconds as rows.

    Time is the device's own: kernels on a GPU, operators without what they call on a CPU.
    Raises ValueError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as err:
        raise ValueError("bench: --profile needs matplotlib; pip install 'matryoshka-pilot[report]'") from err
    on_gpu = torch.device(device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        for event in profile.key_averages()
    }
    total = sum(times.values())
    shown = sorted(times.items(), key=lambda entry: -entry[1])[:BARS]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([name[:60] for name, _ in reversed(shown)], [value for _, value in reversed(shown)], color="#4477aa")
    axes.set_xlabel(f"self time, ms, on {device}; {total:.0f} ms in all")
    axes.set_title("One optimizer step")
    axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return [Row(f"profile: {name}", value, "ms", {"share": value / total}) for name, value in shown]
