"""`matryoshka bench scale`: the same training on more and more ranks of this machine, and the bytes that they exchange.

Strong scaling: the global batch stays, its parts get smaller. Every number of ranks and every layout is a run of its
own under torchrun (gloo, one thread a rank), on the same items from the same adapter: whole optimizer steps, the
reference pass included. The first step is left out. A second block of steps counts: every collective is waited for on
the spot, its bytes and seconds noted. So the share of communication is of steps in which nothing overlaps, and holds
the waiting for the slowest rank; the speed comes from the steps that are not watched. What a rank sends is what the
ring algorithms send: (n - 1) / n of the bytes for gathering and for scattering, twice that for an all-reduce.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matryoshka.benchmarks.ranked import launch
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.core.machine import usable_cores
from matryoshka.core.parallel.layout import LAYOUTS

MIB = 2**20


@dataclass(frozen=True)
class Config:
    """Optimizer steps of DPO on PAL prompts over ranks of this machine, by layout."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks, one run each."""
    layouts: tuple[str, ...] = ("replicate", "shard")
    """Layouts: of "replicate", "shard" and "hybrid" (in groups of two; left out where the ranks are not at least four
    and even)."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    questions: int = 4
    """Prompts in the global batch."""
    pairs: int = 2
    """Pairs of each prompt."""
    steps: int = 2
    """Steps that are timed, and as many whose messages are counted."""
    micro_batch_tokens: int = 8192
    """Most tree tokens in flight at once."""
    full: bool = False
    """Train all weights on the chosen sides (SFT) instead of an adapter of rank 8 on the pairs."""
    dtype: str = "float32"
    """Data type of the weights."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.layouts if name not in LAYOUTS]:
            raise ValueError(f"bench scale: layout {unknown[0]!r} is unknown; choose from {LAYOUTS}")
        if not self.ranks or min(*self.ranks, self.questions, self.pairs, self.steps) < 1:
            raise ValueError("bench scale: ranks, questions, pairs and steps must be at least 1")


def run(config: Config) -> BenchResult:
    """Return a row for every layout and number of ranks; the ratio is the best against the fewest ranks.

    Raises ValueError with the ranks' own words where a run fails.
    """
    rows: list[Row] = []
    for layout in config.layouts:
        alone = None
        for ranks in sorted(config.ranks):
            if layout == "hybrid" and (ranks < 4 or ranks % 2):
                continue
            found = _launch(config, layout, ranks)
            seconds = statistics.median(found["seconds"])
            alone = alone or seconds * ranks
            rows.append(Row(f"{layout}, {ranks} ranks", config.questions * config.pairs / seconds, "pairs/s", {
                "ranks": ranks,
                "layout": layout,
                "seconds_per_step": seconds,
                "min_s": min(found["seconds"]),
                "max_s": max(found["seconds"]),
                "efficiency": round(alone / ranks / seconds, 3),
                "communication_share": round(found["communication_s"] / found["watched_s"], 4),
                "sent_mib_per_step": {kind: round(size / MIB, 3) for kind, size in found["sent"].items()},
                "collectives_per_step": found["calls"],
                "imbalance": round(found["imbalance"], 3),
                "tokens_per_step": found["tokens"],
                "first_loss": found["first_loss"],
                "parameters": found["parameters"],
                "dtype": config.dtype,
                "trained": "all weights, SFT" if config.full else "adapter of rank 8, DPO",
                "cores": usable_cores(),
            }))  # fmt: skip
    speeds = {row.details["ranks"]: row.value or 0.0 for row in rows if row.details["layout"] == config.layouts[0]}
    fewest = min(speeds, default=0)  # "hybrid" alone on two ranks has none
    others = [speed for ranks, speed in speeds.items() if ranks != fewest]
    return BenchResult("scale", rows, max(others) / speeds[fewest] if others else None)


def _launch(config: Config, layout: str, ranks: int) -> dict[str, Any]:
    """Return what rank 0 of a run measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        settings = asdict(config) | {"model": str(config.model), "layout": layout, "out": str(out)}
        launch(f"bench scale: {layout}", ranks, "matryoshka.benchmarks.scale_rank", json.dumps(settings))
        found: dict[str, Any] = json.loads(out.read_text())
        return found
