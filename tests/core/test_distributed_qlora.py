"""QLoRA over ranks: the oracle is one process on the whole batch in one micro-batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matryoshka.tests.core.ranks import Case, Result, launch, run

pytest.importorskip("bitsandbytes")

CASES = [
    Case("sft", dtype="float32", nf4=True),
    Case("dpo", dtype="float32", nf4=True, preference=True),
    Case("uneven", dtype="float32", nf4=True, preference=True, items=3, batch_size=3),
    Case("one item", dtype="float32", nf4=True, items=1),  # one rank has nothing
    Case("exact", dtype="float64", nf4=True, preference=True),
    Case("8 bits", dtype="float32", nf4=True, steps=3, batch_size=4, optimizer="adamw8bit"),
]


@pytest.fixture(scope="module")
def on_two_ranks(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return launch(CASES, 2, tiny_dir, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_compute_what_one_process_does(
    case: Case, on_two_ranks: dict[str, Result], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: one process; fp32: 1e-5 of the largest value; float64 products over the four bits: 1e-10."""
    tolerance = 1e-10 if case.dtype == "float64" else 1e-5
    rows, tensors = on_two_ranks[case.name]
    expected_rows, expected = run(replace(case, micro_batch_tokens=10**6), tiny_dir, tmp_path)
    assert len(rows) == case.steps and tensors.keys() == expected.keys()
    for row, other in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
    gradients = [name for name in expected if name.startswith("gradient")]
    assert len(gradients) == 2 * 14
    for name in gradients:
        atol = tolerance * expected[name].abs().max().item()
        torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=atol, msg=name)
