"""The report as one HTML file that needs nothing else: tables with their intervals drawn in, curves, every episode.

Text from models and users is escaped, or lies packed in a data block that the script unpacks into text nodes. A
content security policy allows the page's own style sheet and script, by hash, and no request at all, so even a slip
in the escaping would run nothing.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
from matryoshka.eval.script import SCRIPT
from matryoshka.eval.style import STYLE
from matryoshka.eval.summary import ReportInput, Table, metric_rows, unsolved

SHARE_SCALE, SHARE_TICKS = (0.0, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)


def render(data: ReportInput, tables: Sequence[Table]) -> str:
    """Return the whole report.html; `tables` are those of `summary.summarise(data)`."""
    policy = (
        f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [("results", "Results", _results(tables[0]))]
    if len(tables) > 1:
        sections.append(("groups", "By group", "".join(_results(table, heading=True) for table in tables[1:])))
    if data.metrics:
        sections.append(("metrics", "Metrics", _metrics(data)))
    sections.append(("unsolved", "Not solved", _unsolved(data)))
    if data.training:
        sections.append(("training", "Training", _training(data.training)))
    if facts := _facts(data):
        sections.append(("run", "The run", facts))
    sections.append(("episodes", "Episodes", _episodes(data, tables[0])))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(data.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            _header(data, tables[0]),
            "<nav>" + "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections) + "</nav>",
            *(f'<section id="{key}">\n<h2>{title}</h2>\n{body}\n</section>' for key, title, body in sections),
            "</main>",
            f'<script type="text/plain" id="data">{pack(data)}</script>',
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(data: ReportInput, table: Table) -> str:
    rows, differences = len(table.rows), len(table.differences)
    size = f"{table.n:,} held-out examples under {rows} condition{'s' * (rows != 1)}"
    compared = f", {differences} paired comparison{'s' * (differences != 1)}" if differences else ""
    command = f'<div class="command">{escape(data.command)}</div>' if data.command else ""
    return (
        f'<header><span class="protocol {table.protocol}">{table.protocol} protocol</span>\n'
        f"<h1>{escape(data.title)}</h1>\n"
        f'<p class="lede">{size}{compared}. In this protocol {escape(PROTOCOL_NOTES[table.protocol])}.</p>\n'
        f"{command}</header>"
    )


def _results(table: Table, heading: bool = False) -> str:
    """Return the table of conditions and, where there are comparisons, the table of differences."""
    cost = table.rows[0].calls is not None
    title = f"<h3>{escape(table.name)}</h3>" if heading else ""
    ticks = plots.axis(SHARE_SCALE, SHARE_TICKS, ["0", "25", "50", "75", "100%"])
    head = f'<th></th><th class="name">condition</th><th>accuracy</th><th>95% Wilson</th><th class="plot">{ticks}</th>'
    head += "<th>score</th>" * (table.rows[0].score is not None) + "<th>right</th><th>n</th><th>executable</th>"
    head += "<th>calls</th><th>tokens</th><th>seconds</th>" * cost
    body = []
    for number, row in enumerate(table.rows, start=1):
        drawn = plots.interval(
            row.accuracy.value,
            row.accuracy.low,
            row.accuracy.high,
            SHARE_SCALE,
            SHARE_TICKS,
            f"accuracy {share(row.accuracy.value)}, interval {bounds(row.accuracy)}",
        )
        cells = f'<td class="number">{number}</td><td class="name">{escape(row.label)}</td>'
        cells += f'<td><strong>{share(row.accuracy.value)}</strong></td><td class="soft">{bounds(row.accuracy)}</td>'
        cells += f'<td class="plot">{drawn}</td>'
        cells += "" if row.score is None else f"<td>{score(row.score)}</td>"
        cells += f'<td>{row.verdicts["right"]:,}</td><td class="soft">{table.n:,}</td>'
        ended = f"{row.verdicts['error']} raised an error, {row.verdicts['failed']} failed"
        cells += f'<td title="{ended}">{share(row.executable.value)}</td>'
        if cost:
            cells += f"<td>{row.calls:,}</td><td>{row.tokens:,}</td><td>{row.seconds:,.1f}</td>"
        body.append(f"<tr>{cells}</tr>")
    caption = f"Accuracy by condition, {table.protocol} protocol, n = {table.n:,}."
    if not heading:
        caption += " Executable: the share of episodes that ended in an answer; the others count as not right."
    return title + _table(caption, head, body) + (_differences(table, heading) if table.differences else "")


def _differences(table: Table, heading: bool) -> str:
    labels = {row.name: row.label for row in table.rows}
    pairs = [d.paired for d in table.differences]
    scale, ticks = plots.fitted_scale(min(p.low for p in pairs), max(p.high for p in pairs))
    axis = plots.axis(scale, ticks, [_minus(f"{100 * tick:+.0f}") if tick else "0" for tick in ticks])
    head = f'<th class="name">second minus first</th><th>points</th><th class="plot">{axis}</th>'
    head += "<th>gained</th><th>lost</th><th>n</th><th>exact McNemar p</th>"
    head += "".join(f"<th>{name}</th>" for name in SCORE_HEADS if table.differences[0].scores)
    body = []
    for d in table.differences:
        estimate, _, limits = _minus(points(d.paired)).partition(" ")
        drawn = plots.interval(
            d.paired.difference, d.paired.low, d.paired.high, scale, ticks, f"difference {points(d.paired)} points"
        )
        first, second = escape(labels[d.first]), escape(labels[d.second])
        body.append(
            f'<tr><td class="name">{second} <span class="soft">minus</span> {first}</td>'
            f'<td><strong>{estimate}</strong> <span class="soft">{limits}</span></td><td class="plot">{drawn}</td>'
            f'<td>{d.paired.gained:,}</td><td>{d.paired.lost:,}</td><td class="soft">{d.paired.n:,}</td>'
            f"<td>{escape(p_value(d.paired.p))}</td>"
            + "".join(f"<td>{escape(_minus(cell))}</td>" for cell in score_difference(d.scores))
            + "</tr>"
        )
    caption = f"Paired differences in percentage points, {table.protocol} protocol, n = {table.n:,}."
    if not heading:
        caption += " Gained: examples that only the second got right. Intervals: 95%, Newcombe's method 10; "
        caption += "p is not corrected for several comparisons."
    return _table(caption, head, body)


def _table(caption: str, head: str, body: Sequence[str]) -> str:
    rows = "\n".join(body)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _metrics(data: ReportInput) -> str:
    head = '<th class="name">metric</th>' + "".join(f"<th>{escape(c.label)}</th>" for c in data.conditions)
    body = []
    for name, *cells in metric_rows(data):
        body.append(
            f'<tr><td class="name">{escape(name)}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    return _table("The task's own metrics by condition, with 95% intervals.", head, body)


def _unsolved(data: ReportInput) -> str:
    """Return a list to open for each condition: the examples that it did not get right."""
    parts = []
    for condition in data.conditions:
        ids = unsolved(condition)
        summary = f"{escape(condition.label)}: {len(ids):,} of {len(condition.trajectories):,}"
        parts.append(f"<details><summary>{summary}</summary><p>{escape(', '.join(ids)) or 'none'}</p></details>")
    return "\n".join(parts)


def _training(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return small multiples: one line plot for every number that a stage's rows carry.

    Raises ValueError for a row without a numeric "step".
    """
    parts = []
    for stage, rows in training.items():
        for i, row in enumerate(rows):
            if not _is_number(row.get("step")):
                raise ValueError(
                    f"report: training stage {stage!r}, row {i}: step is {row.get('step')!r}; expected a number"
                )
        figures = []
        for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
            figures.append(_figure(name, [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]))
        parts.append(f'<h3>{escape(stage)}</h3><div class="curves">{"".join(figures)}</div>')
    return "".join(parts)


def _figure(name: str, series: Sequence[tuple[float, float]]) -> str:
    finite = [(step, value) for step, value in series if math.isfinite(value)]
    if not finite:
        return ""
    dropped = len(series) - len(finite)
    note = f" ({dropped} not finite, not drawn)" if dropped else ""
    steps, values = [step for step, _ in finite], [value for _, value in finite]
    last = plots.short(values[-1])
    drawn = plots.curve(steps, values, f"{name} over steps, last {last}")
    caption = f'<figcaption><b>{escape(name)}{note}</b><span class="soft">{last}</span></figcaption>'
    return f"<figure>{caption}{drawn}</figure>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _facts(data: ReportInput) -> str:
    lists = []
    for title, values in (
        ("Counts", data.counts),
        ("Hardware", data.hardware),
        ("Versions", data.versions),
        ("Configuration", data.config),
    ):
        if values:
            rows = (f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in flatten(values))
            lists.append(f"<h3>{title}</h3><dl>{''.join(rows)}</dl>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    return (f'<ul class="notes">{notes}</ul>' if notes else "") + "".join(lists)


def _episodes(data: ReportInput, table: Table) -> str:
    shown = [
        ("all", "every example"),
        ("right", "after: right"),
        ("wrong", "after: wrong"),
        ("unfinished", "after: error or failed"),
        ("changed", "changed"),
        ("gained", "gained"),
        ("lost", "lost"),
    ]
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in shown)
    return (
        f'<p class="lede">Every episode, {table.protocol} protocol. The numbers on the right are the conditions of the '
        'first table: <span class="right">\u25cf right</span>, <span class="wrong">\u25cb wrong</span>, '
        '<span class="error">\u00d7 error</span>, <span class="failed">\u2013 failed</span>.</p>'
        f'<div class="tools"><label>Show <select id="show">{options}</select></label>'
        '<label>before <select id="before"></select></label><label>after <select id="after"></select></label>'
        '<label>in <select id="group"><option value="">all groups</option></select></label>'
        '<input id="query" type="search" placeholder="Search all texts" aria-label="Search all texts">'
        '<span id="count" role="status"></span></div>'
        '<div class="legend"><span>example</span><span>question</span><span class="strip" id="strip"></span></div>'
        '<div id="list"></div><button class="more" id="more" type="button" hidden>Show more</button>'
        "<noscript><p>The episodes are shown by a script, and scripts are switched off.</p></noscript>"
    )


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
