"""`matryoshka bench ranks`: what `matryoshka plan` predicts, measured on ranks of this machine (gloo, or NCCL on GPUs).

torchrun starts the ranks, and each trains through the product's own loader and loop. Of one optimizer step is measured
what a rank writes to its sockets (the kernel's count), which collectives run with how many bytes (torch's dispatcher),
what torch's allocator holds at the highest point beyond what was there before, and how long collectives were under way,
waiting for slower ranks included. gloo makes a reduce-scatter an all-reduce: its bytes are predicted twice. Ranks that
share few cores say nothing of speed.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from matryoshka.benchmarks.measure import DTYPES, MIB, dtype_of, events_of, highest, prepare
from matryoshka.benchmarks.ranked import launch, trained_part
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.core.distributed import World, local_part, open_world
from matryoshka.core.models.attention import PIECE
from matryoshka.core.models.load import empty_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.parallel.cluster import Job, job_of, memory_of
from matryoshka.core.parallel.collective_log import listen
from matryoshka.core.parallel.forecast import forecast
from matryoshka.core.parallel.hardware import Cluster
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.training.memory import GIB, Footprint
from matryoshka.core.training.packing import Item
from matryoshka.core.training.train import TrainConfig, TrainContext, train
from matryoshka.dpo.head import extra_bytes, token_logps
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.training import Base, load_base

IO = Path("/proc/self/io")


@dataclass(frozen=True)
class Case:
    """A run: layout, ranks, how many share a model under "hybrid", whether all weights are trained, and whether the
    host keeps the model."""

    layout: str
    ranks: int
    group: int = 0
    full: bool = False
    offload: bool = False

    @property
    def name(self) -> str:
        where = f"{self.layout}{', offloaded' if self.offload else ''}, {self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{'full SFT' if self.full else 'LoRA DPO'}, {where}"


CASES = (
    Case("replicate", 1), Case("shard", 1, offload=True),
    Case("replicate", 2), Case("shard", 2), Case("shard", 2, full=True), Case("replicate", 4), Case("hybrid", 4, 2),
    Case("shard", 4), Case("hybrid", 4, 2, True), Case("shard", 4, full=True),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Bytes, peak memory and time of a training step on ranks against the prediction.

    An untrained adapter of rank 8 is trained with DPO, or all weights are.
    """

    device: str = "cpu"
    """"cpu" (gloo), or "cuda" (NCCL, a GPU for each rank; what sockets carry is not measured there)."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    ranks: tuple[int, ...] = (2, 4)
    """Numbers of ranks: of 1, 2 and 4."""
    tokens: int = 256
    """Tokens of a micro-batch."""
    micro_batches: int = 1
    """Micro-batches of a rank in one step."""
    timeout_s: int = 1800
    """Seconds after which a launch is given up."""

    def __post_init__(self) -> None:
        if unknown := set(self.ranks) - {case.ranks for case in CASES}:
            raise ValueError(f"bench ranks: {sorted(unknown)[0]} ranks are not measured; choose from 1, 2 and 4")
        prepare(self.device, 1)
        dtype_of(self.dtype, self.device)
        if self.tokens < 8 or self.micro_batches < 1:
            raise ValueError("bench ranks: tokens must be at least 8 and micro_batches at least 1")


def run(config: Config) -> BenchResult:
    """Return a row for each case: bytes that a rank sends in a step, all else in its details."""
    rows, settings = [], json.dumps(asdict(config) | {"model": str(config.model.resolve())})
    for ranks in config.ranks:
        with tempfile.TemporaryDirectory() as folder:
            launch("bench ranks", ranks, __name__, settings, folder, timeout_s=config.timeout_s)
            for case in [case for case in CASES if case.ranks == ranks]:
                rows.append(_row(config, case, json.loads((Path(folder) / f"{case.name}.json").read_text())))
    return BenchResult("ranks", rows, None)


def _row(config: Config, case: Case, seen: dict[str, Any]) -> Row:
    job, cluster = predicted(config, case)
    sent = forecast(job, cluster, case.layout).sent
    on_gloo, on_gpu = sum(sent.values()) + sent["reduce-scatter"], config.device == "cuda"
    shards = case.ranks if case.layout == "shard" else case.group or 1
    memory = memory_of(job, shards, cluster.memory)
    model = job.config
    head = extra_bytes(seen["scored"], model.hidden_size, model.vocab_size, job.dtype, on_gpu, training=True)
    footprint = Footprint(model, job.dtype, job.rank)
    scores = 0 if on_gpu else min(config.tokens, PIECE) * config.tokens
    step = footprint.step_bytes(config.tokens, job.activations, head, scores)
    peak = memory.gathered + memory.gradients + step
    details = {
        "predicted": on_gloo / 1e6,
        "over_predicted": seen["written"] / on_gloo if on_gloo and not on_gpu else None,
        "collectives_mb": {kind: size / 1e6 for kind, size in seen["sent"].items()},
        "collectives_predicted_mb": {kind: size / 1e6 for kind, size in sent.items()},
        "peak_mib": seen["peak"] / MIB,
        "peak_predicted_mib": peak / MIB,
        "peak_over_predicted": seen["peak"] / peak,
        "stored_mib": seen["stored"] / MIB,
        "stored_predicted_mib": job.stored_bytes(shards) / MIB,
        "seconds": seen["seconds"],
        "collectives_under_way": seen["communication_s"] / seen["profiled_s"],
    }
    return Row(case.name, None if on_gpu else seen["written"] / 1e6, "MB sent by a rank in a step", details)


def predicted(config: Config, case: Case) -> tuple[Job, Cluster]:
    """Return what a case is to the planner: groups of ranks are its nodes."""
    group = case.group or case.ranks
    job = job_of(
        empty_model(config.model), dtype=DTYPES[config.dtype], rank=0 if case.full else LoraConfig().rank,
        reference=not case.full, micro_batch_tokens=config.tokens, micro_batches=config.micro_batches,
        activations="none", device_type=config.device, offload=case.offload,
    )  # fmt: skip
    return job, Cluster(case.ranks // group, group, 10**6 * GIB)


def items_of(config: Config, case: Case, vocabulary: int) -> list[Item]:
    """Return the items of a batch, each of which fills a micro-batch: random ids of which half are scored."""
    draws, items = random.Random(0), []
    for number in range(case.ranks * config.micro_batches):
        count = 1 if case.full else 2
        length = config.tokens // count
        rows = [tuple(draws.randrange(vocabulary) for _ in range(length)) for _ in range(count)]
        mask = (0,) * (length // 2) + (1,) * (length - length // 2)
        items.append(Item(tuple(Tokens(row, mask) for row in rows), f"{number}"))
    return items


def measure(config: Config, case: Case, folder: Path, world: World) -> dict[str, Any]:
    """Return what this rank sees of the second step, and of the third under the profiler."""
    items = items_of(config, case, empty_model(config.model).config.vocab_size)
    settings = TrainConfig(
        epochs=9, batch_size=len(items), micro_batch_tokens=config.tokens, warmup_ratio=0.0, activations="none"
    )
    parallel, dtype = ParallelConfig(case.layout, case.group, offload=case.offload), DTYPES[config.dtype]
    base = Base(config.model, dtype, "none", case.full, LoraConfig(), parallel)
    model = load_base(base, items, settings, world)
    stored = sum(local_part(parameter).nbytes for parameter in model.parameters())
    parameters, objective, reference = trained_part(model, case.full, world)
    steps = train(
        model, parameters, items, settings, objective, token_logps, folder / case.name.replace(" ", "-"),
        TrainContext(reference, world=world),
    )  # fmt: skip
    next(steps)
    world.barrier()
    before = _written()
    with listen() as heard:
        row = next(steps)
    written = _written() - before
    sent = {kind: sum(one.sent for one in heard if one.kind == kind) for kind in {one.kind for one in heard}}
    profiled = _on_gpu(steps) if config.device == "cuda" else _profiled(steps)
    steps.close()  # type: ignore[attr-defined]
    scored = sum(sum(s.mask) for s in items[0].sequences)
    return {"written": written, "sent": sent, "stored": stored, "scored": scored, "seconds": row["seconds"], **profiled}


def _profiled(steps: Iterator[dict[str, float]]) -> dict[str, float]:
    """Return the highest allocation of a step, and the seconds that it and gloo's collectives in it took."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        row = next(steps)
    events = events_of(profile)
    gloo = sum(event.duration_ns() for event in events if event.name().startswith("gloo:"))
    return {"peak": highest(events), "communication_s": gloo / 1e9, "profiled_s": row["seconds"]}


def _on_gpu(steps: Iterator[dict[str, float]]) -> dict[str, float]:
    """Return the highest allocation of a step on this rank's GPU, and its seconds; NCCL's own time is not taken."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row = next(steps)
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "communication_s": 0.0, "profiled_s": row["seconds"]}


def _written() -> int:
    """Return the bytes that this process has written so far: on a rank that writes no file, to its sockets."""
    return int(dict(line.split(": ") for line in IO.read_text().splitlines())["wchar"])


def main(settings: str, folder: Path) -> None:
    given = json.loads(settings)
    config = Config(**given | {"model": Path(given["model"]), "ranks": tuple(given["ranks"])})
    with open_world(config.device, timeout_s=600) as world:
        torch.set_num_threads(1)
        for case in [case for case in CASES if case.ranks == world.size]:
            seen = measure(config, case, folder, world)
            if world.rank == world.size - 1:  # the first one writes metrics besides
                (folder / f"{case.name}.json").write_text(json.dumps(seen))
            world.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
