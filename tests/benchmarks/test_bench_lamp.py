"""benchmarks/lamp.py: on fixtures, with the tiny tokenizer: rows that add up, and a generated file that is read."""

import json
from pathlib import Path

import pytest

from matryoshka.benchmarks import lamp
from matryoshka.tasks.lamp.synthetic_users import fixtures
from matryoshka.tasks.lamp.task_specs import KINDS
from matryoshka.tests.tasks.lamp.lamp_files import write_items

pytest.importorskip("ijson")
pytest.importorskip("rank_bm25")


def test_the_rows_say_where_the_time_goes(tmp_path: Path, tiny_dir: Path) -> None:
    """Oracle: entries counted by hand; the seconds of the steps are those of all; the file is as large as asked."""
    items = [fixture.item for fixture in fixtures(KINDS["1"], "train", 5, 0)]
    write_items(items, KINDS["1"], tmp_path, "train")
    result = lamp.run(lamp.Config(tmp_path / "train_questions.json", "1", tiny_dir, 400, megabytes=2))
    rows = {row.name: row for row in result.rows}
    entries = sum(len(item.profile) for item in items)
    assert {row.details["entries"] for row in result.rows[:4]} == {entries}
    seconds = [rows[name].details["cpu_s"] for name in ("reading", "retrieval", "prompts")]
    assert rows["all"].details["cpu_s"] == pytest.approx(sum(seconds))
    assert rows["all"].value == pytest.approx(entries / sum(seconds))
    peak = rows["peak of streaming"]
    assert peak.value is not None and 5 < peak.value < 60 and peak.details["file_mib"] > 1.9
    assert json.loads(result.to_json())["bench"] == "lamp"
