"""Writes a report: report.json for programs, report.md for a terminal, report.html to read every episode.

All three have the same numbers, from one protocol and one set of examples. `summary` checks that before anything is
written.
"""

import math
from pathlib import Path
from typing import Any

from matryoshka.core.files import write_json, write_text
from matryoshka.core.records import content_key, to_json
from matryoshka.eval import markdown, page
from matryoshka.eval.summary import Condition, ReportInput, Table, graded_scores, summarise

__all__ = ["Condition", "ReportInput", "write_report"]


def write_report(data: ReportInput, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`, each atomically.

    Raises ValueError as `summary.summarise` does, and for training rows without a step.
    """
    tables = summarise(data)
    html, text = page.render(data, tables), markdown.render(data, tables)
    write_json(folder / "report.json", _json(data, tables))
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html)


def _json(data: ReportInput, tables: tuple[Table, ...]) -> Any:
    verdicts = {c.name: {t.example_id: t.info.verdict for t in c.trajectories} for c in data.conditions}
    graded = {c.name: graded_scores(c.trajectories) for c in data.conditions}
    return _finite(
        {
            "title": data.title,
            "command": data.command,
            "protocol": tables[0].protocol,
            "tables": to_json(tables),
            "verdicts": verdicts,
            "scores": graded if all(graded.values()) else {},
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
