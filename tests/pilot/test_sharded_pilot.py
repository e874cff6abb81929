"""The pilot with its controller cut up over two ranks and sampled through vLLM's protocol (tiny_vllm.py)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from safetensors.torch import load_file

from matryoshka.core.files import read_jsonl
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.lora.files import WEIGHTS
from matryoshka.pilot.config import RunConfig
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator, environment
from matryoshka.tests.pilot.test_pilot import small
from matryoshka.tests.pilot.test_rank_episodes import PATIENCE_S, RankRuns, rows, runs

__all__ = ["runs"]  # a fixture
TINY_VLLM = (sys.executable, str(Path(__file__).with_name("tiny_vllm.py")))
STAGES = ("warmup", "round-1/train", "star")


@contextmanager
def tiny_vllm(model: Path, quantization: str) -> Iterator[str]:
    """Yield the URL of a server of `model` that ends with the block."""
    process = subprocess.Popen(
        [*TINY_VLLM, "--model", str(model), "--served-model-name", "base", "--port", "0"]
        + ["--quantization", quantization],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(120)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_sharded_pilot_trains_what_a_replicated_one_does(
    quantization: Literal["none", "nf4"], runs: RankRuns, controller_dir: Path, generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: the same pilot under "replicate", on two ranks too: equal episodes and verdicts, adapters within 1e-6.

    Either layout computes with the whole weights and sums adapter gradients over the same two ranks, in the same order:
    0 was measured. 1e-6, the rounding of a few sums in fp32, is for libraries that order them otherwise.
    """
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")

    def config(layout: str, url: str) -> RunConfig:
        name = f"{layout}-{quantization}"
        config = small(name, controller_dir, generator.url(name))
        controller = replace(
            config.controller, deterministic=False, engine="vllm", quantization=quantization,
            vllm=VllmConfig(base_url=url),
        )  # fmt: skip
        return replace(config, controller=controller, parallel=ParallelConfig(layout))

    with tiny_vllm(controller_dir, quantization) as url:
        configs = {layout: config(layout, url) for layout in ("shard", "replicate")}
        for layout, each in configs.items():
            output, errors = (process := runs.torchrun(2, "pilot", each)).communicate(timeout=PATIENCE_S)
            assert process.returncode == 0 and f"layout {layout}: a rank needs under" in errors, errors[-4000:]
    ours, theirs = (runs.folder(each) for each in configs.values())
    worst = 0.0
    for stage in STAGES:
        first, second = (load_file(folder / stage / "adapter" / WEIGHTS) for folder in (ours, theirs))
        assert first.keys() == second.keys()
        worst = max(worst, *((first[key] - second[key]).abs().max().item() for key in first))
        losses = [[row["loss"] for row in read_jsonl(folder / stage / "metrics.jsonl")] for folder in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    print(f"{quantization}: adapters are {worst:.2g} apart")
    assert worst < 1e-6
    first_row, *_ = read_jsonl(ours / "round-1" / "train" / "metrics.jsonl")
    assert first_row["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ours, theirs)]
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    before = rows(ours)
    assert len(before) == len(rows(theirs)) == 4 * 4 + 2 * 2 + 6 * 7

    # What trains nothing needs neither the ranks nor the weights, nor, all being recorded, the server.
    monkeypatch.chdir(runs.root)
    printed = json.loads(output)
    assert cli.main(["pairs", "--in", str(ours), "--out", str(ours / "preferences.jsonl")]) == 0
    assert cli.main(["evaluate", "--config", str(runs.write(configs["shard"]))]) == 0
    summary = json.loads((ours / "summary.json").read_text())
    assert {**summary, "seconds": 0, "report": ""} == {**printed, "seconds": 0, "report": ""}
    assert rows(ours) == before
    assert cli.main(["collect", "--config", str(runs.write(configs["shard"]))]) == 2  # it may have to train
