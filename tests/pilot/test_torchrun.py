"""`torchrun -m matryoshka.scripts.cli sft | dpo` on two ranks of this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from matryoshka.core.files import read_jsonl
from matryoshka.lora.files import WEIGHTS
from matryoshka.scripts import cli
from matryoshka.tests.core.parallel.ranks import torchrun
from matryoshka.tests.pilot.test_finetune import CHATS, PAIRS, arguments, write

CLI = ("-m", "matryoshka.scripts.cli")


@pytest.mark.parametrize(("name", "rows"), [("dpo", PAIRS), pytest.param("sft", CHATS, marks=pytest.mark.slow)])
def test_two_ranks_train_the_adapter_of_one(
    name: str, rows: list[dict[str, Any]], tiny_dir: Path, tmp_path: Path
) -> None:
    """Oracle: the same command in one process; one summary, one file of metrics, one adapter.

    fp32: sums in another order, which Adam's first steps amplify where a gradient is near 0; 1e-3 of the learning rate
    of 1e-2 and six steps.
    """
    data = write(tmp_path / "rows.jsonl", rows)
    code, out, errors = torchrun(2, *CLI, name, *arguments(data, tiny_dir, tmp_path / "two"))
    assert code == 0, errors
    (line,) = out.splitlines()
    assert json.loads(line)["step"] == 6
    assert cli.main([name, *arguments(data, tiny_dir, tmp_path / "one")]) == 0
    two, one = (read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("two", "one"))
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert all(1 <= row["imbalance"] < 2 for row in two) and "imbalance" not in one[0]
    adapters = [load_file(tmp_path / out / "adapter" / WEIGHTS) for out in ("two", "one")]
    assert adapters[0].keys() == adapters[1].keys()
    for key, value in adapters[1].items():
        assert (adapters[0][key] - value).abs().max() < 6e-5, key


def test_an_error_names_its_rank(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: both ranks read the same bad file and say so, the second one unless it was ended before.

    torchrun's own report names the rank that failed first, with its traceback.
    """
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p"\n')
    code, _, errors = torchrun(2, *CLI, "sft", *arguments(data, tiny_dir, tmp_path / "out"))
    assert code != 0 and not (tmp_path / "out").exists()
    assert "rank 0: error: " in errors or "rank 1: error: " in errors
    assert "rows.jsonl:1: malformed JSON" in errors
    report = errors.partition("Root Cause")[2]
    assert "rank      : 0" in report or "rank      : 1" in report
    assert "traceback : Traceback (most recent call last)" in report and "in read_jsonl" in report
