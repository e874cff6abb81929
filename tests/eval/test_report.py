"""The numbers and the refusals of a report: every expected value is counted by hand from conftest's verdicts."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.intervals import wilson
from matryoshka.core.records import Example, Metric, Trajectory, to_json
from matryoshka.eval.markdown import _grid, p_value
from matryoshka.eval.report import Condition, write_report
from matryoshka.eval.statistics import mcnemar_exact
from matryoshka.eval.summary import summarise


def test_the_tables_count_what_happened(make_input: Any) -> None:
    """Oracle: the verdicts of conftest, counted by hand; errors and failures stay in the denominator."""
    everything, group = summarise(make_input())
    assert (everything.protocol, everything.n, group.name, group.n) == ("label-free", 4, "held-out families", 2)
    none, untrained, trained = everything.rows
    assert none.verdicts == {"right": 1, "wrong": 2, "error": 1, "failed": 0}
    assert untrained.verdicts == {"right": 2, "wrong": 1, "error": 0, "failed": 1}
    assert (none.accuracy, none.executable) == (wilson(1, 4), wilson(3, 4))
    assert (trained.accuracy, trained.executable) == (wilson(3, 4), wilson(4, 4))
    assert (none.calls, none.tokens, none.seconds) == (5, 1234, 2.5)
    assert [row.accuracy.value for row in group.rows] == [0.0, 0.0, 1.0]
    assert group.rows[0].calls is None


def test_comparisons_are_second_minus_first(make_input: Any) -> None:
    """Oracle: by hand: none -> trained gains e1, e2, e3 and loses e0; in the group it gains both and loses none."""
    everything, group = summarise(make_input())
    paired = everything.differences[0].paired
    assert (paired.gained, paired.lost, paired.difference, paired.p) == (3, 1, 0.5, mcnemar_exact(3, 1))
    assert (group.differences[0].paired.gained, group.differences[0].paired.lost) == (2, 0)
    assert [(d.first, d.second) for d in everything.differences] == [("none", "trained"), ("untrained", "trained")]


def test_json_and_markdown_say_the_same(make_input: Any, tmp_path: Path) -> None:
    """Oracle: the summary itself; the Markdown names the protocol in front of each of its four tables of results."""
    data = make_input()
    write_report(data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    report = json.loads((tmp_path / "report.json").read_text())
    everything, group = summarise(data)
    assert report["protocol"] == "label-free"
    assert report["tables"][0]["rows"][2]["accuracy"]["low"] == everything.rows[2].accuracy.low
    assert report["tables"][1]["differences"][0]["paired"]["gained"] == 2
    assert report["verdicts"]["untrained"] == {"e0": "right", "e1": "right", "e2": "failed", "e3": "wrong"}
    assert report["training"] == data.training and report["config"] == data.config
    text = (tmp_path / "report.md").read_text()
    assert "| Trained (`trained`) | 75.0% [30.1, 95.4] | 3 | 4 | 100.0% | 0 | 0 | 5 | 1,234 | 2.5 |" in text
    paired = everything.differences[0].paired
    points = f"+50.0 [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
    assert f"| Trained minus None | {points} | 3 | 1 | 0.625 |" in text
    assert text.count("label-free protocol, n = ") == 4
    assert "| round 1 | 2 | 0.6931 | 0.5 |" in text and "- dpo.beta: 0.1" in text


def test_metrics_and_what_was_not_solved_are_listed(make_input: Any, tmp_path: Path) -> None:
    """Oracle: conftest's verdicts by eye, the metrics as given; a condition without one has an empty cell."""
    metrics = {"none": {"steps": Metric(4.25, 3.5, 5.0, 4)}, "trained": {"success a|b": wilson(3, 4)}}
    write_report(make_input(metrics=metrics), tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| steps | 4.25 [3.5, 5] |  |  |" in text and "| success a\\|b |  |  | 0.75 [0.301, 0.954] |" in text
    assert "- `none`, 3 of 4: e1 (wrong), e2 (error), e3 (wrong)\n" in text
    assert "- `untrained`, 2 of 4: e2 (failed), e3 (wrong)\n" in text and "- `trained`, 1 of 4: e0 (wrong)\n" in text
    assert '<td class="name">steps</td><td>4.25 [3.5, 5]</td><td></td><td></td>' in page
    assert "<summary>Untrained: 2 of 4</summary><p>e2 (failed), e3 (wrong)</p>" in page
    assert json.loads((tmp_path / "report.json").read_text())["metrics"] == to_json(metrics)


def test_the_same_input_gives_the_same_files(make_input: Any, tmp_path: Path) -> None:
    """Oracle: determinism: a report is a function of its input, byte for byte."""
    write_report(make_input(), tmp_path / "a")
    write_report(make_input(), tmp_path / "b")
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_numbers_that_json_lacks_become_text(make_input: Any, tmp_path: Path) -> None:
    """Oracle: RFC 8259 has no NaN: a strict parser must read report.json, and the page must still draw the rest."""
    rows = [{"step": 1, "loss": 0.5, "kl": math.inf}, {"step": 2, "loss": math.nan, "note": "spike"}]
    write_report(make_input(training={"round 1": rows}), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert [row["loss"] for row in report["training"]["round 1"]] == [0.5, "nan"]
    assert "loss (1 not finite, not drawn)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.000"), (0.0703, "0.070"), (0.00056, "0.0006"), (0.0001, "0.0001"), (0.00009, "<0.0001")]
)
def test_p_values_keep_their_leading_digits(p: float, text: str) -> None:
    """Oracle: by hand."""
    assert p_value(p) == text


def change(condition: Condition, index: int, **info: Any) -> Condition:
    """Return `condition` with entries of one episode's info replaced."""
    episodes = list(condition.trajectories)
    episodes[index] = replace(episodes[index], info=replace(episodes[index].info, **info))
    return replace(condition, trajectories=episodes)


def rename(condition: Condition, index: int, example_id: str) -> Condition:
    """Return `condition` with one episode moved to another example."""
    episodes: list[Trajectory] = list(condition.trajectories)
    episodes[index] = replace(episodes[index], example_id=example_id)
    return replace(condition, trajectories=episodes)


# Oracle: the contract: each input breaks one rule, and the message names the culprit. Nothing may be written.
@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda c: {"conditions": [c[0], change(c[1], 2, protocol="oracle")]}, "mixed: condition 'none'.*'untrained'"),
        (lambda c: {"conditions": [change(c[0], 1, protocol="closed")]}, "'none', example 'e1': protocol is 'closed'"),
        (lambda c: {"conditions": [replace(c[0], trajectories=c[0].trajectories[:2])]}, "missing 'e2', 'e3';"),
        (lambda c: {"conditions": [rename(c[0], 0, "x9")]}, "is missing 'e0' and has also 'x9'"),
        (lambda c: {"conditions": [rename(c[0], 0, "e1")]}, "episode 'e1' occurs twice"),
        (lambda c: {"conditions": [c[0], c[0]]}, "condition 'none' occurs twice"),
        (lambda c: {"conditions": []}, "0 conditions"),
        (lambda c: {"comparisons": [("none", "tuned")]}, "'tuned'; choose from none, untrained, trained"),
        (lambda c: {"groups": {"far": ["e1", "e7"]}}, "group 'far' holds 'e7'"),
        (lambda c: {"groups": {"empty": []}}, "group 'empty' holds no id at all"),
        (lambda c: {"groups": {"g": ["e1", "e1"]}}, "group 'g': example 'e1' occurs twice"),
        (lambda c: {"examples": [Example(f"e{i}", {"question": "?"}) for i in range(4)]}, "'e0' has no field 'answer'"),
        (lambda c: {"training": {"sft": [{"step": 1}, {"loss": 2.0}]}}, "'sft', row 1: step is None"),
    ],
)
def test_refusals_name_the_culprit(make_input: Any, tmp_path: Path, breakage: Any, message: str) -> None:
    """Oracle: each fault's message, by hand; no file is written."""
    fields = breakage(make_input().conditions)
    if "conditions" in fields:
        fields |= {"comparisons": []}
    with pytest.raises(ValueError, match=message):
        write_report(make_input(**fields), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_oracle_report_says_so_everywhere(make_input: Any, tmp_path: Path) -> None:
    """Oracle: the rule that the protocol stands in every table: two tables over all examples, two in the group."""
    oracle = [
        replace(c, trajectories=[replace(t, info=replace(t.info, protocol="oracle")) for t in c.trajectories])
        for c in make_input().conditions
    ]
    write_report(make_input(conditions=oracle), tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    captions = [part.partition("</caption>")[0] for part in page.split("<caption>")[1:]]
    assert len(captions) == 4 and all("oracle protocol" in caption for caption in captions)
    assert text.count("oracle protocol, n = ") == 4 and "label-free protocol" not in text + page


@pytest.mark.parametrize("hostile", ["a|b", r"a\|b", r"a\\|b", "a\nb", "\\"])
def test_a_cell_stays_one_cell(hostile: str) -> None:
    """Oracle: the rule of GitHub's tables by hand: a pipe after an even number of backslashes ends a cell."""
    *_, row = _grid(["x", "y"], [[hostile, "z"]]).splitlines()
    ends = re.findall(r"(?<!\\)(?:\\\\)*\|", row)
    assert len(ends) == 3 and row.endswith("| z |")
