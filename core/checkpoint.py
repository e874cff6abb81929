"""Training state on disk: trainable parameters, AdamW moments and the step, in safetensors and JSON, never pickle.

A checkpoint is a folder `step-<n>` that appears by rename when it is complete; the newest replaces the ones before it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.distributed import as_part, is_sharded, own, own_rows, whole


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: str = "",
    write: bool = True,
) -> Path:
    """Write `folder/step-<step>` atomically, remove older checkpoints, and return its path.

    run: whatever identifies the configuration and data; `load_checkpoint` wants the same. write: whether this rank
    does; tensors that are cut up over ranks are gathered, for which all ranks have to call this.
    """
    target, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = whole(parameter.detach()).contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = whole(value.detach()).contiguous()
    if not write:
        return target
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "run": run, "torch": torch.__version__}))
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    _fsync(folder)  # the new name is durable before the old checkpoint goes
    for old in (*folder.glob("step-*"), *folder.glob(".step-*.tmp")):
        if old != target:
            shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in `folder`, or None."""
    found = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: str = ""
) -> int:
    """Fill parameters and optimizer from the checkpoint and return its step.

    Raises ValueError when another `run` wrote it, or its parameters are not exactly these, by name and shape.
    """
    state = json.loads((path / "state.json").read_text())
    if state.get("run") != run:
        raise ValueError(
            f"{path}: was written with another training configuration, objective or data; go on with what wrote it, "
            "or start in a new folder"
        )
    tensors = load_file(path / "state.safetensors")
    saved = {name.removeprefix("parameter/"): t.shape for name, t in tensors.items() if name.startswith("parameter/")}
    here = {name: parameter.shape for name, parameter in parameters.items()}
    if saved != here:
        different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
        raise ValueError(
            f"{path}: parameter {different[0]!r} has shape {saved.get(different[0])} in the checkpoint and "
            f"{here.get(different[0])} in the model; start with the configuration that wrote it, or in a new folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            own(parameter).copy_(_rows(tensors[f"parameter/{name}"], parameter))
    for name, parameter in parameters.items():
        moments = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"optimizer/{key}/{name}"]
            part = value if key == "step" else _rows(value, parameter).to(own(parameter).device)
            moments[key] = as_part(parameter, part) if is_sharded(parameter) and key != "step" else part
        optimizer.state[parameter] = moments
    step: int = state["step"]
    return step


def _rows(value: Tensor, parameter: Tensor) -> Tensor:
    """Return what of a whole tensor lies where this rank's part of `parameter` does."""
    return value[slice(*own_rows(parameter))] if is_sharded(parameter) else value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
