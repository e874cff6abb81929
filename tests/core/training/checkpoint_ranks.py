"""A small sharded training run for `test_distributed_checkpoint.py`; torchrun starts it, one process calls it.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/checkpoint_ranks.py MODEL FOLDER CASE

calls the function CASE below on every rank, and trains MODEL by the real loop besides.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.core.distributed import ALONE, World, full_tensor, open_world
from matryoshka.core.training.checkpoint import Checkpoints
from matryoshka.tests.core.parallel import ranks
from matryoshka.tests.core.parallel.ranks import Case

# Trained for three steps on two ranks, and then for three more on others.
TRAINER = [
    Case("adapter", steps=3, save_every=3, batch_size=4),
    Case("full", full=True, layout="shard", steps=3, save_every=3, batch_size=4),
]
Run = tuple[nn.Module, dict[str, nn.Parameter], torch.optim.AdamW]


def make(seed: int, mesh: Any = None) -> Run:
    """Return a float64 network, its parameters and AdamW, sharded over `mesh` where there is one.

    Rows are no multiple of 2 or 4, and `3.bias` has fewer than 4 ranks; `adapter` stays whole on all.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9), nn.Linear(9, 3)).double()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2], model[3]):
            fully_shard(layer, mesh=mesh).set_gradient_divide_factor(1.0)
        fully_shard(model, mesh=mesh)
    model.adapter = nn.Parameter(torch.randn(3, dtype=torch.float64))
    parameters = dict(model.named_parameters())
    return model, parameters, torch.optim.AdamW(parameters.values(), lr=0.05)


def train(run: Run, steps: range, world: World = ALONE, after: Any = None) -> list[float]:
    """Return the loss of each of `steps`: 8 rows, the same for every world; `after(step)` follows each update."""
    model, parameters, optimizer = run
    losses = []
    for step in steps:
        draws = torch.Generator().manual_seed(step)
        data_NF, target_NF = (torch.randn(8, width, generator=draws, dtype=torch.float64) for width in (5, 3))
        mine = slice(world.rank, None, world.size)
        loss = (model(data_NF[mine]) * parameters["adapter"] - target_NF[mine]).square().sum() / 8
        loss.backward()
        gradient = parameters["adapter"].grad
        assert gradient is not None
        total = loss.detach()
        world.sum([total, gradient])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        if after is not None:
            after(step + 1)
    return losses


def gathered(run: Run) -> dict[str, Tensor]:
    """Return every parameter and moment, gathered."""
    _, parameters, optimizer = run
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return {name: full_tensor(tensor).clone() for name, tensor in tensors.items()}


@contextmanager
def no_pickle() -> Iterator[None]:
    """Make every way into pickle raise, the ones of torch.load, torch.save and object collectives too."""
    import torch.distributed.distributed_c10d as c10d

    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError("pickle")

    places: list[tuple[Any, str]] = [(torch, "load"), (torch, "save"), (c10d, "_pickler"), (c10d, "_unpickler")]
    places += [(pickle, name) for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, forbidden)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def mesh_of(world: World, hybrid: bool = False) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if hybrid:
        return init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world.size,))


def two(folder: Path, world: World) -> dict[str, Any]:
    """Train 6 steps on two ranks and save in the background after the third, without pickle."""
    run = make(0, mesh_of(world))
    losses = train(run, range(2), world)
    with no_pickle(), Checkpoints(folder / "two", "run", world, keep=9) as checkpoints:
        assert checkpoints.load(run[1], run[2]) == 0
        losses += train(
            run, range(2, 6), world, lambda step: checkpoints.save(step, run[1], run[2]) if step == 3 else None
        )
    again = make(1, mesh_of(world))
    with no_pickle():
        assert Checkpoints(folder / "two", "run", world).load(again[1], again[2]) == 3
    return {"losses": losses, "again": train(again, range(3, 6), world)}


def four(folder: Path, world: World) -> dict[str, Any]:
    """Go on from what two ranks and one process saved; save and load a hybrid layout; try bad checkpoints."""
    found: dict[str, Any] = {}
    for name in ("two", "one"):
        run = make(1, mesh_of(world))
        step = Checkpoints(folder / name, "run", world, keep=9).load(run[1], run[2])
        found[name] = train(run, range(step, 6), world)
    run = make(1, mesh_of(world, hybrid=True))
    Checkpoints(folder / "two", "run", world, keep=9).load(run[1], run[2])
    expected = gathered(run)
    with Checkpoints(folder / "hybrid", "run", world) as checkpoints:
        checkpoints.save(3, run[1], run[2])
    run = make(2, mesh_of(world))
    Checkpoints(folder / "hybrid", "run", world).load(run[1], run[2])
    found["hybrid"] = max((gathered(run)[name] - value).abs().max().item() for name, value in expected.items())
    found["errors"] = {name: _refused(folder, name, world) for name in ("missing", "short", "other")}
    # A rank that never writes its part: the first one says so, and no checkpoint appears.
    checkpoints = Checkpoints(folder / "late", "run", world, timeout_s=0.5)
    if world.rank != 1:
        checkpoints.save(3, run[1], run[2])
        try:
            checkpoints._join()
        except TimeoutError as err:
            found["late"] = str(err)
    world.barrier()
    return found


def _refused(folder: Path, damage: str, world: World) -> str:
    """Return the error of every rank at a damaged copy of what two ranks saved; nothing is filled."""
    copy = folder / damage
    if world.is_first:
        shutil.copytree(folder / "two", copy)
        (shard,) = (copy / "step-3").glob("shard-00002-*")
        if damage == "missing":
            shard.unlink()
        if damage == "short":
            shard.write_bytes(shard.read_bytes()[:-8])
    world.barrier()
    run = make(2, mesh_of(world))
    before = gathered(run)
    messages = []
    try:
        Checkpoints(copy, "another" if damage == "other" else "run", world).load(run[1], run[2])
    except ValueError as err:
        messages.append(str(err))
    count = torch.tensor(len(messages))
    world.sum([count])
    after = gathered(run)
    assert int(count) == world.size and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return messages[0]


def main(model: Path, folder: Path, case: str) -> None:
    with open_world(timeout_s=120) as world:
        found = {"two": two, "four": four}[case](folder, world)
        if world.is_first and case == "four":
            shutil.copytree(folder / "runs-two", folder / "runs-four")
        world.barrier()
        for job in TRAINER:
            rows, _ = ranks.run(job, model, folder / f"runs-{case}", world)
            found[job.name] = [row["loss"] for row in rows]
        if world.is_first:
            (folder / f"{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
