"""Reads LaMP's own files, `{split}_questions.json` and `{split}_outputs.json`, and joins them by id.

A questions file is one JSON array of up to gigabytes, so only one question is in memory at a time; the outputs file is
read whole. Errors name file and id. The invariant: every item has an id of its own, a question in its task's wording,
every field of every profile entry as text, and a gold answer.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.json_input import read_json
from matryoshka.tasks.lamp.task_specs import Kind

Entry = Mapping[str, str]
FETCH = "`matryoshka data lamp --task TASK` fetches LaMP's files"


@dataclass(frozen=True)
class Item:
    """One question with its user's history (in file order, possibly none) and the gold answer."""

    id: str
    question: str
    profile: Sequence[Entry]
    gold: str


def outputs_beside(questions: Path) -> Path:
    """Return the outputs file that belongs to a questions file. Raises ValueError if its name does not say."""
    if not questions.name.endswith("questions.json"):
        raise ValueError(f"{questions}: expected a name that ends in questions.json, with the outputs.json beside it")
    return questions.with_name(questions.name.removesuffix("questions.json") + "outputs.json")


def read_items(questions: Path, kind: Kind) -> Iterator[Item]:
    """Yield the items of `questions`, joined with the outputs file beside it, in the order of the questions.

    A .jsonl file is the original's formalised one, whose rows {id, question, answer, profile} are whole.
    Raises FileNotFoundError for a missing file; ValueError naming file and id for malformed rows, for two questions
    with one id, for a question without gold and, at the end of the file, for gold without a question.
    """
    if questions.suffix == ".jsonl":
        if not questions.is_file():
            raise FileNotFoundError(f"{questions}: no such file; expected formalised rows of LaMP; {FETCH}")
        rows: Iterable[Any] = [row | {"input": row.get("question")} for row in read_jsonl(questions)]
        outputs = questions
        placed = [(f"{questions}:{n}", row) for n, row in enumerate(rows, start=1)]
        golds = {_text(row, "id", where): _gold(row.get("answer"), kind, where) for where, row in placed}
    else:
        outputs = outputs_beside(questions)
        golds, rows = read_golds(outputs, kind), read_array(questions)
    seen: set[str] = set()
    for index, row in enumerate(rows):
        id = _text(row, "id", f"{questions}: question {index}")
        where = f"{questions}: id {id!r}"
        if id in seen:
            raise ValueError(f"{where} occurs twice; expected each once")
        if id not in golds:
            raise ValueError(f"{where} has no gold answer in {outputs.name}; a question cannot be scored without")
        seen.add(id)
        question = _text(row, "input", where)
        try:
            kind.subjects(question)
        except ValueError as err:
            raise ValueError(f"{where}: {err}") from err
        yield Item(id, question, _profile(row, kind, where), golds[id])
    if missing := sorted(golds.keys() - seen):
        raise ValueError(f"{outputs}: id {missing[0]!r} has a gold answer but no question ({len(missing)} such ids)")


def read_array(path: Path) -> Iterator[Any]:
    """Yield the items of the JSON array in `path`, one in memory at a time.

    Raises FileNotFoundError; ValueError for an empty array, for malformed JSON (including text that is not UTF-8) and
    without the package ijson.
    """
    try:
        import ijson
    except ImportError as err:
        raise ValueError("reading LaMP's files needs ijson: pip install 'matryoshka-pilot[lamp]'") from err
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {FETCH}")
    done = 0
    with path.open("rb") as handle:
        if handle.read(3) != codecs.BOM_UTF8:  # some editors put one first
            handle.seek(0)
        try:
            for item in ijson.items(handle, "item", use_float=True):
                yield item
                done += 1
        except ijson.JSONError as err:
            said = err.args[0].decode(errors="replace") if isinstance(err.args[0], bytes) else str(err)
            raise ValueError(f"{path}: malformed JSON in item {done}: {' '.join(said.split())}") from err
    if not done:
        raise ValueError(f"{path}: no items; expected a JSON array [...] of questions")


def read_golds(path: Path, kind: Kind) -> dict[str, str]:
    """Return id -> gold answer of an outputs file. Raises as `read_items`."""
    data = read_json(path, f"the gold answers beside a questions file; {FETCH}")
    rows = data.get("golds")
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected {{"task": ..., "golds": [{{"id": ..., "output": ...}}]}}')
    if not str(data.get("task")).startswith(f"LaMP_{kind.number}"):
        raise ValueError(f"{path}: the task is {data.get('task')!r}; LaMP-{kind.name}'s files say LaMP_{kind.number}")
    golds: dict[str, str] = {}
    for index, row in enumerate(rows):
        id = _text(row, "id", f"{path}: gold {index}")
        gold = _gold(_text(row, "output", f"{path}: id {id!r}"), kind, f"{path}: id {id!r}")
        if id in golds:
            raise ValueError(f"{path}: id {id!r} occurs twice; expected each once")
        golds[id] = gold
    return golds


def _gold(gold: Any, kind: Kind, where: str) -> str:
    text = _text({"answer": gold}, "answer", where)
    if kind.labels and text not in kind.labels:
        raise ValueError(f"{where}: {text!r} is none of LaMP-{kind.name}'s labels {list(kind.labels)}")
    return text


def _profile(row: Any, kind: Kind, where: str) -> list[Entry]:
    entries = row.get("profile")
    if not isinstance(entries, list):
        raise ValueError(f"{where}: field 'profile' must be a list of entries; got {type(entries).__name__}")
    profile: list[Entry] = []
    for index, entry in enumerate(entries):
        place = f"{where}, profile entry {index}"
        # A text may be empty: real titles are.
        dated = {"date": _text(entry, "date", place)} if isinstance(entry, dict) and "date" in entry else {}
        profile.append({name: _text(entry, name, place, blank=True) for name in kind.fields} | dated)
    return profile


def _text(row: Any, name: str, where: str, blank: bool = False) -> str:
    """Return a text, or a number as one: real ids and scores are texts, and 5 and 5.0 mean the same as "5"."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(int(value) if value == value // 1 else value)
    if not isinstance(value, str) or not (value or blank):
        got = "nothing" if name not in row else repr(value)[:60]
        raise ValueError(f"{where}: field {name!r} must be a {'' if blank else 'non-empty '}text; got {got}")
    return value
