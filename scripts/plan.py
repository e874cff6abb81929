"""`matryoshka plan`: whether a model trains on a cluster that has not been tried yet, in which layout, and how fast."""

import dataclasses
import json
from typing import Any

import torch

from matryoshka.core.distributed import World
from matryoshka.core.parallel.cluster import Job, job_of, layouts, shards_of
from matryoshka.core.parallel.forecast import Forecast, forecast, table
from matryoshka.core.parallel.hardware import Cluster
from matryoshka.core.parallel.layout import LAYOUTS, ParallelConfig, choose_layout
from matryoshka.core.training.memory import GIB
from matryoshka.pilot.plan import DTYPES, PlanConfig, architecture_of, predicted_peak


def plan(config: PlanConfig) -> None:
    """Print the table of layouts, which is best and why; with --dry-run torch's own counts; the object last."""
    architecture, model_config = architecture_of(config.model)
    with torch.device("meta"):
        model = architecture.Model(model_config)
    job = job_of(
        model,
        nf4=config.quantization == "nf4",
        dtype=DTYPES[config.dtype],
        rank=0 if config.full else config.rank,
        dora=config.dora and not config.full,
        targets=architecture.LORA_TARGETS,
        eight_bit=config.optimizer == "adamw8bit",
        micro_batch_tokens=config.micro_batch_tokens,
        micro_batches=config.micro_batches,
        sequence_tokens=min(config.sequence_tokens, config.micro_batch_tokens),  # none is cut in two
        reference=not config.sft,
        activations=config.activations,
    )
    cluster = config.cluster
    found = [forecast(job, cluster, layout) for layout in layouts(job, cluster)]
    size = sum(weight.numel for weight in job.weights)
    print(
        f"{config.model}: {size / 1e9:.2f}B parameters, {'full fine-tuning' if job.full else f'LoRA rank {job.rank}'}"
        f"{', base in nf4' if config.quantization else ''}; {cluster.nodes} x {cluster.gpus_per_node} "
        f"{config.hardware} of {cluster.memory / GIB:.1f} GiB; {job.micro_batches} x {job.micro_batch_tokens} tokens a "
        "GPU and step. Predicted, nothing measured:"
    )
    print(table(found))
    fitting = [one for one in found if one.memory.fits]
    best = max(fitting, key=lambda one: one.tokens_per_s) if fitting else None
    auto, reason = None, "nothing fits"
    if best is not None:
        world = World(size=cluster.size, local_size=cluster.gpus_per_node)
        chosen = choose_layout(ParallelConfig(), job, cluster.memory, world)
        auto, reason = chosen.name, chosen.reason
        print(f"best: {_why(best, fitting)}")
        print(f'layout = "auto" takes {auto}, the first of {", ".join(LAYOUTS)} that fits')
    else:
        print(f"nothing fits: {_remedy(job)}")
    dry = None
    if config.dry_run:
        layout = config.layout or auto or found[-1].layout
        dry = _dry_run(architecture.Model, model_config, job, cluster, layout, config.peak)
    if config.json:
        settings, rows = dataclasses.asdict(config), [one.to_json() for one in found]
        result = {"plan": settings, "parameters": size, "predicted": True, "layouts": rows}
        print(json.dumps(result | {"best": best and best.layout, "auto": auto, "reason": reason, "dry_run": dry}))


def _why(best: Forecast, fitting: list[Forecast]) -> str:
    others = [f"{best.tokens_per_s / x.tokens_per_s - 1:+.1%} over {x.layout}" for x in fitting if x is not best]
    rate = f"{best.layout}, {best.tokens_per_s:,.0f} tokens/s"
    return f"{rate} ({', '.join(others)})" if others else f"{rate}, the only one that fits"


def _remedy(job: Job) -> str:
    packed = any(weight.packed for weight in job.weights)
    options = ["more or larger GPUs", "a lower --micro-batch-tokens"]
    options += ["--optimizer adamw8bit"] * (job.full and not job.eight_bit)
    options += ["an adapter instead of --full"] * job.full
    options += ["--quantization nf4"] * (not packed and not job.full)
    return "take " + ", ".join(options[:-1]) + f" or {options[-1]}"


def _dry_run(
    model: Any, model_config: Any, job: Job, cluster: Cluster, layout: str, with_peak: bool
) -> dict[str, Any]:
    """Run rank 0 of `layout` in a simulated cluster and print its counts beside the prediction."""
    from matryoshka.pilot.dry_run import dry_run  # takes as long to import as torch

    once = dataclasses.replace(job, micro_batches=1)
    one = forecast(once, cluster, layout)
    done = dry_run(model, model_config, once, cluster, layout, one.memory.policy, with_peak)
    print(f"dry run of rank 0 of {cluster.size}, {layout}, one micro-batch, {done['seconds']:.0f} s here:")
    stored = once.stored_bytes(shards_of(layout, cluster))
    rows: list[tuple[str, Any, float]] = [("weights stored", done["stored_bytes"], stored)]
    for kind, size in one.sent.items():
        seen = done["collectives"].get(kind, {"count": 0, "sent_bytes": 0.0})
        rows.append((f"{kind}, {seen['count']} calls: sent", seen["sent_bytes"], size))
    if done["peak_bytes"]:
        rows.append(("peak memory", done["peak_bytes"]["total"], predicted_peak(once, one)))
    width = max(len(name) for name, *_ in rows)
    for name, seen, size in rows:
        print(f"{name:<{width}}  {seen / 1e9:10.3f} GB  predicted {size / 1e9:10.3f} GB")
    return done | {"predicted": {name: size for name, _, size in rows}}
