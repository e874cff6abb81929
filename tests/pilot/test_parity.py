"""`matryoshka parity` end to end, against a server that speaks vLLM's protocol over our own model."""

import json
import sys
from pathlib import Path

import pytest

from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.pilot.parity import ParityConfig
from matryoshka.scripts.parity import parity

TINY_VLLM = Path(__file__).with_name("tiny_vllm.py")


@pytest.mark.slow
def test_log_probs_agree_at_every_way_to_draw(
    tiny_dir: Path, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the trainer, which knows neither temperature nor top-p; base and adapter, drawn plainly and truncated."""
    vllm = VllmConfig(f"{sys.executable} {TINY_VLLM}")
    log = tmp_path / "vllm.log"
    parity(ParityConfig(tiny_dir, adapter_dir, samples=2, tokens=12, log=log, vllm=vllm))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["rows"]
    assert result["holds"] and len(rows) == 2 * 2 * 4
    assert {(row["adapter"], row["sampling"]) for row in rows} == {
        (adapter, sampling)
        for adapter in ("none", "adapter")
        for sampling in ("temperature 1, top-p 1", "temperature 0.7, top-p 0.9")
    }
    assert all(row["difference"]["rms"] < 1e-4 and row["difference"]["num_tokens"] > 0 for row in rows)
