"""Interval estimates: of shares in closed form, of any other statistic by the bootstrap. Paired tests are in eval."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from matryoshka.core.records import Metric

# Standard normal quantile of a two-sided 95% interval.
Z_95 = 1.959963984540054


def wilson(successes: int, n: int) -> Metric:
    """Return the share successes / n with its 95% Wilson score interval.

    Unlike the normal approximation it stays inside [0, 1] and has width at 0 and n successes.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: {successes} successes of {n}; expected 0 <= successes <= n and n >= 1")
    share = successes / n
    spread = Z_95 * Z_95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At the ends the interval reaches 0 or 1 exactly; rounding must not push it past the share itself.
    return Metric(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def bootstrap(n: int, statistic: Callable[[Any], float], resamples: int = 1000, seed: int = 0) -> Metric:
    """Return `statistic` over n observations with its 95% percentile bootstrap interval.

    statistic: gets an integer array of indices into the observations, which it may hold repeatedly.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979) 1-26.
    Raises ValueError unless n >= 1 and resamples >= 1.
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"bootstrap: {n} observations, {resamples} resamples; expected at least 1 of each")
    draws = np.random.default_rng(seed)
    values = [statistic(draws.integers(0, n, n)) for _ in range(resamples)]
    low, high = (float(bound) for bound in np.quantile(values, [0.025, 0.975]))
    value = float(statistic(np.arange(n)))
    return Metric(value, min(low, value), max(high, value), n)


def bootstrap_mean(values: Sequence[float]) -> Metric:
    """Return the mean of `values` with its bootstrap interval. Raises ValueError for none."""
    numbers = np.array(values, dtype=float)
    return bootstrap(len(numbers), lambda i: float(numbers[i].mean()))
