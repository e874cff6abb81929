"""A model folder made into a module: `config.json` names the architecture, whose file lies in `core/models/`.

`model_type` picks `core/models/<model_type>.py` by name, or a file of that name in a folder of the user's own that the
environment variable MATRYOSHKA_CONTROLLERS lists, so that a new architecture is one new file. It exports `read_config`
(which makes a configuration of config.json's fields), `Model` (a LanguageModel that takes the configuration) and
`LORA_TARGETS` (the last names of its linear layers). The module is built without memory and then filled strictly: a
model that is returned is complete.
"""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from matryoshka.core.files import EMBEDDED_MODEL, check_model_folder
from matryoshka.core.json_input import read_json, shown
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.weights import load_weights
from matryoshka.core.own_module import load_own_module

MODELS = Path(__file__).parent
OWN_FOLDERS = "MATRYOSHKA_CONTROLLERS"  # folders of architectures that are the user's own, separated as in PATH
GUIDE = "docs/controllers.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
IS_ARCHITECTURE = re.compile(r"^LORA_TARGETS\b", re.MULTILINE)  # the other modules of this folder do not define it


def model_folder(model: Path | str) -> Path:
    """Return the folder of a model: `model` itself or, for a hub id OWNER/NAME, its snapshot in the local hub cache.

    Nothing is downloaded. The cache is where HF_HUB_CACHE, or HF_HOME and XDG_CACHE_HOME, say. A path that is
    no folder is returned as it is, for the caller to report, unless it reads as an id. Raises FileNotFoundError for an
    id that the cache does not have.
    """
    folder, text = Path(model), str(model)
    if folder.is_dir() or not HUB_ID.fullmatch(text) or folder.parent.is_dir():
        return folder
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    entry = cache / f"models--{text.replace('/', '--')}"
    main = entry / "refs" / "main"
    snapshot = entry / "snapshots" / main.read_text().strip() if main.is_file() else None
    if snapshot is None or not snapshot.is_dir():
        raise FileNotFoundError(
            f"{text}: no such folder; expected a Hugging Face model folder, or the id of a model in the hub cache "
            f"{cache}, which `hf download {text}` would fetch; {EMBEDDED_MODEL}"
        )
    return snapshot


def load_model(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    convert: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """Return the model of a Hugging Face folder in evaluation mode; dtype None keeps the stored one.

    convert: changes the module before its weights are read (`lora/quantized.py` puts in layers that pack them).
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
        model_config = architecture.read_config(config)
    except ValueError as err:
        raise ValueError(f"{folder}: {err!s:.1000}") from err
    except (ArithmeticError, AttributeError, LookupError, TypeError) as err:
        raise ValueError(f"{folder / 'config.json'}: a field is of the wrong kind ({err!r:.200})") from err
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
    if quantised := read_config(folder).get("quantization_config"):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config is {shown(quantised)}; quantised checkpoints are not read; "
            "use the unquantised one, or remove the key if the weights in the folder are whole"
        )
    load_weights(model, folder, dtype, device)
    init_buffers = getattr(model, "init_buffers", None)
    if init_buffers is not None:
        init_buffers(device)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a model folder.

    Raises FileNotFoundError when folder or file is missing, ValueError for anything but a JSON object in UTF-8.
    """
    check_model_folder(folder)
    return read_json(folder / "config.json", "the configuration of a Hugging Face model folder")


def own_folders() -> list[Path]:
    """Return the folders of architectures that MATRYOSHKA_CONTROLLERS lists."""
    return [Path(folder) for folder in os.environ.get(OWN_FOLDERS, "").split(os.pathsep) if folder]


def architecture_files() -> dict[str, Path]:
    """Return the file of each model_type: those of `core/models/`, then those of the folders in MATRYOSHKA_CONTROLLERS.

    Raises FileNotFoundError for a folder of one's own that is missing, ValueError for a model_type with two files.
    """
    found: dict[str, Path] = {}
    for folder in (MODELS, *own_folders()):
        if not folder.is_dir():
            raise FileNotFoundError(f"{OWN_FOLDERS}: {folder} is no folder; expected one with architecture files")
        for path in sorted(folder.glob("*.py")):
            if not IS_ARCHITECTURE.search(path.read_text("utf-8")):
                continue
            if path.stem in found and found[path.stem].resolve() != path.resolve():
                raise ValueError(f"{path}: {found[path.stem]} computes model_type {path.stem!r} already; rename one")
            found[path.stem] = path
    return found


def model_architecture(config: dict[str, Any], folder: Path) -> ModuleType:
    """Return the module that computes the model_type of a config read from `folder`.

    Raises ValueError, listing the families that there are, for a model_type that is missing or has no file.
    """
    files = architecture_files()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in files:
        mine = [path for place in own_folders() if (path := place / f"{model_type}.py").is_file()]
        remedy = f"let {mine[0]} define LORA_TARGETS" if mine else "choose another model, or add a file for it"
        where = f"{folder / 'config.json'}: model_type is {model_type!r:.100}, expected one of {sorted(files)}"
        raise ValueError(f"{where}; {remedy}: {GUIDE} shows how")
    path = files[model_type]
    if path.parent == MODELS:
        return importlib.import_module(f"matryoshka.core.models.{model_type}")
    module = load_own_module(path, f"matryoshka_controllers.{model_type}")
    if missing := [name for name in ("read_config", "Model") if not hasattr(module, name)]:
        raise ValueError(f"{path}: it has no {missing[0]!r}; {GUIDE} says what an architecture's file exports")
    return module
