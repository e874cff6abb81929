"""The main job with every family of controllers: a tiny random model from its warm-up to the report."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from matryoshka.benchmarks.shapes import random_model
from matryoshka.core.models.load import architecture_files
from matryoshka.core.models.weights import save_weights
from matryoshka.lora.linear import LoraConfig
from matryoshka.tests.pilot.conftest import Generator, with_context
from matryoshka.tests.pilot.test_pilot import Runs, small

SETTINGS = Path(__file__).parents[1] / "core" / "models" / "controllers"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, generator: Generator) -> Runs:
    return Runs(tmp_path_factory.mktemp("families"), generator)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(architecture_files()))
def test_a_pilot_of_every_family(model_type: str, controller_dir: Path, runs: Runs, tmp_path: Path) -> None:
    """Oracle: what a finished run leaves: every policy evaluated, an adapter of all of the family's linear layers, and
    a first loss of ln 2 in the round, since policy and reference are equal there."""
    own = json.loads((SETTINGS / f"{model_type}.json").read_text())["base"]
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    theirs = json.loads((controller_dir / "config.json").read_text())
    fields = {**own, **{key: theirs[key] for key in keys}, "model_type": model_type, "max_position_embeddings": 1024}
    folder = with_context(controller_dir, tmp_path / model_type, 1024)
    (folder / "model.safetensors").unlink()
    model = random_model(fields, torch.float32, "cpu", seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1.0 if name.endswith("norm.weight") else 10.0)
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding[theirs["eos_token_id"]] *= 5  # texts end by themselves
    save_weights(model, folder)
    (folder / "config.json").write_text(json.dumps(fields))
    config = small(model_type, folder, runs.generator.url(model_type))
    config = dataclasses.replace(config, lora=LoraConfig(rank=2))
    runs.finish(config)
    done = runs.folder(config)
    summary = json.loads((done / "summary.json").read_text())
    assert {"no_guidance", "untrained", "warmup"} <= summary.keys() and (done / "report.html").is_file()
    (adapter,) = [path for path in done.rglob("adapter_config.json") if "warmup" in str(path)][:1]
    assert set(json.loads(adapter.read_text())["target_modules"]) == set(model.lora_targets)
    metrics = done / "round-1" / "train" / "metrics.jsonl"
    if json.loads((done / "report.json").read_text())["counts"]["round_1"]["pairs"]:  # a random model may earn none
        first, *_ = metrics.read_text().splitlines()
        assert json.loads(first)["loss"] == pytest.approx(0.6931471805599453, abs=1e-5)
