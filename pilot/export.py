"""Policies on their way out: `matryoshka merge` folds an adapter into its model, `export` takes a stage's from a run.
"""

import os
import shutil
from pathlib import Path

from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import save_weights, weights_hash
from matryoshka.lora.files import adapter_hash, load_adapter
from matryoshka.lora.files import merge as fold

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")


def merge(model: Path, adapter: Path, out: Path) -> None:
    """Write a Hugging Face folder: the model with an adapter folded into its weights, in the model's own dtype.

    Args:
        model: The base model, a Hugging Face folder; its config and tokenizer files are copied.
        adapter: An adapter folder in PEFT layout.
        out: Folder to write; it must not exist.
    """
    _refuse_existing(out)
    loaded = load_model(model, dtype=None)
    load_adapter(loaded, "merged", adapter)
    fold(loaded, "merged")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_weights(loaded, temporary)
        for file in model.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, temporary / file.name)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(out)


def export(run: Path, out: Path, stage: str = "") -> None:
    """Copy the policy of a run's stage and print the folder and its content hash.

    It is an adapter in PEFT layout or, where all weights were trained, a Hugging Face folder, to be used as any other.

    Args:
        run: The run's folder, e.g. runs/demo-0.
        out: Folder to write; it must not exist.
        stage: warmup, star, round-1, ...; by default the last round that is trained.
    """
    _refuse_existing(out)
    hashes = {"adapter": adapter_hash, "model": weights_hash}
    folders = {path.parent.name: path for part in hashes for path in run.glob(f"*/{part}")}
    trained = sorted(folders)
    rounds = sorted((name for name in trained if name.startswith("round-")), key=lambda name: int(name[6:]))
    chosen = stage or (rounds[-1] if rounds else "")
    if chosen not in trained:
        raise ValueError(f"{run}: stage {chosen or 'round-1'!r} is not trained; choose from {trained}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(folders[chosen], temporary)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(out, hashes[folders[chosen].name](out))


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out}: exists; give a folder that does not, nothing is overwritten")
