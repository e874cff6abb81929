"""The one object that every benchmark gives, and its form as JSON: the last line of `matryoshka bench ... --json`.

A bench is a module of this package with `Config`, a frozen dataclass of its flags, and `run(config: Config) ->
BenchResult`; a line in `command.BENCHES` makes it a command. A row is one measured number under its name; what a row
was measured with (batch size, spread, peak memory, a note) stands beside it in `details`. Nothing that was not measured
has a value: such a row's value is None and its details say why.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matryoshka.pilot.environment import environment


@dataclass(frozen=True)
class Row:
    """One number: its name, value (None: not measured), unit and details."""

    name: str
    value: float | None
    unit: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(self.details.keys() & {"name", "value", "unit"}):
            raise ValueError(f"bench: row {self.name!r}: {taken[0]!r} is a field of its own, not a detail")


@dataclass(frozen=True)
class BenchResult:
    """The measurements of one run. ratio: ours against the best other row of the same run, above 1 is better, None
    where there was no other; target: what the ratio must reach, None where nothing was asked; packages: distributions,
    beside the run-time requirements, whose versions decide the numbers.
    """

    bench: str
    rows: Sequence[Row]
    ratio: float | None
    target: float | None = None
    packages: Sequence[str] = ()

    @property
    def holds(self) -> bool | None:
        """Whether the ratio reaches the target; None without a target or a ratio."""
        return None if self.ratio is None or self.target is None else self.ratio >= self.target

    def to_json(self) -> str:
        """Return the object on one line: bench, hardware, versions, commit, rows, ratio, target, holds.

        Raises ValueError, naming the row, for a value that is infinite or not a number: JSON has none.
        """
        for row in self.rows:
            if row.value is not None and not math.isfinite(row.value):
                raise ValueError(f"bench {self.bench}: row {row.name!r} has the value {row.value}; expected a number")
        hardware = environment()
        versions, commit = hardware.pop("versions"), hardware.pop("commit")
        rows = [{"name": row.name, "value": row.value, "unit": row.unit, **row.details} for row in self.rows]
        return json.dumps(
            {
                "bench": self.bench,
                "hardware": hardware,
                "versions": {**versions, **{name: _version(name) for name in self.packages}},
                "commit": commit,
                "rows": rows,
                "ratio": self.ratio,
                "target": self.target,
                "holds": self.holds,
            },
            allow_nan=False,
        )


def speed_up(ours: float, others: Sequence[float], higher_is_better: bool) -> float | None:
    """Return how many times better `ours` is than the best of `others`, None where there are none."""
    if not others:
        return None
    return ours / max(others) if higher_is_better else min(others) / ours


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
