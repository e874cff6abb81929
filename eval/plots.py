"""Computes the coordinates of the report's plots: an interval in a table cell and its axis, a training curve.

`templates/plots.html` draws them as inline SVG, without a library and without scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, PAD = 280, 14  # an interval cell, in pixels
CURVE_WIDTH, CURVE_HEIGHT = 250, 110
MAX_POINTS = 300

Scale = tuple[float, float]


def place(value: float, scale: Scale) -> float:
    """Return the horizontal place of `value` in an interval cell."""
    low, high = scale
    return round(PAD + (value - low) / (high - low) * (WIDTH - 2 * PAD), 1)


def fitted_scale(low: float, high: float) -> tuple[Scale, tuple[float, ...]]:
    """Return a scale that holds 0, `low` and `high` (within [-1, 1]), and its ticks: at most seven, at round values."""
    low, high = min(low, 0.0), max(high, 0.0)
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= 6:
            break
    last = max(last, first + 1)
    return (first * step, last * step), tuple(i * step for i in range(first, last + 1))


@dataclass(frozen=True)
class Curve:
    """A line plot. points: of the line. x_ticks: (x, text anchor, text); y_ticks: (y, text); left, right: the plot's.
    """

    points: Sequence[tuple[float, float]]
    x_ticks: Sequence[tuple[float, str, str]]
    y_ticks: Sequence[tuple[float, str]]
    left: float = 46.0  # room for the labels of the vertical axis
    right: float = CURVE_WIDTH - 8.0
    width: int = CURVE_WIDTH
    height: int = CURVE_HEIGHT

    @property
    def path(self) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


def curve(steps: Sequence[float], values: Sequence[float]) -> Curve:
    """Return a plot of finite `values` over `steps`; longer series than MAX_POINTS are averaged in equal runs.

    Raises ValueError if the lengths differ or nothing is given.
    """
    if len(steps) != len(values) or not values:
        raise ValueError(f"plots: got {len(steps)} steps and {len(values)} values; expected as many of both, some")
    run = math.ceil(len(values) / MAX_POINTS)
    xs, ys = _averaged(steps, run), _averaged(values, run)
    (first, last), (bottom, top) = _span(xs), _span(ys)
    floor = CURVE_HEIGHT - 18.0  # room for the labels of the horizontal axis

    def point(x: float, y: float) -> tuple[float, float]:
        across = Curve.left + (x - first) / (last - first) * (Curve.right - Curve.left)
        return round(across, 1), round(floor - (y - bottom) / (top - bottom) * (floor - 8), 1)

    return Curve(
        points=[point(x, y) for x, y in zip(xs, ys, strict=True)],
        x_ticks=[(point(x, bottom)[0], anchor, f"{x:,.6g}") for x, anchor in ((xs[0], "start"), (xs[-1], "end"))],
        y_ticks=[(point(first, y)[1], short(y)) for y in (bottom, (bottom + top) / 2, top)],
    )


def short(value: float) -> str:
    """Return three significant digits and no needless exponent, e.g. "0.693", "52,000", "8.4e-06"."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def _averaged(values: Sequence[float], run: int) -> list[float]:
    chunks = [values[i : i + run] for i in range(0, len(values), run)]
    return [math.fsum(chunk) / len(chunk) for chunk in chunks]


def _span(values: Sequence[float]) -> Scale:
    """Return the smallest and the largest value, widened where they are equal so that a flat line can be drawn."""
    low, high = min(values), max(values)
    if low == high:
        slack = abs(low) / 2 or 0.5
        return low - slack, high + slack
    return low, high
