"""Compares the predicted step with a measured one: `bench ranks` on gloo, a tiny model, 2 and 4 ranks."""

import json
from pathlib import Path

import pytest

from matryoshka.benchmarks import ranks
from matryoshka.benchmarks.ranks import Config, run
from matryoshka.benchmarks.result import BenchResult

pytestmark = pytest.mark.slow
CASES = [case for case in ranks.CASES if case.ranks > 1]
CONTROL = 2000  # bytes: the step's sums of losses, metrics and norms, and gloo's headers of 72 bytes a message


@pytest.fixture(scope="module")
def result(tiny_dir: Path) -> BenchResult:
    return run(Config(model=tiny_dir, tokens=64, micro_batches=2))


def test_every_layout_is_measured(result: BenchResult) -> None:
    """Oracle: the table of cases."""
    assert [row.name for row in result.rows] == [case.name for case in CASES]
    assert json.loads(result.to_json())["bench"] == "ranks"


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_bytes_are_those_predicted(index: int, result: BenchResult) -> None:
    """Oracle: torch's dispatcher for the payload of gathering and scattering, exact; sums carry the step's few metrics
    besides. The kernel's count of what was written adds gloo's headers; a reduce-scatter counts twice on gloo."""
    row = result.rows[index]
    seen, predicted = row.details["collectives_mb"], row.details["collectives_predicted_mb"]
    for kind in ("all-gather", "reduce-scatter"):
        assert seen.get(kind, 0.0) == pytest.approx(predicted[kind], abs=1e-9), kind
    assert 0 <= seen["all-reduce"] - predicted["all-reduce"] < CONTROL / 1e6
    assert row.value is not None
    headers = 30 * 12 * 72e-6  # at most 30 collectives, each of six turns around four ranks in two parts, by header
    assert 0 < row.value - row.details["predicted"] < CONTROL / 1e6 + headers


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_what_is_stored_and_held(index: int, result: BenchResult) -> None:
    """Oracle: FSDP2's own shards; the last rank has at most what the first has. Peaks: torch's CPU allocator, within a
    third at this size, where what is gathered is no larger than the buffers that are not counted."""
    details = result.rows[index].details
    assert details["stored_mib"] <= details["stored_predicted_mib"] + 1e-9
    assert details["stored_mib"] > 0.7 * details["stored_predicted_mib"]
    assert 0.67 < details["peak_over_predicted"] < 1.33
