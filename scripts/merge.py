"""`matryoshka merge`: an adapter folded into its model."""

from pathlib import Path

from matryoshka.pilot.export import merge_adapter


def merge(model: Path, adapter: Path, out: Path) -> None:
    """Write a Hugging Face folder: the model with an adapter folded into its weights, in the model's own dtype.

    Args:
        model: The base model, a Hugging Face folder; its config and tokenizer files are copied.
        adapter: An adapter folder in PEFT layout.
        out: Folder to write; it must not exist.
    """
    merge_adapter(model, adapter, out)
    print(out)
