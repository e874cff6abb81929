"""Writes a report: report.json for programs, report.md for a terminal, report.html to read every episode.

All three have the same numbers, from one protocol and one set of examples. `summary` checks that before anything is
written.

report.html needs nothing else. jinja2 fills `templates/report.html` with every value escaped; its style sheet and
script stand beside it and are put in by hash, so the page's content security policy allows them and nothing else. Plots
are inline SVG, drawn by `templates/plots.html` at the coordinates that this file computes. The episodes are packed into
one base64 string that the page unpacks: equal texts are stored once and the whole is deflated, so 1000 examples under 8
conditions stay within a few megabytes. Nothing is cut. Prompts are left out; they are in trajectories.jsonl.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from matryoshka.core.files import write_json, write_text
from matryoshka.core.records import VERDICTS, Trajectory, Turn, content_key, to_json
from matryoshka.eval import markdown
from matryoshka.eval.markdown import (
    PROTOCOL_NOTES,
    SCORE_HEADS,
    bounds,
    flatten,
    p_value,
    points,
    score,
    score_difference,
    share,
)
from matryoshka.eval.summary import Condition, ReportInput, Table, graded_scores, metric_rows, summarise, unsolved

__all__ = ["Condition", "ReportInput", "write_report"]
TEMPLATES = Path(__file__).with_name("templates")
WIDTH, PAD = 280, 14  # an interval cell, in pixels
CURVE_WIDTH, CURVE_HEIGHT = 250, 110
MAX_POINTS = 300

Scale = tuple[float, float]


def write_report(data: ReportInput, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`, each atomically.

    Raises ValueError as `summary.summarise` does, and for training rows without a step.
    """
    tables = summarise(data)
    html, text = render_html(data, tables), markdown.render(data, tables)
    write_json(folder / "report.json", _json(data, tables))
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html)


def _json(data: ReportInput, tables: tuple[Table, ...]) -> Any:
    verdicts = {c.name: {t.example_id: t.info.verdict for t in c.trajectories} for c in data.conditions}
    return _finite(
        {
            "title": data.title,
            "command": data.command,
            "protocol": tables[0].protocol,
            "tables": to_json(tables),
            "verdicts": verdicts,
            "scores": graded_scores(data.conditions),
            "problems": {e.id: content_key(e.fields["question"], e.fields["answer"]) for e in data.examples},
            "training": {stage: list(rows) for stage, rows in data.training.items()},
            "counts": data.counts,
            "metrics": to_json(data.metrics),
            "notes": list(data.notes),
            "config": data.config,
            "hardware": data.hardware,
            "versions": data.versions,
        }
    )


def _finite(value: Any) -> Any:
    """Return `value` with nan and the infinities as text: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


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


@dataclass(frozen=True)
class Figure:
    """One training curve. dropped: values that are not finite and not drawn. last: the last value, as text."""

    name: str
    plot: Curve
    dropped: int
    last: str


def render_html(data: ReportInput, tables: Sequence[Table]) -> str:
    """Return the whole report.html; `tables` are those of `summary.summarise(data)`.

    Raises ValueError for a training row without a numeric "step".
    """
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    groups = tables[1:]
    curves = {stage: _figures(stage, rows) for stage, rows in data.training.items()}
    kinds = {
        "Counts": data.counts,
        "Hardware": data.hardware,
        "Versions": data.versions,
        "Configuration": data.config,
    }
    facts = {title: flatten(values) for title, values in kinds.items() if values}
    sections = {
        "results": ("Results", True),
        "groups": ("By group", groups),
        "metrics": ("Metrics", data.metrics),
        "unsolved": ("Not solved", True),
        "training": ("Training", curves),
        "run": ("The run", data.notes or facts),
        "episodes": ("Episodes", True),
    }
    return (
        _environment()
        .get_template("report.html")
        .render(
            data=data,
            whole=tables[0],
            groups=groups,
            curves=curves,
            facts=facts,
            sections=[(key, title) for key, (title, content) in sections.items() if content],
            policy=policy,
            # Our own files and base64: the only values that are not escaped.
            style=Markup(style),
            script=Markup(script),
            episodes=Markup(pack(data)),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "protocol_notes": PROTOCOL_NOTES,
        "score_heads": SCORE_HEADS,
        "share_scale": (0.0, 1.0),
        "share_ticks": (0.0, 0.25, 0.5, 0.75, 1.0),
    }
    environment.filters |= {
        "bounds": bounds,
        "counted": _counted,
        "difference_axis": _difference_axis,
        "metric_rows": metric_rows,
        "minus": _minus,
        "number": lambda value: f"{value:,}",
        "p_value": p_value,
        "place": place,
        "points": points,
        "score": score,
        "score_difference": score_difference,
        "share": share,
        "unsolved": unsolved,
    }
    return environment


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _difference_axis(table: Table) -> tuple[Scale, Sequence[float], Sequence[str]]:
    """Return scale, ticks and their labels for a table's paired differences."""
    pairs = [difference.paired for difference in table.differences]
    scale, ticks = fitted_scale(min(p.low for p in pairs), max(p.high for p in pairs))
    return scale, ticks, [_minus(f"{100 * tick:+.0f}") if tick else "0" for tick in ticks]


def _figures(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure for every number that a stage's rows carry."""
    for i, row in enumerate(rows):
        if not _is_number(row.get("step")):
            raise ValueError(
                f"report: training stage {stage!r}, row {i}: step is {row.get('step')!r}; expected a number"
            )
    figures = []
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        series = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
        finite = [(step, value) for step, value in series if math.isfinite(value)]
        if finite:
            steps, values = [step for step, _ in finite], [value for _, value in finite]
            plot = curve(steps, values)
            figures.append(Figure(name, plot, len(series) - len(finite), short(values[-1])))
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def pack(data: ReportInput) -> str:
    """Return the episodes of checked `data` (see `summary.summarise`) as base64 of deflated JSON.

    The JSON is an object: conditions [[name, label], ...]; before, after: indices of the two conditions whose guidance
    is shown side by side at first; groups [name, ...]; verdicts [name, ...]; texts [...]; and episodes, in which every
    text is an index into `texts`: [id, question, gold, [group index, ...], [record, ...]] with one record a condition:
    [verdict index, prediction, error, [[guidance, cut, feedback, [[reply, cut, outcome], ...]], ...]]. cut is 1 where
    the token limit ended the text.
    """
    texts: dict[str, int] = {}

    def text(value: Any) -> int:
        return texts.setdefault("" if value is None else str(value), len(texts))

    def turn(item: Turn) -> list[Any]:
        calls = [[text(call.sample.text), _cut(call.sample.finish_reason), text(call.outcome)] for call in item.calls]
        return [text(item.action.text), _cut(item.action.finish_reason), text(item.feedback), calls]

    def record(trajectory: Trajectory) -> list[Any]:
        info = trajectory.info
        turns = [turn(item) for item in trajectory.turns]
        return [VERDICTS.index(info.verdict), text(info.prediction), text(info.error), turns]

    by_id = [{t.example_id: t for t in condition.trajectories} for condition in data.conditions]
    members = [frozenset(ids) for ids in data.groups.values()]
    episodes = [
        [
            text(example.id),
            text(example.fields["question"]),
            text(example.fields["answer"]),
            [i for i, ids in enumerate(members) if example.id in ids],
            [record(trajectories[example.id]) for trajectories in by_id],
        ]
        for example in data.examples
    ]
    before, after = _before_and_after(data)
    payload = {
        "conditions": [[condition.name, condition.label] for condition in data.conditions],
        "before": before,
        "after": after,
        "groups": list(data.groups),
        "verdicts": VERDICTS,
        "texts": list(texts),
        "episodes": episodes,
    }
    # ASCII JSON also carries lone surrogates, which UTF-8 cannot
    packed = zlib.compress(json.dumps(payload, ensure_ascii=True, separators=(",", ":")).encode("ascii"), 9)
    return base64.b64encode(packed).decode("ascii")


def _before_and_after(data: ReportInput) -> tuple[int, int]:
    """Return the conditions of the first comparison in which both gave guidance, else the first and the last that did.

    Rows after the trained controller are often controls (gold or wrong guidance), so a comparison says better what
    before and after are. Where fewer than two conditions gave guidance: the first and the last condition.
    """
    names = [c.name for c in data.conditions if any(turn.action.text for t in c.trajectories for turn in t.turns)]
    pairs = [pair for pair in data.comparisons if set(pair) <= set(names)]
    if len(names) < 2:
        return 0, len(data.conditions) - 1
    first, last = pairs[0] if pairs else (names[0], names[-1])
    order = [c.name for c in data.conditions]
    return order.index(first), order.index(last)


def _cut(finish_reason: str) -> int:
    return int(finish_reason == "length")
