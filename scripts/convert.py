"""`matryoshka convert`: a GGUF file as a Hugging Face folder."""

from pathlib import Path
from typing import Literal

import torch

from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf


def convert(out: Path, gguf: Path | None = None, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Convert a GGUF file to a Hugging Face folder.

    Args:
        out: Folder to write, e.g. models/smollm2-135m-instruct.
        gguf: A GGUF file of a family that can be converted; by default the embedded SmolLM2-135M-Instruct.
        dtype: Data type of the weights in the folder; bfloat16 takes half the memory and rounds them.
    """
    print(convert_gguf(gguf or smollm2_gguf(), out, getattr(torch, dtype)))
