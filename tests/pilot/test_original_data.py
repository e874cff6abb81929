"""configs/original/ reads rows in the original's own form, written here: warm-up, problems, collected pairs."""

import json
import re
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
from matryoshka.scripts import cli
from matryoshka.tasks.alfworld.games import TASK_TYPES, read_split
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.lamp.data import Item, read_items
from matryoshka.tasks.lamp.task_specs import CATEGORIES, KINDS
from matryoshka.tests.tasks.alfworld.test_games import write_official
from matryoshka.tests.tasks.lamp.lamp_files import write_items

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


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The controller's folder as the configurations name it, in the current folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    folder = tmp_path / "models" / "Meta-Llama-3-8B-Instruct"
    shutil.copytree(tiny_dir, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 65536}))
    return folder


def read_pairs(model: Path, file: str) -> list[list[str]]:
    """Return the two sides, as text, of each pair of `file` under configs/original/gsm8k_pairs.toml."""
    command = load_toml(DpoCommand, FOLDER / "gsm8k_pairs.toml", {"data": file})
    tokenizer = Tokenizer.load(model)
    items = load_rows(command, tokenizer, 65536, True).items
    return [[tokenizer.decode(sequence.ids) for sequence in item.sequences] for item in items]


def test_the_original_s_households_are_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracles: ALFWorld's own layout, written by hand from generated games: `check` finds no fault; pairs of [user,
    assistant] keep both sides; the games' own walkthroughs win in the old words, and in the new ones they do not.
    """
    data = tmp_path / "data" / "alfworld"
    for split, count in (("train", 24), ("valid_unseen", 4), ("valid_seen", 1)):
        found = households(split, count, 0, "small", TASK_TYPES)
        names = [f"{split}/{row['task_type']}-{i}/trial_{i}/game.tw-pddl" for i, row in enumerate(found)]
        write_official(data, [{**row, "game": name} for row, name in zip(found, names, strict=True)])
    small = {"task.warmup": 4, "task.train": 12, "task.validation": 2, "task.test": 4}
    checked = check_run(load_toml(RunConfig, FOLDER / "alfworld.toml", small))
    assert checked.faults == []
    assert any("4 warmup, 12 train, 2 validation, 4 test" in line for line in checked.lines)
    assert "generator: second request" in checked.prompts
    asked = [{"role": "user", "content": "Plan it."}]
    pairs = [{"rejected": asked + said_plan(f"bad {i}"), "chosen": asked + said_plan("good")} for i in range(2)]
    write(tmp_path / "data" / "alfworld" / "gpt3.5" / "collect" / "train.jsonl", pairs)
    sides = read_pairs(model, "data/alfworld/gpt3.5/collect/train.jsonl")
    assert len(sides) == 2 and "# General Plan: good" in sides[0][0] and "# General Plan: bad" in sides[0][1]

    games = read_split(data, "valid_unseen")
    games.sort(key=lambda game: not any(step.startswith("move ") for step in game["walkthrough"]))
    old = [re.sub(r"^move (.+) to (.+)$", r"put \1 in/on \2", step) for step in games[0]["walkthrough"]]
    assert old != games[0]["walkthrough"]
    told = ["\n".join(f"> {step}\nOK." for step in old), ["look"], "> look\nYou won!", "I cannot."]
    ids = [game["game"].removesuffix("/game.tw-pddl") for game in games]
    rows = [{"id": id, "prediction": text} for id, text in zip(ids, told, strict=True)]
    write(tmp_path / "transcripts.jsonl", rows)
    flags = ["--task.name", "alfworld", "--task.options.data", str(data), "--task.options.test-split", "valid_unseen"]
    assert cli.main(["score", "transcripts.jsonl", *flags, "--task.options.verbs", "old"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["success"]["value"] == 0.25
    write(tmp_path / "transcripts.jsonl", [{**rows[0], "prediction": games[0]["walkthrough"]}, *rows[1:]])
    assert cli.main(["score", "transcripts.jsonl", *flags, "--task.options.verbs", "old"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["success"]["value"] == 0


def said_plan(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"# General Plan: {text}\n# [Step 1] ..."}]


def test_the_original_s_histories_are_read(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracles: `check` finds no fault in formalised files written here; a result file of the original's form, a JSON
    list without ids, has the accuracy that was written into it.
    """
    kind, folder = KINDS["2N"], tmp_path / "data" / "lamp" / "formalized" / "lamp2n"
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("train", 30), ("dev", 4)):
        rows[split] = [
            {
                "question": kind.ask(f"{split} article {i}"), "answer": CATEGORIES[i % 15], "id": f"{split}{i}",
                "profile": [{"text": f"{split} {i} {n}", "title": f"t{n}", "category": "sports"} for n in range(3)],
            }
            for i in range(count)
        ]  # fmt: skip
        write(folder / f"formalized_{split}_data.jsonl", rows[split])
    small = {"task.train": 20, "task.validation": 4, "task.test": 4}
    config = load_toml(RunConfig, FOLDER / "lamp.toml", small)
    checked = check_run(config)
    assert checked.faults == []
    assert any("20 train, 4 validation, 4 test" in line for line in checked.lines)
    (prompt,) = checked.prompts["controller: guidance"]
    assert prompt.role == "user" and "sports" in prompt.content and "article" not in prompt.content.partition("t0")[2]

    said = [rows["dev"][0]["answer"], rows["dev"][1]["answer"].upper(), "none of them", rows["dev"][3]["answer"]]
    made = [
        {**{key: row[key] for key in ("question", "answer")}, "gpt_response": text, "whiteBox_responses": ["..."]}
        for row, text in zip(rows["dev"], said, strict=True)
    ]
    path = tmp_path / "data" / "lamp" / "inference" / "lamp2n" / "inference_dev_data.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made))
    files = [f"--task.options.{name}-file={folder}/formalized_{split}_data.jsonl" for name, split in
             (("train", "train"), ("test", "dev"))]  # fmt: skip
    assert cli.main(["score", str(path), "--task.name", "lamp", "--task.options.task", "2N", *files]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]["value"] == 0.75

    asked = [{"role": "user", "content": "Sum it up."}]
    pair = {side: [*asked, {"role": "assistant", "content": side}] for side in ("rejected", "chosen")}
    write(tmp_path / "data" / "lamp" / "processed_length" / "lamp2n" / "train.jsonl", [pair])
    ((better, worse),) = read_pairs(model, "data/lamp/processed_length/lamp2n/train.jsonl")
    assert "chosen" in better and "rejected" in worse


def test_the_original_s_word_problems_are_read(model: Path, tmp_path: Path) -> None:
    """Oracle: 216 rows of the original's form are 216 items; `check` finds no fault; pairs keep both sides."""
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
