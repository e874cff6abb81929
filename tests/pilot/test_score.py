"""matryoshka score: predictions made elsewhere, against each task's own measure."""

import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import write_jsonl
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Example
from matryoshka.pilot.config import SPLITS, TaskConfig
from matryoshka.scripts import cli
from matryoshka.tasks.find import task_class
from matryoshka.tasks.pal.answers import read_answer


def problems(name: str, count: int, **options: Any) -> list[Example]:
    """Return the test problems of a task."""
    config = TaskConfig(name, options=options or None)
    task = task_class(name)(config.options, TaskSetting({**dict.fromkeys(SPLITS, 0), "test": count}))
    return list(task.examples("test"))


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("#### 1,234", 1234), ("so 3 + 4 = 7.", 7), ("$12.50", 12.5), ("-3", -3), ("it costs 5% more", 5), (7.0, 7.0),
        ("a1 b2c", None), ("", None), (None, None), (True, None), ("1e3", 1000.0), ("### 5 then #### 6 x 9", 6),
        ("version 1.2.3", None), ("it is \u22125", -5), ("#### \u22127", -7), ("costs $.50", 0.5), ("so .25.", 0.25),
        ("1\u202f000 in all", 1000), ("$12{,}000$", 12000), ("\\$1\\,200", 1200), ("3/4 of it", 0.75),
        ("on 5/6/2020", 2020), ("9" * 5000, None), ("1e999", None), ("3/0", 0),
    ],
)  # fmt: skip
def test_numbers_in_answers(said: Any, value: float | None) -> None:
    """Oracle: by hand."""
    assert read_answer(said) == value


def test_gsm8k_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand; a GSM8K test file alone is enough, rows are found by their question or their id, and a missing
    one is an error, wrong or left out as the flag says.
    """
    gold = [{"question": f"What is {n} and 1?", "answer": f"It is <<{n}+1={n + 1}>> #### {n + 1}"} for n in range(4)]
    write_jsonl(tmp_path / "test.jsonl", gold)
    task = ["--task.name", "pal", "--task.options.test-file", str(tmp_path / "test.jsonl")]
    said = ["The answer is 1.", "#### 7", "none", 4]
    made = [{**row, "response": s} for row, s in zip(gold, said, strict=True)]
    write_jsonl(tmp_path / "made.jsonl", made)
    assert cli.main(["score", str(tmp_path / "made.jsonl"), *task]) == 0
    (row,) = rows(capsys)
    assert (row["predictions"], row["problems"]) == (4, 4)
    assert row["accuracy"]["value"] == 0.5 and row["executable"]["value"] == 0.75
    # The same rows with the original's key "answer", as one JSON list, are read when their key is named.
    listed = [{"input": row["question"], "answer": s, "score": 1} for row, s in zip(gold, said, strict=True)]
    (tmp_path / "list.jsonl").write_text(json.dumps(listed))
    out = str(tmp_path / "scored")
    files = [str(tmp_path / name) for name in ("made.jsonl", "list.jsonl")]
    assert cli.main(["score", files[1], "--key", "answer", *task]) == 0
    assert rows(capsys)[0]["accuracy"]["value"] == 0.5
    write_jsonl(tmp_path / "part.jsonl", made[:3])
    run = ["score", files[0], str(tmp_path / "part.jsonl"), *task]
    assert cli.main(run) == 2
    assert "part: 1 of 4 problems of test have no prediction" in capsys.readouterr().err
    assert cli.main([*run, "--missing", "wrong", "--out", out]) == 0
    assert [row["accuracy"]["value"] for row in rows(capsys)] == [0.5, 0.25]
    assert json.loads((Path(out) / "report.json").read_text())["tables"][0]["differences"][0]["paired"]["lost"] == 1
    assert cli.main([*run, "--missing", "leave-out", "--out", out]) == 0
    assert [row["problems"] for row in rows(capsys)] == [4, 3]
    assert cli.main(["compare", out, out, "--condition", "made", "part"]) == 0
    assert "scored:part - " in capsys.readouterr().out


def test_lamp_labels_and_headlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the gold answers are right in LaMP's own form of outputs, and one false label costs one in four."""
    for task, metric, wrong in (("2N", "accuracy", "sports"), ("4", "rouge_l", ""), ("3", "accuracy", "7")):
        examples = problems("lamp", 4, task=task)
        golds = [{"id": example.id, "output": example.fields["answer"]} for example in examples]
        file, flags = tmp_path / f"{task}.json", ["--task.name", "lamp", "--task.options.task", task]
        file.write_text(json.dumps({"task": f"LaMP_{task[0]}", "golds": golds}))
        assert cli.main(["score", str(file), *flags]) == 0
        assert rows(capsys)[0][metric]["value"] == pytest.approx(1.0)
        golds[0]["output"] = wrong if golds[0]["output"] != wrong else "travel"
        file.write_text(json.dumps(golds))
        assert cli.main(["score", str(file), *flags]) == 0
        assert rows(capsys)[0][metric]["value"] == pytest.approx(0.75)


def test_transcripts_are_played_and_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the walkthroughs of generated households win; a transcript that only says so does not."""
    examples = problems("alfworld", 4)
    walks = [example.fields["answer"].split(", ") for example in examples]
    told = "\n".join(f"> {command}\nAll is well." for command in walks[1])
    said = [walks[0], told, "> look\nYou won!", "\n".join(["look"] * 60)]
    write_jsonl(tmp_path / "a.jsonl", [{"id": e.id, "prediction": s} for e, s in zip(examples, said, strict=True)])
    assert cli.main(["score", str(tmp_path / "a.jsonl"), "--task.name", "alfworld"]) == 0
    (row,) = rows(capsys)
    assert row["success"]["value"] == 0.5 and row["executable"]["value"] == 0.75
    assert row["steps"]["value"] == (len(walks[0]) + len(walks[1]) + 1 + 50) / 4
    write_jsonl(tmp_path / "a.jsonl", [{"id": examples[0].id, "prediction": "done"}])
    assert cli.main(["score", str(tmp_path / "a.jsonl"), "--task.name", "alfworld"]) == 2
    assert "a transcript, which can be played" in capsys.readouterr().err


def test_an_own_task_has_a_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the default of `Task.judge`: equal texts apart from capitals and the full stop."""
    write_jsonl(tmp_path / "qa.jsonl", [{"question": "q1", "answer": "Paris"}, {"question": "q2", "answer": "4"}])
    own = str(Path(__file__).resolve().parents[2] / "examples" / "own_task.py")
    write_jsonl(tmp_path / "a.jsonl", [{"id": "line 1", "prediction": "paris."}, {"id": "line 2", "prediction": "5"}])
    flags = ["--task.name", f"{own}:ShortAnswers", "--task.options.data", str(tmp_path / "qa.jsonl")]
    assert cli.main(["score", str(tmp_path / "a.jsonl"), *flags]) == 0
    assert rows(capsys)[0]["accuracy"]["value"] == 0.5


def test_files_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand: the folders above them tell two files apart, or the endings of their names."""
    (example,) = problems("pal", 1)
    files = [tmp_path / name for name in ("one/made.jsonl", "two/made.jsonl", "two/made.json")]
    for file in files:
        write_jsonl(file, [{"id": example.id, "prediction": example.fields["answer"]}])
    assert cli.main(["score", *map(str, files[:2]), "--count", "1", "--out", str(tmp_path / "out")]) == 0
    assert [row["file"] for row in rows(capsys)] == ["one/made", "two/made"]
    assert list(json.loads((tmp_path / "out" / "scores.json").read_text())) == ["one/made", "two/made"]
    assert cli.main(["score", *map(str, files[1:]), "--count", "1"]) == 0
    assert [row["file"] for row in rows(capsys)] == ["made.jsonl", "made.json"]
    assert cli.main(["score", str(files[0]), str(files[0]), "--count", "1"]) == 2
    assert "score: made.jsonl is given twice; give each file of predictions once" in capsys.readouterr().err


def test_predictions_that_cannot_be_scored_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: status 2 and a message with file, row and remedy."""
    (example,) = problems("pal", 1)
    good = {"id": example.id, "prediction": 1}
    for given, said in (
        ([{"id": "x", "prediction": 1}], "a.jsonl: item 1: id 'x' is no problem of test, such as"),
        ([good, good], "a.jsonl:2: problem"),
        ([{"id": example.id, "text": "1"}], "a.jsonl: item 1: no prediction; its keys are ['id', 'text']; choose one"),
        ([{"prediction": 1}], "no key 'id' and no question"),
        ([{"question": "What?", "prediction": 1}], "0 problems of test have the question 'What?'; give ids"),
        ([{**good, "prediction": [1]}], "the prediction [1] cannot be read: expected a number or a text"),
    ):
        write_jsonl(tmp_path / "a.jsonl", given)
        assert cli.main(["score", str(tmp_path / "a.jsonl"), "--count", "1"]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("[]")
    assert cli.main(["score", str(tmp_path / "a.jsonl")]) == 2 and "no predictions" in capsys.readouterr().err
    assert cli.main(["score", str(tmp_path / "b.jsonl")]) == 2 and "b.jsonl: no such file" in capsys.readouterr().err
