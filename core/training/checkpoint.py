"""Training state on disk: trainable parameters, optimizer moments and the step, in safetensors and JSON, never pickle.

A checkpoint is a folder `step-<n>` that appears by rename when all of it is on disk: `state.json`, which says what it
is and lists every tensor and every file, `state.safetensors` with the tensors that all ranks have whole (the first rank
writes them), and a file a rank of those that are sharded (`checkpoint_shards.py`). It is written by a thread from
copies in host memory, while training goes on. Any number of ranks may go on from it.

Random numbers and the position in the data are not in it: both are functions of the seed and the step in
`core/training/train.py`, so a run that continues draws and reads what the uninterrupted one would (held by a test).
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.distributed import ALONE, TIMEOUT_S, World, is_sharded
from matryoshka.core.files import fsync, write_atomic, write_json
from matryoshka.core.training.checkpoint_files import STATE, WHOLE, read_state, remove, rotate, sizes, step_of
from matryoshka.core.training.checkpoint_files import latest_checkpoint as latest_checkpoint
from matryoshka.core.training.checkpoint_shards import own_slices, read_slices, write_slices

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
        path = self._folder / f"step-{step}"
        state = read_state(path)
        if state["run"] != self._run:
            raise ValueError(
                f"{path}: was written with another training configuration, objective, model or data; go on with "
                "what wrote it, or start in a new folder"
            )
        _check_parameters(path, state["tensors"], parameters)
        targets = {name: _empty(kind, _owner(name, parameters)[1]) for name, kind in state["tensors"].items()}
        _read(path, state["files"], targets)
        everyone = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        order = {id(parameter): at for at, parameter in enumerate(everyone)}
        moments: dict[int, dict[str, Any]] = {}
        for name, value in (targets | state["values"]).items():
            key, parameter = _owner(name, parameters)
            if key is None:
                parameter.detach().copy_(value)
            else:
                moments.setdefault(order[id(parameter)], {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})  # which puts them where they belong
        return step

    def save(self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Copy the state and write `step-<step>` in the background, after the one before it is complete.

        Raises what writing the one before it raised.
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
            arguments = (step, state, copies, slices, bool(sharded))
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
        self, step: int, state: dict[str, Any], whole: dict[str, Tensor], slices: dict[str, Tensor], sharded: bool
    ) -> None:
        target, temporary = self._folder / f"step-{step}", self._folder / f".step-{step}.tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        files = write_slices(temporary, self._world.rank, slices)
        if not self._world.is_first:  # that this file is there says that those in it are on disk
            write_json(temporary / f"rank-{self._world.rank}.json", sizes(files))
            return
        if whole:
            write_atomic(temporary / WHOLE, lambda path: save_file(whole, path))
            files.append(temporary / WHOLE)
        state["files"] = sizes(files) | (self._files_of_others(temporary) if sharded else {})
        write_json(temporary / STATE, state)
        if target.exists():
            remove(target)
        os.rename(temporary, target)
        fsync(self._folder)  # the new name is durable before an old checkpoint goes
        rotate(self._folder, target, self._keep, self._max_bytes)

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
