"""Interval estimates of shares. Metrics of text and paired tests live with the evaluation; this is what tasks need."""

import math

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
