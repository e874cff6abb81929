"""Differences over seeds and games: against scipy where there is one seed, by hand, and by simulation."""

import numpy as np
import pytest

from matryoshka.benchmarks.levels import (
    holm,
    levelled_difference,
    smallest_difference,
    student_cdf,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [1.0, 1.5, 2.0, 3.3, 10.0, 59.0, 5000.0])
def test_student_is_scipys(degrees: float) -> None:
    """Oracle: scipy's t distribution, an independent implementation, from the far tail to the middle."""
    stats = pytest.importorskip("scipy.stats")
    for t in (-50.0, -12.7, -3.0, -1.0, 0.0, 0.5, 2.0, 40.0):
        assert student_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-9)
    for share in (0.8, 0.975):
        assert student_quantile(share, degrees) == pytest.approx(stats.t.ppf(share, degrees), abs=1e-8)


def test_one_seed_is_the_paired_t_test() -> None:
    """Oracle: scipy's paired t test and its interval; clusters of one game each change nothing."""
    stats = pytest.importorskip("scipy.stats")
    draws = np.random.default_rng(1)
    first, second = draws.random(31).round(1), draws.random(31).round(1)
    test = stats.ttest_rel(second, first)
    interval = test.confidence_interval(0.95)
    for clusters in ((), [str(number) for number in range(31)]):
        found = levelled_difference([first.tolist()], [second.tolist()], clusters)
        assert (found.p, found.low, found.high) == pytest.approx((test.pvalue, interval.low, interval.high))
        assert found.degrees == 30 and found.by_seed == pytest.approx((found.difference,))


def test_two_seeds_by_hand() -> None:
    """Oracle: by hand. d = [[1, 0, 1], [1, 0, 0]]: mean 1/2, seeds 2/3 and 1/3, games 1, 0, 1/2.
    MS_c = 2 (1/4 + 1/4 + 0) / 2 = 1/2; MS_s = 3 (1/36 + 1/36) / 1 = 1/6; residuals +-1/6 (four) and +-1/3 (two), so
    MS_e = (4/36 + 2/9) / 2 = 1/6, which leaves nothing for the seeds: variance (1/2) / 6 with 2 degrees of freedom.
    """
    found = levelled_difference([[0, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 0, 0]])
    assert found.difference == pytest.approx(1 / 2) and found.by_seed == pytest.approx((2 / 3, 1 / 3))
    assert found.degrees == 2
    reach = student_quantile(0.975, 2) * (1 / 12) ** 0.5
    assert (found.low, found.high) == pytest.approx((1 / 2 - reach, 1 / 2 + reach))


def test_games_of_a_cluster_are_one_observation() -> None:
    """Oracle: copies of every game in a cluster of their own change neither the interval nor p; as games of their own
    they would narrow it. Clusters of unequal size leave the mean over games as it is.
    """
    first, second = [[0, 1, 0, 1, 0]], [[1, 1, 0, 1, 1]]
    alone = levelled_difference(first, second)
    names = [letter for letter in "abcde" for _ in range(3)]
    copied = levelled_difference(np.repeat(first, 3, 1).tolist(), np.repeat(second, 3, 1).tolist(), names)
    assert (copied.difference, copied.low, copied.high) == pytest.approx((alone.difference, alone.low, alone.high))
    free = levelled_difference(np.repeat(first, 3, 1).tolist(), np.repeat(second, 3, 1).tolist())
    assert free.high - free.low < 0.7 * (alone.high - alone.low)
    unequal = levelled_difference(first, second, ["a", "a", "a", "b", "c"])
    assert unequal.difference == pytest.approx(alone.difference) and unequal.clusters == 3


def test_what_is_no_table_is_refused() -> None:
    """Oracle: the message says the shapes that came."""
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        levelled_difference([[0, 1]], [[0, 1, 1]])
    with pytest.raises(ValueError, match="got 1 independent games"):
        levelled_difference([[0, 1]], [[0, 1]], ["a", "a"])


def test_holm_by_hand() -> None:
    """Oracle: Holm's procedure by hand: .01 x 4, .02 x 3, .03 x 2 and, never below the one before, .04 as .06."""
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.02}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06}
    )
    assert holm({"one": 0.7, "two": 0.9}) == {"one": 1.0, "two": 1.0}


def simulate(seeds: int, effect: float, seed_deviation: float, size: int, reps: int) -> tuple[float, float]:
    """Return coverage and the share of significant results over `reps` experiments with 60 games in clusters of `size`.

    Games differ in difficulty (deviation .1) and in their gain (.1; clusters of several games share .15 besides).
    """
    draws = np.random.default_rng(seeds * 1000 + size)
    cluster = np.arange(60) // size
    covered = significant = 0
    for _ in range(reps):
        easy = 0.4 + draws.normal(0, 0.1, 60)
        shared = draws.normal(0, 0.15, cluster[-1] + 1)[cluster] if size > 1 else 0.0
        gain = effect + draws.normal(0, 0.1, 60) + shared + draws.normal(0, seed_deviation, (seeds, 1))
        first = (draws.random((seeds, 60)) < easy).astype(float).tolist()
        second = (draws.random((seeds, 60)) < easy + gain).astype(float).tolist()
        found = levelled_difference(first, second, [str(name) for name in cluster] if size > 1 else ())
        covered += found.low <= effect <= found.high
        significant += found.p < 0.05
    return covered / reps, significant / reps


@pytest.mark.slow
@pytest.mark.parametrize("seeds, seed_deviation", [(1, 0.0), (3, 0.0), (3, 0.03), (3, 0.06), (5, 0.06)])
@pytest.mark.parametrize("size", [1, 3])
def test_coverage_and_false_positives(seeds: int, seed_deviation: float, size: int) -> None:
    """Oracle: simulation of the model. 3,000 experiments give .95 a standard error of .004, so the issue's bounds (93
    to 97%, at most 6%) are held with one of them to spare.
    """
    covered, significant = simulate(seeds, 0.0, seed_deviation, size, 3000)
    assert 0.93 <= covered <= 0.974 and significant <= 0.06


@pytest.mark.slow
def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    """Oracle: simulation with the variances that the formula is given: here .48 of the games disagree (.4 against .55
    won independently), nothing is shared between seeds but the games' own gains, and 1,500 experiments give .8 a
    standard error of .01. One seed; with three seeds the two-way interval is wider than the formula's known variance.
    """
    effect = smallest_difference(60, 1, 0.48, 1.0, 0.0)
    _, power = simulate(1, effect, 0.0, 1, 1500)
    assert 0.75 <= power <= 0.87
    assert smallest_difference(60, 3, 0.48, 0.3, 0.0) < effect < smallest_difference(60, 1, 0.48, 1.0, 0.1)
