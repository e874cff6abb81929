"""core/step.py, core/distributed.py, core/packing.py: oracles are one process on the whole batch, and invariants."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matryoshka.core.packing import plan, split
from matryoshka.tests.core.ranks import Case, Result, items_of, launch, run

CASES = [
    Case("sft"),
    Case("dpo", preference=True),
    Case("steps", steps=4, batch_size=4),
    Case("one item", items=1),  # one rank has nothing
    Case("uneven", items=3, batch_size=3),
]


@pytest.fixture(scope="module")
def on_two_ranks(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return launch(CASES, 2, tiny_dir, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_compute_what_one_process_does(
    case: Case, on_two_ranks: dict[str, Result], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: one process with the whole batch in one micro-batch; float64, 1e-10 of the largest value.

    AdamW divides by the size of the gradient, which after several steps costs two digits more.
    """
    rows, tensors = on_two_ranks[case.name]
    expected_rows, expected = run(replace(case, micro_batch_tokens=10**6), tiny_dir, tmp_path)
    assert len(rows) == case.steps and tensors.keys() == expected.keys()
    for row, other in zip(rows, expected_rows, strict=True):
        for name in other.keys() - {"tokens", "padded_tokens", "seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-10), name
    for name, value in expected.items():
        tolerance = 1e-10 if name.startswith("gradient") else 1e-8
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=name)


def test_imbalance_is_reported(on_two_ranks: dict[str, Result]) -> None:
    """Oracle: the plans of the two ranks, which every process makes alike."""
    for case in CASES[:2] + CASES[3:]:
        tokens = [part.tree_tokens for part in split(items_of(case), case.micro_batch_tokens, 2)]
        (row,) = on_two_ranks[case.name][0]
        assert row["imbalance"] == max(tokens) / (sum(tokens) / 2) and row["tokens"] == sum(tokens)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 20])
def test_a_batch_is_split_evenly(ranks: int) -> None:
    """Oracle: invariants: every item once, within the budget, none idle while there is an item for each.

    No rank has more than its share of the work and one item's: the cut falls between items. One rank: `plan`.
    """
    items = items_of(Case("", items=16))
    parts = split(items, 60, ranks)
    held = [item for part in parts for micro in part.micro_batches for item in micro]
    assert len(parts) == ranks and sorted(map(id, held)) == sorted(map(id, items))
    assert sum(not part.micro_batches for part in parts) == max(0, ranks - 16)
    work = [part.tree_tokens + 256 * len(part.micro_batches) for part in parts]
    alone = [plan([item], 60).tree_tokens + 256 for item in items]
    assert max(work) <= sum(work) / ranks + max(alone)
    if ranks == 1:
        assert parts == [plan(items, 60)]
