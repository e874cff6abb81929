"""Adapter files in PEFT's layout, so that PEFT and vLLM load ours and we load theirs; and merging in fp32.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with keys
`base_model.model.<module path>.lora_A.weight` [R, I], `...lora_B.weight` [O, R] and, with DoRA,
`...lora_magnitude_vector` [O].
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.files import write_atomic, write_folder, write_json
from matryoshka.lora.linear import LoraConfig, LoraLinear, add_adapter, layers_with, remove_adapter, target_names

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that change the computation or which layers it touches, and that we do not compute.
REFUSED = (
    "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias",
    "alora_invocation_tokens", "use_qalora", "use_bdlora",
)  # fmt: skip


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return adapter `name` under PEFT's keys, detached, in its own dtype."""
    layers_with(model, name)
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) and name in module.configs:
            for part, parameters in module.parts(name).items():
                suffix = ".weight" if parameters[name].ndim == 2 else ""  # PEFT writes its vectors without
                tensors[f"{PREFIX}{path}.{part}{suffix}"] = parameters[name].detach().contiguous()
    return tensors


def adapter_digest(model: nn.Module, name: str) -> str:
    """Return a hash of adapter `name` as it is in `model`: its configuration and every bit of it."""
    digest = hashlib.sha256(f"{layers_with(model, name)[0].configs[name]}".encode())
    for key, tensor in adapter_tensors(model, name).items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model: nn.Module, name: str, folder: Path, base_model: str, dtype: torch.dtype | None = None) -> None:
    """Write adapter `name` to `folder` in PEFT's layout.

    The folder appears whole. One that was there steps aside first: a kill between the two renames leaves no folder of
    that name, never a mixture. base_model: what `base_model_name_or_path` says. dtype: of the file; default the
    adapter's own.
    """
    config = layers_with(model, name)[0].configs[name]
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in adapter_tensors(model, name).items()}
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(target_names(model, name)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    # Only where they are on: a plain adapter's file, and with it its hash, is what it was before there were variants.
    peft |= {key: True for key, is_on in (("use_rslora", config.rslora), ("use_dora", config.dora)) if is_on}

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files for their owner alone; a server may be another user
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)

    with write_folder(folder) as temporary:
        write_json(temporary / CONFIG, peft)
        write_atomic(temporary / WEIGHTS, write)


def read_config(folder: Path) -> LoraConfig:
    """Return the LoraConfig of an adapter folder. Raises FileNotFoundError, ValueError for what we do not compute."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter folder holds it beside {WEIGHTS}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = data["r"], float(data["lora_alpha"]), data["target_modules"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path}: not an adapter's configuration ({err!r}); expected PEFT's, with r, lora_alpha and "
                         "target_modules") from err
    for key in REFUSED:
        if data.get(key):
            raise ValueError(f"{path}: {key} = {data[key]!r} is not supported; expected plain LoRA, rsLoRA or DoRA")
    if data.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {data['bias']!r} is not supported; expected 'none'")
    if not isinstance(targets, list):
        raise ValueError(f"{path}: target_modules = {targets!r}; expected a list of module names")
    rslora, dora = bool(data.get("use_rslora")), bool(data.get("use_dora"))
    return LoraConfig(rank, alpha, float(data.get("lora_dropout", 0.0)), tuple(sorted(targets)), rslora, dora)


def load_adapter(model: nn.Module, name: str, folder: Path, device: torch.device | None = None) -> None:
    """Give `model` the adapter in `folder` as `name`, strictly: every key used, every layer filled.

    device: default that of the layers.

    Raises FileNotFoundError, ValueError naming the key whose presence or shape is wrong.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the adapter's weights")
    try:
        tensors = load_file(path)
    except SafetensorError as err:
        raise ValueError(f"{path}: not a readable safetensors file ({err}); copy it again") from err
    add_adapter(model, name, config, 0, device)
    expected = adapter_tensors(model, name)
    saved, here = ({key: tuple(t.shape) for key, t in group.items()} for group in (tensors, expected))
    if saved != here:
        remove_adapter(model, name)
        key = sorted(k for k in saved.keys() | here.keys() if saved.get(k) != here.get(k))[0]
        raise ValueError(
            f"{path}: {key} has shape {saved.get(key)}, the model wants {here.get(key)}; is it for another base model?"
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            expected[key].copy_(tensor)  # detached views share memory with the parameters


def adapter_hash(folder: Path) -> str:
    """Return 16 hex digits of the SHA-256 of an adapter folder's two files: what a served adapter's name carries."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def merge(model: nn.Module, name: str) -> None:
    """Fold adapter `name` into the weights: W + scale B A, its rows rescaled with DoRA, computed in at least fp32 and
    rounded once to W's dtype.

    Every adapter is dropped and each LoRA layer becomes a plain linear layer again. Raises ValueError for a quantised
    base: its own weights are gone, and a sum that is rounded to four bits again would lose the adapter.
    """
    if any(layer.scales is not None for layer in layers_with(model, name)):
        raise ValueError(
            f"merge: the base under adapter {name!r} is quantised; load the model without quantisation and merge "
            "there. An adapter that was trained beside rounded weights then computes nearly, not exactly, the same"
        )
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        outputs, inputs = module.weight.shape
        plain = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta").train(module.training)
        weight = module.weight.detach()
        if name in module.configs:
            weight = module.merged(name).to(weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
