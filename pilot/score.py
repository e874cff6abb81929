"""Predictions that were made elsewhere, by a task's own measure: read, joined with the problems, judged, reported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from matryoshka.core.config import check_least
from matryoshka.core.files import write_json
from matryoshka.core.json_input import parse_json, shown
from matryoshka.core.protocols import Task, TaskSetting
from matryoshka.core.records import EpisodeInfo, Example, Metric, Trajectory, from_json, to_json
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.pilot.compare import short_names
from matryoshka.pilot.config import SPLITS, TaskConfig
from matryoshka.pilot.environment import environment, typed_command, versions
from matryoshka.tasks.find import make_task

PREDICTIONS = ("prediction", "output", "gpt_response", "response")  # where --key is not given
QUESTIONS = ("question", "input")


@dataclass(frozen=True)
class ScoreCommand:
    """Score predictions made elsewhere: GSM8K answers, LaMP labels and headlines, ALFWorld transcripts."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of predictions, JSONL or one JSON list, or LaMP's own form of outputs; several are compared."""
    key: str = ""
    """Key of a row that holds the prediction; default: prediction, output, gpt_response or response."""
    id_key: str = ""
    """Key of a row that holds the problem's id; default: id, and otherwise problems are found by their question."""
    split: Literal["warmup", "train", "validation", "test", "held_out"] = "test"
    """Split of the task that the predictions are of."""
    count: int = 0
    """Problems of that split; 0 for as many as the longest file has rows."""
    missing: Literal["error", "wrong", "leave-out"] = "error"
    """The treatment of a problem that a file has no prediction for: an error, a wrong answer, or left out."""
    protocol: Literal["label_free", "oracle"] = "label_free"
    """The protocol under which the predictions were made; "oracle" where a retry saw the gold answer."""
    seed: int = 0
    """Seed of the problems, on tasks that make them."""
    out: str = ""
    """Folder for a report with every prediction, which `matryoshka compare` reads; none by default."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The task, whose options name its files."""


def score_files(command: ScoreCommand) -> list[dict[str, Any]]:
    """Return a row for each file: its name, how many predictions, and the task's metrics.

    Raises FileNotFoundError; ValueError for rows without a prediction, of no problem of the split, of one that has a
    prediction already, and for missing ones as `command.missing` says.
    """
    if not command.files:
        raise ValueError("score: give at least one file of predictions")
    check_least(command, "score: ", count=0)
    names = short_names([file.with_suffix("") for file in command.files])
    names = names if len(set(names)) == len(names) else short_names(command.files)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"score: {repeated[0]} is given twice; give each file of predictions once")
    read = {name: read_predictions(file) for name, file in zip(names, command.files, strict=True)}
    sizes = command.task.sizes
    count = command.count or max(map(len, read.values()))
    if command.split in ("test", "held_out"):
        sizes = dict.fromkeys(SPLITS, 0)
    sizes[command.split] = count
    task = make_task(command.task.name, command.task.options, TaskSetting(sizes, command.seed))
    examples = task.examples(command.split)
    conditions = [_condition(command, task, examples, name, rows) for name, rows in read.items()]
    metrics = {condition.name: task.score(condition.trajectories) for condition in conditions}
    judged = [len(condition.trajectories) for condition in conditions]
    if command.out:
        # A report compares conditions over the same problems, which are fewer where some are left out.
        common = set.intersection(*({t.example_id for t in c.trajectories} for c in conditions))
        examples = [example for example in examples if example.id in common]
        of_common = ([t for t in condition.trajectories if t.example_id in common] for condition in conditions)
        conditions = [replace(c, trajectories=rows) for c, rows in zip(conditions, of_common, strict=True)]
        _write(command, conditions, examples, {c.name: task.score(c.trajectories) for c in conditions})
    return [
        {"file": name, "predictions": len(read[name]), "problems": count, **_plain(metrics[name])}
        for name, count in zip(read, judged, strict=True)
    ]


def read_predictions(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, row) of each row of JSONL, of one JSON list, or of LaMP's {"task", "golds": [...]}.

    The rows of an evaluation's trajectories.jsonl are read as their episodes' predictions.

    Raises FileNotFoundError, and ValueError naming file and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected predictions as JSONL or one JSON list")
    data = path.read_bytes()
    try:
        value = parse_json(data, str(path))
    except ValueError:
        lines = [(f"{path}:{n}", line) for n, line in enumerate(data.splitlines(), start=1) if line.strip()]
        rows = [(where, parse_json(line, where)) for where, line in lines]
    else:
        value = value["golds"] if isinstance(value, dict) and isinstance(value.get("golds"), list) else value
        rows = [(f"{path}: item {n}", row) for n, row in enumerate(value if isinstance(value, list) else [value], 1)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with a prediction, got {type(row).__name__}")
    if not rows:
        raise ValueError(f"{path}: no predictions; expected JSONL or one JSON list")
    return [(where, _of_episode(where, row) if "trajectory" in row else row) for where, row in rows]


def _of_episode(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the prediction of a row of a trajectories.jsonl."""
    try:
        episode = from_json(Trajectory, row["trajectory"])
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err
    return {"id": episode.example_id, "prediction": episode.info.prediction}


Rows = Sequence[tuple[str, dict[str, Any]]]


def _condition(
    command: ScoreCommand, task: Task, examples: Sequence[Example], name: str, rows: Rows
) -> Condition:
    by_id = {example.id: example for example in examples}
    found: dict[str, Trajectory] = {}
    for where, row in rows:
        example = _example(command, by_id, where, row)
        if example.id in found:
            raise ValueError(f"{where}: problem {example.id!r} has a prediction already; expected one each")
        found[example.id] = _judged(command, task, example, name, where, _prediction(command, where, row))
    if (missing := [example for example in examples if example.id not in found]) and command.missing == "error":
        lack = f"{len(missing)} of {len(examples)} problems of {command.split} have no prediction"
        raise ValueError(
            f"{name}: {lack}, {missing[0].id!r} for one; "
            "--missing wrong counts them as wrong, --missing leave-out scores the others alone"
        )
    for example in missing if command.missing == "wrong" else ():
        found[example.id] = _judged(command, task, example, name, name, None)
    return Condition(name, name, [found[e.id] for e in examples if e.id in found], 0.0, 0, 0)


def _example(command: ScoreCommand, by_id: Mapping[str, Example], where: str, row: Mapping[str, Any]) -> Example:
    key = command.id_key or "id"
    if key in row:
        if (example := by_id.get(str(row[key]))) is not None:
            return example
        one = f"no problem of {command.split}, such as {next(iter(by_id))!r}"
        raise ValueError(f"{where}: {key} {shown(row[key])} is {one}")
    asked = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str)), None)
    if asked is None or command.id_key:
        raise ValueError(f"{where}: no key {key!r} and no question; its keys are {sorted(row)}; choose with --id-key")
    alike = [e for e in by_id.values() if e.fields["question"].strip() == asked.strip()]
    if len(alike) != 1:
        found = f"{len(alike)} problems of {command.split}"
        raise ValueError(f"{where}: {found} have the question {shown(asked)}; give ids")
    return alike[0]


def _prediction(command: ScoreCommand, where: str, row: Mapping[str, Any]) -> Any:
    for key in (command.key,) if command.key else PREDICTIONS:
        if key in row:
            return row[key]
    raise ValueError(f"{where}: no prediction; its keys are {sorted(row)}; choose one with --key")


def _judged(
    command: ScoreCommand, task: Task, example: Example, name: str, where: str, prediction: Any
) -> Trajectory:
    try:
        found = task.judge(example, prediction)
    except ValueError as err:
        raise ValueError(f"{where}: the prediction {shown(prediction)} cannot be read: {err}") from err
    info = EpisodeInfo(
        found.verdict, command.protocol, name, "elsewhere", attempts=1, prediction=found.prediction, score=found.score,
        measures=found.measures,
    )  # fmt: skip
    return Trajectory(task.name, example.id, (), found.reward, info)


def _write(
    command: ScoreCommand,
    conditions: Sequence[Condition],
    examples: Sequence[Example],
    metrics: Mapping[str, Mapping[str, Metric]],
) -> None:
    folder, machine = Path(command.out), environment()
    first, *others = [condition.name for condition in conditions]
    report = ReportInput(
        title=f"Scores of {', '.join(condition.name for condition in conditions)}",
        command=typed_command(),
        config={name: to_json(getattr(command, name)) for name in ("task", "split", "seed", "missing")},
        hardware={},
        versions=versions(machine),
        conditions=conditions,
        examples=examples,
        comparisons=[(first, other) for other in others],
        metrics=metrics,
        notes=["The predictions were made elsewhere; how they were made is not known here."],
    )
    write_report(report, folder)
    write_json(folder / "scores.json", {name: _plain(row) for name, row in metrics.items()})


def _plain(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: to_json(metric) for name, metric in metrics.items()}
