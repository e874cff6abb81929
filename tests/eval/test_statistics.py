"""Paired statistics against published worked examples, complete enumeration and scipy."""

import itertools
import math
import random

import pytest

from matryoshka.eval.statistics import mcnemar_exact, paired_difference, unpaired


def outcomes(both: int, first_only: int, second_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Return the two outcome lists of a table of pairs."""
    first = [True] * both + [True] * first_only + [False] * second_only + [False] * neither
    second = [True] * both + [False] * first_only + [True] * second_only + [False] * neither
    return first, second


# Oracle: Armitage and Berry's culture media (12 against 2) and Bentur's airway data (1 against 7), as worked in the
# StatsDirect manual and in Fagerland et al., BMC Med. Res. Methodol. 13:91 (2013).
@pytest.mark.parametrize(("b", "c", "p"), [(12, 2, 0.0129), (1, 7, 0.0703)])
def test_mcnemar_reproduces_published_values(b: int, c: int, p: float) -> None:
    """Oracle: published p values; the test is symmetric."""
    assert round(mcnemar_exact(b, c), 4) == p
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


# Oracle: all 2^m ways in which m discordant pairs can fall, counted; two-sided by the symmetry of the null.
@pytest.mark.parametrize("pairs", range(12))
def test_mcnemar_equals_counting_every_way_the_pairs_can_fall(pairs: int) -> None:
    """Oracle: every way in which the pairs can fall, counted."""
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=pairs)]
    for b in range(pairs + 1):
        extreme = sum(abs(2 * k - pairs) >= abs(2 * b - pairs) for k in falls)
        assert mcnemar_exact(b, pairs - b) == pytest.approx(extreme / 2**pairs, abs=1e-15)


# Oracle: scipy's binomial test, an independent implementation, at sizes where 2^m overflows a float.
@pytest.mark.parametrize(("b", "c"), [(0, 40), (31, 52), (480, 520), (700, 900), (1000, 1000)])
def test_mcnemar_equals_scipy(b: int, c: int) -> None:
    """Oracle: scipy's exact binomial test."""
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


# Oracle: an exact test keeps its level: under the null, P(p <= alpha) <= alpha for every number of discordant pairs.
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_mcnemar_keeps_its_level(alpha: float) -> None:
    """Invariant: the exact probability of a rejection, summed over all outcomes, never exceeds the level."""
    for pairs in range(1, 40):
        rejected = sum(math.comb(pairs, b) for b in range(pairs + 1) if mcnemar_exact(b, pairs - b) <= alpha)
        assert rejected / 2**pairs <= alpha


def test_mcnemar_refuses_negative_counts() -> None:
    """Oracle: the contract, counts of at least 0."""
    with pytest.raises(ValueError, match="-1"):
        mcnemar_exact(3, -1)


# Oracle: published intervals by Newcombe's method 10 for (both, first only, second only, neither), first minus second:
# Newcombe 1998 (culture media), Fagerland et al. 2014 (airways), Tang et al. 2010, Chang et al. 2024.
@pytest.mark.parametrize(
    ("table", "low", "high", "digits"),
    [
        ((20, 12, 2, 16), 0.0562, 0.3292, 4),
        ((1, 1, 7, 12), -0.507, -0.026, 3),
        ((8, 3, 1, 2), -0.1574, 0.4136, 4),
        ((7, 25, 2, 68), 0.133, 0.318, 3),
    ],
)
def test_interval_reproduces_published_values(
    table: tuple[int, int, int, int], low: float, high: float, digits: int
) -> None:
    """Oracle: published intervals; the counts and the p value are by hand."""
    first, second = outcomes(*table)
    paired = paired_difference(second, first)  # the publications subtract the second from the first
    assert (round(paired.low, digits), round(paired.high, digits)) == (low, high)
    assert (paired.gained, paired.lost, paired.n) == (table[1], table[2], sum(table))
    assert paired.difference == pytest.approx((table[1] - table[2]) / sum(table))
    assert paired.p == mcnemar_exact(table[1], table[2])


# Oracle: exact coverage, summed over all 1771 tables of 20 pairs with their multinomial probabilities. Newcombe reports
# a mean near 0.95 and dips that stay above 0.9 for method 10.
def test_interval_covers_the_true_difference() -> None:
    """Oracle: the exact coverage, summed over all tables of 20 pairs."""
    n = 20
    tables = [t for t in itertools.product(range(n + 1), repeat=3) if sum(t) <= n]
    intervals = {}
    for a, b, c in tables:
        paired = paired_difference(*outcomes(a, b, c, n - a - b - c))
        intervals[a, b, c] = (
            paired.low,
            paired.high,
            math.factorial(n) // math.prod(math.factorial(k) for k in (a, b, c, n - a - b - c)),
        )
    rng = random.Random(0)
    coverages = []
    for _ in range(40):
        weights = [rng.expovariate(1.0) for _ in range(4)]
        p = [w / sum(weights) for w in weights]
        powers = [[q**k for k in range(n + 1)] for q in p]
        truth = p[2] - p[1]
        coverages.append(
            sum(
                ways * powers[0][a] * powers[1][b] * powers[2][c] * powers[3][n - a - b - c]
                for (a, b, c), (low, high, ways) in intervals.items()
                if low <= truth <= high
            )
        )
    assert min(coverages) > 0.9
    assert 0.94 < sum(coverages) / len(coverages) < 0.98


def test_swapping_the_conditions_mirrors_the_interval() -> None:
    """Oracle: symmetry of the definition; the order of the examples must not matter either."""
    rng = random.Random(1)
    for _ in range(200):
        n = rng.randrange(1, 40)
        first = [rng.random() < 0.6 for _ in range(n)]
        second = [rng.random() < 0.7 for _ in range(n)]
        there, back = paired_difference(first, second), paired_difference(second, first)
        assert (back.low, back.high, back.difference) == pytest.approx((-there.high, -there.low, -there.difference))
        assert (back.gained, back.lost, back.p) == (there.lost, there.gained, there.p)
        assert -1 <= there.low <= there.difference <= there.high <= 1
        order = rng.sample(range(n), n)
        assert paired_difference([first[i] for i in order], [second[i] for i in order]) == there


@pytest.mark.parametrize("right", [True, False])
def test_identical_outcomes_still_leave_uncertainty(right: bool) -> None:
    """Oracle: no discordant pair means difference 0 and p 1, but n examples cannot rule out every difference."""
    paired = paired_difference([right] * 25, [right] * 25)
    assert (paired.difference, paired.p) == (0.0, 1.0)
    assert -0.2 < paired.low < 0 < paired.high < 0.2


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_paired_difference_refuses_what_is_not_paired(first: list[bool], second: list[bool]) -> None:
    """Oracle: the contract, equal lengths of at least 1; the message gives both lengths."""
    with pytest.raises(ValueError, match=f"{len(first)} and {len(second)}"):
        paired_difference(first, second)


@pytest.mark.parametrize(
    ("a", "n", "b", "m"), [(3, 10, 9, 12), (0, 5, 5, 5), (7, 20, 7, 20), (1, 1, 0, 1), (40, 90, 61, 100)]
)
def test_two_samples_of_different_problems(a: int, n: int, b: int, m: int) -> None:
    """Oracles: scipy's Fisher test; the interval swaps its ends with the samples; Newcombe's worked example below."""
    first, second = [True] * a + [False] * (n - a), [True] * b + [False] * (m - b)
    stats = pytest.importorskip("scipy.stats")
    found, mirrored = unpaired(first, second), unpaired(second, first)
    assert found.p == pytest.approx(stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low))
    assert found.low <= found.difference <= found.high and found.difference == pytest.approx(b / m - a / n)


def test_two_samples_reproduce_newcombe() -> None:
    """Oracle: 56/70 - 48/80, method 10 of table II of the 1998 paper: 0.0524 to 0.3339."""
    found = unpaired([True] * 48 + [False] * 32, [True] * 56 + [False] * 14)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    with pytest.raises(ValueError, match="got 0 and 1 outcomes"):
        unpaired([], [True])
