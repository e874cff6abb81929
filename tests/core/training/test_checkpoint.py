"""checkpoint.py in one process: oracles are the values at the time of the save, the older checkpoint, messages."""

import json
import os
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.training import checkpoint as module
from matryoshka.core.training.checkpoint import Checkpoints, latest_checkpoint

Parameters = dict[str, nn.Parameter]


def make(seed: int = 0, rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Parameters, torch.optim.AdamW]:
    """Return two parameters of random values and their AdamW."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (rows, 4), "b.bias": (5,)}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for name, shape in shapes.items()}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)


def update(parameters: Parameters, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.dtype)
    optimizer.step()


def state(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of all that a checkpoint must hold."""
    out: dict[str, Any] = {}
    for name, parameter in parameters.items():
        out[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            out[f"{key}/{name}"] = value.clone() if isinstance(value, Tensor) else value
    return out


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Return whether both hold the same, to the bit and in the same types."""
    return one.keys() == two.keys() and all(
        type(one[name]) is type(two[name])
        and (
            torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype
            if isinstance(one[name], Tensor)
            else one[name] == two[name]
        )
        for name in one
    )


def saved(folder: Path, steps: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """Make a run that saves after each of `steps` updates; return what each save must hold."""
    parameters, optimizer = make()
    expected = []
    with Checkpoints(folder, "run", **settings) as checkpoints:
        for step in range(1, steps + 1):
            update(parameters, optimizer, step)
            expected.append(state(parameters, optimizer))
            checkpoints.save(step, parameters, optimizer)
    return expected


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: copies; also of states that are not AdamW's: other shapes, numbers that are no tensors."""
    parameters, optimizer = make(dtype=dtype)
    update(parameters, optimizer, 1)
    extra = {"count": 3, "scale": 0.1, "map": torch.rand(2, 2).to(dtype)}
    optimizer.state[parameters["b.bias"]] |= extra
    with Checkpoints(tmp_path, "run") as checkpoints:
        checkpoints.save(12, parameters, optimizer)
    expected = state(parameters, optimizer)
    parameters, optimizer = make(seed=1, dtype=dtype)
    checkpoints = Checkpoints(tmp_path, "run")
    assert checkpoints.latest() == 12 and checkpoints.load(parameters, optimizer) == 12
    assert same(state(parameters, optimizer), expected)
    assert names(tmp_path) == ["step-12"] and names(tmp_path / "step-12") == ["state.json", "state.safetensors"]


def test_without_a_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    """Oracle: by hand."""
    parameters, optimizer = make()
    before = state(parameters, optimizer)
    checkpoints = Checkpoints(tmp_path / "new", "run")
    assert checkpoints.latest() is None and checkpoints.load(parameters, optimizer) == 0
    assert same(state(parameters, optimizer), before)


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: copies made before `save`; the disk is stopped while the next update changes the tensors in place."""
    disk = threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        assert disk.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_tensors", slow)
    parameters, optimizer = make()
    with Checkpoints(tmp_path, "run") as checkpoints:
        update(parameters, optimizer, 1)
        expected = state(parameters, optimizer)
        checkpoints.save(1, parameters, optimizer)
        update(parameters, optimizer, 2)
        assert latest_checkpoint(tmp_path) is None
        disk.set()
        checkpoints.wait()
        assert latest_checkpoint(tmp_path) == tmp_path / "step-1"
    parameters, optimizer = make(seed=1)
    assert Checkpoints(tmp_path, "run").load(parameters, optimizer) == 1
    assert same(state(parameters, optimizer), expected)


def test_what_the_writer_raises_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a full disk by hand. `save`, `wait` and the end raise it, an error on its way tells it; step 1 stays."""
    expected = saved(tmp_path)[-1]
    parameters, optimizer = make()

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_tensors", full)
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(2, parameters, optimizer)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    checkpoints.wait()  # it is raised once
    checkpoints.save(2, parameters, optimizer)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, parameters, optimizer)
    with pytest.raises(OSError, match="No space left"), checkpoints:
        checkpoints.save(2, parameters, optimizer)
    with pytest.raises(OSError, match="No space left"):
        Checkpoints(tmp_path, "run", asynchronous=False).save(2, parameters, optimizer)
    with pytest.raises(FloatingPointError, match="loss") as caught, checkpoints:
        checkpoints.save(2, parameters, optimizer)
        raise FloatingPointError("loss")
    assert "No space left" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="No space left"), checkpoints:
        checkpoints.save(2, parameters, optimizer)
        raise GeneratorExit
    assert Checkpoints(tmp_path, "run").load(parameters, optimizer) == 1
    assert same(state(parameters, optimizer), expected) and names(tmp_path) == ["step-1"]


def test_the_oldest_go(tmp_path: Path) -> None:
    """Oracle: by hand, by count and by bytes; the newest stays however large it is, and the rest is still loadable."""
    saved(tmp_path / "one", 3)
    assert names(tmp_path / "one") == ["step-3"]
    size = sum(file.stat().st_size for file in (tmp_path / "one" / "step-3").iterdir())
    expected = saved(tmp_path / "three", 12, keep=3)
    assert names(tmp_path / "three") == ["step-10", "step-11", "step-12"]
    saved(tmp_path / "bytes", 5, keep=4, max_bytes=2 * size + size // 2)
    assert names(tmp_path / "bytes") == ["step-4", "step-5"]
    saved(tmp_path / "few", 3, keep=4, max_bytes=1)
    assert names(tmp_path / "few") == ["step-3"]
    shutil.rmtree(tmp_path / "three" / "step-12")
    parameters, optimizer = make(seed=1)
    assert Checkpoints(tmp_path / "three", "run").load(parameters, optimizer) == 11
    assert same(state(parameters, optimizer), expected[10])


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Oracle: step 1 or step 2 is loaded, to the bit, whichever operation on the folder the process died before.

    A forked child dies at its first, second, ... operation that Python reports (open, mkdir, rename, remove, rmdir)
    until it lives to the end; the one that saves step 2 also replaces step 1.
    """
    parameters, optimizer = make()
    expected = [*saved(tmp_path / "whole", 2)]
    outcomes = []
    for fatal in range(1, 100):
        folder = tmp_path / str(fatal)
        saved(folder)
        child = os.fork()
        if child == 0:
            left = fatal

            def hook(event: str, arguments: tuple[Any, ...], folder: str = str(folder)) -> None:
                nonlocal left
                paths = [str(argument) for argument in arguments[:2]]
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and folder in "".join(paths):
                    left -= 1
                    if left == 0:
                        os._exit(9)

            sys.addaudithook(hook)
            try:
                parameters, optimizer = make()
                checkpoints = Checkpoints(folder, "run")
                checkpoints.load(parameters, optimizer)
                update(parameters, optimizer, 2)
                checkpoints.save(2, parameters, optimizer)
                checkpoints.wait()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        parameters, optimizer = make(seed=1)
        step = Checkpoints(folder, "run").load(parameters, optimizer)
        assert step in (1, 2) and same(state(parameters, optimizer), expected[step - 1])
        assert names(folder) in ([f"step-{step}"], ["step-1", "step-2"])
        outcomes.append(step)
        if status == 0:
            break
    assert status == 0 and outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2 and len(outcomes) > 8


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: os.rename(folder / old, folder / new)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(change((folder / name).read_bytes())))


def edit(**changes: Any) -> Callable[[Path], None]:
    return rewrite("step-2/state.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


def void(value: object) -> None:
    del value


HALF = "half a checkpoint: .*remove this folder to go on from an earlier checkpoint"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "step-2/state.json").unlink(), HALF),
        (rewrite("step-2/state.json", lambda data: data[:-10]), HALF),
        (rewrite("step-2/state.json", lambda data: b"[]"), HALF),
        (rewrite("step-2/state.json", lambda data: b"{}"), HALF),
        (rewrite("step-2/state.json", lambda data: b"\xff\xfe"), HALF),
        (lambda folder: (folder / "step-2/state.safetensors").unlink(), "tensors is missing, [0-9]+ were"),
        (rewrite("step-2/state.safetensors", lambda data: data[:-1]), "tensors has [0-9]+ bytes, [0-9]+ were"),
        (rewrite("step-2/state.safetensors", lambda data: b"\x01" * len(data)), "cannot be read"),
        (edit(run="another"), "was written with another training configuration, objective, model or data"),
        (lambda folder: (folder / "step-3").mkdir(), HALF),
        (rename("step-2", "step-7"), "was written as step-2; give the folder its name back"),
        (rename("step-2", "step-best"), r"step-best: is not the name of a checkpoint \(step-<number>\)"),
        (rename("step-2", "step-02"), "step-02: is not the name of a checkpoint"),
        (rename("step-2", "step-2.bak"), "step-2.bak: is not the name of a checkpoint"),
    ],
)  # fmt: skip
def test_half_a_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    """Oracle: messages. Parameters, optimizer and every file of the folder stay as they are."""
    saved(tmp_path, 2, keep=2)
    damage(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parameters, optimizer = make(seed=1)
    before = state(parameters, optimizer)
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, "run").load(parameters, optimizer)
    assert same(state(parameters, optimizer), before)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(rows=2), r"parameter 'a.weight' is float32 [3, 4] in the checkpoint and float32 [2, 4] in the"),
        (lambda: make(dtype=torch.bfloat16), r"is float32 [3, 4] in the checkpoint and bfloat16 [3, 4] in the model"),
        (lambda: ({"a.weight": make()[0]["a.weight"]}, make()[1]), "'b.bias' is float32 [5] in the checkpoint and n"),
        (lambda: ({**make()[0], "c": make()[0]["b.bias"]}, make()[1]), "'c' is nothing in the checkpoint and float32"),
    ],
)  # fmt: skip
def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path, other: Callable[[], Any], message: str) -> None:
    """Oracle: messages, which name the first parameter that differs; nothing changes."""
    saved(tmp_path)
    parameters, optimizer = other()
    before = state(parameters, optimizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpoints(tmp_path, "run").load(parameters, optimizer)
    assert same(state(parameters, optimizer), before) and names(tmp_path) == ["step-1"]


def test_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pickle's and torch's own functions raise; every file is JSON or safetensors, by its parser."""

    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError("pickle")

    for owner in (pickle, torch):
        for name in ("load", "loads", "dump", "dumps", "save", "Pickler", "Unpickler"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, forbidden)
    expected = saved(tmp_path)[-1]
    parameters, optimizer = make(seed=1)
    assert Checkpoints(tmp_path, "run").load(parameters, optimizer) == 1
    assert same(state(parameters, optimizer), expected)
    assert json.loads((tmp_path / "step-1/state.json").read_text())["step"] == 1
    assert len(load_file(tmp_path / "step-1/state.safetensors")) == 8
