"""`matryoshka convert`: a GGUF file as a Hugging Face folder."""

from pathlib import Path

from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf


def convert(out: Path, gguf: Path | None = None) -> None:
    """Convert a GGUF file to a Hugging Face folder.

    Args:
        out: Folder to write, e.g. models/smollm2-135m-instruct.
        gguf: A GGUF file of a family that can be converted; by default the embedded SmolLM2-135M-Instruct.
    """
    print(convert_gguf(gguf or smollm2_gguf(), out))
