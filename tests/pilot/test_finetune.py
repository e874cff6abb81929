"""`matryoshka sft` and `matryoshka dpo --data` on a user's own rows, through the command line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from matryoshka.core.files import folder_lock, read_jsonl
from matryoshka.core.models.load import load_model
from matryoshka.lora.files import WEIGHTS, adapter_tensors, load_adapter
from matryoshka.lora.linear import active
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import command, environment

PAIRS = [
    {"prompt": [{"role": "user", "content": f"Say {i}"}], "chosen": f"It is {i}.", "rejected": f"No {i}"}
    for i in range(6)
]
CHATS = [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(6)]
SMALL = "--lora.rank 2 --train.learning-rate 1e-2 --train.batch-size 2 --train.epochs 2 --threads 1".split()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(data: Path, model: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--model", str(model), "--out", str(out), *SMALL, *more]


@pytest.mark.parametrize(("name", "rows"), [("dpo", PAIRS), ("sft", CHATS)])
def test_an_adapter_is_trained_and_peft_computes_the_same(
    name: str, rows: list[dict[str, Any]], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: peft's hidden states on transformers' model with the folder that was written; ln 2 at the first step."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert cli.main([name, *arguments(write(tmp_path / "rows.jsonl", rows), tiny_dir, out)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["items"], summary["skipped"], summary["step"]) == (6, 0, 6)
    assert summary["adapter"] == str(out / "adapter")
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    if name == "dpo":
        assert metrics[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]

    ours = load_model(tiny_dir)
    load_adapter(ours, "trained", out / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad(), active(ours, "trained"):
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert any(tensor.any() for key, tensor in adapter_tensors(ours, "trained").items() if "lora_B" in key)


def test_training_goes_on_from_an_adapter_which_is_then_the_reference(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: ln 2 again at the first step, though the adapter is not the identity; the adapter handed in stays."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "one")]) == 0
    before = (tmp_path / "one" / "adapter" / WEIGHTS).read_bytes()
    more = ["--adapter", str(tmp_path / "one" / "adapter")]
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "two", *more)]) == 0
    first = read_jsonl(tmp_path / "two" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert (tmp_path / "one" / "adapter" / WEIGHTS).read_bytes() == before
    assert (tmp_path / "two" / "adapter" / WEIGHTS).read_bytes() != before


def test_a_stopped_run_continues_with_the_same_bits(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: an undisturbed run; SIGTERM ends the process with 143 after the step that runs is saved."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    long = ["--train.epochs", "20"]
    process = subprocess.Popen(
        command("dpo", *arguments(data, tiny_dir, tmp_path / "stopped", *long)),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "the same command continues" in errors
    assert not (tmp_path / "stopped" / "adapter").exists()
    for out in ("stopped", "whole"):
        assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / out, *long)]) == 0
    adapters = [(tmp_path / out / "adapter" / WEIGHTS).read_bytes() for out in ("stopped", "whole")]
    assert adapters[0] == adapters[1]
    stopped, whole = (read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("stopped", "whole"))
    assert [{**row, "seconds": 0} for row in stopped] == [{**row, "seconds": 0} for row in whole]
    assert len(whole) == 60


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("dpo", "", r"rows.jsonl: the file is empty"),
        ("dpo", '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"\n', "rows.jsonl:2: malformed JSON"),
        ("dpo", '{"prompt": "p", "chosen": "a"}\n', "rows.jsonl:1: field 'rejected' is missing"),
        ("sft", '{"prompt": "p", "completion": "c"}\n\n', "rows.jsonl:2: the row is empty"),
        ("sft", json.dumps({"prompt": "p" * 600, "completion": "c"}) + "\n", "1 of 1 items exceed the context of 512"),
    ],
)
def test_bad_rows_are_one_line_and_leave_nothing(
    name: str, text: str, problem: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2, file and line in the message, no output folder."""
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    assert cli.main([name, *arguments(data, tiny_dir, tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_skipped_and_counted_when_asked(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one row of seven is longer than the context."""
    rows = [*CHATS, {"prompt": "p" * 600, "completion": "c"}]
    data = write(tmp_path / "rows.jsonl", rows)
    assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "out", "--overlong", "skip")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["items"], summary["skipped"]) == (6, 1)


def test_repeated_pairs_are_left_out_and_counted(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the adapter that the rows without the repeated ones give, to the bit; SFT rows may repeat."""
    adapters = []
    for name, rows, repeated in (("once", PAIRS, 0), ("twice", [*PAIRS, *PAIRS[:2]], 2)):
        data, out = write(tmp_path / f"{name}.jsonl", rows), tmp_path / name
        assert cli.main(["dpo", *arguments(data, tiny_dir, out)]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (summary["items"], summary["repeated"]) == (6, repeated)
        adapters.append((out / "adapter" / WEIGHTS).read_bytes())
    assert adapters[0] == adapters[1]
    data = write(tmp_path / "chats.jsonl", [*CHATS, *CHATS[:2]])
    assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "sft")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["items"], summary["repeated"]) == (8, 0)


def test_reference_log_probs_are_kept_when_asked(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a second run on the file that the first one filled: ln 2, the same losses; a damaged file is one line."""
    data, cache = write(tmp_path / "rows.jsonl", PAIRS), tmp_path / "reference.sqlite"
    for out in ("plain", "one", "two"):
        more = [] if out == "plain" else ["--reference-cache", str(cache)]
        assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / out, *more)]) == 0
    plain, one, two = (read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("plain", "one", "two"))
    assert two[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    for row, expected in zip(two, plain, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert [row["loss"] for row in one][:3] == [row["loss"] for row in two][:3]
    cache.write_bytes(b"not a database" * 100)
    capsys.readouterr()
    more = ["--reference-cache", str(cache)]
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "three", *more)]) == 2
    error = capsys.readouterr().err
    assert "not a readable cache of reference log-probs" in error and error.count("\n") == 1


def test_an_unknown_key_offers_the_nearest(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand."""
    config = tmp_path / "dpo.toml"
    config.write_text(f'data = "d"\nmodel = "{tiny_dir}"\nout = "o"\n[objective]\nbeta = 0.2\nlable_smoothing = 0.1\n')
    assert cli.main(["dpo", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "objective.lable_smoothing: unknown key; did you mean 'objective.label_smoothing'?" in error


def test_a_folder_in_which_another_process_trains_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message, while the folder's lock is held, and that nothing is written beside the lock."""
    with folder_lock(tmp_path / "out"):
        assert cli.main(["sft", *arguments(write(tmp_path / "a.jsonl", CHATS), tiny_dir, tmp_path / "out")]) == 2
    assert "is working in this run directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_other_data_in_a_folder_of_an_unfinished_run_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message; the adapter that was trained there stays."""
    out = tmp_path / "out"
    assert cli.main(["dpo", *arguments(write(tmp_path / "a.jsonl", PAIRS), tiny_dir, out)]) == 0
    before = (out / "adapter" / WEIGHTS).read_bytes()
    assert cli.main(["dpo", *arguments(write(tmp_path / "b.jsonl", PAIRS[:4]), tiny_dir, out)]) == 2
    assert "was written with another training configuration, objective, model or data" in capsys.readouterr().err
    assert (out / "adapter" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_another_start_in_a_folder_of_an_unfinished_run_is_refused(
    kind: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message, for a base and for a first adapter of the same shapes in which one number differs."""
    data, out = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out"
    first: list[str] = []
    if kind == "adapter":
        assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "before")]) == 0
        first = ["--adapter", str(tmp_path / "before" / "adapter")]
    assert cli.main(["dpo", *arguments(data, tiny_dir, out, *first)]) == 0
    folder = tiny_dir if kind == "base" else Path(first[1])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    base, first = (other, []) if kind == "base" else (tiny_dir, ["--adapter", str(other)])
    assert cli.main(["dpo", *arguments(data, base, out, *first)]) == 2
    assert "was written with another training configuration, objective, model or data" in capsys.readouterr().err


def test_tensorboard_without_its_package_names_the_extra(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand; with the package an event file appears beside the metrics."""
    data = write(tmp_path / "rows.jsonl", CHATS)
    with monkeypatch.context() as without:
        modules: dict[str, Any] = sys.modules
        for name in ("tensorboard", "torch.utils.tensorboard"):
            without.setitem(modules, name, None)  # None: not to be found
        assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "out", "--tensorboard")]) == 2
        assert "needs the extra `track`" in capsys.readouterr().err
    pytest.importorskip("tensorboard")
    assert cli.main(["sft", *arguments(data, tiny_dir, tmp_path / "out", "--tensorboard")]) == 0
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == 1
