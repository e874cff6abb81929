"""`matryoshka collect`: the episodes of a pilot, as far as its policies are trained."""

import json

from matryoshka.core.distributed import open_world
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.stages import collected, warm_up


def collect(config: RunConfig) -> None:
    """Warm up and collect the episodes of every round whose starting policy is trained; print their number as JSON."""
    with open_world(config.controller.device) as world, open_run(config, RUNS, world=world) as run:
        warm_up(run)
        episodes = len(collected(run))
        if world.is_first:
            print(json.dumps({"episodes": episodes}))
