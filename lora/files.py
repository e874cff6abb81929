"""Adapter files in PEFT's layout, so that PEFT and vLLM load ours and we load theirs; and merging in fp32.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with keys
`base_model.model.<module path>.lora_A.weight` [R, I], `...lora_B.weight` [O, R] and, with DoRA,
`...lora_magnitude_vector` [O].
"""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from matryoshka.core.files import write_folder, write_json
from matryoshka.core.json_input import Fields, read_json, shown
from matryoshka.core.models.load import model_folder
from matryoshka.core.models.weights import sampled_digest, write_tensors
from matryoshka.lora.linear import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    layers_with,
    remove_adapter,
    replace_layers,
    target_names,
)

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What other keys of PEFT's LoraConfig say where they change nothing here: they are off, or matter to training alone.
# A key that is in none of these lists is refused unless it is off (null, false or empty).
COMPUTED = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
DESCRIPTIVE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
NO_EFFECT_ALONE = {  # a setting of another one -> the key that would make it count, which is refused itself
    "corda_config": "init_lora_weights", "eva_config": "init_lora_weights", "loftq_config": "init_lora_weights",
    "lora_ga_config": "init_lora_weights", "layers_pattern": "layers_to_transform", "megatron_core": "megatron_config",
    "qalora_group_size": "use_qalora", "runtime_config": "use_dora",
}  # fmt: skip
# Initial values of the adapter that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga, ...)
# move a part of the base's weights into the adapter, which is wrong beside the original base.
PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    The folder appears whole, in place of one that was there (`write_folder`). base_model: the value of
    `base_model_name_or_path`. dtype: of the file; default the adapter's own.
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

    with write_folder(folder) as temporary:
        write_json(temporary / CONFIG, peft)
        write_tensors(temporary / WEIGHTS, tensors)


def read_config(folder: Path) -> LoraConfig:
    """Return the LoraConfig of an adapter folder.

    Every key that changes the computation is either read or refused by name, unknown keys as well.
    Raises FileNotFoundError, ValueError naming file and key.
    """
    path = folder / CONFIG
    data = read_json(path, f"an adapter's configuration beside {WEIGHTS}")
    fields = Fields(data, str(path))
    if fields.text("peft_type") != "LORA":
        raise fields.error("peft_type", "'LORA'; other kinds of adapters are not computed")
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise fields.error("task_type", "'CAUSAL_LM'")
    if data.get("bias", "none") != "none":
        raise fields.error("bias", "'none'; biases that were trained are not supported")
    initial = data.get("init_lora_weights", True)
    if not any(initial is known or (isinstance(known, str) and initial == known) for known in PLAIN_INIT):
        raise fields.error("init_lora_weights", f"one of {PLAIN_INIT}. Such an adapter changes the base's weights too: "
                           "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA")
    handled = {*COMPUTED, *DESCRIPTIVE, *NO_EFFECT_ALONE, "bias", "init_lora_weights"}
    for key in sorted(data.keys() - handled):
        if data[key] is not None and data[key] is not False and data[key] not in ([], {}, ""):  # 0 may be a layer
            raise ValueError(f"{path}: {key:.60} = {shown(data[key])} is not supported; expected plain LoRA, rsLoRA or "
                             "DoRA, where this key is null or false")
    targets = fields.texts("target_modules")
    if not targets:
        raise fields.error("target_modules", "a list with at least one name")
    alpha, dropout = fields.number("lora_alpha"), fields.number("lora_dropout", 0.0)
    if not alpha > 0.0:
        raise fields.error("lora_alpha", "a number above 0")
    if not 0.0 <= dropout < 1.0:
        raise fields.error("lora_dropout", "a number in [0, 1)")
    return LoraConfig(
        rank=fields.integer("r", low=1),
        alpha=alpha,
        dropout=dropout,
        # Last names: `load_adapter` requires the tensors of every layer of such a name, so no layer is added or lost.
        targets=tuple(sorted({target.rpartition(".")[2] for target in targets})),
        rslora=fields.boolean("use_rslora", False),
        dora=fields.boolean("use_dora", False),
    )


def load_adapter(
    model: nn.Module, name: str, folder: Path, device: torch.device | None = None, base: Path | None = None
) -> None:
    """Give `model` the adapter in `folder` as `name`, strictly: every key used, every layer filled.

    device: default that of the layers. base: the folder that `model` was read from; a warning is logged where the
    adapter was trained over another model.

    Raises FileNotFoundError, ValueError naming the key whose presence, shape or numbers are wrong.
    """
    config, path = read_config(folder), folder / WEIGHTS
    tensors = read_tensors(path, config)
    try:
        add_adapter(model, name, config, 0, device)
    except ValueError as err:
        raise ValueError(f"{folder}: {err}") from err
    expected = adapter_tensors(model, name)
    saved, here = ({key: tuple(t.shape) for key, t in group.items()} for group in (tensors, expected))
    if saved != here:
        remove_adapter(model, name)
        key = sorted(k for k in saved.keys() | here.keys() if saved.get(k) != here.get(k))[0]
        raise ValueError(
            f"{path}: {key:.200} has shape {saved.get(key)}, the model wants {here.get(key)}; is it for another base "
            "model?"
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            expected[key].copy_(tensor)  # detached views share memory with the parameters
    if base is not None and (trained_over := _other_base(folder, base)):
        logger.warning("%s: the adapter was trained over %s; beside %s it computes something else unless the two are "
                       "the same model", folder, trained_over, base)


def _other_base(folder: Path, base: Path) -> str:
    """Return the model that the adapter in `folder` names as its base where `base` seems to be another one, else "".

    Weights are compared where the named model is on this machine. Elsewhere names are: the last part of a hub id or a
    path may be that of `base` or of a folder around it.
    """
    named = read_json(folder / CONFIG, "an adapter's configuration").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    try:
        trained_over = model_folder(named)
        if trained_over.is_dir():
            is_same = trained_over.samefile(base) or sampled_digest(trained_over) == sampled_digest(base)
            return "" if is_same else named
    except (OSError, ValueError):  # it is not here, or not whole
        pass
    # The hub's cache has folders models--OWNER--NAME.
    names = {part.casefold().rpartition("--")[2] for part in base.resolve().parts}
    return "" if Path(named).name.casefold() in names else named


def read_tensors(path: Path, config: LoraConfig) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, before a model is given anything of their size.

    Raises FileNotFoundError, and ValueError naming the tensor whose type, numbers or rank are not an adapter's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the adapter's weights")
    try:
        tensors = load_file(path)
    except SafetensorError as err:
        raise ValueError(f"{path}: not a readable safetensors file ({err!s:.300}); copy it again") from err
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {key:.200} is stored as {tensor.dtype}; expected floating-point numbers of 16 "
                             "to 64 bits. Export the adapter again in one of these")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key:.200} has numbers that are not finite; its training diverged or the file "
                             "is damaged. Choose an earlier checkpoint")
        if key.endswith(".lora_A.weight") and tensor.shape[:1] != (config.rank,):
            raise ValueError(f"{path}: {key:.200} has shape {tuple(tensor.shape)}, but r is {config.rank} in {CONFIG}; "
                             "the two files belong to different adapters")
    return tensors


def adapter_hash(folder: Path) -> str:
    """Return 16 hex digits of the SHA-256 of an adapter folder's two files: it is part of a served adapter's name."""
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

    def merged(layer: LoraLinear) -> nn.Linear:
        outputs, inputs = layer.weight.shape
        plain = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta").train(layer.training)
        weight = layer.weight.detach()
        if name in layer.configs:
            weight = layer.merged(name).to(weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return plain

    replace_layers(model, LoraLinear, merged)
