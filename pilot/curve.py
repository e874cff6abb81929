"""Runs a pilot over several seeds and measures the gain of its policies, stage by stage, with intervals.

Each seed has its own problems, adapters and episodes in its own run folder, so the series can be stopped and continued.
Pooled shares treat the held-out problems of all seeds as one sample. The share of each seed is listed too, because
training varies more between seeds than the shares of one policy vary between samples of problems. A task that grades
its answers has mean scores in place of shares, and sign-flip tests in place of exact McNemar tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka.core.intervals import bootstrap_mean, wilson
from matryoshka.core.json_input import read_json
from matryoshka.core.records import Metric, to_json
from matryoshka.eval.statistics import paired
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.loop import run_pilot
from matryoshka.pilot.run_report import controller_steps

Outcomes = Mapping[str, Mapping[str, float]]  # condition -> problem -> score; True for a solved problem counts as 1


def run_seeds(
    config: RunConfig, seeds: Sequence[int], root: Path, on_run: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run or continue a pilot for each seed as root/NAME-SEED and return the summary over all of them.

    on_run: is called with the short summary of each run when it ends.
    """
    runs: dict[int, Outcomes] = {}
    by_seed: dict[str, Any] = {}
    for seed in seeds:
        name = f"{config.name}-{seed}"
        found = run_pilot(replace(config, seed=seed, name=name), root)
        by_seed[str(seed)] = {key: found[key] for key in ("task", "examples", "untrained", "trained", "p", "seconds")}
        on_run(by_seed[str(seed)])
        runs[seed] = outcomes(root / name)
    return {**summary(runs), "runs": by_seed}


def outcomes(folder: Path) -> Outcomes:
    """Return condition -> held-out problem -> its score, or whether it was solved, from the report in `folder`."""
    report = read_json(folder / "report.json", "the report of a run")
    verdicts: Outcomes = {
        name: {id: verdict == "right" for id, verdict in row.items()} for name, row in report["verdicts"].items()
    }
    return report["scores"] or verdicts


def summary(runs: Mapping[int, Outcomes]) -> dict[str, Any]:
    """Return the shares, by seed and pooled, of the conditions that every seed has, and the pooled gains of the
    stages.
    """
    names = [name for name in next(iter(runs.values())) if all(name in conditions for conditions in runs.values())]
    pooled = {name: [score for conditions in runs.values() for score in conditions[name].values()] for name in names}
    conditions = {
        name: {
            "by_seed": {
                str(seed): round(sum(found[name].values()) / len(found[name]), 4) for seed, found in runs.items()
            },
            "pooled": to_json(_pooled(pooled[name])),
        }
        for name in names
    }
    ladder = controller_steps(names)
    steps = [*zip(ladder, ladder[1:], strict=False)] + [(ladder[0], ladder[-1])] * (len(ladder) > 2)
    gains = [{"first": a, "second": b, **vars(paired(pooled[a], pooled[b]))} for a, b in steps]
    return {"conditions": conditions, "gains": gains}


def table(result: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    seeds = list(next(iter(result["conditions"].values()))["by_seed"])
    lines = [f"| condition | {' | '.join(f'seed {seed}' for seed in seeds)} | pooled | 95% | n |"]
    lines.append("|---" * (len(seeds) + 4) + "|")
    for name, row in result["conditions"].items():
        pooled = row["pooled"]
        by_seed = " | ".join(f"{share:.3f}" for share in row["by_seed"].values())
        interval = f"[{pooled['low']:.3f}, {pooled['high']:.3f}]"
        lines.append(f"| {name} | {by_seed} | {pooled['value']:.3f} | {interval} | {pooled['n']} |")
    lines += ["", "| gain | points | 95% | gained | lost | p |", "|---|---|---|---|---|---|"]
    for gain in result["gains"]:
        points = [f"{100 * gain[key]:+.1f}" for key in ("difference", "low", "high")]
        counts = f"{gain.get('gained', '')} | {gain.get('lost', '')} | {gain['p']:.2g}"
        lines.append(f"| {gain['first']} to {gain['second']} | {points[0]} | [{points[1]}, {points[2]}] | {counts} |")
    return "\n".join(lines)


def _pooled(scores: Sequence[float]) -> Metric:
    if all(isinstance(score, bool) for score in scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap_mean(scores)
