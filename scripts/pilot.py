"""`matryoshka pilot`: the main job."""

import json

from matryoshka.core.distributed import open_world
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.loop import run_pilot
from matryoshka.tasks.find import task_class


def pilot(config: RunConfig) -> None:
    """Run or continue the whole job; the last line printed is its summary as JSON, or the part that the task chose."""
    with open_world(config.controller.device) as world:
        summary = run_pilot(config, RUNS, world)
    if not world.is_first:
        return
    print(json.dumps(summary))
    if headline := task_class(config.task.name).headline:
        print(json.dumps({key: summary[key] for key in headline}))
