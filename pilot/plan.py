"""`matryoshka plan`: whether a model trains on a cluster that nobody has tried yet, in which layout, and how fast.

Predictions from shapes (`cluster.py`, `core/parallel/forecast.py`); nothing is loaded, no GPU is needed. `--dry-run`
besides builds the model with fake tensors and runs the first rank's step with a fake process group
(`pilot/dry_run.py`).
"""

import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from matryoshka.core.distributed import World
from matryoshka.core.models.load import model_architecture, read_config
from matryoshka.core.parallel.cluster import Job, job_of, layouts, shards_of
from matryoshka.core.parallel.forecast import Forecast, forecast, table
from matryoshka.core.parallel.hardware import Cluster, known_hardware
from matryoshka.core.parallel.layout import LAYOUTS, ParallelConfig, choose_layout
from matryoshka.core.training.memory import GIB, Footprint, MemoryPlan
from matryoshka.dpo.head import extra_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPTIMIZERS = ("adamw", "adamw8bit")
UNITS = {"GB": 10**9, "MB": 10**6, "TB": 10**12, "GIB": 2**30, "MIB": 2**20, "TIB": 2**40}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
# What their config.json says of shapes.
MODELS: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128, 128256, False),
}


@dataclass(frozen=True)
class PlanConfig:
    """What a training run takes on a cluster: memory of a GPU, bytes sent, time and the best layout. All predicted.

    model: a known name (llama-3-8b, llama-3-70b, llama-3.1-405b, llama-3.2-1b, llama-3.2-3b, smollm2-135m) or a folder
    with config.json. gpus_per_node: 0 is 8, or all where there are fewer. gpu_memory: of one, "80GB" or "80GiB". full:
    full fine-tuning instead of an adapter of rank `rank`. quantization: "nf4", the frozen base in four bits. optimizer:
    adamw or adamw8bit. sft: no pass of the reference policy. A GPU goes over micro_batches of micro_batch_tokens tokens
    a step, in sequences of sequence_tokens. activations: auto, none, selective, full or offload. hardware: h100 or
    a100; tflops, share, link_gbs, network_gbs: its product rate, the share of it that a step reaches, the bandwidth of
    a GPU to its node's others and of a node to the other nodes, in GB/s and one direction, where they differ (0: not).
    dry_run: also build and run the first rank with fake tensors and a fake process group, in `layout` (default: what
    "auto" takes); peak: follow every allocation of it, which takes minutes. json: one JSON object as the last line.
    """

    model: str
    gpus: int = 1
    gpus_per_node: int = 0
    gpu_memory: str = "80GB"
    full: bool = False
    rank: int = 8
    dora: bool = False
    quantization: str = ""
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    sft: bool = False
    micro_batch_tokens: int = 8192
    micro_batches: int = 1
    sequence_tokens: int = 2048
    activations: str = "auto"
    hardware: str = "h100"
    tflops: float = 0.0
    share: float = 0.0
    link_gbs: float = 0.0
    network_gbs: float = 0.0
    dry_run: bool = False
    peak: bool = False
    layout: str = ""
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "rank", "micro_batch_tokens", "micro_batches", "sequence_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} {getattr(self, name)} must be at least 1")
        for name in ("gpus_per_node", "tflops", "share", "link_gbs", "network_gbs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"plan: {name} {getattr(self, name)} must not be negative; 0 takes the default")
        for name, known in (("quantization", ("", "nf4")), ("optimizer", OPTIMIZERS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"plan: {name} {getattr(self, name)!r} is unknown; choose from {known}")
        if self.layout not in ("", *LAYOUTS):
            raise ValueError(f"plan: layout {self.layout!r} is unknown; choose from {', '.join(LAYOUTS)}")
        if (self.layout or self.peak) and not self.dry_run:
            raise ValueError("plan: layout and peak are of the dry run; add --dry-run, or leave them out")
        if self.gpus % self.per_node:
            raise ValueError(
                f"plan: {self.gpus} GPUs are not whole nodes of {self.per_node}; give a multiple or --gpus-per-node"
            )

    @property
    def per_node(self) -> int:
        return self.gpus_per_node or min(8, self.gpus)

    @property
    def cluster(self) -> Cluster:
        """The cluster. Raises ValueError for memory or hardware that is not understood."""
        given = {"flops": self.tflops * 1e12, "share": self.share, "link": self.link_gbs * 1e9}
        given["network"] = self.network_gbs * 1e9
        hardware = dataclasses.replace(known_hardware(self.hardware), **{k: v for k, v in given.items() if v})
        return Cluster(self.gpus // self.per_node, self.per_node, memory_size(self.gpu_memory), hardware)


def memory_size(text: str) -> int:
    """Return the bytes that "80GB" (10^9 each) or "80GiB" (2^30 each) means. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise ValueError(f'plan: GPU memory {text!r} is not understood; expected a size as "80GB" or "80GiB"')
    return int(float(match[1]) * UNITS[match[2].upper()])


def architecture_of(name: str) -> tuple[ModuleType, Any]:
    """Return the module of `core/models/` and the configuration of a known model or of a folder.

    Raises ValueError, naming the nearest, for a name that is neither; and as `read_config` for a folder.
    """
    if name in MODELS:
        data = {"model_type": "llama", **dict(zip(_FIELDS, MODELS[name], strict=True))}
    elif Path(name).is_dir():
        data = read_config(Path(name))
    else:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(MODELS)}"
        raise ValueError(f"plan: model {name!r} is neither known nor a folder; {hint}")
    architecture = model_architecture(data, Path(name))
    return architecture, architecture.Config.from_dict(data)


def plan(config: PlanConfig) -> None:
    """Print the table of layouts, which is best and why; with --dry-run what torch did; the object last."""
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
        sequence_tokens=config.sequence_tokens,
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
        own = dataclasses.asdict(config)
        result = {"plan": own, "parameters": size, "predicted": True, "layouts": [one.to_json() for one in found]}
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
    """Run the first rank of `layout` with nobody and print what it did beside what is predicted."""
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


def predicted_peak(job: Job, one: Forecast) -> int:
    """Return the predicted peak where the head is computed as on a CPU, as a dry run does."""
    config, tokens = job.config, job.micro_batch_tokens
    head = extra_bytes(tokens, config.hidden_size, config.vocab_size, job.dtype, gpu=False, training=True)
    policy = "full" if one.memory.policy == "offload" else one.memory.policy
    held = Footprint(config, job.dtype, job.rank, job.dora).step_bytes(tokens, policy, head)
    gpu = MemoryPlan(policy, Footprint(config, job.dtype, job.rank, job.dora), 0, "cuda").peak_bytes(tokens, policy)
    return one.memory.total - (gpu - held if gpu == one.memory.activations else 0)
