"""The report as one HTML file that needs nothing else: tables with their intervals drawn in, curves, every episode.

The page is `templates/report.html`, which jinja2 fills with every value escaped; its style sheet and script stand
beside it and are put in by hash, so that the page's content security policy allows them and nothing else.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from matryoshka.eval import plots
from matryoshka.eval.episodes import pack
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
from matryoshka.eval.plots import Curve, Scale
from matryoshka.eval.summary import ReportInput, Table, metric_rows, unsolved

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Figure:
    """One training curve. dropped: values that are not finite and not drawn. last: the last value, as text."""

    name: str
    plot: Curve
    dropped: int
    last: str


def render(data: ReportInput, tables: Sequence[Table]) -> str:
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
        "place": plots.place,
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
    scale, ticks = plots.fitted_scale(min(p.low for p in pairs), max(p.high for p in pairs))
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
            plot = plots.curve(steps, values)
            figures.append(Figure(name, plot, len(series) - len(finite), plots.short(values[-1])))
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
