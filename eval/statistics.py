"""Paired comparison of two conditions over the same examples: test, and difference with its interval.

The outcomes are right or wrong (exact McNemar test) or graded scores (sign-flip test). Two conditions answer the same
examples, so only the examples on which they disagree carry information; treating the two means as independent would
waste it. The interval is approximate: near 0.05 it and the p value may disagree. Neither corrects for the number
of comparisons made.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from matryoshka.core.intervals import bootstrap_mean, wilson
from matryoshka.core.records import Metric

EXACT_FLIPS = 14  # differences up to which every assignment of signs is counted
FLIPS = 10_000


@dataclass(frozen=True)
class Paired:
    """Second minus first condition over n examples.

    gained: examples that only the second got right; lost: only the first; difference: (gained - lost) / n, with its
    95% interval [low, high]; p: two-sided exact McNemar.
    """

    n: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact McNemar p value for b and c discordant pairs of either direction.

    Under the null each of the m = b + c discordant pairs falls either way with probability 1/2:
    p = min(1, 2 * sum_{i <= min(b, c)} C(m, i) / 2^m), summed in integers; no discordant pair gives 1.
    Source: McNemar, Psychometrika 12 (1947) 153-157; the binomial form is the sign test on the discordant pairs.

    Raises ValueError if a count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact: got {b} and {c} discordant pairs; expected counts of at least 0")
    pairs = b + c
    term = tail = 1
    for i in range(min(b, c)):
        term = term * (pairs - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << pairs))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Return the accuracy of `second` minus that of `first`, item i of both being the same example.

    Interval: Newcombe's method 10 ("square and add"). With p_k the accuracies, [l_k, u_k] their Wilson intervals and
    phi the correlation of the two outcomes,
        low  = d - sqrt((p2 - l2)^2 - 2 phi (p2 - l2) (u1 - p1) + (u1 - p1)^2)
        high = d + sqrt((u2 - p2)^2 - 2 phi (u2 - p2) (p1 - l1) + (p1 - l1)^2).
    Source: Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10; recommended among the closed forms by
    Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850-2875.

    Raises ValueError if the lengths differ or are 0.
    """
    n = len(first)
    if len(second) != n or n == 0:
        raise ValueError(
            f"paired_difference: got {n} and {len(second)} outcomes; expected as many of both, at least one, item i of "
            "both being the same example"
        )
    both = gained = lost = neither = 0
    for was, now in zip(first, second, strict=True):
        both += was and now
        gained += now and not was
        lost += was and not now
        neither += not was and not now
    one, two = wilson(both + lost, n), wilson(both + gained, n)
    phi = _correlation(both, lost, gained, neither)
    difference = (gained - lost) / n
    low, high = _newcombe(difference, one, two, phi)
    return Paired(n, gained, lost, difference, low, high, mcnemar_exact(gained, lost))


@dataclass(frozen=True)
class Unpaired:
    """Second minus first share of two samples of different examples, with its 95% interval; p: two-sided Fisher."""

    n_first: int
    n_second: int
    difference: float
    low: float
    high: float
    p: float


def unpaired(first: Sequence[bool], second: Sequence[bool]) -> Unpaired:
    """Return the share of `second` minus that of `first`, two samples of different examples.

    Interval: Newcombe's method 10 for independent proportions, which is that of `paired_difference` with phi = 0
    (Newcombe, Statistics in Medicine 17 (1998) 873-890). p: Fisher's exact test, the tables that are at most as likely
    as the observed one, in integers.

    Raises ValueError if a sample is empty.
    """
    n, m = len(first), len(second)
    if not n or not m:
        raise ValueError(f"unpaired: got {n} and {m} outcomes; expected at least one of both")
    one, two = wilson(sum(first), n), wilson(sum(second), m)
    right = sum(first) + sum(second)
    ways = [math.comb(n, k) * math.comb(m, right - k) for k in range(max(0, right - m), min(n, right) + 1)]
    observed = math.comb(n, sum(first)) * math.comb(m, sum(second))
    p = sum(w for w in ways if w <= observed) / sum(ways)
    difference = two.value - one.value
    low, high = _newcombe(difference, one, two, 0.0)
    return Unpaired(n, m, difference, low, high, p)


@dataclass(frozen=True)
class PairedScores:
    """Mean of second minus first over n examples, its 95% bootstrap interval, two-sided p of the sign-flip test."""

    n: int
    difference: float
    low: float
    high: float
    p: float


def paired_scores(first: Sequence[float], second: Sequence[float]) -> PairedScores:
    """Return the mean score of `second` minus that of `first`, item i of both being the same example.

    Under the null the sign of each difference is a coin's: p is the share of assignments of signs whose mean is at
    least as far from 0 as the observed one. All are counted where at most EXACT_FLIPS differences are not 0; otherwise
    FLIPS drawn ones and the observed one, so that p is at least 1 / (FLIPS + 1).
    Source: Fisher, "The Design of Experiments", 1935, section 21; Phipson and Smyth, Statistical Applications in
    Genetics and Molecular Biology 9 (2010) article 39, for the observed assignment being counted.

    Raises ValueError if the lengths differ or are 0.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"paired_scores: got {len(first)} and {len(second)} scores; expected as many of both, at least one, item i "
            "of both being the same example"
        )
    differences = np.array(second, float) - np.array(first, float)
    interval = bootstrap_mean(differences.tolist())
    moved = differences[differences != 0]
    observed = abs(moved.sum()) * (1 - 1e-12)  # sums of equal terms in another order may round apart
    if len(moved) <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(moved))))
        p = float((abs(signs @ moved) >= observed).mean())
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(FLIPS, len(moved)))
        p = float(((abs(signs @ moved) >= observed).sum() + 1) / (FLIPS + 1))
    return PairedScores(len(differences), interval.value, interval.low, interval.high, p)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | PairedScores:
    """Return `paired_difference` where all outcomes are true or false, else `paired_scores`."""
    solved = [won for won in (*first, *second) if isinstance(won, bool)]
    if len(solved) == len(first) + len(second):
        return paired_difference(solved[: len(first)], solved[len(first) :])
    return paired_scores(first, second)


def _correlation(a: int, b: int, c: int, d: int) -> float:
    """Return phi of the table [[a, b], [c, d]], a positive numerator shrunk by n/2 (at most to 0), as in method 10."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    numerator: float = a * d - b * c
    if numerator > 0:
        numerator = max(numerator - (a + b + c + d) / 2, 0.0)
    return numerator / math.sqrt(margins)


def _newcombe(difference: float, one: Metric, two: Metric, phi: float) -> tuple[float, float]:
    """Return the interval of `difference`, the second share less the first, by method 10 ("square and add")."""

    def add(x: float, y: float) -> float:
        # the form is >= (x - y)^2 >= 0 in exact arithmetic, but may round below 0
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = difference - add(two.value - two.low, one.high - one.value)
    high = difference + add(two.high - two.value, one.value - one.low)
    return max(-1.0, low), min(1.0, high)
