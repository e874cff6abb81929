"""A model folder made into a module: `config.json` names the architecture, whose file lies in `core/models/`.

`model_type` picks `core/models/<model_type>.py` by name, so that a new architecture is one new file. That file exports
`Config` (with `from_dict`), `Model` (a LanguageModel that takes a Config) and `LORA_TARGETS`. The module is built
without memory and then filled strictly: what comes back is complete or an error was raised.
"""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.weights import load_weights

MODELS = Path(__file__).parent
IS_ARCHITECTURE = re.compile(r"^LORA_TARGETS\b", re.MULTILINE)  # the other modules of this folder do not define it


def load_model(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    convert: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """Return the model of a Hugging Face folder in evaluation mode; dtype None keeps the stored one.

    convert: what to make of the module before its weights come in (`lora/quantized.py`: layers that pack them).
    Raises FileNotFoundError or ValueError for a folder, config or checkpoint that is missing, malformed or does not
    fit.
    """
    model = empty_model(folder)
    if convert is not None:
        convert(model)
    return fill_model(model, folder, dtype, device)


def empty_model(folder: Path) -> LanguageModel:
    """Return the model of a Hugging Face folder on the meta device. Raises as `load_model`."""
    config = read_config(folder)
    architecture = model_architecture(config, folder)
    try:
        model_config = architecture.Config.from_dict(config)
    except ValueError as err:
        raise ValueError(f"{folder}: {err}") from err
    with torch.device("meta"):
        model: LanguageModel = architecture.Model(model_config)
    return model


def fill_model(
    model: LanguageModel, folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> LanguageModel:
    """Give `model` the weights in `folder`, of parameters that are cut up over ranks this rank's part alone.

    A model with buffers that no checkpoint holds has a method `init_buffers(device)`, called once the weights are in.
    Returns it in evaluation mode. Raises as `load_model`.
    """
    load_weights(model, folder, dtype, device)
    init_buffers = getattr(model, "init_buffers", None)
    if init_buffers is not None:
        init_buffers(device)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a model folder.

    Raises FileNotFoundError when folder or file is missing, ValueError for anything but a JSON object in UTF-8.
    """
    path = folder / "config.json"
    if not path.is_file():
        missing = "config.json in this folder" if folder.is_dir() else "folder"
        raise FileNotFoundError(f"{folder}: no such {missing}; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:  # malformed, or not UTF-8
        raise ValueError(f"{path}: malformed JSON ({err}); get the file again") from err
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}; get the file again")
    return config


def model_architecture(config: dict[str, Any], folder: Path) -> ModuleType:
    """Return the module `core/models/<model_type>.py` for a config read from `folder`.

    Raises ValueError, listing what there is, for a model_type that is missing or has no file.
    """
    available = sorted(path.stem for path in MODELS.glob("*.py") if IS_ARCHITECTURE.search(path.read_text("utf-8")))
    model_type = config.get("model_type")
    if model_type not in available:
        raise ValueError(f"{folder / 'config.json'}: model_type is {model_type!r}, expected one of {available}; "
                         f"choose another model, or add core/models/<model_type>.py")
    return importlib.import_module(f"matryoshka.core.models.{model_type}")
