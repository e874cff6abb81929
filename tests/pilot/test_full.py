"""`matryoshka sft | dpo --tune full` and `--parallel.*` through the command line; single ranks run in this process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.core.files import read_jsonl
from matryoshka.core.models.load import load_model
from matryoshka.core.training import train
from matryoshka.inference.vllm_server import free_port
from matryoshka.scripts import cli
from matryoshka.tests.pilot.test_finetune import CHATS, PAIRS, arguments, write


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that torchrun gives to a rank that is alone."""
    settings = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in (settings | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))


def test_all_weights_are_trained_and_transformers_computes_the_same(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: transformers' logits with the folder that was written; the loss falls; nothing but weights changed."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    data = write(tmp_path / "rows.jsonl", CHATS)
    assert cli.main(["sft", *arguments(data, tiny_dir, out, "--tune", "full")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["model"] == str(out / "model") and summary["step"] == 6
    losses = [row["loss"] for row in read_jsonl(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert theirs.dtype == torch.float32
    ours, ids = load_model(out / "model"), torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_dir, out / "model"))
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((out / "model" / name).read_text()) == json.loads((tiny_dir / name).read_text())


def test_one_rank_that_shards_trains_what_a_process_does(
    tiny_dir: Path, tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same command without torchrun: the same losses, weights within fp32 rounding of 12 steps of 1e-2.

    The reference is the model as it came: ln 2 at the first step, and log-probs of all pairs in a file.
    """
    data = write(tmp_path / "rows.jsonl", PAIRS)
    full = ["--tune", "full", "--train.learning-rate", "1e-3"]
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "shard", *full, "--parallel.layout", "shard")]) == 0
    assert "layout shard: a rank needs under replicate" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()
    monkeypatch.delenv("RANK")
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "plain", *full)]) == 0
    shard, plain = (read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("shard", "plain"))
    assert shard[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert [row["loss"] for row in shard] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    weights = [load_file(tmp_path / out / "model" / "model.safetensors") for out in ("shard", "plain")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=1e-4, msg=name)
    assert (tmp_path / "shard" / "reference.sqlite").is_file()


def test_bf16_keeps_fp32_weights_beside(tiny_dir: Path, tmp_path: Path, one_rank: None) -> None:
    """Oracle: invariant: a learning rate of 1e-6 moves weights of 0.2 by far less than bf16's spacing of 2^-10.

    In bf16 alone no step would move anything; after six steps the fp32 weights have moved, as the checkpoint shows.
    """
    data = write(tmp_path / "rows.jsonl", CHATS)
    more = ["--tune", "full", "--dtype", "bfloat16", "--train.learning-rate", "1e-6"]
    assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "out", *more)]) == 0
    before = load_file(tiny_dir / "model.safetensors")
    files = (tmp_path / "out" / "step-6").glob("*.safetensors")  # of one rank, whose slices are whole
    state = {name: value for file in files for name, value in load_file(file).items()}
    kept = {name.removeprefix("parameter/"): value for name, value in state.items() if "parameter/" in name}
    moved = [(kept[name] - value).abs() for name, value in before.items()]
    assert all(value.dtype == torch.float32 for value in kept.values())
    assert all(0 < difference.max() < 1e-5 for difference in moved)
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(value.equal(kept[name].bfloat16()) for name, value in written.items())
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--tune", "full", "--adapter", "a"], "there is none where all weights are trained"),
        (["--parallel.layout", "shard"], "layout 'shard' is for ranks; start with torchrun"),
        (["--tune", "full", "--dtype", "bfloat16"], "training all weights in torch.bfloat16 is for ranks"),
    ],
)
def test_what_needs_ranks_or_makes_no_sense_is_one_line(
    more: list[str], problem: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2, the message, no output folder."""
    data = write(tmp_path / "rows.jsonl", CHATS)
    assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "out", *more)]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_loading(
    tiny_dir: Path, tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a machine with 100 kB free; the message holds what each layout needs; weights are not even looked for."""
    monkeypatch.setattr(train, "free_bytes", lambda device: 100_000)
    data = write(tmp_path / "rows.jsonl", CHATS)
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_dir / name).read_bytes())
    assert cli.main(["sft", *arguments(data, base, tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "does not fit with layout = 'auto': a rank needs under replicate" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
