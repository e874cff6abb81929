"""core/training/step.py, sharding.py, distributed.py, weights.py under torchrun on gloo, two ranks and (slow) four.

Every case is compared with one process on the whole batch and, its first step, with autograd sequence by sequence.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from matryoshka.core.distributed import ALONE, full_tensor, is_sharded, local_part
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.models.weights import save_weights
from matryoshka.core.training.packing import Item, batch_at, split
from matryoshka.lora.linear import active
from matryoshka.tests.core.models.controller_contract import architectures
from matryoshka.tests.core.parallel.ranks import Case, Result, build, check_close, check_equal, items_of, launch, run

TWO = [
    Case("sft"),
    Case("dpo", preference=True),
    Case("steps", steps=3, batch_size=4),
    Case("one item", items=1),  # one rank has nothing
    Case("shard sft", layout="shard"),
    Case("shard dpo", layout="shard", preference=True, steps=2, batch_size=4),
    Case("shard dora", layout="shard", dora=True, reshard=False),
    Case("shard one item", layout="shard", items=1, prefetch=0),
    Case("full sft", full=True),
    Case("shard full sft", layout="shard", full=True, steps=3, batch_size=4, max_grad_norm=0.1),
    Case("shard full dpo", layout="shard", full=True, preference=True, steps=3, batch_size=4, max_grad_norm=0.1),
    Case("shard full recomputed", layout="shard", full=True, activations="selective", prefetch=2),
    Case("shard full blocks again", layout="shard", full=True, activations="full", offload=True),
    Case("shard full untied", layout="shard", full=True, model="untied"),
    Case("phi3 dpo", preference=True, model="phi3"),
    Case("shard phi3 sft", layout="shard", model="phi3"),
]
RESUMED = Case("shard full resumed", layout="shard", full=True, preference=True, batch_size=4, save_every=1, steps=2)
PARTS = [replace(RESUMED, name=f"{RESUMED.name} {i}", folder="resumed", reshard=i == 1, steps=1) for i in (1, 2)]
BF16 = Case("shard full bf16", layout="shard", full=True, dtype="bfloat16", stored="float32")
FOUR = [
    Case("sft", items=3, batch_size=3),  # fewer items than ranks
    Case("dpo", preference=True),
    Case("shard sft", layout="shard", items=3, batch_size=3),
    Case("shard full dpo", layout="shard", full=True, preference=True, steps=2, batch_size=4),
    Case("hybrid sft", layout="hybrid", group=2),
    Case("hybrid dpo", layout="hybrid", group=2, preference=True, steps=2, batch_size=4),
    Case("hybrid full sft", layout="hybrid", group=2, full=True, items=3, batch_size=3),
    Case("hybrid full dpo", layout="hybrid", group=2, full=True, preference=True, steps=2, max_grad_norm=0.1),
]


@pytest.fixture(scope="module")
def models(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: the tiny model with a head of its own; a tiny Phi 3, which has fused projections and windows."""
    folder = tmp_path_factory.mktemp("untied")
    config = json.loads((tiny_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny_dir / "model.safetensors")
    head = 0.2 * torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(5))
    save_weights(tensors | {"lm_head.weight": head}, folder)
    (phi3,) = (one for one in architectures(None) if one.model_type == "phi3")
    return {"untied": folder, "phi3": phi3.cases[0].save(tmp_path_factory.mktemp("phi3"), vocab_size=256)}


def with_model(case: Case, models: dict[str, Path]) -> Case:
    return replace(case, model=str(models[case.model])) if case.model else case


@pytest.fixture(scope="module")
def two(tiny_dir: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    cases = [with_model(case, models) for case in [*TWO, *PARTS, BF16]]
    return launch(cases, 2, tiny_dir, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return launch(FOUR, 4, tiny_dir, tmp_path_factory.mktemp("four"))


def by_hand(case: Case, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the first step and its gradients by autograd, each sequence computed alone.

    SFT: mean over all scored tokens of -log p. DPO (arXiv 2305.18290, eq. 7): mean over the pairs of
    -log sigmoid(0.1 (log p/p_ref of chosen - the same of rejected)).
    """
    model, parameters = build(replace(case, layout="replicate", stored=""), folder, ALONE)
    _, batch = batch_at(items_of(case), 0, case.batch_size, 42)

    def logp(tokens: Tokens) -> Tensor:
        ids, mask = torch.tensor(tokens.ids), torch.tensor(tokens.mask[1:], dtype=torch.bool)
        logps_TV = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
        summed: Tensor = logps_TV.gather(1, ids[1:, None])[mask].sum()
        return summed

    def reference(tokens: Tokens) -> Tensor:
        with torch.no_grad(), active(model, None):
            return logp(tokens)

    def loss_of(item: Item) -> Tensor:
        if not case.preference:
            return -logp(item.sequences[0]) / sum(sum(item.sequences[0].mask) for item in batch)
        chosen, rejected = (logp(tokens) - reference(tokens) for tokens in item.sequences)
        return -F.logsigmoid(0.1 * (chosen - rejected)) / len(batch)

    loss = torch.stack([loss_of(item) for item in batch]).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def check(case: Case, found: Result, model_folder: Path, folder: Path) -> None:
    rows, tensors = found
    loss, gradients = by_hand(case, model_folder)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-10)
    for name, value in gradients.items():
        check_close(tensors[f"gradient/{name}"] / clip(case, rows[0]), value, 1e-10, name)
    alone = replace(case, layout="replicate", micro_batch_tokens=10**6, activations="none")
    check_equal(found, run(alone, model_folder, folder), case.steps)


def clip(case: Case, row: dict[str, float]) -> float:
    """Return the factor by which clipping multiplied the gradients (torch.nn.utils.clip_grad_norm_)."""
    return min(1.0, case.max_grad_norm / (row["grad_norm"] + 1e-6))


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_ranks_compute_what_one_process_does(
    case: Case, two: dict[str, Result], tiny_dir: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Oracle: autograd by hand and one process with the whole batch in one micro-batch, in float64."""
    check(with_model(case, models), two[case.name], tiny_dir, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR, ids=lambda case: case.name)
def test_four_ranks_compute_what_one_process_does(
    case: Case, four: dict[str, Result], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: as with two ranks. Hybrid: two groups of two, each with a copy of the weights."""
    check(case, four[case.name], tiny_dir, tmp_path)


def test_sharded_weights_resume(two: dict[str, Result], tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the undisturbed run of one process, float64, tolerances as above.

    When it goes on, the reference is looked up with the weights as they came, which must not be used any more after it.
    """
    rows, tensors = run(replace(RESUMED, layout="replicate"), tiny_dir, tmp_path)
    for row, part in zip(rows, PARTS, strict=True):
        (found,) = two[part.name][0]
        assert found["step"] == row["step"] and found["loss"] == pytest.approx(row["loss"], rel=1e-10)
    for name, value in tensors.items():
        if name.startswith("parameter/"):
            check_close(two[PARTS[1].name][1][name], value, 1e-8, name)


def test_bf16_is_as_close_to_float64_as_in_one_process(two: dict[str, Result], tiny_dir: Path) -> None:
    """Oracle: float64 autograd by hand; the error is that of a process that computes in bf16, within a factor of 1.5.

    bf16 rounds every product to 8 bits, and the order of tokens decides which way, so no closer bound holds for each.
    The loss is 5.9 or so: 2^-8 of it. Weights, gradients and the sum over the ranks are in fp32.
    """
    rows, tensors = two[BF16.name]
    loss, exact = by_hand(replace(BF16, dtype="float64"), tiny_dir)
    rounded_loss, rounded = by_hand(BF16, tiny_dir)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=2**-8)
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=2**-8)
    errors, expected = (
        torch.stack([(found[name].double() - value).square().sum() for name, value in exact.items()]).sum().sqrt()
        for found in ({name: tensors[f"gradient/{name}"] for name in exact}, rounded)
    )
    norm = torch.stack([value.square().sum() for value in exact.values()]).sum().sqrt()
    assert 0 < errors / norm < 1.5 * expected / norm < 0.1
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_imbalance_is_reported(two: dict[str, Result]) -> None:
    """Oracle: the plans of the two ranks, which every process makes alike."""
    for case in (TWO[0], TWO[1], TWO[3]):
        _, batch = batch_at(items_of(case), 0, case.batch_size, 42)
        tokens = [part.tree_tokens for part in split(batch, case.micro_batch_tokens, 2)]
        (row,) = two[case.name][0]
        assert row["imbalance"] == max(tokens) / (sum(tokens) / 2) and row["tokens"] == sum(tokens)


@pytest.mark.parametrize("name", ["shard sft", "sft"])
def test_a_rank_reads_its_rows_alone(name: str, two: dict[str, Result], tiny_dir: Path) -> None:
    """Oracle: the tensors of the file: under shard a rank is handed the upper or lower half of the rows of each."""
    tensors = load_file(tiny_dir / "model.safetensors").values()
    halves = [[(len(t) + 1) // 2, len(t) // 2] for t in tensors]
    whole = sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)
    for rank, (total, largest) in enumerate(two[name][0][0]["read"]):  # type: ignore[arg-type, var-annotated]
        parts = [rows[rank] * t.nbytes // len(t) for rows, t in zip(halves, tensors, strict=True)]
        assert (total, largest) == ((sum(parts), max(parts)) if name == "shard sft" else whole)


def test_all_weights_of_one_process_resume_with_the_same_bits(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run; the reference is the model as it was before the first step, from the file."""
    case = Case("whole", full=True, preference=True, batch_size=4, steps=4, save_every=1)
    rows, tensors = run(case, tiny_dir, tmp_path)
    part = replace(case, name="part")
    first, _ = run(replace(part, steps=2), tiny_dir, tmp_path)
    rest, resumed = run(replace(part, steps=2), tiny_dir, tmp_path)
    assert [row["loss"] for row in first + rest] == [row["loss"] for row in rows]
    after = [name for name in tensors if name.startswith("parameter/")]
    assert after and all(torch.equal(tensors[name], resumed[name]) for name in after)
    untrained = dict(load_model(tiny_dir, torch.float64).named_parameters())
    assert not any(torch.equal(tensors[f"parameter/{name}"], value) for name, value in untrained.items())


def test_what_is_not_sharded_is_left_as_it_is() -> None:
    """Oracle: identity."""
    value: Any = torch.ones(2)
    assert not is_sharded(value) and local_part(value) is value and full_tensor(value) is value
