"""The numbers of a report: conditions over the same examples, their tables and their paired comparisons.

Nothing is formatted here. The invariant: every number of one report comes from one protocol and one set of examples,
each answered exactly once by every condition. An episode counts as right only if its verdict is
"right": one that raised an error, or whose generator failed for good, stays in the denominator.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matryoshka.core.intervals import bootstrap_mean, wilson
from matryoshka.core.records import VERDICTS, Example, Metric, Trajectory
from matryoshka.eval.statistics import Paired, PairedScores, paired_difference, paired_scores

PROTOCOLS = {"label_free": "label-free", "oracle": "oracle"}


@dataclass(frozen=True)
class Condition:
    """One row of the table: one episode for each held-out example, and their cost.

    seconds: wall-clock; calls: black-box calls; tokens: tokens read and written.
    """

    name: str
    label: str
    trajectories: Sequence[Trajectory]
    seconds: float
    calls: int
    tokens: int


@dataclass(frozen=True)
class ReportInput:
    """Everything that a report is made of; the mappings hold what JSON can hold.

    groups: group name -> example ids; comparisons: pairs of condition names, second minus first; training: stage ->
    rows of its metrics.jsonl, each with "step"; counts: pairs, samples, skipped, cut by length, ...; metrics: condition
    name -> the task's own metrics, such as success by type, attempts, steps.
    """

    title: str
    command: str
    config: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    conditions: Sequence[Condition]
    examples: Sequence[Example]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    comparisons: Sequence[tuple[str, str]] = ()
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    counts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One condition in one table. executable: share of episodes with an answer; the cost only over all examples.

    score: the mean of the episodes' graded scores, on a task that has them.
    """

    name: str
    label: str
    accuracy: Metric
    executable: Metric
    verdicts: dict[str, int]
    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    score: Metric | None = None


@dataclass(frozen=True)
class Difference:
    """Second minus first condition, example by example, in right answers and, where there are any, in scores."""

    first: str
    second: str
    paired: Paired
    scores: PairedScores | None = None


@dataclass(frozen=True)
class Table:
    """All conditions over one set of n examples, under one protocol."""

    name: str
    protocol: str
    n: int
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]

    def label(self, name: str) -> str:
        """Return the label of the condition `name`."""
        return next(row.label for row in self.rows if row.name == name)


def summarise(data: ReportInput) -> tuple[Table, ...]:
    """Return the table over all examples and then one for each group.

    Raises ValueError for mixed or unknown protocols, conditions over other examples than `data.examples` (naming the
    ids), repeated names or ids, and groups or comparisons of examples or conditions that are not there.
    """
    verdicts, protocol = _check(data)
    everything = tuple(example.id for example in data.examples)
    tables = [_table("all examples", everything, data, verdicts, protocol, cost=True)]
    tables += [_table(name, ids, data, verdicts, protocol, cost=False) for name, ids in data.groups.items()]
    return tuple(tables)


def unsolved(condition: Condition) -> list[str]:
    """Return "id (verdict)" of every episode that was not right, in the order of the episodes."""
    episodes = ((t.example_id, t.info.verdict) for t in condition.trajectories)
    return [f"{example_id} ({verdict})" for example_id, verdict in episodes if verdict != "right"]


def metric_rows(data: ReportInput) -> list[list[str]]:
    """Return a row for each metric: its name and, for each condition, "0.62 [0.56, 0.68]", "" where it has none."""
    names = dict.fromkeys(name for metrics in data.metrics.values() for name in metrics)
    columns = [data.metrics.get(condition.name, {}) for condition in data.conditions]

    def cell(metric: Metric | None) -> str:
        return "" if metric is None else f"{metric.value:.3g} [{metric.low:.3g}, {metric.high:.3g}]"

    return [[name, *(cell(column.get(name)) for column in columns)] for name in names]


def _table(
    name: str,
    ids: Sequence[str],
    data: ReportInput,
    verdicts: Mapping[str, Mapping[str, str]],
    protocol: str,
    cost: bool,
) -> Table:
    rows = []
    graded = graded_scores(data.conditions)
    scores = {name: [row[example_id] for example_id in ids] for name, row in graded.items()}
    for condition in data.conditions:
        seen = [verdicts[condition.name][example_id] for example_id in ids]
        counts: dict[str, int] = {verdict: seen.count(verdict) for verdict in VERDICTS}
        rows.append(
            Row(
                condition.name,
                condition.label,
                wilson(counts["right"], len(ids)),
                wilson(counts["right"] + counts["wrong"], len(ids)),
                counts,
                condition.calls if cost else None,
                condition.tokens if cost else None,
                condition.seconds if cost else None,
                bootstrap_mean(scores[condition.name]) if scores else None,
            )
        )
    right = {c.name: [verdicts[c.name][example_id] == "right" for example_id in ids] for c in data.conditions}
    differences = tuple(
        Difference(
            first,
            second,
            paired_difference(right[first], right[second]),
            paired_scores(scores[first], scores[second]) if scores else None,
        )
        for first, second in data.comparisons
    )
    return Table(name, PROTOCOLS[protocol], len(ids), tuple(rows), differences)


def graded_scores(conditions: Sequence[Condition]) -> dict[str, dict[str, float]]:
    """Return condition name -> example id -> graded score; {} for a task whose episodes are only right or wrong.

    A failed episode without a score has 0, as it has reward 0, also where a whole condition failed.
    """
    episodes = [trajectory for condition in conditions for trajectory in condition.trajectories]
    missing = [t for t in episodes if t.info.score is None]
    if len(missing) == len(episodes) or any(t.info.verdict != "failed" for t in missing):
        return {}
    return {c.name: {t.example_id: t.info.score or 0.0 for t in c.trajectories} for c in conditions}


def _check(data: ReportInput) -> tuple[dict[str, dict[str, str]], str]:
    """Return condition name -> example id -> verdict, and the one protocol."""
    if not data.conditions or not data.examples:
        raise ValueError(
            f"report: got {len(data.conditions)} conditions and {len(data.examples)} examples; expected at least one "
            "of each"
        )
    _refuse_repeats("condition", (condition.name for condition in data.conditions))
    _refuse_repeats("example", (example.id for example in data.examples))
    for example in data.examples:
        if missing := [name for name in ("question", "answer") if name not in example.fields]:
            known = sorted(example.fields)
            raise ValueError(f"report: example {example.id!r} has no field {missing[0]!r}; got {known}")
    expected = {example.id for example in data.examples}
    verdicts = {condition.name: _verdicts(condition, expected) for condition in data.conditions}
    protocol = _protocol(data.conditions)
    for name, ids in data.groups.items():
        _refuse_repeats(f"group {name!r}: example", ids)
        if not ids or not expected.issuperset(ids):
            unknown = _listed(sorted(set(ids) - expected)) or "no id at all"
            raise ValueError(f"report: group {name!r} holds {unknown}; expected ids of the report's examples")
    for pair in data.comparisons:
        if unknown_names := [name for name in pair if name not in verdicts]:
            raise ValueError(
                f"report: comparison {pair} names condition {unknown_names[0]!r}; choose from {', '.join(verdicts)}"
            )
    return verdicts, protocol


def _verdicts(condition: Condition, expected: set[str]) -> dict[str, str]:
    where = f"report: condition {condition.name!r}"
    _refuse_repeats(f"condition {condition.name!r}: episode", (t.example_id for t in condition.trajectories))
    verdicts: dict[str, str] = {}
    for trajectory in condition.trajectories:
        verdicts[trajectory.example_id] = trajectory.info.verdict
    missing, foreign = sorted(expected - set(verdicts)), sorted(set(verdicts) - expected)
    if missing or foreign:
        parts = [f"is missing {_listed(missing)}"] * bool(missing) + [f"has also {_listed(foreign)}"] * bool(foreign)
        raise ValueError(
            f"{where} {' and '.join(parts)}; every condition of a report must answer the same examples, each once"
        )
    return verdicts


def _protocol(conditions: Sequence[Condition]) -> str:
    used: dict[str, str] = {}
    for condition in conditions:
        for trajectory in condition.trajectories:
            protocol = trajectory.info.protocol
            if protocol not in PROTOCOLS:
                raise ValueError(
                    f"report: condition {condition.name!r}, example {trajectory.example_id!r}: protocol is "
                    f"{protocol!r}; expected one of {tuple(PROTOCOLS)}"
                )
            used.setdefault(protocol, condition.name)
    if len(used) > 1:
        first, second = list(used.items())[:2]
        raise ValueError(
            f"report: protocols are mixed: condition {first[1]!r} has {first[0]!r} episodes and {second[1]!r} has "
            f"{second[0]!r} ones; their numbers do not compare: write one report for each protocol"
        )
    return next(iter(used))


def _refuse_repeats(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"report: {what} {name!r} occurs twice; expected each once")
        seen.add(name)


def _listed(ids: Sequence[str]) -> str:
    """Return the ids, at most twelve by name."""
    more = f" and {len(ids) - 12} more" if len(ids) > 12 else ""
    return ", ".join(repr(example_id) for example_id in ids[:12]) + more
