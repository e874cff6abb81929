"""Checkpoints on disk: the folders `step-<n>` of a run, each read whole or refused, and the removal of old ones."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

STATE, WHOLE = "state.json", "state.safetensors"


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step in `folder`, or None. Raises ValueError for another `step-*`."""
    return max(folder.glob("step-*"), key=step_of, default=None)


def step_of(path: Path) -> int:
    """Return the number in the name of a checkpoint. Raises ValueError for another name."""
    if not (match := re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name)):
        raise ValueError(f"{path}: is not the name of a checkpoint (step-<number>); move it out of this folder")
    return int(match[1])


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json. Raises ValueError where it, or one of the files that it lists, is not what was written."""
    mend = "remove this folder to go on from an earlier checkpoint, where there is one, or from the start"
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        step, files = state["step"], state["files"]
        missing = {"run", "tensors", "values"} - state.keys()
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ValueError(f"{path}: half a checkpoint: {STATE} is missing or malformed ({err!r}); {mend}") from err
    if missing:
        raise ValueError(f"{path}: {STATE} lacks {sorted(missing)}; {mend}")
    if step != step_of(path):
        raise ValueError(f"{path}: was written as step-{step}; give the folder its name back")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{path}: half a checkpoint: {name} {what}, {size} were written; {mend}")
    return state


def rotate(folder: Path, newest: Path, keep: int, max_bytes: int | None) -> None:
    """Remove the oldest checkpoints while there are more than `keep` or they take more; `newest` always stays."""
    old = sorted((path for path in folder.glob("step-*") if path != newest), key=step_of)
    size = {path: sum(file.stat().st_size for file in path.iterdir()) for path in (newest, *old)}
    while old and (len(size) > keep or (max_bytes is not None and sum(size.values()) > max_bytes)):
        del size[old[0]]
        remove(old.pop(0))


def remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no half of it under its name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old)


def sizes(files: list[Path]) -> dict[str, int]:
    """Return the bytes of each file by its name."""
    return {file.name: file.stat().st_size for file in files}
