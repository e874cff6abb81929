"""pilot/plan.py: oracles are layouts by hand, the object's own sums, torch's fake process group, messages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matryoshka.pilot.plan import PlanConfig, memory_size
from matryoshka.scripts.cli import main
from matryoshka.scripts.plan import plan
from matryoshka.tests.pilot.conftest import environment

ROOT = Path(__file__).resolve().parents[2]


def planned(capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[str, dict[str, Any]]:
    plan(PlanConfig(json=True, **settings))
    text = capsys.readouterr().out
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    return text, result


@pytest.mark.parametrize(
    ("model", "gpus", "settings", "auto"),
    [
        ("llama-3-8b", 1, {}, "replicate"),
        ("llama-3-8b", 8, {}, "replicate"),
        ("llama-3-8b", 64, {"gpu_memory": "16GB"}, "hybrid"),
        ("llama-3-8b", 8, {"full": True}, "shard"),
        ("llama-3-70b", 1, {}, None),
        ("llama-3-70b", 1, {"quantization": "nf4"}, "replicate"),
        ("llama-3-70b", 8, {}, "shard"),
        ("llama-3-70b", 64, {}, "hybrid"),
        ("llama-3-70b", 64, {"full": True}, "shard"),
        ("llama-3-70b", 8, {"full": True}, None),
    ],
)
def test_what_auto_takes(
    model: str, gpus: int, settings: dict[str, Any], auto: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand. 8B are 16 GB in bf16, 70B 141 GB; where they are trained, 16 bytes a weight."""
    text, result = planned(capsys, model=model, gpus=gpus, **settings)
    assert result["auto"] == auto
    fitting = [row for row in result["layouts"] if row["fits"]]
    assert [row["layout"] for row in fitting][:1] == ([auto] if auto else [])
    assert result["best"] == (max(fitting, key=lambda row: row["tokens_per_s"])["layout"] if fitting else None)
    assert ("nothing fits" in text) is (auto is None) and result["predicted"] is True
    for row in result["layouts"]:
        memory = row["memory_bytes"]
        parts = ("weights", "gathered", "gradients", "moments", "activations")
        assert memory["total"] == sum(memory[part] for part in parts)
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_s"])
        assert row["fits"] is (memory["activations"] <= memory["room"])
        assert row["layout"] in text


def test_a_folder_is_planned_as_the_known_name(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the tiny model's numbers of parameters by hand (tests/core/parallel/test_layout.py's arithmetic)."""
    _, result = planned(capsys, model=str(tiny_dir), gpus=4, gpus_per_node=2, gpu_memory="1GiB")
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert result["parameters"] == 259 * 32 + 32 + 2 * block
    assert [row["layout"] for row in result["layouts"]] == ["replicate", "hybrid", "shard"]


def test_memory_sizes() -> None:
    """Oracle: by hand."""
    assert memory_size("80GB") == 80 * 10**9 and memory_size("80GiB") == 80 * 2**30
    assert memory_size(" 1.5 gb ") == 1_500_000_000 and memory_size("512MiB") == 2**29
    for text in ("80", "GB", "-1GB", "0GB", "80 G", "eighty GB", "1e3GB", ""):
        with pytest.raises(ValueError, match='expected a size as "80GB" or "80GiB"'):
            memory_size(text)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": "llama3-70b"}, "model 'llama3-70b' is neither known nor a folder; did you mean 'llama-3-70b'"),
        ({"model": "qwerty"}, "choose from smollm2-135m, llama-3.2-1b"),
        ({"gpus": 12}, "12 GPUs are not whole nodes of 8"),
        ({"gpus": 8, "gpus_per_node": 3}, "8 GPUs are not whole nodes of 3"),
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"gpu_memory": "80"}, "GPU memory '80' is not understood"),
        ({"hardware": "h10"}, "hardware 'h10' is unknown; did you mean 'h100'"),
        ({"network_gbs": -1.0}, "network_gbs -1.0 must not be negative"),
        ({"quantization": "int4"}, "quantization 'int4' is unknown"),
        ({"quantization": "nf4", "full": True}, "four bits cannot be trained"),
        ({"activations": "some"}, "policy 'some' is unknown"),
        ({"layout": "ddp"}, "layout 'ddp' is unknown"),
        ({"layout": "shard"}, "layout and peak are of the dry run; add --dry-run"),
    ],
)
def test_bad_input_is_refused_by_name(settings: dict[str, Any], problem: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=problem):
        plan(PlanConfig(**{"model": "llama-3-8b", **settings}))


def test_the_command_line_refuses_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: status 2, and one line."""
    assert main(["plan", "--model", "llama3-70b"]) == 2
    assert capsys.readouterr().err.startswith("error: plan: model 'llama3-70b' is neither known")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--full"]], ids=["lora", "full"])
def test_a_dry_run_of_64_ranks_sends_what_is_predicted(settings: list[str], tiny_dir: Path) -> None:
    """Oracle: torch's own collectives under the fake process group, and what FSDP2 stores, to the byte."""
    arguments = ["plan", "--model", str(tiny_dir), "--gpus", "64", "--dry-run", "--peak", "--json", *settings]
    for layout in ("hybrid", "shard"):
        command = [sys.executable, "-m", "matryoshka.scripts.cli", *arguments, "--layout", layout]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        dry = json.loads(done.stdout.splitlines()[-1])["dry_run"]
        predicted = dry["predicted"]
        assert dry["stored_bytes"] == predicted["weights stored"] > 0
        sent = {name.partition(",")[0]: size for name, size in predicted.items() if "calls" in name}
        for kind, size in sent.items():
            assert dry["collectives"].get(kind, {"sent_bytes": 0})["sent_bytes"] == pytest.approx(size, abs=1), kind
        assert set(dry["collectives"]) == {kind for kind, size in sent.items() if size}
        assert 0 < dry["peak_bytes"]["total"]
