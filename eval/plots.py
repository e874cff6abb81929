"""Small plots as inline SVG: an interval in a table cell, its axis, a training curve. No library, no scripts.

Colours and fonts come from the page's style sheet through classes, so the plots follow its light and dark modes. They
draw and label what they are given; every text goes through `escape`.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, PAD = 280, 34, 14  # an interval cell, in pixels: the height of a table row, so that rules meet
CURVE_WIDTH, CURVE_HEIGHT = 250, 110
MAX_POINTS = 300

Scale = tuple[float, float]


def interval(value: float, low: float, high: float, scale: Scale, ticks: Sequence[float], label: str) -> str:
    """Return a table-cell plot: a dot at `value`, a line over [low, high], a faint rule at each tick.

    `label` is read aloud in the picture's stead.
    """
    x, x_low, x_high = (_place(v, scale) for v in (value, low, high))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(_rule(tick, scale) for tick in ticks)
        + f'<line class="range" x1="{x_low}" x2="{x_high}" y1="{HEIGHT / 2}" y2="{HEIGHT / 2}"/>'
        + f'<circle class="dot" cx="{x}" cy="{HEIGHT / 2}" r="4"/></svg>'
    )


def axis(scale: Scale, ticks: Sequence[float], labels: Sequence[str]) -> str:
    """Return the axis that belongs above a column of `interval` cells."""
    marks = "".join(
        f'<text x="{_place(tick, scale)}" y="11" text-anchor="middle">{escape(text)}</text>'
        for tick, text in zip(ticks, labels, strict=True)
    )
    return f'<svg width="{WIDTH}" height="16" aria-hidden="true">{marks}</svg>'


def fitted_scale(low: float, high: float) -> tuple[Scale, tuple[float, ...]]:
    """Return a scale that holds 0, `low` and `high` (within [-1, 1]), and its ticks: at most seven, at round values."""
    low, high = min(low, 0.0), max(high, 0.0)
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= 6:
            break
    last = max(last, first + 1)
    return (first * step, last * step), tuple(i * step for i in range(first, last + 1))


def curve(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """Return a line plot of finite `values` over `steps`; longer series than MAX_POINTS are averaged in equal runs.

    Raises ValueError if the lengths differ or nothing is given.
    """
    if len(steps) != len(values) or not values:
        raise ValueError(f"plots: got {len(steps)} steps and {len(values)} values; expected as many of both, some")
    run = math.ceil(len(values) / MAX_POINTS)
    xs, ys = _averaged(steps, run), _averaged(values, run)
    (left, right), (bottom, top) = _span(xs), _span(ys)
    edge, floor = 46.0, CURVE_HEIGHT - 18.0  # room for the labels of either axis

    def point(x: float, y: float) -> tuple[float, float]:
        across = edge + (x - left) / (right - left) * (CURVE_WIDTH - edge - 8)
        return round(across, 1), round(floor - (y - bottom) / (top - bottom) * (floor - 8), 1)

    points = [point(x, y) for x, y in zip(xs, ys, strict=True)]
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    parts = []
    for tick in (bottom, (bottom + top) / 2, top):
        y = point(left, tick)[1]
        parts.append(f'<line class="rule" x1="{edge:g}" x2="{CURVE_WIDTH - 8}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text x="{edge - 5:g}" y="{y + 3.5:g}" text-anchor="end">{short(tick)}</text>')
    for tick, anchor in ((xs[0], "start"), (xs[-1], "end")):
        x = point(tick, bottom)[0]
        parts.append(f'<text x="{x:g}" y="{CURVE_HEIGHT - 3}" text-anchor="{anchor}">{tick:,.6g}</text>')
    parts.append(f'<polyline class="line" points="{path}"/>')
    parts.append(f'<circle class="dot" cx="{points[-1][0]:g}" cy="{points[-1][1]:g}" r="3"/>')
    size = f'viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}"'
    return f'<svg class="curve" {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def short(value: float) -> str:
    """Return three significant digits and no needless exponent, e.g. "0.693", "52,000", "8.4e-06"."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def _place(value: float, scale: Scale) -> float:
    low, high = scale
    return round(PAD + (value - low) / (high - low) * (WIDTH - 2 * PAD), 1)


def _rule(tick: float, scale: Scale) -> str:
    x = _place(tick, scale)
    return f'<line class="{"rule zero" if tick == 0 else "rule"}" x1="{x}" x2="{x}" y1="0" y2="{HEIGHT}"/>'


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
