"""Training runs for tests of several ranks: one process and the ranks of torchrun execute the same function.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/core/parallel/ranks.py MODEL FOLDER CASES.json

runs every case and writes rank 0's tensors and metrics into FOLDER, as `<case>.safetensors` and `<case>.json`.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from matryoshka.core.distributed import ALONE, World, full_tensor, open_world
from matryoshka.core.models import weights
from matryoshka.core.models.load import empty_model, fill_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.parallel.layout import Layout, ParallelConfig
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.dpo.reference import open_reference
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    layers_with,
    prepare_linears,
    set_active,
    trainable_parameters,
)
from matryoshka.lora.quantized import QuantizedLinear, quantize_linears

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Result = tuple[list[dict[str, float]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A training run. full: all weights are trained. items: their number, their lengths differ. steps: optimizer steps.

    dtype: of the computation; stored: of the weights, where it is another. model: a folder, by default the one that all
    cases share. folder: the run's own, by default its name; a case continues an earlier one of the same folder.
    """

    name: str
    preference: bool = False
    full: bool = False
    layout: str = "replicate"
    group: int = 0
    reshard: bool = True
    prefetch: int = 1
    offload: bool = False
    activations: str = "none"
    max_grad_norm: float = 1e9
    dora: bool = False
    dtype: str = "float64"
    stored: str = ""
    items: int = 10
    batch_size: int = 10
    micro_batch_tokens: int = 60
    steps: int = 1
    save_every: int = 0
    model: str = ""
    nf4: bool = False
    optimizer: str = "adamw"
    folder: str = ""


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


def build(case: Case, model_folder: Path, world: World) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """Return the model as this rank holds it under the case's layout, and its trained parameters."""
    dtype, stored = DTYPES[case.dtype], DTYPES[case.stored or case.dtype]
    model_folder = Path(case.model or model_folder)
    model: Any = empty_model(model_folder)
    if case.nf4:
        quantize_linears(model)
    if not case.full:
        prepare_linears(model)
    model.requires_grad_(case.full)
    if case.layout != "replicate":
        from matryoshka.core.parallel.sharding import make_mesh, shard

        parallel = ParallelConfig(case.layout, case.group, case.reshard, case.prefetch, case.offload)
        shard(model, make_mesh(Layout(case.layout, case.group, ""), world), parallel, dtype, world.device)
    fill_model(model, model_folder, stored, "cpu")
    if case.full:
        return model, dict(model.named_parameters())
    add_adapter(model, "policy", LoraConfig(rank=2, dora=case.dora), 0)
    set_active(model, "policy")
    with torch.no_grad():
        for layer in layers_with(model, "policy"):  # where B is 0, the gradient of A is 0
            torch.nn.init.normal_(layer.lora_B["policy"], std=0.1, generator=torch.Generator().manual_seed(1))
    return model, trainable_parameters(model, "policy")


def reading(case: Case, model_folder: Path, world: World) -> list[list[float]]:
    """Return for each rank the bytes of weights that it reads, and those of the largest tensor among them."""
    handed: list[int] = []

    class Handle:
        def __init__(self, handle: Any, key: str = "") -> None:
            self.handle, self.key = handle, key

        def keys(self) -> list[str]:
            return list(self.handle.keys())

        def get_slice(self, key: str) -> "Handle":
            return Handle(self.handle.get_slice(key))

        def get_tensor(self, key: str) -> Tensor:
            return self.note(self.handle.get_tensor(key))

        def __getitem__(self, rows: slice) -> Tensor:
            return self.note(self.handle[rows])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def note(self, tensor: Tensor) -> Tensor:
            handed.append(tensor.nbytes)
            return tensor

    really_open = weights._open
    weights._open = lambda path, stack: Handle(really_open(path, stack))
    try:
        build(case, model_folder, world)
    finally:
        weights._open = really_open
    table = torch.zeros(world.size, 2, dtype=torch.float64)
    table[world.rank] = torch.tensor([sum(handed), max(handed)])
    world.sum([table])
    return table.tolist()


def run(case: Case, model_folder: Path, folder: Path, world: World = ALONE) -> Result:
    """Return the metrics rows; and by name the gradients of the first step and the parameters after the last."""
    model, parameters = build(case, model_folder, world)
    config = TrainConfig(
        learning_rate=1e-2, epochs=100, batch_size=case.batch_size, micro_batch_tokens=case.micro_batch_tokens,
        max_grad_norm=case.max_grad_norm, warmup_ratio=0.0, min_lr_ratio=1.0, activations=case.activations,
        save_every=case.save_every, optimizer=case.optimizer,
    )  # fmt: skip
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for name, parameter in parameters.items():
            if name not in gradients and parameter.grad is not None:
                gradients[name] = full_tensor(parameter.grad).clone()

    gathered: dict[str, Tensor] = {}

    def keep_bytes(index: int, block: torch.nn.Module, *_: object) -> None:
        for path, layer in block.named_modules():
            if isinstance(layer, QuantizedLinear):
                gathered.setdefault(f"bytes/{index}.{path}", layer.weight.detach().int())

    if case.layout != "replicate" or world.size == 1:
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(keep_bytes, index))  # after FSDP2's, which gathers
    objective = Preference() if case.preference else SFT()
    reference: Any = None if not case.preference else nullcontext if case.full else partial(active, model, None)
    own = folder / (case.folder or case.name)
    hook = register_optimizer_step_pre_hook(keep)
    with ExitStack() as stack:
        cache = None
        if case.preference and case.full:
            path = folder / f"{case.folder or case.name}.sqlite"
            cache = stack.enter_context(open_reference(path, Path(case.model or model_folder), model, None, world))
        rows = train(
            model, parameters, items_of(case), config, objective, token_logps, own,
            TrainContext(reference, cache=cache, reference_first=cache is not None, world=world),
        )  # fmt: skip
        found = [row for _, row in zip(range(case.steps), rows, strict=False)]
    hook.remove()
    after = {name: full_tensor(parameter.detach()) for name, parameter in parameters.items()}
    world.sum(list(gathered.values()))
    tensors = gathered | {f"gradient/{name}": value for name, value in gradients.items()}
    return found, tensors | {f"parameter/{name}": value for name, value in after.items()}


def check_equal(found: Result, expected: Result, num_steps: int) -> None:
    """Hold a run on ranks to the same run of one process, in float64.

    1e-10 of the largest value; 1e-8 for parameters after a step, since AdamW divides by the size of the gradient.
    """
    (rows, tensors), (expected_rows, expected_tensors) = found, expected
    assert len(rows) == num_steps and tensors.keys() == expected_tensors.keys()
    for row, other in zip(rows, expected_rows, strict=True):
        for name in other.keys() - {"tokens", "padded_tokens", "seconds"}:
            assert abs(row[name] - other[name]) <= max(1e-10 * abs(other[name]), 1e-14), name  # a margin of 0 is 0
    for name, value in expected_tensors.items():
        check_close(tensors[name], value, 1e-10 if name.startswith("gradient") else 1e-8, name)


def check_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item(), msg=name)


def launch(cases: list[Case], ranks: int, model_folder: Path, folder: Path) -> dict[str, Result]:
    """Return the result of each case on `ranks` ranks of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    code, _, errors = torchrun(ranks, __file__, str(model_folder), str(folder), str(folder / "cases.json"))
    assert code == 0, errors
    return {
        case.name: (
            json.loads((folder / f"{case.name}.json").read_text()),
            load_file(folder / f"{case.name}.safetensors"),
        )
        for case in cases
    }


def torchrun(ranks: int, *command: str, timeout_s: float = 1200) -> tuple[int, str, str]:
    """Return status, output and errors of a command on ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launcher, *command], env=environment, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        finally:
            process.terminate()  # it then ends its ranks; killed at once, it could not
    return process.returncode, out, errors


def main(model_folder: Path, folder: Path, cases: Path) -> None:
    with open_world(timeout_s=120) as world:
        for case in [Case(**row) for row in json.loads(cases.read_text())]:
            rows, tensors = run(case, model_folder, folder / "runs", world)
            if case.name in ("sft", "shard sft"):
                rows[0]["read"] = reading(case, model_folder, world)  # type: ignore[assignment]
            if world.is_first:
                save_file(tensors, folder / f"{case.name}.safetensors")
                (folder / f"{case.name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
