"""QLoRA over ranks: the oracle is one process on the whole batch in one micro-batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matryoshka.tests.core.parallel.ranks import Case, Result, launch, run

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

CASES = [
    Case("sft", dtype="float32", nf4=True),
    Case("dpo", dtype="float32", nf4=True, preference=True),
    Case("uneven", dtype="float32", nf4=True, preference=True, items=3, batch_size=3),
    Case("one item", dtype="float32", nf4=True, items=1),  # one rank has nothing
    Case("exact", dtype="float64", nf4=True, preference=True),
    Case("shard sft", dtype="float32", nf4=True, layout="shard"),
    Case("shard dpo", dtype="float32", nf4=True, preference=True, layout="shard"),
    Case("shard exact", dtype="float64", nf4=True, preference=True, layout="shard", dora=True),
    Case("shard bf16", dtype="bfloat16", nf4=True, layout="shard"),
    Case("shard, offloaded, one item", dtype="float32", nf4=True, items=1, layout="shard", offload=True, reshard=False),
    Case("8 bits", dtype="float32", nf4=True, steps=3, batch_size=4, optimizer="adamw8bit"),
]


@pytest.fixture(scope="module")
def on_two_ranks(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return launch(CASES, 2, tiny_dir, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_compute_what_one_process_does(
    case: Case, on_two_ranks: dict[str, Result], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: one process; fp32: 1e-5 of the largest value; float64 products over the four bits: 1e-10.

    bf16: 3%, as micro-batches of other shapes round their sums otherwise. Under shard the bytes that every rank has
    gathered before a block runs are those that one process quantised.
    """
    tolerance = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.03}[case.dtype]
    rows, tensors = on_two_ranks[case.name]
    alone = replace(case, micro_batch_tokens=10**6, layout="replicate", offload=False)
    expected_rows, expected = run(alone, tiny_dir, tmp_path)
    assert len(rows) == case.steps
    for row, other in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
    gradients = [name for name in expected if name.startswith("gradient")]
    assert len(gradients) == (3 if case.dora else 2) * 14
    for name in gradients:
        atol = tolerance * expected[name].abs().max().item()
        torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=atol, msg=name)
    if case.layout == "shard":
        packed = [name for name in expected if name.startswith("bytes")]
        assert len(packed) == 14 and all(torch.equal(tensors[name], 2 * expected[name]) for name in packed)
