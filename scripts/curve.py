"""`matryoshka curve`: a pilot over several seeds."""

import json
from dataclasses import dataclass

from matryoshka.core.files import write_json
from matryoshka.pilot.config import RunConfig, run_part
from matryoshka.pilot.curve import run_seeds, table
from matryoshka.pilot.folder import RUNS


@dataclass(frozen=True)
class CurveConfig(RunConfig):
    """The configuration of a pilot that runs once for each of several seeds, as runs/NAME-SEED."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs, in place of `seed`."""


def curve(config: CurveConfig) -> None:
    """Run or continue a pilot for each seed, and write runs/NAME-curve.json."""
    seeds = config.seeds
    if not seeds or len(seeds) > len(set(seeds)):
        raise ValueError(f"curve: seeds {list(seeds)}: give at least one, and each once")
    result = run_seeds(run_part(config), seeds, RUNS, lambda row: print(json.dumps(row), flush=True))
    write_json(RUNS / f"{config.name}-curve.json", result)
    print(table(result))
    print(json.dumps({"name": config.name, "seeds": list(seeds), **result}))
