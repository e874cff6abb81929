"""tasks/lamp/data.py: what comes out of LaMP's files, every kind of bad file, and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matryoshka.tasks.lamp.data import Item, outputs_beside, read_array, read_golds, read_items
from matryoshka.tasks.lamp.synthetic_users import fixtures
from matryoshka.tasks.lamp.task_specs import KINDS
from matryoshka.tests.tasks.lamp.lamp_files import write_items

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("MATRYOSHKA_DATA", ROOT.parent / "shared" / "data")) / "lamp"
NEWS = KINDS["2N"]
ENTRY = {"title": "t", "text": "x", "category": "sports", "id": "10"}


def question(id: Any = "1", **changes: Any) -> dict[str, Any]:
    return {"id": id, "input": NEWS.ask("An article"), "profile": [ENTRY], **changes}


def files(folder: Path, questions: Any, golds: Any = None, task: str = "LaMP_2") -> Path:
    golds = [{"id": "1", "output": "sports"}] if golds is None else golds
    (folder / "train_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    path = folder / "train_questions.json"
    path.write_text(json.dumps(questions))
    return path


def test_questions_are_joined_by_id_not_by_place(tmp_path: Path) -> None:
    """Oracle: by hand; the golds stand in another order, scores may be numbers, and other fields are left behind."""
    golds = [{"id": "2", "output": "crime"}, {"id": "1", "output": "travel"}]
    path = files(tmp_path, [question(), question("2", profile=[])], golds)
    entry = {"title": "t", "text": "x", "category": "sports"}
    assert list(read_items(path, NEWS)) == [
        Item("1", NEWS.ask("An article"), [entry], "travel"),
        Item("2", NEWS.ask("An article"), [], "crime"),  # an empty profile is a user without a history
    ]
    rating = {"text": "a", "score": 4, "date": "2020-01-01"}
    review: dict[str, Any] = {"id": 7, "input": KINDS["3"].ask("Fine."), "profile": [rating]}
    (item,) = read_items(files(tmp_path, [review], [{"id": 7, "output": "5"}], "LaMP_3"), KINDS["3"])
    expected = Item("7", KINDS["3"].ask("Fine."), [{"text": "a", "score": "4", "date": "2020-01-01"}], "5")
    assert item == expected
    # Numbers that are floats, and a byte order mark, mean the same.
    review["profile"] = [{**rating, "score": 4.0}]
    path = files(tmp_path, [review], [{"id": 7, "output": 5.0}], "LaMP_3")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(read_items(path, KINDS["3"])) == [expected]


@pytest.mark.parametrize(
    ("questions", "golds", "message"),
    [
        ([question()], [], "train_questions.json: id '1' has no gold answer in train_outputs.json"),
        ([question(), question()], None, "train_questions.json: id '1' occurs twice"),
        ([question()], [{"id": "1", "output": "sports"}] * 2, "train_outputs.json: id '1' occurs twice"),
        (
            [question()],
            [{"id": "1", "output": "sports"}, {"id": "8", "output": "crime"}],
            "train_outputs.json: id '8' has a gold answer but no question",
        ),
        ([question()], [{"id": "1", "output": "sport"}], "id '1': 'sport' is none of LaMP-2N's labels"),
        ([question()], [{"id": "1"}], "_outputs.json: id '1': field 'output' must be a non-empty text; got nothing"),
        ([question(None)], None, "question 0: field 'id' must be a non-empty text; got None"),
        ([question(input="Who?")], None, "id '1': not a question of LaMP-2N: 'Who\\?'"),
        ([question(profile="x")], None, "id '1': field 'profile' must be a list of entries; got str"),
        ([question(profile=[ENTRY, {"text": "x"}])], None, "id '1', profile entry 1: field 'title' must be a text"),
        ([question(profile=[7])], None, "id '1', profile entry 0: expected an object, got int"),
        ([7], None, "question 0: expected an object, got int"),
        ([], None, "train_questions.json: no items; expected a JSON array"),
        ({"id": "1"}, None, "train_questions.json: no items; expected a JSON array"),
        ([question()], "x", 'train_outputs.json: expected {"task": ..., "golds": '),
    ],
)
def test_what_is_malformed_is_named_by_file_and_id(tmp_path: Path, questions: Any, golds: Any, message: str) -> None:
    """Oracle: the file and id that this test broke."""
    with pytest.raises(ValueError, match=message):
        list(read_items(files(tmp_path, questions, golds), NEWS))


def test_files_that_are_not_json(tmp_path: Path) -> None:
    """Oracle: the item that this test broke: cut off, not UTF-8, with something after the array."""
    path = files(tmp_path, [question()])
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:-2], whole.replace(b"An article", b"An \xff"), whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="train_questions.json: malformed JSON in item [01]: "):
            list(read_items(path, NEWS))
    path.write_bytes(whole)
    outputs = outputs_beside(path)
    for broken in (outputs.read_bytes()[:-1], b'{"task": "LaMP_2\xff"}'):
        outputs.write_bytes(broken)
        with pytest.raises(ValueError, match="train_outputs.json: (malformed JSON|not UTF-8)"):
            list(read_items(path, NEWS))


def test_files_that_are_absent_or_of_another_task(tmp_path: Path) -> None:
    """Oracle: the message names the path, or the two tasks."""
    path = files(tmp_path, [question()], task="LaMP_3")
    with pytest.raises(ValueError, match="the task is 'LaMP_3'; LaMP-2N's files say LaMP_2"):
        list(read_items(path, NEWS))
    outputs_beside(path).unlink()
    with pytest.raises(FileNotFoundError, match="train_outputs.json: no such file; .* beside .*`matryoshka data lamp"):
        list(read_items(path, NEWS))
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file; `matryoshka data lamp .* fetches"):
        list(read_array(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match="rows.jsonl: no such file; .*`matryoshka data lamp"):
        list(read_items(tmp_path / "rows.jsonl", NEWS))
    with pytest.raises(ValueError, match="expected a name that ends in questions.json"):
        list(read_items(tmp_path / "data.json", NEWS))


@pytest.mark.parametrize("name", KINDS)
def test_fixtures_go_through_the_files(name: str, tmp_path: Path) -> None:
    """Oracle: written items are read back, but for the entries' ids, which nothing uses."""
    kind = KINDS[name]
    items = [fixture.item for fixture in fixtures(kind, "train", 5, 0)]
    write_items(items, kind, tmp_path, "train")
    found = list(read_items(tmp_path / "train_questions.json", kind))
    bare = [[{key: text for key, text in row.items() if key != "id"} for row in item.profile] for item in items]
    assert found == [Item(i.id, i.question, rows, i.gold) for i, rows in zip(items, bare, strict=True)]


@pytest.mark.parametrize(
    ("file", "name", "items", "entries"),
    [
        ("LaMP_1/train236_top10profile", "1", 236, 2360),
        ("LaMP_2-news/train235_top4percat_profile", "2N", 235, 4963),
        ("LaMP_4-derived/loo", "4", 326, 15744),
    ],
)
def test_real_rows(file: str, name: str, items: int, entries: int) -> None:
    """Oracle: json.load of the same files, joined by hand."""
    path = DATA / f"{file}_questions.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set MATRYOSHKA_DATA)")
    golds = {row["id"]: row["output"] for row in json.loads(outputs_beside(path).read_text())["golds"]}
    found = list(read_items(path, KINDS[name]))
    rows = json.loads(path.read_text())
    assert [(i.id, i.question, i.gold) for i in found] == [(r["id"], r["input"], golds[r["id"]]) for r in rows]
    assert (len(found), sum(len(item.profile) for item in found)) == (items, entries)
    assert read_golds(outputs_beside(path), KINDS[name]) == golds


WATCH = """
import sys
from pathlib import Path
from matryoshka.tasks.lamp.data import read_items
from matryoshka.tasks.lamp.task_specs import KINDS
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
characters = sum(len(e["text"]) for item in read_items(Path(sys.argv[1]), KINDS["2N"]) for e in item.profile)
print(characters, peak() - before)
"""


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """Oracle: the peak of a fresh process reading 80 MB, one entry being a megabyte: far below the size of the file."""
    rows, text = 80, "word " * 200_000
    path = files(tmp_path, [], [{"id": str(i), "output": "sports"} for i in range(rows)])
    with path.open("w") as handle:
        for i in range(rows):
            handle.write("," if i else "[")
            json.dump(question(str(i), profile=[{**ENTRY, "text": text}]), handle)
        handle.write("]")
    done = subprocess.run([sys.executable, "-c", WATCH, str(path)], capture_output=True, text=True, check=True)
    characters, kib = map(int, done.stdout.split())
    assert path.stat().st_size > 80_000_000 and characters == rows * len(text)
    assert kib < 16 * 1024
