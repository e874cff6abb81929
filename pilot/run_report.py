"""The files in which a run reports its results: report.json, .md, .html, summary.json and transfer.json."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.config import load_toml
from matryoshka.core.files import read_jsonl, write_json
from matryoshka.core.json_input import read_json
from matryoshka.core.protocols import Task
from matryoshka.core.records import Example, Metric, Trajectory, to_json
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.eval.statistics import paired
from matryoshka.eval.summary import graded_scores
from matryoshka.lora.files import adapter_hash
from matryoshka.pilot.config import EMBEDDED_ADAPTER, RunConfig, rollout_settings
from matryoshka.pilot.context import Run, open_run
from matryoshka.pilot.episodes import NotRecordedError, policy_scheme, run_episodes
from matryoshka.pilot.evaluate import (
    HELD_OUT_SPLITS,
    evaluate,
    evaluate_with,
    plain_report,
    schemes,
    trained_rounds,
)
from matryoshka.pilot.folder import CONFIG
from matryoshka.pilot.stages import collect, is_trained, left_out, pairs_so_far

logger = logging.getLogger(__name__)

SPLIT_TITLES = {"test": "held-out problems", "held_out": "held-out families"}


def write_run_report(run: Run, conditions: Sequence[Condition], counts: dict[str, Any]) -> dict[str, Any]:
    """Write the report into the run's folder and return the summary. All ranks call this; the first one writes.

    counts: what became of the samples of each round, for the report.
    """
    last = controller_steps([condition.name for condition in conditions])[-1]
    validation = select_round(run)
    summary = summarise(run, conditions, last)
    if not run.world.is_first:
        return summary
    write_report(_report_input(run, conditions, counts, validation), run.folder)
    write_json(run.folder / "summary.json", summary)
    return summary


def report_again(folder: Path) -> dict[str, Any]:
    """Write the report of the run in `folder` again from its record alone, and return the summary.

    Conditions whose episodes are not all recorded are left out, with a warning. Raises FileNotFoundError where there is
    no run; ValueError where the untrained controller or a choice on validation problems is not recorded.
    """
    if (folder / "evaluation.json").is_file():
        what = "is an evaluation, not a run; the command that made it writes its report again and asks nothing twice"
        raise ValueError(f"{folder}: {what}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}; expected the folder of a run, such as runs/demo-0")
    config = replace(load_toml(RunConfig, folder / CONFIG), name=folder.name)
    with open_run(config, folder.parent, is_read=True) as run:
        conditions: list[Condition] = []
        for name, scheme in schemes(run).items():
            try:
                conditions += evaluate(run, {name: scheme})
            except NotRecordedError as err:
                logger.warning("%s; the report has no row of it", err)
        try:
            if "untrained" not in [condition.name for condition in conditions]:
                raise NotRecordedError("evaluate untrained: episodes are not recorded")
            return write_run_report(run, conditions, round_counts(run))
        except NotRecordedError as err:
            raise ValueError(f"{folder}: {err}; `matryoshka evaluate --config` runs them") from err


def round_counts(run: Run) -> dict[str, Any]:
    """Return what became of the samples of each trained round, as far as its episodes are all recorded."""
    trajectories: list[Trajectory] = []
    counts: dict[str, Any] = {}
    recorded = replace(run, is_read=True)
    for round in trained_rounds(run):
        try:
            trajectories += collect(recorded, round)
        except NotRecordedError as err:
            logger.warning("%s; the report has no counts from this round on", err)
            break
        counts[f"round_{round}"] = pairs_so_far(run, trajectories)[1].as_dict()
    return counts


def _report_input(
    run: Run, conditions: Sequence[Condition], counts: dict[str, Any], validation: dict[str, Any]
) -> ReportInput:
    plain = plain_report(run, f"Pilot {run.config.name}", conditions, HELD_OUT_SPLITS)
    groups = {split: [e.id for e in run.problems[split]] for split in HELD_OUT_SPLITS}
    stages = [path.parent for path in sorted(run.folder.glob("**/metrics.jsonl"))]
    by_split = {SPLIT_TITLES[split]: ids for split, ids in groups.items() if ids and groups["held_out"]}
    return replace(
        plain,
        groups=by_split | by_group(run.task, plain.examples),
        comparisons=_comparisons([condition.name for condition in conditions]),
        training={str(stage.relative_to(run.folder)): read_jsonl(stage / "metrics.jsonl") for stage in stages},
        notes=notes(run, validation),
        counts={
            **counts,
            "metrics": _values(plain.metrics),
            **plain.counts,
            "validation": validation,
            "seconds": run.seconds.as_dict(),
            **({} if run.account is None else {"generator": run.account.as_dict()}),
        },
    )


def _comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of conditions that are tested: each step of the controller against the next, and the last one.
    """
    steps = controller_steps(names)
    last = steps[-1]
    comparisons = [*zip(steps, steps[1:], strict=False)]
    more = [(first, last) for first in ("untrained", "star") if first in names and first != last]
    return comparisons + [pair for pair in more if pair not in comparisons]


def _values(metrics: Mapping[str, Mapping[str, Metric]]) -> dict[str, dict[str, float]]:
    """Return condition -> metric -> its value, rounded."""
    return {name: {key: round(metric.value, 4) for key, metric in row.items()} for name, row in metrics.items()}


def controller_steps(names: Sequence[str]) -> list[str]:
    """Return those of the conditions that are the controller's own steps, from untrained to the last round."""
    return [n for n in names if n in ("untrained", "warmup") or n.startswith("round_")]


def write_transfer(run: Run, generators: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the summary of every policy of `run` with each of other generators, and add them to transfer.json."""
    found, path = {}, run.folder / "transfer.json"
    known = read_json(path, "the summaries of earlier generators") if path.exists() else {}
    for name in generators:
        conditions = evaluate_with(run, name)
        found[name] = summarise(run, conditions, controller_steps([condition.name for condition in conditions])[-1])
        found[name] |= {"metrics": _values({c.name: run.task.score(c.trajectories) for c in conditions})}
        if run.world.is_first:
            write_json(path, {**known, **found})
    return found


def by_group(task: Task, examples: Sequence[Example]) -> dict[str, list[str]]:
    """Return the ids of examples by their kind of problem; {} on a task that has no kinds."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        if group := task.group(example):
            groups.setdefault(group, []).append(example.id)
    return groups


def select_round(run: Run) -> dict[str, Any]:
    """Return validation accuracies of warm-up and rounds, and the policy that they choose (the earlier on a tie)."""
    accuracies = {}
    first = "warmup" if is_trained(run, "warmup") else ""
    for stage in [first, *(f"round-{round}" for round in trained_rounds(run))]:
        name = stage or "untrained"
        scored = run.task.score(run_episodes(run, policy_scheme(run, stage), ["validation"], label=f"validate {name}"))
        accuracies[name] = to_json(scored[run.task.main_metric])
    return {"accuracy": accuracies, "chosen": max(accuracies, key=lambda stage: accuracies[stage]["value"])}


def summarise(run: Run, conditions: Sequence[Condition], last: str) -> dict[str, Any]:
    """Return the one-line summary over the `test` split: a mean for each condition, and paired tests of the last one.

    The means are accuracies with exact McNemar tests or, where every episode has a graded "score", scores with
    sign-flip tests. trained: the last condition; p: of it against the untrained one.
    """
    ids = [example.id for example in run.problems["test"]]
    rows = {condition.name: {t.example_id: t for t in condition.trajectories} for condition in conditions}
    scored = graded_scores(conditions)
    right = {name: [row[id].info.verdict == "right" for id in ids] for name, row in rows.items()}
    values = {name: [row[id] for id in ids] for name, row in scored.items()} if scored else right
    summary: dict[str, Any] = {"task": run.task.label, "examples": len(ids)}
    summary |= {name: round(sum(row) / len(row), 4) for name, row in values.items()}
    for first, key in (("untrained", "p_trained_vs_untrained"), ("warmup", "p_trained_vs_warmup")):
        if first in values:
            difference = paired(values[first], values[last])
            summary[key] = difference.p
            if first == "warmup":
                gain = (difference.difference, difference.low, difference.high)
                summary["gain_over_warmup"] = [round(x, 4) for x in gain]
    summary |= {"trained": summary[last], "p": summary["p_trained_vs_untrained"]}
    summary["seconds"] = round(sum(run.seconds.as_dict().values()), 1)
    summary["report"] = str(run.folder / "report.html")
    return summary


def notes(run: Run, validation: dict[str, Any]) -> list[str]:
    """Return the notes that a reader needs to judge the numbers."""
    drawn = rollout_settings(run.config, greedy=True).controller
    sampled = f"Guidance is sampled at temperature {drawn.temperature:g} and top-p {drawn.top_p:g}, and code is decoded"
    lines = [
        f"Chosen on {len(run.problems['validation'])} validation problems: {validation['chosen']}. The held-out "
        "problems were used for this report alone.",
        f"{sampled if drawn.temperature else 'Guidance and code are decoded'} greedily in evaluation.",
    ]
    if run.problems["held_out"]:
        counted = f"{len(run.problems['test'])} held-out problems and {len(run.problems['held_out'])} of other families"
        lines.append(f"The table of all examples is over {counted}; the summary's numbers are over the first alone.")
    if missing := left_out(run):
        counted = ", ".join(f"{n} {what}" for what, n in missing.items())
        lines.append(f"Left out of every condition alike, since they do not fit the controller's context: {counted}.")
    adapter = run.config.serve.adapter_folder
    if adapter is not None and adapter_hash(adapter) == adapter_hash(EMBEDDED_ADAPTER):
        lines.append(
            "The generator is SmolLM2-135M-Instruct with an adapter that was trained to translate steps into code, "
            "line by line. It is good with good steps and poor without them by construction: these numbers show that "
            "the loop trains a controller, not that the generator is a capable model."
        )
    if run.config.serve.scripted:
        lines.append(
            f"The generator is a script ({run.generator.name}) that takes guidance at its word, not a model: these "
            "numbers show that the loop trains a controller to write what such a reader can use, nothing more."
        )
    return lines
