"""core/training/checkpoint.py: a run saved on two ranks goes on in one process and on four, and back."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from matryoshka.core.training.checkpoint import Checkpoints
from matryoshka.tests.core.parallel import ranks
from matryoshka.tests.core.parallel.ranks import Case
from matryoshka.tests.core.training import checkpoint_ranks
from matryoshka.tests.core.training.checkpoint_ranks import TRAINER, make, train

pytestmark = pytest.mark.slow


def launch(model: Path, folder: Path, case: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [checkpoint_ranks.__file__, str(model), str(folder), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / f"{case}.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run everything once: two ranks save, one process goes on and saves, four ranks go on from both."""
    folder = tmp_path_factory.mktemp("checkpoints")
    out: dict[str, Any] = {"folder": folder, "two": launch(tiny_dir, folder, "two", 2)}
    run = make(1)
    assert Checkpoints(folder / "two", "run").load(run[1], run[2]) == 3
    losses = train(run, range(3, 4))
    with Checkpoints(folder / "one", "run") as checkpoints:
        checkpoints.save(4, run[1], run[2])
    out["one"] = losses + train(run, range(4, 6))
    out["four"] = launch(tiny_dir, folder, "four", 4)
    out["alone"] = train(make(0), range(6))
    return out


def test_any_number_of_ranks_goes_on(found: dict[str, Any]) -> None:
    """Oracle: one process that never stopped; float64, 1e-10: only the order of sums over ranks differs."""
    alone = found["alone"]
    assert len(set(alone)) == 6
    for losses in (
        found["two"]["losses"],
        found["two"]["again"],
        found["one"],
        *map(found["four"].get, ("two", "one")),
    ):
        assert losses == pytest.approx(alone[-len(losses) :], rel=1e-10)
    assert [len(found["four"][name]) for name in ("two", "one")] == [3, 2] and len(found["one"]) == 3
    assert found["two"]["again"] == found["two"]["losses"][3:]  # the same ranks: to the bit
    assert found["four"]["hybrid"] == 0


@pytest.mark.parametrize("case", TRAINER, ids=lambda case: case.name)
def test_training_goes_on_with_the_same_losses(
    case: Case, found: dict[str, Any], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: six steps of one process that never stopped; float64, 1e-10. Saved on two ranks after three of them."""
    alone = replace(case, layout="replicate")
    rows, _ = ranks.run(replace(alone, steps=6), tiny_dir, tmp_path)
    losses = [row["loss"] for row in rows]
    shutil.copytree(found["folder"] / "runs-two", tmp_path / "one")
    one = [row["loss"] for row in ranks.run(alone, tiny_dir, tmp_path / "one")[0]]
    assert len(set(losses)) == 6
    assert found["two"][case.name] == pytest.approx(losses[:3], rel=1e-10)
    assert found["four"][case.name] == pytest.approx(losses[3:], rel=1e-10)
    assert one == pytest.approx(losses[3:], rel=1e-10)
    (path,) = (found["folder"] / "runs-two" / case.name).glob("step-3")
    assert len(list(path.glob("shard-*"))) == (2 if case.full else 0)


def test_every_file_is_safetensors_or_json(found: dict[str, Any]) -> None:
    """Oracle: the parsers. Every rank wrote a file; of replicas one did; whole tensors are in the first rank's file."""
    (rows,) = (found["folder"] / "two").iterdir()
    names = sorted(path.name for path in rows.iterdir())
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert rows.name == "step-3" and names == [*shards, "state.json", "state.safetensors"]
    state = json.loads((rows / "state.json").read_text())
    assert state["files"] == {name: (rows / name).stat().st_size for name in names if name != "state.json"}
    kept = {}
    for name in (*shards, "state.safetensors"):
        with safe_open(rows / name, framework="pt") as handle:
            kept[name] = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118
    assert [kept[name]["parameter/0.weight"] for name in shards] == [[4, 5], [3, 5]]
    plain = {"parameter/adapter", "optimizer/exp_avg/adapter", "optimizer/exp_avg_sq/adapter"}
    assert {name for name in kept["state.safetensors"] if "/step/" not in name} == plain
    hybrid = [path.name for path in (found["folder"] / "hybrid/step-3").glob("shard-*")]
    assert sorted(hybrid) == shards


def test_bad_checkpoints_are_refused_on_every_rank(found: dict[str, Any]) -> None:
    """Oracle: messages."""
    errors = found["four"]["errors"]
    shard = "shard-00002-model-00001-of-00001.safetensors"
    assert f"half a checkpoint: {shard} is missing" in errors["missing"]
    assert f"half a checkpoint: {shard} has " in errors["short"]
    assert "was written with another training configuration" in errors["other"]
    assert "rank 1 did not write its part of the checkpoint in time" in found["four"]["late"]
    assert [path.name for path in (found["folder"] / "late").iterdir()] == [".step-3.tmp"]
