"""scripts/gpu_check runs the right commands, checks its promises, and shows no numbers of a dry run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.benchmarks import compute, gpu_check
from matryoshka.benchmarks.command import BENCHES
from matryoshka.benchmarks.gpu_check import CHECKS, Config, commands, main, unmeasured

ROOT = Path(__file__).resolve().parents[2]
PEERS = ["liger_kernel", "cut_cross_entropy", "trl", "transformers", "bitsandbytes"]


def row(name: str, value: float | None, **details: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "", **details}


GOOD: dict[str, Any] = {
    "compute": {
        "rows": [
            row("one step of dpo: first loss less the known one", 1e-6),
            row("sampler against trainer, root mean square", 0.05),
        ]
    },
    "head": {
        "rows": [
            row("flash head, 8192 tokens", 25.0, extra_mib=300.0, gradient_error=1e-3),
            row("eager, 8192 tokens", 40.0, gradient_error=2e-3),
            row("two vocabulary products, 8192 tokens", 24.0),
        ]
    },
    "step": {
        "ratio": 13.0,
        "rows": [
            row("token tree", 130.0, peak_gib=40.0),
            row("trl, 8 pairs", 9.0, peak_gib=30.0),
            row("trl-liger, 12 pairs", 10.0, peak_gib=50.0),
            row("trl, 12 pairs", None, note="not measured: out of memory"),
            row("largest difference of the losses, token tree and trl over 50 steps", 0.01),
            row("graphs compiled over the epochs after it", 0.0),
            row("peak memory of a step of ours", 105.0, over_predicted=1.0625),
        ],
    },
    "sft": {"rows": [row("token tree", 16000.0)]},
    "qlora": {
        "rows": [
            row("peak of a step with the weights, bfloat16", 20.0),
            row("peak of a step beyond the weights, nf4", 7.0),
            row("peak of a step with the weights, nf4", 10.0),
        ]
    },
}


def test_checks_read_the_numbers() -> None:
    """Oracle: by hand; 25 / 24 of the floor, half of eager's error, 40 GiB against 50 of TRL's best, 1.0625 - 1,
    10 MiB of 20 in four bits."""
    rows = [check.row(GOOD) for check in CHECKS]
    assert [found["value"] for found in rows[:2]] == [1e-6, 0.05]
    by_hand = [25.0, 25 / 24, 300.0, 0.5, 13.0, 0.8, 0.01, 0.0, 0.0625, 0.5, 16000.0]
    assert [found["value"] for found in rows[2:]] == by_hand
    assert all(found["holds"] is True for found in rows)
    assert all(check.row({})["holds"] is None for check in CHECKS)
    slow_step = {"rows": [row("token tree", 119.0), row("trl, 8 pairs", 10.0)]}
    slow: dict[str, Any] = {"sft": {"rows": [row("token tree", 14999.0)]}, "step": slow_step}
    assert sorted(c.name for c in CHECKS if c.row(slow)["holds"] is False) == [
        "DPO over TRL's best configuration",
        "SFT, sequences of 4096 tokens",
    ]


@pytest.mark.parametrize("dry_run", [True, False])
def test_commands_are_benches_and_absent_peers_are_left_out(dry_run: bool) -> None:
    """Oracle: the table of benches; with no peer installed no command names one."""
    config = Config(dry_run=dry_run)
    for peers in (PEERS, []):
        for arguments in commands(config, peers, Path("chart.png")).values():
            assert arguments[0] in BENCHES
            assert ("cuda" in arguments) is not dry_run
            named = {"trl", "trl-liger", "liger", "cce", "transformers"} & set(arguments)
            assert not named or peers
    assert "trl-liger" in commands(Config(), PEERS, Path("chart.png"))["step"]


def test_a_bench_that_fails_leaves_the_others(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: stubbed processes; status 1, the reason by name, the results of the rest written."""

    def stub(module: str, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str] | None:
        assert limit_s == math.inf
        if arguments[1] == "ranks":
            return None  # ended at the limit
        if arguments[1:2] == ("load",):
            return subprocess.CompletedProcess([], 2, "", "warning\nerror: no disk\n")
        name = "sft" if "sft" in arguments else arguments[1]
        return subprocess.CompletedProcess([], 0, "noise\n" + json.dumps(GOOD.get(name, {"rows": []})), "")

    monkeypatch.setattr(gpu_check, "_run", stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "_tests", lambda dry_run: {"status": 0, "summary": "3 passed"})
    assert main(Config(model=tiny_dir, out=tmp_path)) == 1
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failures"] == {"load": "error: no disk", "ranks": "out of time"}
    assert set(result["benches"]) >= {"head", "step", "sft"}
    assert all(check["holds"] for check in result["checks"])
    assert result["hardware"]["commit"] and result["hardware"]["versions"]["torch"]


def test_no_gpu_and_wrong_settings_are_refused(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the messages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU here; --dry-run"):
        main(Config(model=tiny_dir))
    with pytest.raises(ValueError, match="nowhere: no model folder"):
        main(Config(model=Path("nowhere"), dry_run=True))
    with pytest.raises(ValueError, match="--only 'heads' is unknown; choose from tests, compute, step"):
        Config(only=("heads",))
    with pytest.raises(ValueError, match="--call 3; expected 1 or 2"):
        Config(call=3)


def test_two_calls_have_all_parts() -> None:
    """Oracle: by definition; every bench belongs to one of the two calls, the tests to the first."""
    parts = [Config(call=call).parts for call in (1, 2)]
    known = commands(Config(), PEERS, Path("chart.png"))
    assert sorted(parts[0] + parts[1]) == sorted({"tests", *known}) and parts[0][0] == "tests"


def test_unmeasured_keeps_no_number() -> None:
    """Oracle: by hand."""
    found = unmeasured({"bench": "head", "rows": GOOD["head"]["rows"][:1], "ratio": 2.0, "target": None, "holds": None})
    assert found["rows"] == [
        {"name": "flash head, 8192 tokens", "value": None, "unit": "", "note": "not measured"}
    ] and found["ratio"] is None


@pytest.mark.slow
def test_the_dry_run_goes_through_all_of_it(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: every part ran and passed, no row has a number, nothing was written; through the shell script."""
    script = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--dry-run", "--model", str(tiny_dir)]
    script += ["--out", str(tmp_path / "out"), "--only", "head", "sft"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert sorted(result["benches"]) == ["head", "sft"] and result["failures"] == {}
    rows = [row for bench in result["benches"].values() for row in bench["rows"]]
    assert rows and all(row["value"] is None and row["note"] == "not measured" for row in rows)
    assert all(check["value"] is None for check in result["checks"])
    assert not (tmp_path / "out").exists()


def test_compute_knows_the_first_losses(tiny_dir: Path) -> None:
    """Oracle: the first loss of each objective by its equation, exact in eager code; float32's rounding."""
    found = {row.name: row.value for row in compute.run(compute.Config(model=tiny_dir, draws=2, tokens=4)).rows}
    known = {name: value for name, value in found.items() if "first loss less" in name}
    assert len(known) >= 5 and max(value for value in known.values() if value is not None) <= 1e-6
    assert all(value is not None for value in found.values())
    assert (found["sampler against trainer, root mean square"] or 0) <= 1e-4
