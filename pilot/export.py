"""Policies for use elsewhere: an adapter folded into its model, and the policy of a run's stage copied out."""

import shutil
from pathlib import Path

from matryoshka.core.files import write_folder
from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import save_weights, weights_hash
from matryoshka.lora.files import adapter_hash, load_adapter, merge
from matryoshka.pilot.folder import trained_stages

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")


def merge_adapter(model: Path, adapter: Path, out: Path) -> None:
    """Write the Hugging Face folder `out`: the model with an adapter folded into its weights, in the model's own dtype.

    Raises ValueError where `out` exists.
    """
    _refuse_existing(out)
    loaded = load_model(model, dtype=None)
    load_adapter(loaded, "merged", adapter, base=model)
    merge(loaded, "merged")
    with write_folder(out, replace=False) as temporary:
        save_weights(loaded, temporary)
        copy_tokenizer(model, temporary)


def export_policy(run: Path, out: Path, stage: str = "") -> str:
    """Copy the policy of `stage` of the run in the folder `run` to `out` and return its content hash.

    stage: "" is the last round that is trained. Raises ValueError for a stage that is not trained, or where `out`
    exists.
    """
    _refuse_existing(out)
    folders = trained_stages(run)
    if not folders:
        raise ValueError(f"{run}: no trained policy is there; expected the folder of a run, such as runs/demo-0")
    rounds = sorted((name for name in folders if name.startswith("round-")), key=lambda name: int(name[6:]))
    chosen = stage or (rounds[-1] if rounds else "")
    if chosen not in folders:
        raise ValueError(f"{run}: stage {chosen or 'round-1'!r} is not trained; choose from {list(folders)}")
    with write_folder(out, replace=False) as temporary:
        shutil.copytree(folders[chosen], temporary)
    return adapter_hash(out) if folders[chosen].name == "adapter" else weights_hash(out)


def copy_tokenizer(model: Path, out: Path) -> None:
    """Copy all files of a Hugging Face folder but its weights: configuration and tokenizer."""
    for file in model.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, out / file.name)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out}: exists; give a folder that does not, nothing is overwritten")
