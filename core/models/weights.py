"""Safetensors in and out of a module, a tensor at a time, in the Hugging Face layout (one file, or shards and index).

Names and shapes are the checkpoint's own: nothing is renamed, reshaped, padded or left out. A tensor that does not fit
exactly is an error that names file and key. The peak is the module itself and one tensor, since files are
memory-mapped. Pickled checkpoints are not read.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from matryoshka.core.distributed import as_part, full_tensor, is_sharded, local_rows
from matryoshka.core.files import check_model_folder, file_digest, write_atomic, write_json
from matryoshka.core.json_input import read_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
LEGACY_BUFFER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
FLOATING = ("F64", "F32", "F16", "BF16")
SHOWN_KEYS = 5
COMPARED_ROWS = 8192


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Fill `model` (usually on the meta device) with the checkpoint in `folder`, strictly and in place.

    Floating tensors are cast to `dtype` (None: as stored) and put on `device`; every parameter is replaced by a new one
    with the same requires_grad. Of a parameter that is cut up over ranks (a DTensor), this rank's rows alone are read.
    On the CPU, weights that need no cast stay mapped from their files, which must not be changed in place while the
    model lives; replacing or removing a file is harmless. Non-persistent buffers are not touched. Two surplus kinds of
    key are accepted: the buffers `*.rotary_emb.inv_freq` of old checkpoints, and, where the model has a tied head and
    so no parameter of that name, an `lm_head.weight` that equals the embedding. On an error the model is left partly
    filled.

    A layer that stores its weight packed (`lora/quantized.py`) has a method `pack(weight, dtype)`, which gets the whole
    tensor in fp32 on the device that the model computes on, and returns the packed parameter; its `shape` is the
    checkpoint's. Every rank reads all of such a tensor and keeps its own rows of the packed one.

    Raises:
        FileNotFoundError: no such folder, no safetensors in it, or a shard that the index names is missing.
        ValueError: a corrupt file, a missing or unexpected key, another shape, integers where floats are expected.
    """
    slots: dict[str, Tensor] = model.state_dict(keep_vars=True)
    with ExitStack() as stack:
        found = _open_matching(slots, folder, stack)
        for key, slot in slots.items():
            path, handle = found[key]
            stored = handle.get_slice(key)
            owner, _, leaf = key.rpartition(".")
            layer: Any = model.get_submodule(owner)
            is_packed = leaf == "weight" and hasattr(layer, "pack")
            _check_shape(path, key, stored, layer.shape if is_packed else slot.shape)
            is_floating = is_packed or slot.is_floating_point()
            if is_floating and stored.get_dtype() not in FLOATING:
                raise ValueError(f"{path}: {key} is stored as {stored.get_dtype()}, expected one of {FLOATING}; "
                                 f"quantised checkpoints are not read, use the unquantised one")
            if is_packed:
                read = handle.get_tensor(key)
                place = getattr(model, "compute_device", None) or device
                packed = layer.pack(read.to(device=place, dtype=torch.float32), dtype or read.dtype)
                part = packed[slice(*local_rows(slot))].clone() if is_sharded(slot) else packed
                tensor = part.to(device)
            else:
                read = _own_part(slot, stored) if is_sharded(slot) else handle.get_tensor(key)
                # On the CPU and uncast it is a view of the file's private memory map: nothing is copied, pages are read
                # when they are first used, and writing to the tensor leaves the file alone.
                tensor = read.to(device=device, dtype=dtype if is_floating else None)
            _assign(model, key, slot, as_part(slot, tensor) if is_sharded(slot) else tensor)


def check_weights(model: nn.Module, folder: Path) -> None:
    """Return if the checkpoint in `folder` has the names and shapes of `model`; no tensor is read.

    Raises as `load_weights`.
    """
    slots: dict[str, Tensor] = model.state_dict(keep_vars=True)
    with ExitStack() as stack:
        for key, (path, handle) in _open_matching(slots, folder, stack).items():
            if key in slots:
                _check_shape(path, key, handle.get_slice(key), slots[key].shape)


def save_weights(
    model: nn.Module | Mapping[str, Tensor],
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    write: bool = True,
) -> None:
    """Write a module (or its state dict) into `folder`: `model.safetensors`, or shards and an index above the limit.

    The file that makes the folder loadable comes last, and each file is written atomically: a kill leaves a folder that
    `load_weights` refuses, and saving again mends it. At most one shard is held in host memory. dtype: of the files;
    default the tensors' own. Tensors that are cut up over ranks are gathered one by one, so all ranks call this, with
    `write` true on the one that writes.

    Raises ValueError for an empty state dict, a tensor without data, and a folder that holds other weights already.
    """
    tensors: Mapping[str, Tensor] = model.state_dict() if isinstance(model, nn.Module) else model
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if not tensors or empty:
        raise ValueError(f"{folder}: nothing to save: {len(tensors)} tensors, on the meta device {_some(empty)}; "
                         f"load the model first")
    shards = _split(tensors, max_shard_bytes)
    if not write:
        for key in (key for keys in shards for key in keys):
            full_tensor(tensors[key])
        return
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    resumable = set(names) if count > 1 else set()
    clash = sorted({path.name for path in folder.glob("model*.safetensors*")} - resumable)
    if clash:
        raise ValueError(f"{folder}: holds weights already ({_some(clash)}); remove them or choose another folder")
    for name, keys in zip(names, shards, strict=True):
        shard = {key: full_tensor(tensors[key].detach()).to("cpu", dtype).contiguous() for key in keys}
        write_tensors(folder / name, shard)
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def sampled_digest(folder: Path) -> str:
    """Return a hash of the names, shapes, dtypes and three rows (first, middle, last) of every tensor in `folder`.

    It tells two checkpoints of one shape apart in a moment, however many gigabytes they have, unless they differ in
    other rows alone; how they are cut into files is not in it. Raises as `load_weights` for a bad file.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        for key, (_, handle) in sorted(_open_checkpoint(folder, stack).items()):
            stored = handle.get_slice(key)
            shape = stored.get_shape()
            digest.update(f"{key} {stored.get_dtype()} {shape}".encode())
            rows = (0, shape[0] // 2, shape[0] - 1) if shape and shape[0] else ()
            for part in [stored[row : row + 1] for row in rows] if shape else [handle.get_tensor(key)]:
                digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_digest(folder: Path) -> str:
    """Return the name and SHA-256 of a model folder's configuration and weight files, which are read whole for it."""
    paths = sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    return "".join(f"{path.name} {file_digest(path)}" for path in paths)


def weights_hash(folder: Path) -> str:
    """Return 16 hex digits of the SHA-256 of `files_digest`. The name of a model that a run has trained ends with them.
    """
    return hashlib.sha256(files_digest(folder).encode()).hexdigest()[:16]


def _open_matching(
    slots: Mapping[str, Tensor], folder: Path, stack: ExitStack
) -> dict[str, tuple[Path, Any]]:
    """Return key -> (file, its handle) of the checkpoint in `folder`, whose keys are those of `slots`."""
    found = _open_checkpoint(folder, stack)
    unexpected = [key for key in found if key not in slots and not _is_ignorable(key, found, slots)]
    missing = [key for key in slots if key not in found]
    if unexpected or missing:
        raise ValueError(
            f"{folder}: the checkpoint and the model disagree: missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}; check that config.json belongs to these weights (layers, biases, tied head)"
        )
    return found


def _check_shape(path: Path, key: str, stored: Any, shape: Sequence[int]) -> None:
    if tuple(stored.get_shape()) != tuple(shape):
        raise ValueError(f"{path}: {key} has shape {tuple(stored.get_shape())}, the model expects {tuple(shape)}; "
                         "check that config.json belongs to these weights")


def _open_checkpoint(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Return the open file that holds each key; every file is opened, so that a bad one shows before any work."""
    check_model_folder(folder)
    if (folder / SINGLE).is_file():
        path = folder / SINGLE
        handle = _open(path, stack)
        return {key: (path, handle) for key in handle.keys()}
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}; get the checkpoint in safetensors format")
    weight_map = _read_index(folder / INDEX)
    handles = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: this shard is missing, {INDEX} names it; get it again")
        handles[name] = _open(folder / name, stack)
    found: dict[str, tuple[Path, Any]] = {}
    for name, handle in handles.items():
        keys = set(handle.keys())
        absent = [key for key, owner in weight_map.items() if owner == name and key not in keys]
        surplus = sorted(key for key in keys if weight_map.get(key) != name)
        if absent or surplus:
            raise ValueError(f"{folder / name}: {INDEX} and the shard disagree: not in the shard {_some(absent)}, "
                             f"not in the index {_some(surplus)}; get both files again")
        found |= {key: (folder / name, handle) for key in keys}
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each key. Raises ValueError for a file that is not named as one in the index's own folder."""
    weight_map = read_json(path, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is {shown(weight_map)}; expected {{key: file}}, get the index again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in (".", "..") or not re.fullmatch(r"[^/\\\0]{1,200}", name):
            raise ValueError(f"{path}: {shown(key)} lies in {shown(name)}; expected the name of a file in this folder")
    return weight_map


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except SafetensorError as err:
        raise ValueError(f"{path}: truncated or not a safetensors file ({err!s:.300}, {path.stat().st_size} bytes); "
                         f"get it again") from err


def _is_ignorable(key: str, found: Mapping[str, tuple[Path, Any]], slots: Mapping[str, Tensor]) -> bool:
    if LEGACY_BUFFER.fullmatch(key):
        return True
    if key != HEAD or EMBEDDING not in slots or EMBEDDING not in found:
        return False
    path, handle = found[HEAD]
    head, embedding = handle.get_slice(HEAD), found[EMBEDDING][1].get_slice(EMBEDDING)
    shape = head.get_shape()
    same = len(shape) == 2 and shape == embedding.get_shape()
    for start in range(0, shape[0] if same else 0, COMPARED_ROWS):  # not all at once: a rank need not have room for it
        rows = slice(start, start + COMPARED_ROWS)
        same = same and torch.equal(head[rows], embedding[rows])
    if not same:
        raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}, but the model ties them; "
                         f"set tie_word_embeddings to false in config.json")
    return True


def _own_part(slot: Any, stored: Any) -> Tensor:
    """Return this rank's rows of a tensor that is in a file."""
    start, stop = local_rows(slot)
    part: Tensor = stored[start:stop] if start < stop else torch.empty(0, *slot.shape[1:], dtype=slot.dtype)
    return part


def _assign(model: nn.Module, key: str, slot: Tensor, tensor: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    value = nn.Parameter(tensor, requires_grad=slot.requires_grad) if isinstance(slot, nn.Parameter) else tensor
    setattr(model.get_submodule(owner), name, value)


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Return the keys of each shard, in order; a tensor above the limit has a shard to itself."""
    shards: list[list[str]] = []
    room = -1
    for key, tensor in tensors.items():
        if tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= tensor.nbytes
    return shards


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""

    def write(temporary: Path) -> None:
        # safetensors creates files that only the owner can read: keep the permissions that the user's umask gives.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_tensors(tensors, temporary, {"format": "pt"})
        temporary.chmod(mode)

    write_atomic(path, write)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place. Raises OSError where the disk fails, which safetensors hides in another kind.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as err:
        if (code := re.search(r"\(os error (\d+)\)", str(err))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from err


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return (", ".join(f"{key:.100}" for key in keys[:SHOWN_KEYS]) + more) or "nothing"
