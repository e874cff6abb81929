"""Adapters on their way out: `matryoshka merge` folds one into its model, `matryoshka export` takes one from a run."""

import os
import shutil
from pathlib import Path

from matryoshka.core.load import load_model
from matryoshka.core.weights import save_weights
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
    """Copy the adapter of a run's stage, in PEFT layout, and print the folder and the adapter's content hash.

    Args:
        run: The run's folder, e.g. runs/demo-0.
        out: Folder to write; it must not exist.
        stage: warmup, star, round-1, ...; by default the last round that is trained.
    """
    _refuse_existing(out)
    trained = sorted(folder.parent.name for folder in run.glob("*/adapter"))
    rounds = sorted((name for name in trained if name.startswith("round-")), key=lambda name: int(name[6:]))
    chosen = stage or (rounds[-1] if rounds else "")
    if chosen not in trained:
        raise ValueError(f"{run}: stage {chosen or 'round-1'!r} is not trained; choose from {trained}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(run / chosen / "adapter", temporary)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(out, adapter_hash(out))


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out}: exists; give a folder that does not, nothing is overwritten")
