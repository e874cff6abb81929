"""Graded scores: the sign-flip test against counting, the bootstrap against theory, and both in a report."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from matryoshka.core.intervals import bootstrap
from matryoshka.core.records import EpisodeInfo, Example, Sample, Trajectory, Turn
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.eval.statistics import FLIPS, paired, paired_difference, paired_scores


def test_sign_flips_are_counted_where_they_are_few() -> None:
    """Oracle: every assignment of signs counted in integers; equal scores say nothing either way."""
    draws = random.Random(0)
    for n in (1, 2, 5, 9):
        first = [draws.randint(0, 4) for _ in range(n)]
        second = [value + draws.choice((-2, -1, 0, 1, 3)) for value in first]
        differences = [b - a for a, b in zip(first, second, strict=True)]
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
                for signs in itertools.product((-1, 1), repeat=n)]  # fmt: skip
        found = paired_scores(first, second)
        assert found.p == sum(value >= abs(sum(differences)) for value in sums) / len(sums)
        assert found.n == n and found.difference == pytest.approx(sum(differences) / n)
    assert paired_scores([0.1, 0.7], [0.1, 0.7]).p == 1.0
    # 0.1 + 0.2 + 0.3 in another order is another float; all eight assignments of one size must count.
    assert paired_scores([0.0, 0.0, 0.0], [0.1, 0.2, 0.3]).p == 2 / 8


def test_outcomes_of_either_kind_are_paired_by_their_own_test() -> None:
    """Oracle: the two tests called by name; 1.0 and 0.0 are scores, true and false are not."""
    won, lost = [True, False, True], [False, False, True]
    assert paired(lost, won) == paired_difference(lost, won)
    assert paired([0.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == paired_scores([0.0, 0.0, 1.0], [1.0, 0.0, 1.0])


def test_sign_flips_are_drawn_where_they_are_many() -> None:
    """Oracle: for differences of one size the exact binomial p, within four standard errors; seeded; never 0."""
    second = [1.0] * 40 + [-1.0] * 20
    exact = 2 * sum(math.comb(60, k) for k in range(21)) / 2**60
    found = paired_scores([0.0] * 60, second)
    assert abs(found.p - exact) < 4 * math.sqrt(exact * (1 - exact) / FLIPS)
    assert found == paired_scores([0.0] * 60, second)
    assert paired_scores([0.0] * 60, [1.0] * 60).p == 1 / (FLIPS + 1)


def test_lists_that_do_not_pair_are_refused() -> None:
    """Oracle: the message names both lengths."""
    for first, second in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=f"got {len(first)} and {len(second)} scores"):
            paired_scores(first, second)


def test_the_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    """Oracle: mean +- 1.96 standard errors, within a tenth of the width, for 400 draws; value: the statistic itself."""
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(400, lambda i: float(values[i].mean()), resamples=4000)
    error = values.std() / math.sqrt(400)
    assert found.value == values.mean() and found.n == 400
    assert abs(found.low - (values.mean() - 1.96 * error)) < 0.4 * error
    assert abs(found.high - (values.mean() + 1.96 * error)) < 0.4 * error
    assert found == bootstrap(400, lambda i: float(values[i].mean()), resamples=4000)
    constant = bootstrap(5, lambda i: 2.0)
    assert (constant.low, constant.value, constant.high) == (2.0, 2.0, 2.0)
    for n, resamples in ((0, 10), (5, 0)):
        with pytest.raises(ValueError, match=f"bootstrap: {n} observations, {resamples} resamples"):
            bootstrap(n, lambda i: 0.0, resamples)


def report(folder: Path, scores: dict[str, list[float | None]]) -> tuple[str, str]:
    """Return report.md and report.html of conditions with the given graded scores."""
    examples = [Example(str(i), {"question": "q", "answer": "5"}) for i in range(3)]

    def episode(id: str, score: float | None) -> Trajectory:
        info = EpisodeInfo("wrong" if score != -1 else "failed", "label_free", "c", "g", calls=1)
        info = replace(info, score=None if score == -1 else score)
        return Trajectory("t", id, (Turn((), None, Sample("s")),), 0.0, info)

    conditions = [
        Condition(name, name, [episode(str(i), value) for i, value in enumerate(row)], 1.0, 3, 9)
        for name, row in scores.items()
    ]
    write_report(ReportInput("T", "", {}, {}, {}, conditions, examples, comparisons=[("a", "b")]), folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_a_report_shows_scores_where_every_episode_has_one(tmp_path: Path) -> None:
    """Oracle: means and the exact p of three differences of one sign, by hand: 2 of 8 assignments."""
    markdown, page = report(tmp_path, {"a": [0.5, 0.5, 0.5], "b": [0.75, 1.0, 0.5 + 1e-9]})
    assert "| condition | score [95% bootstrap] | accuracy" in markdown
    assert "| a (`a`) | 0.500 [0.500, 0.500] |" in markdown and "sign-flip p |" in markdown
    assert "| +0.250 [" in markdown and markdown.count("| 0.250 |") == 1
    assert "<th>score</th>" in page and "<td>0.500 [0.500, 0.500]</td>" in page and "<th>sign-flip p</th>" in page
    markdown, page = report(tmp_path, {"a": [0.5, 0.5, 0.5], "b": [0.75, None, 1.0]})
    assert "score" not in markdown and "<th>score" not in page
    markdown, page = report(tmp_path, {"a": [0.5, 0.5, 0.5], "b": [0.75, -1, 0.75]})  # -1: failed, without a score
    assert "| b (`b`) | 0.500 [" in markdown and "<th>score</th>" in page
    markdown, page = report(tmp_path, {"a": [0.5, 0.5, 0.5], "b": [-1, -1, -1]})  # a condition that failed whole
    assert "| b (`b`) | 0.000 [" in markdown and "| -0.500 [" in markdown
