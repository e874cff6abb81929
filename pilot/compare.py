"""Runs, evaluations and scores with one another: paired over the problems that are equal, protocols never mixed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.core.intervals import wilson
from matryoshka.core.json_input import read_json
from matryoshka.eval.statistics import Paired, PairedScores, Unpaired, paired, unpaired


@dataclass(frozen=True)
class Result:
    """One condition of one report. problems: id -> content key; won: id -> whether it was right; scores: id -> score,
    empty where answers are not graded.
    """

    run: str
    condition: str
    protocol: str
    problems: Mapping[str, str]
    won: Mapping[str, bool]
    scores: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.run}:{self.condition}"


def read_results(folders: Sequence[Path]) -> list[list[Result]]:
    """Return the conditions of each folder's report.json.

    Raises FileNotFoundError without one; ValueError for a report that does not say which problems it is about.
    """
    names = short_names([folder if folder.is_dir() else folder.parent for folder in folders])
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def compared(results: Sequence[Sequence[Result]], conditions: Sequence[str]) -> dict[str, Any]:
    """Return the shares of all chosen conditions, and the differences of the other runs' from the first run's.

    conditions: none for every name that the first run and another have in common; one name for all runs; or one for
    each run. Raises ValueError where nothing can be compared.
    """
    if len(results) < 2:
        raise ValueError(f"compare: {len(results)} runs given; expected at least two folders with a report.json")
    if len(conditions) not in (0, 1, len(results)):
        raise ValueError(f"compare: {len(conditions)} conditions for {len(results)} runs; give one for all or for each")
    first, *others = results
    pairs: list[tuple[Result, Result]] = []
    for place, other in enumerate(others, start=1):
        if conditions:
            pairs.append((_chosen(first, conditions[0]), _chosen(other, conditions[min(place, len(conditions) - 1)])))
        else:
            by_name = {result.condition: result for result in first}
            pairs += [(by_name[result.condition], result) for result in other if result.condition in by_name]
    if not pairs:
        listed = "; ".join(f"{run[0].run}: {', '.join(result.condition for result in run)}" for run in results)
        raise ValueError(f"compare: the runs have no condition in common ({listed}); choose with --condition")
    used = list({result.name: result for pair in pairs for result in pair}.values())
    return {
        "rows": [_row(result) for result in sorted(used, key=lambda result: result.protocol)],
        "differences": [_difference(*pair) for pair in pairs],
    }


def table(found: Mapping[str, Any]) -> str:
    """Return what `compared` found as Markdown: a table for each protocol, and the differences."""
    lines: list[str] = []
    for protocol in dict.fromkeys(row["protocol"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["protocol"] == protocol]
        lines += [f"Protocol {protocol}:", "", "| condition | right | 95% | n |", "|---|---|---|---|"]
        lines += [f"| {r['name']} | {r['right']:.3f} | [{r['low']:.3f}, {r['high']:.3f}] | {r['n']} |" for r in rows]
        lines.append("")
    lines += ["| second - first | of | points | 95% | p | problems |", "|---|---|---|---|---|---|"]
    for row in found["differences"]:
        what = f"| {row['second']} - {row['first']} |"
        if row["refused"]:
            lines.append(f"{what} {row['refused']} | | | | |")
            continue
        points = [f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high")]
        measured = f"{row['measure']} | {points[0]} | [{points[1]}, {points[2]}] | {row['p']:.2g}"
        lines.append(f"{what} {measured} | {row['problems']} |")
    return "\n".join(lines)


def _read(folder: Path, name: str) -> list[Result]:
    path = folder if folder.is_file() else folder / "report.json"
    report = read_json(path, "the report of a run, an evaluation or `score --out`")
    problems, verdicts, protocol = (report.get(key) for key in ("problems", "verdicts", "protocol"))
    scores = report.get("scores") or {}
    if (
        not (isinstance(problems, dict) and isinstance(verdicts, dict) and isinstance(protocol, str))
        or not all(isinstance(row, dict) for row in (scores, *verdicts.values()))
    ):
        what = "it does not say which problems it is about"
        raise ValueError(f"{path}: {what}; write it again: matryoshka report {folder}")
    return [
        Result(
            name, condition, protocol, problems,
            {id: verdict == "right" for id, verdict in row.items()}, scores.get(condition, {}),
        )
        for condition, row in verdicts.items()
    ]  # fmt: skip


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part or, where that tells two of them not apart, as many as do."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    different = len(set(parts))
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == different:
            break
    return names


def _chosen(run: Sequence[Result], condition: str) -> Result:
    for result in run:
        if result.condition == condition:
            return result
    there = ", ".join(result.condition for result in run)
    raise ValueError(f"compare: {run[0].run} has no condition {condition!r}; choose from {there}")


def _row(result: Result) -> dict[str, Any]:
    share = wilson(sum(result.won.values()), len(result.won))
    row = {"name": result.name, "protocol": result.protocol, "right": share.value, "low": share.low, "high": share.high}
    score = {"score": sum(result.scores.values()) / len(result.scores)} if result.scores else {}
    return {**row, **score, "n": share.n}


def _difference(first: Result, second: Result) -> dict[str, Any]:
    """Return second minus first: paired over equal problems, of two samples where no problem is equal."""
    row: dict[str, Any] = {"first": first.name, "second": second.name, "refused": ""}
    if first.protocol != second.protocol:
        return {**row, "refused": f"not compared: {first.protocol} and {second.protocol} are two protocols"}
    shared = [id for id, key in first.problems.items() if second.problems.get(id) == key]
    graded = bool(shared and first.scores and second.scores)
    found: Paired | PairedScores | Unpaired
    if not shared:
        found = unpaired(list(first.won.values()), list(second.won.values()))
        what = f"two samples, {len(first.won)} and {len(second.won)} problems, none in common"
    else:
        one, two = (run.scores if graded else run.won for run in (first, second))
        found = paired([one[id] for id in shared], [two[id] for id in shared])
        whole = len(shared) == len(first.won) == len(second.won)
        what = "equal ones" if whole else f"in common of {len(first.won)} and {len(second.won)}"
        what = f"{len(shared)} {what}"
    return {**row, **vars(found), "paired": bool(shared), "measure": "score" if graded else "right", "problems": what}
