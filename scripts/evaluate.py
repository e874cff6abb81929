"""`matryoshka evaluate`: the policies of a pilot on its held-out problems."""

import dataclasses
import json
from dataclasses import dataclass

from matryoshka.core.distributed import open_world
from matryoshka.core.records import to_json
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.evaluate import evaluate as evaluate_run
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.run_report import write_run_report, write_transfer


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """The configuration of a pilot, to evaluate its policies."""

    generators: str = ""
    """Other generators to evaluate the policies with instead, separated by commas: names of models at [generator], or
    of scripted generators where [serve] names one, or TOML files with the keys of [generator]."""


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate every policy that is trained, print its scores and write the report, or transfer.json."""
    pilot_config = RunConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})
    device = config.controller.device
    with open_world(device) as world, open_run(pilot_config, RUNS, world=world, trains=False) as run:
        if config.generators:
            names = [name.strip() for name in config.generators.split(",")]
            if not all(names):
                raise ValueError(f"generators {config.generators!r}: expected names or TOML files, separated by commas")
            rows = [{"generator": name, **row} for name, row in write_transfer(run, names).items()]
        else:
            conditions = evaluate_run(run)
            rows = [{condition.name: to_json(run.task.score(condition.trajectories))} for condition in conditions]
            rows.append(write_run_report(run, conditions, {}))
        for row in rows if world.is_first else ():
            print(json.dumps(row))
