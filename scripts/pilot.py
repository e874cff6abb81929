"""`matryoshka pilot`: the main job."""

import json

from matryoshka.core.distributed import open_world
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.loop import run_pilot


def pilot(config: RunConfig) -> None:
    """Run or continue the whole job; the last line printed is its summary as JSON (on LaMP a short one after it)."""
    with open_world(config.controller.device) as world:
        summary = run_pilot(config, RUNS, world)
    if not world.is_first:
        return
    print(json.dumps(summary))
    if config.task.name == "lamp":
        print(json.dumps({key: summary[key] for key in ("task", "examples", "untrained", "trained", "p", "seconds")}))
