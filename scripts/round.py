"""`matryoshka round`: one round of a pilot alone."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from matryoshka.core.distributed import open_world
from matryoshka.pilot.config import RunConfig, run_part
from matryoshka.pilot.context import open_run
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.stages import run_round


@dataclass(frozen=True)
class RoundConfig(RunConfig):
    """The configuration of a pilot, one round of which is run: collect, pair, train. Round 1 warms up first."""

    number: Annotated[int, tyro.conf.Positional] = 0
    """The round; 0 is the first that is not trained yet."""


def round(config: RoundConfig) -> None:
    """Run one round and print its summary as JSON."""
    with open_world(config.controller.device) as world, open_run(run_part(config), RUNS, world=world) as run:
        summary = run_round(run, config.number)
        if world.is_first:
            print(json.dumps(summary))
