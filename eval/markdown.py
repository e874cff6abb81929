"""The report as Markdown: the same tables as the page, for a terminal, a pull request or a paper's appendix.

It also formats the numbers of every report: shares in percent with one decimal, differences in percentage points.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matryoshka.core.records import Metric
from matryoshka.eval.statistics import Paired, PairedScores
from matryoshka.eval.summary import ReportInput, Table, metric_rows, unsolved

SCORE_HEADS = ["score [95% bootstrap]", "sign-flip p"]
PROTOCOL_NOTES = {
    "label-free": "a retry sees execution errors only; no gold answer is used",
    "oracle": "a retry also sees whether the answer was wrong; not comparable with label-free numbers",
}


def render(data: ReportInput, tables: Sequence[Table]) -> str:
    """Return the whole report.md."""
    parts = [f"# {_plain(data.title)}", f"```\n{data.command}\n```" if data.command else ""]
    protocol = tables[0].protocol
    parts.append(f"Protocol: **{protocol}** ({PROTOCOL_NOTES[protocol]}).")
    for table in tables:
        parts += [f"## {_plain(table.name)}", *_table(table)]
    if data.metrics:
        parts += [
            "## Metrics",
            "95% intervals.",
            _grid(["metric", *(c.name for c in data.conditions)], metric_rows(data)),
        ]
    lists = [(condition.name, unsolved(condition)) for condition in data.conditions]
    lines = [
        f"- `{_plain(name)}`, {len(ids)} of {tables[0].n}: {_plain(', '.join(ids)) or 'none'}" for name, ids in lists
    ]
    parts += ["## Not solved", "\n".join(lines)]
    if data.training:
        parts += ["## Training", _training(data.training)]
    for title, values in (
        ("Counts", data.counts),
        ("Configuration", data.config),
        ("Hardware", data.hardware),
        ("Versions", data.versions),
    ):
        if values:
            parts += [f"## {title}", "\n".join(f"- {_plain(k)}: {_plain(v)}" for k, v in flatten(values))]
    if data.notes:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in data.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(metric: Metric) -> str:
    """Return e.g. "62.4% [56.2, 68.2]"."""
    return f"{share(metric.value)} {bounds(metric)}"


def share(value: float) -> str:
    """Return e.g. "62.4%"."""
    return f"{100 * value:.1f}%"


def bounds(metric: Metric) -> str:
    """Return the interval of a share in percent, e.g. "[56.2, 68.2]"."""
    return f"[{100 * metric.low:.1f}, {100 * metric.high:.1f}]"


def points(paired: Paired) -> str:
    """Return a difference in percentage points, e.g. "+12.5 [+4.0, +20.6]"."""
    low, high = 100 * paired.low, 100 * paired.high
    return f"{100 * paired.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def score(metric: Metric) -> str:
    """Return a graded score with its interval, e.g. "0.624 [0.562, 0.683]"."""
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def score_difference(scores: PairedScores | None) -> list[str]:
    """Return the cells under SCORE_HEADS; none where there are no scores."""
    if scores is None:
        return []
    return [f"{scores.difference:+.3f} [{scores.low:+.3f}, {scores.high:+.3f}]", p_value(scores.p)]


def p_value(p: float) -> str:
    """Return p with three decimals, e.g. "0.070", with four below 0.001, or "<0.0001"."""
    if p < 1e-4:
        return "<0.0001"
    return f"{p:.3f}" if p >= 1e-3 else f"{p:.4f}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, value as JSON) for every leaf of nested mappings; text stays bare."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _table(table: Table) -> list[str]:
    cost, graded = table.rows[0].calls is not None, table.rows[0].score is not None
    head = ["condition", "accuracy [95% Wilson]", "right", "n", "executable", "error", "failed"]
    rows = []
    for row in table.rows:
        cells = [f"{row.label} (`{row.name}`)", percent(row.accuracy), f"{row.verdicts['right']}", f"{table.n}"]
        cells += [share(row.executable.value), f"{row.verdicts['error']}", f"{row.verdicts['failed']}"]
        if row.score is not None:
            cells.insert(1, score(row.score))
        if cost:
            cells += [f"{row.calls:,}", f"{row.tokens:,}", f"{row.seconds:,.1f}"]
        rows.append(cells)
    if graded:
        head.insert(1, "score [95% bootstrap]")
    parts = [
        f"{table.protocol} protocol, n = {table.n}.",
        _grid(head + ["calls", "tokens", "seconds"] * cost, rows),
    ]
    if table.differences:
        labels = {row.name: row.label for row in table.rows}
        parts.append(f"Paired differences in percentage points, {table.protocol} protocol, n = {table.n}.")
        parts.append(
            _grid(
                ["difference", "points [95% Newcombe]", "gained", "lost", "exact McNemar p"] + SCORE_HEADS * graded,
                [
                    [
                        f"{labels[d.second]} minus {labels[d.first]}",
                        points(d.paired),
                        f"{d.paired.gained}",
                        f"{d.paired.lost}",
                        p_value(d.paired.p),
                        *score_difference(d.scores),
                    ]
                    for d in table.differences
                ],
            )
        )
    return parts


def _training(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = []
    for stage, metrics in training.items():
        losses = [row["loss"] for row in metrics if "loss" in row]
        ends = [f"{losses[0]:.4g}", f"{losses[-1]:.4g}"] if losses else ["-", "-"]
        rows.append([stage, f"{len(metrics)}", *ends])
    return _grid(["stage", "rows", "first loss", "last loss"], rows)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(value: str) -> str:
    """Return `value` on one line, with what would break a table cell or start an HTML tag escaped."""
    return " ".join(value.split()).replace("\\", "\\\\").replace("<", "&lt;").replace("|", "\\|")
