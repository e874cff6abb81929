"""benchmarks/real_weights.py over the embedded model: log-probs beside those of transformers and llama.cpp."""

import json
from pathlib import Path

import pytest

from matryoshka.benchmarks.real_weights import main
from matryoshka.core.models.from_gguf import smollm2_gguf
from matryoshka.dpo.parity import BOUNDS


@pytest.mark.slow
def test_the_embedded_model_end_to_end(smollm2_dir: Path, tmp_path: Path) -> None:
    """Oracles: transformers and our server within the rounding of fp32; llama.cpp, which quantises activations, within
    a tenth of a nat; a step of SFT lowers its own loss."""
    pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")
    main(smollm2_dir, smollm2_gguf(), tmp_path / "result.json", "float32", max_tokens=12, serve=True)
    found = json.loads((tmp_path / "result.json").read_text())
    rms = {name: one["rms"] for name, one in found["nats_a_token"].items()}
    assert rms.pop("trainer, llama.cpp") < 0.1 and found["not_among_llama_cpps_50"] == 0
    assert len(rms) == 3 and max(rms.values()) < BOUNDS["float32"]
    before, after = found["sft_losses"]
    assert after < before and "Paris" in found["replies"][0]
