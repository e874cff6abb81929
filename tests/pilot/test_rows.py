"""pilot/finetune.py: which rows `matryoshka sft | dpo` trains on, and what it does beside training."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from matryoshka.core.files import read_jsonl
from matryoshka.core.models.load import model_folder
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.pilot.finetune import DpoCommand, SftCommand, load_rows
from matryoshka.pilot.training import wandb_writer
from matryoshka.scripts import cli
from matryoshka.tests.pilot.test_finetune import PAIRS, arguments, write


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_dir)


def chats(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "completion": " yes"} for i in range(count)]


def texts(items: Any, tokenizer: Tokenizer) -> Counter[str]:
    return Counter(tokenizer.decode(item.sequences[0].ids[:2]) for item in items)


def test_files_are_mixed_by_weights(tiny_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Oracle: counts by hand: each row of the first file twice, half of the second, one seed one draw."""
    one, two = write(tmp_path / "a.jsonl", chats("a", 3)), write(tmp_path / "b.jsonl", chats("b", 8))
    command = SftCommand(one, tiny_dir, tmp_path, more_data=(two,), weights=(2.0, 0.5))
    found = texts(load_rows(command, tokenizer, 512, False).items, tokenizer)
    assert {key: n for key, n in found.items() if key[0] == "a"} == {"a0": 2, "a1": 2, "a2": 2}
    assert sum(n for key, n in found.items() if key[0] == "b") == len([key for key in found if key[0] == "b"]) == 4
    assert texts(load_rows(command, tokenizer, 512, False).items, tokenizer) == found
    for weights, problem in (((1.0,), "1 for 2 files"), ((1.0, 0.0), "must be above 0")):
        with pytest.raises(ValueError, match=problem):
            SftCommand(one, tiny_dir, tmp_path, more_data=(two,), weights=weights)


def test_samples_lengths_and_held_out_rows_are_counted(tiny_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Oracle: counts by hand; a pair repeated in another file counts once, equal prompts stay on one side."""
    rows = [*PAIRS, {**PAIRS[0], "chosen": "Another."}, {**PAIRS[0], "prompt": "x" * 300}]
    one, two = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", PAIRS[:2])
    with pytest.raises(ValueError, match="1 of 8 items exceed the context of 200 tokens"):
        load_rows(DpoCommand(one, tiny_dir, tmp_path, max_length=200), tokenizer, 512, True)
    command = DpoCommand(
        one, tiny_dir, tmp_path, more_data=(two,), max_length=200, overlong="skip", eval_share=0.5, max_samples=2
    )
    found = load_rows(command, tokenizer, 512, True)
    assert found.counts["skipped"] == 1 and found.counts["repeated"] == 2 and found.counts["equal"] == 0
    assert len(found.items) == 2 and found.counts["held_out"] == len(found.held_out) >= 3
    assert found.counts["not_taken"] + 2 + len(found.held_out) == 7
    assert not {item.group for item in found.items} & {item.group for item in found.held_out}
    for wrong, problem in (
        ({"eval_share": 1.0}, "must lie in"), ({"early_stop": 1}, "need rows to evaluate on"),
        ({"max_samples": -1}, "must not be negative"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            DpoCommand(one, tiny_dir, tmp_path, **wrong)


def test_the_command_evaluates_and_stops_early(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the rows of metrics.jsonl; held-out pairs with exchanged sides get worse, so that the second evaluation
    ends it and the adapter is that of one step: the checkpoint's, number by number. The last line names the step.
    """
    data = write(tmp_path / "rows.jsonl", PAIRS)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    held_out = write(tmp_path / "eval.jsonl", turned)
    more = ["--eval-data", str(held_out), "--eval-every", "1", "--early-stop", "1"]
    assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / "out", *more)]) == 0
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["eval_loss"] > rows[0]["eval_loss"]
    assert rows[1]["eval_accuracy"] == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["held_out"] == 6 and (said["step"], said["best_step"]) == (2, 1)
    assert said["best_eval_loss"] == rows[0]["eval_loss"]
    kept, steps = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors"), {}
    for step in (1, 2):
        state = load_file(tmp_path / "out" / f"step-{step}" / "state.safetensors")
        steps[step] = sorted(value.double().abs().sum().item() for name, value in state.items() if "parameter/" in name)
    found = sorted(value.double().abs().sum().item() for value in kept.values())
    assert found == steps[1] != steps[2]


def test_dropout_of_a_preference_training_is_a_choice(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: "off" trains as without dropout, and says so; "policy" trains otherwise."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    losses = {}
    for name, more in {
        "none": [], "off": ["--lora.dropout", "0.5"],
        "policy": ["--lora.dropout", "0.5", "--objective.dropout", "policy"],
    }.items():  # fmt: skip
        assert cli.main(["dpo", *arguments(data, tiny_dir, tmp_path / name, *more)]) == 0
        losses[name] = [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
    assert losses["off"] == losses["none"] != losses["policy"]
    assert "lora.dropout is not used, since the objective's dropout is 'off'" in caplog.text


def test_a_hub_id_is_found_in_the_local_cache(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the hub's own layout, made by hand; without the model the message says how to fetch it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    os.symlink(tiny_dir, snapshot)
    (tmp_path / "hub" / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--tiny" / "refs" / "main").write_text("abc")
    assert model_folder("me/tiny") == snapshot and model_folder(tiny_dir) == tiny_dir
    with pytest.raises(FileNotFoundError, match="me/other: no such folder; .* which `hf download me/other`"):
        model_folder("me/other")
    (tmp_path / "me").mkdir()
    assert model_folder("me/other") == Path("me/other")  # a folder of the user's that lacks the model
    assert model_folder("/nowhere/at/all") == Path("/nowhere/at/all")


@pytest.mark.slow
def test_metrics_go_to_wandb_through_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: wandb's own offline run file, which holds the numbers by name; without a project nothing is written."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb_writer(tmp_path / "none", "", "dpo") as write_row:
        write_row({"step": 1})
    assert not (tmp_path / "none").exists()
    with wandb_writer(tmp_path / "run", "mine", "dpo") as write_row:
        write_row({"step": 1, "steps": 2, "loss": 0.5})
        write_row({"step": 2, "steps": 2, "loss": 0.25})
    wandb.teardown()  # its service writes the file, and ends here as it does at a program's exit
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in file.read_bytes()


def test_rows_that_are_all_held_out_are_named(tiny_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Oracle: two rows of one prompt stay together, so a share of them is both."""
    data = write(tmp_path / "one.jsonl", [{"prompt": "p", "completion": str(i)} for i in range(2)])
    command = SftCommand(data, tiny_dir, tmp_path / "out", eval_share=0.1)
    with pytest.raises(ValueError, match="no row is left to train on; rows left out: 2 held_out"):
        load_rows(command, tokenizer, 512, pairs=False)
