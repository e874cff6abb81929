"""Wilson interval: values by an independent route and its defining equation."""

import math

import pytest

from matryoshka.core.intervals import Z_95, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 7), (0, 20), (20, 20), (129, 134), (5000, 10000)])
def test_bounds_solve_the_score_equation(successes: int, n: int) -> None:
    """Oracle: the definition. A bound p satisfies |share - p| = z sqrt(p (1 - p) / n); 0 and 1 are always solutions of
    the ends. Tolerance: rounding of a few float64 operations."""
    metric = wilson(successes, n)
    assert metric.value == successes / n and metric.n == n
    for bound in (metric.low, metric.high):
        assert math.isclose(abs(metric.value - bound), Z_95 * math.sqrt(bound * (1 - bound) / n), abs_tol=1e-12)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_no_success_and_all_successes_by_hand() -> None:
    """Oracle: at 0 of n the upper bound is z^2 / (n + z^2), and at n of n the lower bound is n / (n + z^2)."""
    square = Z_95 * Z_95
    none, every = wilson(0, 10), wilson(10, 10)
    assert (none.value, none.low, every.value, every.high) == (0.0, 0.0, 1.0, 1.0)
    assert none.high == pytest.approx(square / (10 + square))
    assert every.low == pytest.approx(10 / (10 + square))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_errors(successes: int, n: int) -> None:
    """Oracle: by definition of a share."""
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)
