"""Settings and model shapes of `matryoshka plan`, which predicts training on a cluster that has not been tried yet.

`core/parallel/cluster.py` and `core/parallel/forecast.py` predict from the shapes alone, so nothing is loaded and no
GPU is needed. With `--dry-run`, `pilot/dry_run.py` also builds the model with fake tensors and runs the first rank's
step with a fake process group.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from matryoshka.core.config import check_least, nearest
from matryoshka.core.models.load import model_architecture, read_config
from matryoshka.core.parallel.cluster import Job
from matryoshka.core.parallel.forecast import Forecast
from matryoshka.core.parallel.hardware import Cluster, known_hardware
from matryoshka.core.parallel.layout import LAYOUTS
from matryoshka.core.training.memory import Footprint, MemoryPlan
from matryoshka.dpo.head import extra_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPTIMIZERS = ("adamw", "adamw8bit")
UNITS = {"GB": 10**9, "MB": 10**6, "TB": 10**12, "GIB": 2**30, "MIB": 2**20, "TIB": 2**40}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
# The values of these fields in the models' config.json.
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
    """Predicts what a training run takes on a cluster: memory of a GPU, bytes sent, time, and the best layout."""

    model: str
    """A known name (llama-3-8b, llama-3-70b, llama-3.1-405b, llama-3.2-1b, llama-3.2-3b, smollm2-135m) or a folder with
    config.json."""
    gpus: int = 1
    """GPUs in all."""
    gpus_per_node: int = 0
    """GPUs of a node; 0 means 8, or all GPUs if there are fewer."""
    gpu_memory: str = "80GB"
    """Memory of one GPU, as "80GB" or "80GiB"."""
    full: bool = False
    """Train all weights instead of an adapter."""
    rank: int = 8
    """Rank of the adapter."""
    dora: bool = False
    """Train a DoRA adapter instead of a plain LoRA adapter."""
    quantization: str = ""
    """Set to "nf4" to hold the frozen base in four bits."""
    optimizer: str = "adamw"
    """Optimizer: adamw or adamw8bit."""
    dtype: str = "bfloat16"
    """Data type of the weights: bfloat16 or float32."""
    sft: bool = False
    """Predict supervised training, which has no pass of the reference policy."""
    micro_batch_tokens: int = 8192
    """Tokens in flight on a GPU."""
    micro_batches: int = 1
    """Micro-batches of a GPU in one step."""
    sequence_tokens: int = 2048
    """Tokens of one sequence, and at most micro_batch_tokens."""
    activations: str = "auto"
    """The activation policy: auto, none, selective, full or offload."""
    hardware: str = "h100"
    """GPU model whose rates are assumed: h100 or a100."""
    tflops: float = 0.0
    """Product rate of a GPU in TFLOP/s; 0 takes that of `hardware`."""
    share: float = 0.0
    """Share of the product rate that a step reaches; 0 takes that of `hardware`."""
    link_gbs: float = 0.0
    """Bandwidth of a GPU to the others of its node, in GB/s and one direction; 0 takes that of `hardware`."""
    network_gbs: float = 0.0
    """Bandwidth of a node to the others, in GB/s and one direction; 0 takes that of `hardware`."""
    dry_run: bool = False
    """Also build and run the first rank with fake tensors and a fake process group."""
    peak: bool = False
    """Follow every allocation of the dry run to find its peak memory; this takes minutes."""
    layout: str = ""
    """Layout of the dry run; by default the one that layout = "auto" would take."""
    json: bool = False
    """Print one JSON object as the last line."""

    def __post_init__(self) -> None:
        check_least(self, "plan: ", gpus=1, rank=1, micro_batch_tokens=1, micro_batches=1, sequence_tokens=1)
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
        """The cluster that the settings describe. Raises ValueError for a memory size or hardware that is unknown."""
        given = {"flops": self.tflops * 1e12, "share": self.share, "link": self.link_gbs * 1e9}
        given["network"] = self.network_gbs * 1e9
        hardware = dataclasses.replace(known_hardware(self.hardware), **{k: v for k, v in given.items() if v})
        return Cluster(self.gpus // self.per_node, self.per_node, memory_size(self.gpu_memory), hardware)


def memory_size(text: str) -> int:
    """Return the bytes of a size as "80GB" (10^9 each) or "80GiB" (2^30 each). Raises ValueError for another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise ValueError(f'plan: GPU memory {text!r} is not understood; expected a size as "80GB" or "80GiB"')
    return int(float(match[1]) * UNITS[match[2].upper()])


def architecture_of(name: str) -> tuple[ModuleType, Any]:
    """Return the module of `core/models/` and the configuration of a known model or of a folder.

    Raises ValueError for a name that is neither, naming the nearest known one; for a folder as `read_config` does.
    """
    if name in MODELS:
        data = {"model_type": "llama", **dict(zip(_FIELDS, MODELS[name], strict=True))}
    elif Path(name).is_dir():
        data = read_config(Path(name))
    else:
        hint = nearest(name.lower(), MODELS, cutoff=0.4)
        raise ValueError(f"plan: model {name!r} is neither known nor a folder; {hint}")
    architecture = model_architecture(data, Path(name))
    return architecture, architecture.read_config(data)


def predicted_peak(job: Job, one: Forecast) -> int:
    """Return the predicted peak of a dry run, which computes the head as on a CPU."""
    config, tokens = job.config, job.micro_batch_tokens
    head = extra_bytes(tokens, config.hidden_size, config.vocab_size, job.dtype, gpu=False, training=True)
    policy = "full" if one.memory.policy == "offload" else one.memory.policy
    held = Footprint(config, job.dtype, job.rank, job.dora).step_bytes(tokens, policy, head)
    gpu = MemoryPlan(policy, Footprint(config, job.dtype, job.rank, job.dora), 0, "cuda").peak_bytes(tokens, policy)
    return one.memory.total - (gpu - held if gpu == one.memory.activations else 0)
