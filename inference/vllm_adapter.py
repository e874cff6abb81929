"""Checks, before anything is sent, whether vLLM serves an adapter folder as it was trained.

vLLM ignores keys of adapter_config.json that it does not know, so that an adapter may load and compute something else.
`lora.files` refuses adapters that neither program computes, and numbers that are not finite; this file refuses adapters
that we train and vLLM does not serve.
"""

from pathlib import Path

from matryoshka.inference.vllm_server import max_lora_rank
from matryoshka.lora.files import CONFIG, PREFIX, WEIGHTS, read_config, read_tensors
from matryoshka.lora.linear import LoraConfig

# The projections of the blocks that we train, fused ones too. vLLM takes embeddings and heads for some models only.
TARGETS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def check_config(config: LoraConfig, where: str = "vllm") -> None:
    """Raise ValueError for adapters that vLLM does not serve: DoRA, other targets, a rank beyond its largest."""
    if config.dora:
        raise ValueError(f"{where}: vLLM serves no DoRA; train without it, or merge the adapter (matryoshka merge)")
    if other := sorted({target.rpartition(".")[2] for target in config.targets} - set(TARGETS)):
        raise ValueError(f"{where}: target {other[0]!r} is not served by vLLM; expected some of {', '.join(TARGETS)}")
    max_lora_rank(config.rank)


def check_adapter(folder: Path, max_rank: int) -> LoraConfig:
    """Return the configuration of the adapter in `folder` if vLLM, started for rank `max_rank`, serves it as trained.

    Raises FileNotFoundError, ValueError naming the file and the setting or tensor that is wrong.
    """
    config = read_config(folder)
    check_config(config, str(folder / CONFIG))
    if config.rank > max_lora_rank(max_rank):
        raise ValueError(
            f"{folder / CONFIG}: rank {config.rank}, but the server takes up to {max_lora_rank(max_rank)}; start it "
            "for the largest rank that is to be served"
        )
    path = folder / WEIGHTS
    parts: dict[str, set[str]] = {}
    for key, tensor in read_tensors(path, config).items():
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or part not in ("lora_A", "lora_B") or module.rpartition(".")[2] not in TARGETS:
            raise ValueError(f"{path}: {key} is not served by vLLM; expected {PREFIX}MODULE.lora_A.weight or "
                             f"lora_B.weight of {', '.join(TARGETS)}")
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0 if part == "lora_A" else 1] != config.rank:
            raise ValueError(f"{path}: {key} has shape {shape}, but r is {config.rank} in {CONFIG}")
        parts.setdefault(module, set()).add(part)
    if alone := sorted(module for module, found in parts.items() if len(found) < 2):
        raise ValueError(f"{path}: {alone[0]} has only one of lora_A and lora_B; save the adapter again")
    if not parts:
        raise ValueError(f"{path}: no LoRA tensors; save the adapter again")
    return config
