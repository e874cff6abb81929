"""`matryoshka evaluate`: the policies of a pilot on its held-out problems, or any policies under any settings."""

import json

from matryoshka.core.distributed import open_world
from matryoshka.core.records import to_json
from matryoshka.pilot.config import run_part
from matryoshka.pilot.context import open_run
from matryoshka.pilot.evaluate import EvaluateConfig, chosen, evaluate_policies, schemes
from matryoshka.pilot.evaluate import evaluate as evaluate_conditions
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.run_report import round_counts, write_run_report, write_transfer


def evaluate(config: EvaluateConfig) -> None:
    """Print the scores of each policy as JSON, and write the run's report, transfer.json or a folder of their own."""
    if config.policy and (config.generators or config.only or config.skip):
        raise ValueError("evaluate: --policy names all that is evaluated; leave --generators, --only and --skip out")
    with open_world(config.controller.device) as world:
        if config.policy:
            rows = evaluate_policies(config, RUNS, world)
        else:
            with open_run(run_part(config), RUNS, world=world, trains=False) as run:
                if config.generators:
                    names = [name.strip() for name in config.generators.split(",")]
                    if not all(names):
                        what = f"generators {config.generators!r}"
                        raise ValueError(f"{what}: expected names or TOML files, separated by commas")
                    rows = [{"generator": name, **row} for name, row in write_transfer(run, names).items()]
                else:
                    conditions = evaluate_conditions(run, chosen(schemes(run), config.only, config.skip))
                    rows = [{c.name: to_json(run.task.score(c.trajectories))} for c in conditions]
                    if not (config.only or config.skip):
                        rows.append(write_run_report(run, conditions, round_counts(run)))
        for row in rows if world.is_first else ():
            print(json.dumps(row))
