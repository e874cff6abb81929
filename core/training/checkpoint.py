"""Training state on disk: trainable parameters, optimizer moments and the step, in safetensors and JSON, never pickle.

A checkpoint is a folder `step-<n>` that appears by rename when all of it is on disk. `state.json` lists every tensor
and every file. `state.safetensors` holds the tensors that every rank has whole; the first rank writes it. Each rank
writes one more file with its slices of sharded tensors. A thread writes all this from copies in host memory while
training continues. Any number of ranks can continue from it.

Slices are written and read by the planner and storage interfaces of torch.distributed.checkpoint (safetensors files
whose headers say where in the tensor a slice lies), without its collectives, which would send pickled plans between
ranks. So no rank waits for another while it writes.

Random numbers and the position in the data are not saved: `core/training/train.py` computes both from the seed and the
step, so a resumed run draws and reads what the uninterrupted run would (held by a test).
"""

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from matryoshka.core.distributed import ALONE, TIMEOUT_S, World, is_sharded, local_part
from matryoshka.core.files import fsync, write_atomic, write_json
from matryoshka.core.models.weights import save_tensors

STATE, WHOLE = "state.json", "state.safetensors"
GRACE_S = 10.0  # how long a run that ends with an error still waits for a checkpoint that other ranks write too


class Checkpoints:
    """The checkpoints of one run. A context manager: at its end the one that is being written is complete, or raises.

    Every rank makes it and calls its methods in the same order. Leftovers of a run that was killed are removed.
    """

    def __init__(
        self,
        folder: Path,
        run: str = "",
        world: World = ALONE,
        keep: int = 1,
        max_bytes: int | None = None,
        asynchronous: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """folder: where they lie; all ranks must see it. run: whatever identifies the configuration and data; another
        run's are refused. keep, max_bytes: the oldest go while there are more, or while they take more, but never the
        newest. asynchronous: `save` returns when the tensors are copied. timeout_s: how long the first rank waits for
        the files of the others.
        """
        self._folder, self._run, self._world = folder, run, world
        self._keep, self._max_bytes, self._asynchronous, self._timeout_s = keep, max_bytes, asynchronous, timeout_s
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._deadline = 0.0
        if world.is_first:
            for leftover in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")):
                shutil.rmtree(leftover)
        world.barrier()

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, as the first rank sees it, or None.

        Raises ValueError for a `step-*` that is none of ours.
        """
        found = latest_checkpoint(self._folder) if self._world.is_first else None
        step = torch.tensor(0 if found is None else step_of(found) + 1, device=self._world.device)
        self._world.sum([step])
        return int(step) - 1 if step else None

    def load(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Fill parameters and optimizer from the newest checkpoint and return its step; 0 and untouched without one.

        Raises ValueError, with nothing changed, when another `run` wrote it, when its parameters are not exactly these
        by name, shape and dtype, or when a file of it is missing, cut short or unreadable.
        """
        step = self.latest()
        if step is None:
            return 0
        self._fill(step, parameters, optimizer)
        return step

    def load_parameters(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Fill `parameters` alone from the checkpoint of `step`; the errors are those of `load`."""
        self._fill(step, parameters, None)

    def _fill(
        self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
    ) -> None:
        path = self._folder / f"step-{step}"
        state = read_state(path)
        if state["run"] != self._run:
            raise ValueError(
                f"{path}: was written with another training configuration, objective, model or data; go on with "
                "what wrote it, or start in a new folder"
            )
        _check_parameters(path, state["tensors"], parameters)
        names = [name for name in state["tensors"] if optimizer is not None or _owner(name, parameters)[0] is None]
        targets = {name: _empty(state["tensors"][name], _owner(name, parameters)[1]) for name in names}
        _read(path, state["files"], targets)
        for name, value in targets.items():
            key, parameter = _owner(name, parameters)
            if key is None:
                parameter.detach().copy_(value)
        if optimizer is None:
            return
        everyone = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        order = {id(parameter): at for at, parameter in enumerate(everyone)}
        moments: dict[int, dict[str, Any]] = {}
        for name, value in (targets | state["values"]).items():
            key, parameter = _owner(name, parameters)
            if key is not None:
                moments.setdefault(order[id(parameter)], {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})  # which puts them where they belong

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        best: int | None = None,
    ) -> None:
        """Copy the state and write `step-<step>` in the background, after the one before it is complete.

        best: the step of a checkpoint that stays, however old it is. Raises what writing the one before it raised.
        """
        self._join()
        tensors: dict[str, Tensor] = {}
        values: dict[str, int | float] = {}
        for name, parameter in parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value.detach()
                else:
                    values[f"optimizer/{key}/{name}"] = value
        state = {
            "step": step,
            "run": self._run,
            "torch": torch.__version__,
            "tensors": {name: _kind(tensor) for name, tensor in tensors.items()},
            "values": values,
        }
        sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        whole = tensors.keys() - sharded.keys() if self._world.is_first else ()
        copies = {name: tensors[name].to("cpu", copy=True).contiguous() for name in whole}
        slices = {name: tensor.to("cpu", copy=True) for name, tensor in own_slices(sharded).items()}
        if sharded or self._world.is_first:
            self._deadline = time.monotonic() + self._timeout_s
            arguments = (step, state, copies, slices, bool(sharded), best)
            self._thread = threading.Thread(target=self._guarded, args=arguments, name=f"step-{step}", daemon=True)
            self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the checkpoint that is being written is complete. Raises what writing it raised."""
        self._join()
        self._world.barrier()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        # Another rank may be dead: no barrier, and its files are not waited for long.
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        try:
            self._join()
        except Exception as err:
            if not isinstance(error, Exception):  # a generator that is closed
                raise
            error.add_note(f"and the checkpoint before it is not complete: {err!r}")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _guarded(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as err:  # raised by the next `save` or `wait`
            self._failure = err

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        whole: dict[str, Tensor],
        slices: dict[str, Tensor],
        sharded: bool,
        best: int | None,
    ) -> None:
        target, temporary = self._folder / f"step-{step}", self._folder / f".step-{step}.tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        files = write_slices(temporary, self._world.rank, slices)
        if not self._world.is_first:  # that this file is there says that those in it are on disk
            write_json(temporary / f"rank-{self._world.rank}.json", sizes(files))
            return
        if whole:
            write_atomic(temporary / WHOLE, lambda path: save_tensors(whole, path))
            files.append(temporary / WHOLE)
        state["files"] = sizes(files) | (self._files_of_others(temporary) if sharded else {})
        write_json(temporary / STATE, state)
        if target.exists():
            remove(target)
        os.rename(temporary, target)
        fsync(self._folder)  # the new name is durable before an old checkpoint goes
        stay = {target} if best is None else {target, self._folder / f"step-{best}"}
        rotate(self._folder, stay, self._keep, self._max_bytes)

    def _files_of_others(self, temporary: Path) -> dict[str, int]:
        """Wait until every other rank has written its slices; return the bytes of their files by name."""
        files: dict[str, int] = {}
        for rank in range(1, self._world.size):
            notice = temporary / f"rank-{rank}.json"
            while not notice.exists():
                if time.monotonic() > self._deadline:
                    raise TimeoutError(
                        f"{temporary}: rank {rank} did not write its part of the checkpoint in time; all ranks must "
                        "see this folder; the checkpoint before it is whole"
                    )
                time.sleep(0.01)
            files |= json.loads(notice.read_text())
            notice.unlink()
        return files


def _check_parameters(path: Path, tensors: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    prefix = "parameter/"
    saved = {name.removeprefix(prefix): kind for name, kind in tensors.items() if name.startswith(prefix)}
    here = {name: _kind(parameter) for name, parameter in parameters.items()}
    if saved != here:
        name = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))[0]
        one, two = (" ".join(map(str, kind)) if kind else "nothing" for kind in (saved.get(name), here.get(name)))
        raise ValueError(
            f"{path}: parameter {name!r} is {one} in the checkpoint and {two} in the model; start with the "
            "configuration that wrote it, or in a new folder"
        )


def _read(path: Path, files: Mapping[str, int], targets: Mapping[str, Tensor]) -> None:
    try:
        if list(files) == [WHOLE] and not any(map(is_sharded, targets.values())):
            loaded = load_file(path / WHOLE)
            for name, target in targets.items():
                target.copy_(loaded[name])
        else:
            read_slices(path, targets)
    except (SafetensorError, KeyError, RuntimeError, ValueError, AssertionError) as err:
        raise ValueError(f"{path}: cannot be read ({err!r}); remove it to go on from an earlier one") from err


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _owner(name: str, parameters: Mapping[str, nn.Parameter]) -> tuple[str | None, nn.Parameter]:
    """Return what `parameter/<name>` and `optimizer/<key>/<name>` belong to; the key is None for the parameter."""
    what, _, rest = name.partition("/")
    if what == "parameter":
        return None, parameters[rest]
    key, _, of = rest.partition("/")
    return key, parameters[of]


def _empty(kind: list[Any], parameter: nn.Parameter) -> Tensor:
    """Return room for a tensor: laid out as `parameter` where it has its shape, plain in host memory otherwise."""
    dtype, shape = getattr(torch, kind[0]), torch.Size(kind[1])
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step in `folder`, or None. Raises ValueError for another `step-*`."""
    return max(folder.glob("step-*"), key=step_of, default=None)


def step_of(path: Path) -> int:
    """Return the number in the name of a checkpoint. Raises ValueError for another name."""
    if not (match := re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name)):
        raise ValueError(f"{path}: is not the name of a checkpoint (step-<number>); move it out of this folder")
    return int(match[1])


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json. Raises ValueError if it or a file that it lists is not as it was written."""
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


def rotate(folder: Path, stay: Collection[Path], keep: int, max_bytes: int | None) -> None:
    """Remove the oldest checkpoints while there are more than `keep` or they take more; those in `stay` stay."""
    old = sorted((path for path in folder.glob("step-*") if path not in stay), key=step_of)
    size = {path: sum(file.stat().st_size for file in path.iterdir()) for path in (*stay, *old)}
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


def own_slices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those DTensors of `tensors` that this rank has to write: a slice with elements, the first of its replicas.

    Raises ValueError for a tensor that is neither sharded nor replicated (a partial sum).
    """
    mine = {}
    for name, tensor in tensors.items():
        placements, coordinate = cast(Any, tensor).placements, cast(Any, tensor).device_mesh.get_coordinate()
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"checkpoint: {name!r} is a partial sum ({placements}); only whole values can be saved")
        replicas = (at for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
        if local_part(tensor).numel() and not any(replicas):
            mine[name] = tensor
    return mine


def write_slices(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write this rank's slices of `tensors` (DTensors in host memory), fsync them, and return the files: one or none.

    It holds the bytes of the slices once more while it writes.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if not tensors:
        return []
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # otherwise the thread opens a context on the first GPU, on every rank
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    results = writer.write_data(dataclasses.replace(plan, storage_data={"shard_index": rank + 1}), planner).wait()
    return sorted({folder / result.storage_data.relative_path for result in results})


def read_slices(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` in place (DTensors: this rank's slice) from the safetensors files in `folder`, sharded or not."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    wanted = {n: t for n, t in targets.items() if not is_sharded(t) or local_part(t).numel()}
    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(wanted, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
