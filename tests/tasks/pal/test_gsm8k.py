"""Reading GSM8K, PAL and GSM-Hard files: fixtures of each form, malformed rows, and the real files where they are."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Example, content_key
from matryoshka.tasks.pal.gsm8k import load, load_splits
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.pal.task import PALTask

DATA = Path(os.environ.get("MATRYOSHKA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set MATRYOSHKA_DATA")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_three_forms_of_one_problem_read_alike(tmp_path: Path) -> None:
    """Oracle: the question and 1234, whatever the file looks like; the same question has the same id."""
    gsm8k = load(write(tmp_path / "a", {"question": "How many?", "answer": "2 * 617 = <<2*617=1234>>1234\n#### 1,234"}))
    pal = load(write(tmp_path / "b", {"input": "How many?", "target": 1234}))
    hard = load(write(tmp_path / "c", {"input": "How many?", "code": "def solution(): ...", "target": 1234.0}))
    fields = {"question": "How many?", "answer": 1234}
    assert pal == hard == [Example(content_key("How many?"), fields)]
    assert gsm8k == [Example(content_key("How many?"), {**fields, "steps": ["What is 2*617?"]})]


def test_socratic_rows_have_their_questions_as_steps(tmp_path: Path) -> None:
    """Oracle: a row written by hand in the form of GSM8K's Socratic files; its steps are questions, not arithmetic."""
    answer = (
        "How many clips did Ann sell in May? ** She sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "How many clips is that in all? ** Ann sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
    )
    (example,) = load(write(tmp_path / "a", {"question": "How many?", "answer": answer}))
    steps = ["How many clips did Ann sell in May?", "How many clips is that in all?"]
    assert example.fields == {"question": "How many?", "answer": 72, "steps": steps}


def test_a_held_out_file_counts_apart(tmp_path: Path) -> None:
    """Oracle: by hand: a question that stands in both has two ids; one that training sees is refused."""
    train, test, hard = (tmp_path / name for name in ("train", "test", "hard"))
    write(train, *({"input": f"t{i}?", "target": i} for i in range(3)))
    write(test, {"input": "same?", "target": 4}, {"input": "b?", "target": 5})
    write(hard, {"input": "same?", "target": 4.0}, {"input": "c?", "target": 6.5})
    sizes = {"warmup": 0, "train": 2, "validation": 1, "test": 2, "held_out": 2}
    options, setting = PalOptions("", str(train), str(test), str(hard)), TaskSetting(sizes, gold_warmup=False)
    splits = load_splits(options, setting)
    assert [example.fields["answer"] for example in splits["held_out"]] == [4.0, 6.5]
    ids = [example.id for rows in splits.values() for example in rows]
    assert len(set(ids)) == len(ids) == 7 and splits["held_out"][1].id == content_key("c?")
    with pytest.raises(ValueError, match="takes 2 problems, but .* held_out_file is empty; give .* or take no"):
        load_splits(replace(options, held_out_file=""), setting)
    write(hard, {"input": "t2?", "target": 4.0}, {"input": "c?", "target": 6.5})
    with pytest.raises(ValueError, match="1 questions stand in both train_file and held_out_file; training would see"):
        load_splits(options, setting)


def test_a_repeated_question_counts_with_an_id_of_its_own(tmp_path: Path) -> None:
    """Oracle: two equal rows have two ids, the same in every reading."""
    row = {"input": "How many?", "target": 1}
    path = write(tmp_path / "twice", row, row)
    ids = [example.id for example in load(path)]
    assert len(set(ids)) == 2 and ids == [example.id for example in load(path)]


@pytest.mark.parametrize("name", ["train_file", "test_file", "held_out_file"])
def test_no_file_is_left_aside(name: str, tmp_path: Path) -> None:
    """Oracle: each file alone is not enough for the sizes: an error, and never problems made from the seed instead."""
    path = write(tmp_path / "a", {"input": "How many?", "target": 1})
    setting = TaskSetting({"warmup": 0, "train": 1, "validation": 0, "test": 1, "held_out": 1}, gold_warmup=False)
    with pytest.raises(ValueError, match=r"takes 1 problems, but \[task.options\] \w+_file is empty"):
        file: dict[str, Any] = {name: str(path)}
        PALTask(PalOptions(**file), setting).examples("test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "answer": "four"}, "expected the answer to end with '#### NUMBER'"),
        ({"question": "Q?", "answer": 4}, "'answer' is int; expected a text"),
        ({"input": "Q?", "target": "4"}, "'target' is '4'; expected a finite number"),
        ({"input": "Q?", "target": True}, "'target' is True; expected a finite number"),
        ({"input": "Q?", "target": float("nan")}, "malformed JSON"),
        ({"input": " ", "target": 4}, "the question is ' '; expected a text"),
        ({"question": None, "answer": "#### 4"}, "the question is None; expected a text"),
        ({"prompt": "Q?"}, r"the row has the keys \['prompt'\]; expected 'question' and 'answer'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(row: object, message: str, tmp_path: Path) -> None:
    """Oracle: one fault at a time in line 2; the message names file and line."""
    path = write(tmp_path / "bad.jsonl", {"input": "Q?", "target": 4}, row)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Oracle: the exception names the file and the command that fetches the published ones."""
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file; .*`matryoshka data gsm8k`"):
        load(tmp_path / "nowhere.jsonl")


@needs_data
def test_all_of_gsm8k_train_is_read() -> None:
    """Oracle: the published count, and the first answer (48 + 24)."""
    examples = load(DATA / "train.jsonl")
    assert len(examples) == len({example.id for example in examples}) == 7473
    assert examples[0].fields["answer"] == 72
