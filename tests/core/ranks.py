"""Training runs for `test_distributed*.py`, the same for one process and for the ranks that torchrun starts.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/core/ranks.py MODEL FOLDER CASES.json

runs every case and leaves in FOLDER what rank 0 has in the end, `<case>.safetensors` and `<case>.json`.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from matryoshka.core.distributed import ALONE, World, open_world
from matryoshka.core.load import load_model
from matryoshka.core.train import Item, TrainConfig, train
from matryoshka.core.tree import Tokens
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import LoraConfig, active, add_adapter, layers_with, set_active, trainable_parameters

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Result = tuple[list[dict[str, float]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A training run. items: how many, of ragged lengths; steps: of the optimizer."""

    name: str
    preference: bool = False
    dtype: str = "float64"
    items: int = 10
    batch_size: int = 10
    micro_batch_tokens: int = 60
    steps: int = 1


def items_of(case: Case) -> list[Item]:
    """Return items of random ids, two a group with a common prompt, answers of 2 to 30 tokens."""
    draws = random.Random(0)
    items = []
    for index in range(case.items):
        if index % 2 == 0:
            prompt = [draws.randrange(256) for _ in range(draws.randint(3, 12))]
        answers = [[draws.randrange(256) for _ in range(draws.randint(2, 30))] for _ in range(1 + case.preference)]
        both = tuple(Tokens((*prompt, *a), (0,) * len(prompt) + (1,) * len(a)) for a in answers)
        items.append(Item(both, f"group {index // 2}"))
    return items


def run(case: Case, model_folder: Path, folder: Path, world: World = ALONE) -> Result:
    """Return the metrics rows; and by name the gradients of the first step and the parameters after the last."""
    model: Any = load_model(model_folder, DTYPES[case.dtype])
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    set_active(model, "policy")
    with torch.no_grad():
        for layer in layers_with(model, "policy"):  # as A's gradient is 0 where B is
            torch.nn.init.normal_(layer.lora_B["policy"], std=0.1, generator=torch.Generator().manual_seed(1))
    parameters = trainable_parameters(model, "policy")
    config = TrainConfig(
        learning_rate=1e-2, epochs=100, batch_size=case.batch_size, micro_batch_tokens=case.micro_batch_tokens,
        max_grad_norm=1e9, warmup_ratio=0.0, min_lr_ratio=1.0,
    )  # fmt: skip
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for name, parameter in parameters.items():
            if name not in gradients and parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    objective = Preference() if case.preference else SFT()
    reference = partial(active, model, None) if case.preference else None
    hook = register_optimizer_step_pre_hook(keep)
    rows = train(
        model, parameters, items_of(case), config, objective, token_logps, folder / case.name, reference, world=world
    )
    found = [row for row, _ in zip(rows, range(case.steps), strict=False)]
    hook.remove()
    after = {name: parameter.detach() for name, parameter in parameters.items()}
    tensors = {f"gradient/{name}": value for name, value in gradients.items()}
    return found, tensors | {f"parameter/{name}": value for name, value in after.items()}


def launch(cases: list[Case], ranks: int, model_folder: Path, folder: Path) -> dict[str, Result]:
    """Return what each case gives on `ranks` ranks of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, str(model_folder), str(folder), str(folder / "cases.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return {
        case.name: (
            json.loads((folder / f"{case.name}.json").read_text()),
            load_file(folder / f"{case.name}.safetensors"),
        )
        for case in cases
    }


def main(model_folder: Path, folder: Path, cases: Path) -> None:
    with open_world(timeout_s=120) as world:
        for case in [Case(**row) for row in json.loads(cases.read_text())]:
            rows, tensors = run(case, model_folder, folder / "runs", world)
            if world.is_first:
                save_file(tensors, folder / f"{case.name}.safetensors")
                (folder / f"{case.name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
