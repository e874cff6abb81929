"""pilot/export.py: a merged folder against transformers + peft on the same files, and stages taken out of a run."""

import json
from pathlib import Path

import pytest
import torch

from matryoshka.core.models.load import load_model
from matryoshka.lora.files import adapter_hash, save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.scripts import cli


def make_adapter(model_dir: Path, folder: Path, seed: int = 0) -> Path:
    """Return a saved adapter whose B is not zero, so that merging it changes the model."""
    model = load_model(model_dir)
    add_adapter(model, "policy", LoraConfig(rank=2, alpha=4.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name.lower():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, "policy", folder, str(model_dir))
    return folder


def test_merge_writes_the_folder_that_transformers_and_peft_agree_with(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: peft's own adapted model on the unmerged files; fp32 sums differ in order, hence 1e-4 on logits."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    adapter, out = make_adapter(tiny_dir, tmp_path / "adapter"), tmp_path / "merged"
    assert cli.main(["merge", "--model", str(tiny_dir), "--adapter", str(adapter), "--out", str(out)]) == 0
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits.clone()
        expected = peft.PeftModel.from_pretrained(base, adapter)(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        ours = load_model(out)
        logits = ours.logits(ours(ids))
    assert (expected - plain).abs().max() > 1e-2, "the adapter must matter"
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (out / "tokenizer.json").read_bytes() == (tiny_dir / "tokenizer.json").read_bytes()


def test_merge_never_overwrites_and_leaves_nothing_half(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the promise about bad input; the folder's content is unchanged."""
    adapter = make_adapter(tiny_dir, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    flags = ["merge", "--model", str(tiny_dir), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert cli.main(flags) == 2 and "nothing is overwritten" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    flags[-1] = str(tmp_path / "other")
    assert cli.main(flags) == 2 and "not a readable safetensors file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_export_takes_the_last_round_or_the_stage_that_is_named(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the content hashes of the stages' adapters; round-10 comes after round-2."""
    run = tmp_path / "run"
    stages = {name: make_adapter(tiny_dir, run / name / "adapter", seed) for seed, name in
              enumerate(("warmup", "round-2", "round-10"))}
    for stage, expected in (("", "round-10"), ("warmup", "warmup")):
        out = tmp_path / f"out-{expected}"
        assert cli.main(["export", "--run", str(run), "--out", str(out), "--stage", stage]) == 0
        assert adapter_hash(out) == adapter_hash(stages[expected])
        assert adapter_hash(out) in capsys.readouterr().out
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "no"), "--stage", "star"]) == 2
    assert "'star' is not trained; choose from ['round-10', 'round-2', 'warmup']" in capsys.readouterr().err
