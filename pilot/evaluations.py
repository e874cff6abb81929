"""Evaluations apart from a run: any policies under any settings, in a folder of their own; runs stay untouched.

The folder's name carries a hash of all settings, so that the same command continues an evaluation and other settings
begin another one. The answers of the generator are shared with the run of the configuration's name.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.core.distributed import World
from matryoshka.core.files import write_json
from matryoshka.core.records import content_key, to_json
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.pilot.config import RunConfig, run_part
from matryoshka.pilot.context import Run, open_run
from matryoshka.pilot.environment import environment, typed_command
from matryoshka.pilot.evaluate import HELD_OUT_SPLITS, evaluate, policy_conditions, policy_folder, schemes, slug
from matryoshka.pilot.folder import cache_path
from matryoshka.pilot.run_report import left_out


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """The configuration of a pilot, whose policies are evaluated, or under whose settings other policies are."""

    policy: tuple[str, ...] = ()
    """Policies to evaluate in a folder of their own: none, gold, wrong, own or untrained; an adapter folder; a stage as
    RUN:STAGE; a model folder; URL#MODEL or a TOML file with the keys of [generator] for another model as controller. By
    default the run's own policies are evaluated, and its report is written."""
    only: tuple[str, ...] = ()
    """Conditions of the run to evaluate, by name; without a report, which needs all of them."""
    skip: tuple[str, ...] = ()
    """Conditions of the run to leave out, by name; without a report, which needs all of them."""
    split: tuple[str, ...] = HELD_OUT_SPLITS
    """Splits of problems, where --policy is given."""
    out: str = ""
    """Folder under `runs/` for the evaluation of --policy; default: NAME-evaluation- and a hash of all settings."""
    generators: str = ""
    """Other generators to evaluate the run's policies with instead, separated by commas: names of models at
    [generator], or of scripted generators where [serve] names one, or TOML files with the keys of [generator]."""

    @property
    def run(self) -> RunConfig:
        """The configuration of the run alone."""
        return run_part(self)


def evaluate_policies(config: EvaluateConfig, root: Path, world: World) -> list[dict[str, Any]]:
    """Evaluate `config.policy` under the other settings of `config` and return a row for each policy.

    The evaluation's folder gets evaluation.json, the report and every episode. Raises ValueError for a policy that is
    none and for splits that the task does not have.
    """
    settings = config.run
    out = config.out or f"{settings.name}-evaluation-{content_key(to_json(settings))[:8]}"
    cache = cache_path(root / settings.name)
    of_models: dict[str, Condition] = {}
    for policy in config.policy:
        if (policy_folder(policy) / "config.json").is_file():
            model = replace(settings.controller, path=str(policy_folder(policy)), adapter="")
            # A model is opened alone, so that two of them need not fit the memory.
            nested = replace(settings, name=f"{out}/{slug(policy)}", controller=model)
            with open_run(nested, root, cache, world, trains=False) as run:
                (found,) = evaluate(run, {"untrained": schemes(run)["untrained"]}, splits=config.split)
                of_models[policy] = replace(found, name=slug(policy), label=policy)
    with ExitStack() as stack:
        run = stack.enter_context(open_run(replace(settings, name=out), root, cache, world, trains=False))
        others = [policy for policy in config.policy if policy not in of_models]
        done = evaluate(run, policy_conditions(run, others, stack), splits=config.split)
        conditions = [*of_models.values(), *done]
        rows = [_row(run, condition) for condition in conditions]
        if world.is_first:
            write_json(run.folder / "evaluation.json", {"settings": to_json(settings), "policies": rows})
            write_report(_report(run, conditions, config.split), run.folder)
        return rows


def _row(run: Run, condition: Condition) -> dict[str, Any]:
    metrics = {name: to_json(metric) for name, metric in run.task.score(condition.trajectories).items()}
    costs = {"episodes": len(condition.trajectories), "calls": condition.calls, "tokens": condition.tokens}
    return {"policy": condition.name, "label": condition.label, "metrics": metrics, **costs}


def _report(run: Run, conditions: Sequence[Condition], splits: Sequence[str]) -> ReportInput:
    machine = environment()
    first, *others = [condition.name for condition in conditions]
    return ReportInput(
        title=f"Evaluation {run.config.name}",
        command=typed_command(),
        config=to_json(run.config),
        hardware={name: value for name, value in machine.items() if name not in ("versions", "commit", "python")}
        | run.task.facts(),
        versions={"python": machine["python"], **machine["versions"], "commit": machine["commit"]},
        conditions=conditions,
        examples=[example for split in splits for example in run.problems[split]],
        comparisons=[(first, other) for other in others],
        metrics={condition.name: run.task.score(condition.trajectories) for condition in conditions},
        counts={"left_out": left_out(run)},
    )
