"""Paired differences with two levels: the games on which two conditions are compared, and the seeds of the training.

Every seed trains its own controller and all seeds are tested on the same games, so outcomes form a table of seeds by
games, and neither S seeds x n games are S n independent examples nor are the seeds exact copies of each other. The
variance of the mean difference is taken apart as in a two-way layout with random seeds and random games. Games that are
not independent (the same game several times, or several games of one room) are first averaged within their cluster.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POWER, LEVEL = 0.8, 0.05
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class LevelledDifference:
    """Second minus first condition. seeds, clusters: how many of each; difference: its mean with the 95% interval
    [low, high]; p: two-sided; degrees: of freedom of the t distribution; by_seed: the difference of each seed.
    """

    seeds: int
    clusters: int
    difference: float
    low: float
    high: float
    p: float
    degrees: float
    by_seed: tuple[float, ...]


def levelled_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], clusters: Sequence[str] = ()
) -> LevelledDifference:
    """Return the mean score of `second` minus that of `first`, both with one row a seed and one column a game.

    A condition that does not depend on the seed repeats its row. clusters: of each game, () for games that are all
    independent. With d the table of differences (clusters as columns), the mean squares of its two-way layout are MS_c
    = S sum_j (d_.j - d_..)^2 / (C - 1)        clusters MS_s = C sum_i (d_i. - d_..)^2 / (S - 1)        seeds MS_e =
    sum_ij (d_ij - d_i. - d_.j + d_..)^2 / ((S - 1)(C - 1)) and the variance of the mean is (MS_c + MS_s - MS_e) / (S
    C). It is never taken below MS_c / (S C), which is its value without differences between seeds. The degrees of
    freedom are Satterthwaite's. One seed: the paired t interval over clusters, which says nothing about other seeds.
    Clusters of unequal size count by their size. Error: with three seeds and 60 games the interval covers 95 to 97% and
    at most 5.5% of true zeros are significant while the seeds' own differences deviate by up to 6 points
    (tests/benchmarks/test_levels.py, by simulation); at 10 points it covers 93% and 7% are significant, since three
    seeds tell too little of their own spread. Source: Searle, Casella and McCulloch, "Variance Components", 1992,
    sections 4.7 and 5.4; Miller, arXiv 2411.00640, for paired and clustered standard errors of evaluations.

    Raises ValueError for tables of different shapes, or with fewer than two clusters.
    """
    one, two = np.array(first, float), np.array(second, float)
    if one.ndim != 2 or one.shape != two.shape or (clusters and len(clusters) != one.shape[1]):
        raise ValueError(
            f"levelled_difference: got tables of shape {one.shape} and {two.shape} and {len(clusters)} clusters; "
            "expected one row a seed and one column a game in both, and one cluster a game or none"
        )
    difference = two - one
    if clusters:
        names = list(dict.fromkeys(clusters))
        member = np.array([[name == cluster for name in names] for cluster in clusters], float)
        # A column's weight is its cluster's share of the games, so that the mean stays the mean over games.
        difference = difference @ member * (len(names) / one.shape[1])
    seeds, count = difference.shape
    if count < 2:
        raise ValueError(f"levelled_difference: got {count} independent games; expected at least two")
    mean, by_seed, by_cluster = difference.mean(), difference.mean(1), difference.mean(0)
    of_clusters = seeds * float(((by_cluster - mean) ** 2).sum()) / (count - 1)
    variance, degrees = of_clusters, float(count - 1)
    if seeds > 1:
        of_seeds = count * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
        rest = difference - by_seed[:, None] - by_cluster[None] + mean
        of_rest = float((rest**2).sum()) / ((seeds - 1) * (count - 1))
        if of_seeds > of_rest:
            variance = of_clusters + of_seeds - of_rest
            parts = (of_clusters, count - 1), (of_seeds, seeds - 1), (of_rest, (seeds - 1) * (count - 1))
            degrees = variance**2 / sum(square**2 / free for square, free in parts)
    error = math.sqrt(variance / (seeds * count))
    reach = student_quantile(1 - LEVEL / 2, degrees) * error
    p = 2 * student_cdf(-abs(mean) / error, degrees) if error > 0 else float(mean == 0)
    return LevelledDifference(
        seeds, count, float(mean), float(mean - reach), float(mean + reach), float(p), degrees, tuple(by_seed.tolist())
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p values adjusted for all of them together: below 0.05 means significant at a family-wise 5%.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70: the k-th smallest of m is multiplied by m - k + 1,
    and never falls below the one before.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def smallest_difference(games: int, seeds: int, disagreement: float, shared: float, seed_deviation: float) -> float:
    """Return the smallest true difference that `games` and `seeds` find with 80% power at the 5% level.

    disagreement: the share of games whose outcomes differ between the conditions, which bounds the variance of a
    paired difference. shared: the part of that variance which all seeds have in common (1: every seed wins the same
    games). seed_deviation: standard deviation of the true difference between seeds. Source: Miller, arXiv 2411.00640,
    section 5.
    """
    variance = disagreement * (shared + (1 - shared) / seeds) / games + seed_deviation**2 / seeds
    degrees = float(games - 1)
    if seeds > 1 and seed_deviation > 0:
        of_seeds = seed_deviation**2 / seeds
        degrees = variance**2 / (of_seeds**2 / (seeds - 1) + (variance - of_seeds) ** 2 / (games - 1))
    reach = student_quantile(1 - LEVEL / 2, degrees) + student_quantile(POWER, degrees)
    return float(reach * math.sqrt(variance))


def student_cdf(t: float, degrees: float) -> float:
    """Return the distribution function of Student's t; degrees may be fractional, at least 1.

    With t = sqrt(degrees) tan(a) the density is cos(a)^(degrees - 1) up to its norm, which Gauss-Legendre quadrature
    integrates to within 1e-9 (held against scipy by tests/benchmarks/test_levels.py).
    """
    angle = math.atan(t / math.sqrt(degrees))
    norm = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    inner = float((_WEIGHTS * np.cos(angle / 2 * (_NODES + 1)) ** (degrees - 1)).sum())
    return min(1.0, max(0.0, 0.5 + norm * angle / 2 * inner))


def student_quantile(share: float, degrees: float) -> float:
    """Return the t below which `share` of Student's distribution lies, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < share else (low, middle)
    return (low + high) / 2
