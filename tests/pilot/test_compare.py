"""matryoshka compare: which problems are paired, which protocols are not, and what a reader sees."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import write_json
from matryoshka.eval.statistics import paired_difference, paired_scores, unpaired
from matryoshka.pilot.compare import compared, read_results, table
from matryoshka.scripts import cli


def run(
    folder: Path, wins: Mapping[str, str], problems: str = "abcd", protocol: str = "label_free", **more: Any
) -> Path:
    """Write a report.json: condition -> the verdict of each problem as r or w; a capital is another problem's text."""
    verdicts = {
        name: {id.lower(): "right" if won == "r" else "wrong" for id, won in zip(problems, row, strict=True)}
        for name, row in wins.items()
    }
    keys = {id.lower(): f"key {id}" for id in problems}
    write_json(folder / "report.json", {"problems": keys, "verdicts": verdicts, "protocol": protocol, **more})
    return folder


def test_equal_problems_are_paired_and_others_are_not(tmp_path: Path) -> None:
    """Oracle: `paired_difference` and `unpaired` on outcomes by hand; an id with another text is another problem."""
    one = run(tmp_path / "one", {"untrained": "rwww", "round_1": "rrww"})
    two = run(tmp_path / "two", {"round_1": "wrrr"})
    part = run(tmp_path / "part", {"round_1": "rrw"}, "abX")
    other = run(tmp_path / "other", {"round_1": "rr"}, "AB")
    found = compared(read_results([one, two, part, other]), ())
    by_name = {row["second"]: row for row in found["differences"]}
    assert [row["first"] for row in found["differences"]] == ["one:round_1"] * 3
    expected = vars(paired_difference([True, True, False, False], [False, True, True, True]))
    assert expected.items() <= by_name["two:round_1"].items() and by_name["two:round_1"]["problems"] == "4 equal ones"
    expected = vars(paired_difference([True, True], [True, True]))
    assert expected.items() <= by_name["part:round_1"].items()
    assert by_name["part:round_1"]["problems"] == "2 in common of 4 and 3"
    expected = vars(unpaired([True, True, False, False], [True, True]))
    assert expected.items() <= by_name["other:round_1"].items() and not by_name["other:round_1"]["paired"]
    assert [row["right"] for row in found["rows"]] == [0.5, 0.75, 2 / 3, 1.0]
    mixed = compared(read_results([one, two]), ["untrained", "round_1"])["differences"]
    assert [(row["first"], row["second"]) for row in mixed] == [("one:untrained", "two:round_1")]


def test_graded_scores_are_compared_as_scores(tmp_path: Path) -> None:
    """Oracle: `paired_scores` on the scores by hand."""
    scores = [{"x": {"a": 0.5, "b": 0.25}}, {"x": {"a": 0.75, "b": 0.5}}]
    folders = [run(tmp_path / str(i), {"x": "ww"}, "ab", scores=row) for i, row in enumerate(scores)]
    (row,) = compared(read_results(folders), ())["differences"]
    assert vars(paired_scores([0.5, 0.25], [0.75, 0.5])).items() <= row.items() and row["measure"] == "score"
    assert "| 1:x - 0:x | score | +25.0 |" in table(compared(read_results(folders), ()))
    # Of two samples of different problems the shares are compared, whatever else the reports hold.
    other = run(tmp_path / "other", {"x": "rw"}, "AB", scores=scores[0])
    (row,) = compared(read_results([folders[0], other]), ())["differences"]
    assert (row["measure"], row["difference"]) == ("right", 0.5)


def test_protocols_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a table for each protocol, and a difference that is refused by name."""
    folders = [run(tmp_path / p, {"x": "rrww"}, protocol=p) for p in ("label_free", "oracle")]
    assert cli.main(["compare", *map(str, folders)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("Protocol label_free:") < printed.index("label_free:x |") < printed.index("Protocol oracle:")
    assert "| oracle:x - label_free:x | not compared: label_free and oracle are two protocols | | | | |" in printed


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: status 2 and one line that says what to do."""
    one, two = run(tmp_path / "one", {"a": "r"}, "a"), run(tmp_path / "two", {"b": "r"}, "a")
    odd = run(tmp_path / "odd", {"a": "r"}, "a", scores=[1])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text(json.dumps({"verdicts": {}, "protocol": "oracle"}))
    for given, said in (
        ([one, two], "no condition in common (one: a; two: b); choose with --condition"),
        ([one], "1 runs given; expected at least two"),
        ([one, tmp_path], "no such file; expected the report of a run"),
        ([one, tmp_path / "old"], "does not say which problems it is about; write it again: matryoshka report"),
        ([one, odd], "does not say which problems it is about"),
        ([one, two, "--condition", "a"], "two has no condition 'a'; choose from b"),
    ):
        assert cli.main(["compare", *map(str, given)]) == 2
        assert said in capsys.readouterr().err
    # Folders of one name are told apart by the folders above them, and a report.json may be named itself.
    again = run(tmp_path / "more" / "one", {"a": "w"}, "a")
    assert cli.main(["compare", str(one / "report.json"), str(again), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["differences"]
    assert (row["first"], row["second"]) == (f"{tmp_path.name}/one:a", "more/one:a")
