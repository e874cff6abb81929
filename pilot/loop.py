"""The main job: warm-up, then rounds of collect -> pair -> train, evaluation of every policy, the report.

This is the one place that strings the stages together; each stage is a method of `pilot/context.py` and finds by itself
what is done. Choices (learning rate, round) are made on validation problems; the held-out ones are only reported.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.files import read_jsonl, write_json
from matryoshka.core.protocols import Controller
from matryoshka.core.records import Example, Trajectory, stable_seed, to_json
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance, ScriptedGuidance
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.eval.statistics import Paired, PairedScores, paired_difference, paired_scores
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Run, open_run
from matryoshka.pilot.doctor import environment
from matryoshka.pilot.episodes import Scheme

HELD_OUT_SPLITS = ("test", "held_out")
BASELINES = {
    "rag_1": "one retrieved entry (RAG)",
    "rag_4": "four retrieved entries (RAG)",
    "other_4": "four entries of another user",
}


def pilot(config: RunConfig, root: Path = Path("runs"), world: World = ALONE) -> dict[str, Any]:
    """Run or continue the pilot in `root/<name>` and return its summary: accuracies, p values, the report's path.

    world: the ranks that share its episodes and its training.
    """
    with open_run(config, root, world=world) as run:
        run.warmup()
        trajectories: list[Trajectory] = []
        counts: dict[str, Any] = {}
        for round in range(1, config.rounds + 1):
            trajectories += run.collect(round)
            counts[f"round_{round}"] = run.train_round(round, trajectories).as_dict()
            if round == 1 and config.star:
                run.star(trajectories)
        conditions = evaluate(run)
        return report(run, conditions, counts)


def schemes(run: Run) -> dict[str, tuple[str, Scheme]]:
    """Return the conditions of the report: name -> (label, scheme), from no guidance to the last round."""
    config, examples = run.config, [e for split in HELD_OUT_SPLITS for e in run.task.examples(split)]
    one_plan = replace(run.settings(greedy=True), outer_turns=1)  # fixed guidance has no second plan
    found = {"no_guidance": ("no guidance", Scheme("no-guidance", _fixed(NoGuidance()), one_plan))}
    gold = [guidance for example in examples if (guidance := run.task.gold_guidance(example)) is not None]
    if len(gold) == len(examples):
        tables = [("gold_guidance", "gold guidance", gold)]
        if len(set(gold)) > 1:  # a single problem has no other's
            other = wrong_guidance(gold, config.seed)
            tables = [("wrong_guidance", "wrong guidance (another problem's)", other), *tables]
        for name, label, table in tables:
            prompts = [run.task.first_prompt(example) for example in examples]
            controller = ScriptedGuidance(f"{name}-{config.seed}", dict(zip(prompts, table, strict=True)))
            found[name] = (label, Scheme(name, _fixed(controller), one_plan))
    if config.warmup.source == "generator" or config.task.name == "lamp":
        own = Scheme("own-guidance", lambda _: GeneratorGuidance(run.generator), one_plan)
        found["own_guidance"] = ("the generator's own guidance", own)
    for name in examples[0].fields.get("baselines", {}):  # guidance that the task itself knows without a controller
        known = {run.task.first_prompt(example): example.fields["baselines"][name] for example in examples}
        fixed = _fixed(ScriptedGuidance(f"{name}-{config.seed}", known))
        found[name] = (BASELINES[name], Scheme(name, fixed, one_plan))
    found["untrained"] = ("untrained controller", run.policy(""))
    if run.is_trained("warmup"):
        found["warmup"] = ("after warm-up (SFT)", run.policy("warmup"))
    for round in _rounds(run):
        found[f"round_{round}"] = (f"after round {round}", run.policy(f"round-{round}"))
    if run.is_trained("star"):
        found["star"] = ("STaR control (SFT on round 1's wins)", run.policy("star"))
    return found


def _rounds(run: Run) -> list[int]:
    return [round for round in range(1, run.config.rounds + 1) if run.is_trained(f"round-{round}")]


def evaluate(run: Run, what: str = "evaluate") -> list[Condition]:
    """Return every condition over the held-out problems, one greedy episode each; `what` names the time it takes."""
    conditions = []
    for name, (label, scheme) in schemes(run).items():
        stage = f"{what} {name}"
        episodes = run.episodes(scheme, HELD_OUT_SPLITS, label=stage)
        calls = sum(t.info["calls"] for t in episodes)
        usage = [turn.action.usage for t in episodes for turn in t.turns]
        tokens = sum(u.prompt_tokens + u.completion_tokens for u in usage)
        tokens += sum(t.info["prompt_tokens"] + t.info["completion_tokens"] for t in episodes)
        conditions.append(Condition(name, label, episodes, run.seconds()[stage], calls, tokens))
    return conditions


def report(run: Run, conditions: Sequence[Condition], counts: dict[str, Any]) -> dict[str, Any]:
    """Write report.json, .md, .html into the run's folder and return the summary. All ranks call it, the first writes.
    """
    names = [condition.name for condition in conditions]
    ladder = steps(names)
    comparisons = [*zip(ladder, ladder[1:], strict=False)]
    last = ladder[-1]
    more = [(first, last) for first in ("untrained", "star") if first in names and first != last]
    comparisons += [pair for pair in more if pair not in comparisons]
    validation = select_round(run)
    summary = summarise(run, conditions, last)
    if not run.world.is_first:
        return summary
    examples = [e for split in HELD_OUT_SPLITS for e in run.task.examples(split)]
    groups = {split: [e.id for e in run.task.examples(split)] for split in HELD_OUT_SPLITS}
    labels = {"test": "held-out problems", "held_out": "families held out whole"}
    machine = environment()
    stages = [path.parent for path in sorted(run.folder.glob("**/metrics.jsonl"))]
    data = ReportInput(
        title=f"Pilot {run.config.name}",
        command=" ".join(["matryoshka", *sys.argv[1:]]),
        config=to_json(run.config),
        hardware={name: value for name, value in machine.items() if name not in ("versions", "commit", "python")},
        versions={"python": machine["python"], **machine["versions"], "commit": machine["commit"]},
        conditions=conditions,
        examples=examples,
        groups={labels[split]: ids for split, ids in groups.items() if ids and groups["held_out"]} | by_type(examples),
        comparisons=comparisons,
        training={str(stage.relative_to(run.folder)): read_jsonl(stage / "metrics.jsonl") for stage in stages},
        notes=notes(run, validation),
        metrics={condition.name: run.task.score(condition.trajectories) for condition in conditions},
        counts={
            **counts,
            "metrics": scores(run, conditions),
            "left_out": run.left_out(),
            "validation": validation,
            "seconds": run.seconds(),
            **_cost(run),
        },
    )
    write_report(data, run.folder)
    verdicts = {c.name: {t.example_id: t.info["verdict"] for t in c.trajectories} for c in conditions}
    write_json(run.folder / "verdicts.json", verdicts)
    graded = {c.name: {t.example_id: t.info.get("score") for t in c.trajectories} for c in conditions}
    if all(score is not None for row in graded.values() for score in row.values()):
        write_json(run.folder / "scores.json", graded)
    write_json(run.folder / "summary.json", summary)
    return summary


def scores(run: Run, conditions: Sequence[Condition]) -> dict[str, dict[str, float]]:
    """Return the value of every metric of the task for each condition, over all held-out examples."""
    found = {condition.name: run.task.score(condition.trajectories) for condition in conditions}
    return {name: {key: round(metric.value, 4) for key, metric in row.items()} for name, row in found.items()}


def steps(names: Sequence[str]) -> list[str]:
    """Return those of the conditions that are the controller's own steps, from untrained to the last round."""
    return [n for n in names if n in ("untrained", "warmup") or n.startswith("round_")]


def transfer(run: Run, generators: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the summary of every policy of `run` with each of other generators, and write them to transfer.json."""
    found = {}
    for name in generators:
        run.use_generator(name)
        conditions = evaluate(run, f"transfer {name}")
        found[name] = summarise(run, conditions, steps([condition.name for condition in conditions])[-1])
        found[name] |= {"metrics": scores(run, conditions)}
        if run.world.is_first:
            write_json(run.folder / "transfer.json", found)
    return found


def by_type(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Return the ids of examples by their field "task_type", where a task has types; {} where it has none."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        if "task_type" in example.fields:
            groups.setdefault(example.fields["task_type"], []).append(example.id)
    return groups


def _cost(run: Run) -> dict[str, Any]:
    return {"black box": spending} if (spending := run.spending()) else {}


def select_round(run: Run) -> dict[str, Any]:
    """Return validation accuracies of warm-up and rounds, and the policy that they choose (the earlier on a tie)."""
    accuracies = {}
    first = "warmup" if run.is_trained("warmup") else ""
    for stage in [first, *(f"round-{round}" for round in _rounds(run))]:
        name = stage or "untrained"
        scored = run.task.score(run.episodes(run.policy(stage), ["validation"], label=f"validate {name}"))
        accuracies[name] = to_json(scored[run.task.main_metric])
    return {"accuracy": accuracies, "chosen": max(accuracies, key=lambda stage: accuracies[stage]["value"])}


def summarise(run: Run, conditions: Sequence[Condition], last: str) -> dict[str, Any]:
    """Return the one-line summary over the `test` split: a mean for each condition, and paired tests of the last one.

    The means are accuracies with exact McNemar tests or, where every episode has a graded "score", scores with
    sign-flip tests. trained: the last condition; p: of it against the untrained one.
    """
    ids = [example.id for example in run.task.examples("test")]
    rows = {condition.name: {t.example_id: t for t in condition.trajectories} for condition in conditions}
    graded = all("score" in row[id].info for row in rows.values() for id in ids)
    right = {name: [row[id].info["verdict"] == "right" for id in ids] for name, row in rows.items()}
    values = {name: [float(row[id].info["score"]) for id in ids] for name, row in rows.items()} if graded else right

    def compared(first: str) -> Paired | PairedScores:
        return (
            paired_scores(values[first], values[last]) if graded else paired_difference(right[first], right[last])
        )

    summary: dict[str, Any] = {"task": task_label(run.config), "examples": len(ids)}
    summary |= {name: round(sum(row) / len(row), 4) for name, row in values.items()}
    for first, key in (("untrained", "p_trained_vs_untrained"), ("warmup", "p_trained_vs_warmup")):
        if first in values:
            difference = compared(first)
            summary[key] = difference.p
            if first == "warmup":
                gain = (difference.difference, difference.low, difference.high)
                summary["gain_over_warmup"] = [round(x, 4) for x in gain]
    summary |= {"trained": summary[last], "p": summary["p_trained_vs_untrained"]}
    summary["seconds"] = round(sum(run.seconds().values()), 1)
    summary["report"] = str(run.folder / "report.html")
    return summary


def task_label(config: RunConfig) -> str:
    """Return what the task is called in a summary."""
    return f"LaMP-{config.task.lamp.task}" if config.task.name == "lamp" else config.task.name


def notes(run: Run, validation: dict[str, Any]) -> list[str]:
    """Return what a reader must know to judge the numbers."""
    lines = [
        f"Chosen on {len(run.task.examples('validation'))} validation problems: {validation['chosen']}. The held-out "
        "problems were used for nothing but this report.",
        "Guidance and code are decoded greedily in evaluation.",
    ]
    if left_out := run.left_out():
        counted = ", ".join(f"{n} {what}" for what, n in left_out.items())
        lines.append(f"Left out of every condition alike, since they do not fit the controller's context: {counted}.")
    if run.config.serve.adapter:
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


def wrong_guidance(gold: Sequence[str], seed: int) -> list[str]:
    """Return for each example the gold guidance of another one, drawn by `seed`."""
    draws = random.Random(stable_seed("wrong", seed))
    return [draws.choice([other for other in gold if other != own]) for own in gold]


def _fixed(controller: Controller) -> Callable[[TokenSampler], Controller]:
    return lambda _sampler: controller
