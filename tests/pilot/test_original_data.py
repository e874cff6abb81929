"""configs/original/ reads rows in the original's own form, written here: warm-up, problems, collected pairs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.pilot.check import check_run
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.finetune import DpoCommand, load_rows
from matryoshka.pilot.recipes import RECIPES
from matryoshka.tasks.lamp.data import Item, read_items, write_items
from matryoshka.tasks.lamp.task_specs import KINDS

FOLDER = RECIPES / "original"


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "\nSplit it.\n"}, {"role": "user", "content": f"Q: {question}\nA:"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"Let's break down this problem:\n{text}"}]


def test_formalised_lamp_rows_are_read(tmp_path: Path) -> None:
    """Oracle: the same items as from LaMP's two files; a label that is none is named by its line."""
    kind = KINDS["2M"]
    profile = [{"description": "a farm", "tag": "classic"}]
    item = Item("7", kind.ask("a ghost"), profile, "action")
    write_items([item], kind, tmp_path, "dev")
    path = tmp_path / "formalized_dev_data.jsonl"
    row = {"question": item.question, "answer": "action", "id": "7", "profile": profile}
    write(path, [row])
    assert list(read_items(path, kind)) == list(read_items(tmp_path / "dev_questions.json", kind)) == [item]
    write(path, [row, {**row, "id": "8", "answer": "actions"}])
    with pytest.raises(ValueError, match=r"data\.jsonl:2: 'actions' is none of LaMP-2M's labels"):
        list(read_items(path, kind))


def test_the_original_s_layout_is_read(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 216 rows of the original's form are 216 items; `check` finds no fault; pairs keep both sides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    model = tmp_path / "models" / "Meta-Llama-3-8B-Instruct"
    shutil.copytree(tiny_dir, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 65536}))
    data = tmp_path / "data" / "gsm8k"
    rows = [{"prompt": chat(f"w{i}?"), "response": said(f"What is {i}?")} for i in range(216)]
    write(data / "pal_sft" / "train.jsonl", rows)
    for name, count in (("gsm_train", 24), ("gsm", 3)):
        write(data / "pal" / f"{name}.jsonl", [{"input": f"{name} {i}?", "target": i} for i in range(count)])
    hard = [{"input": f"hard {i}?", "code": "def solution(): ...", "target": i + 0.5} for i in range(3)]
    write(data / "pal" / "gsmhardv2.jsonl", hard)
    small = {"task.train": 20, "task.validation": 4, "task.test": 3, "task.held_out": 3}
    checked = check_run(load_toml(RunConfig, FOLDER / "gsm8k.toml", small))
    assert checked.faults == []
    assert any(line.startswith("warm-up: file, 216 rows") for line in checked.lines)
    assert any("20 train, 4 validation, 3 test, 3 held_out" in line for line in checked.lines)

    pairs = [{"rejected": chat("q?") + said(f"bad {i}?"), "chosen": chat("q?") + said("good?")} for i in range(4)]
    pairs.append({side: chat("q?") + said("good?") for side in ("rejected", "chosen")})  # as its pairing may make
    write(tmp_path / "data" / "gsm" / "gpt3.5" / "collect" / "train.jsonl", pairs)
    command = load_toml(DpoCommand, FOLDER / "gsm8k_pairs.toml")
    tokenizer = Tokenizer.load(model)
    found = load_rows(command, tokenizer, 65536, True)
    assert len(found.items) == 4 and found.counts["equal"] == 1
    sides = [tokenizer.decode(sequence.ids) for sequence in found.items[0].sequences]
    assert "Let's break down this problem:\ngood?" in sides[0] and "bad" in sides[1] and "Split it." in sides[0]
