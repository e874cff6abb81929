"""`matryoshka collect`: the episodes of a pilot, or those of any policy in a folder of their own."""

import json

from matryoshka.core.distributed import open_world
from matryoshka.pilot.collected import CollectConfig, collect_apart
from matryoshka.pilot.config import run_part
from matryoshka.pilot.context import open_run
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.stages import collected, warm_up


def collect(config: CollectConfig) -> None:
    """Collect the episodes of --policy into --out, or all that a pilot's policies can give; print counts as JSON."""
    if not config.out and (config.policy, config.split) != (CollectConfig.policy, CollectConfig.split):
        raise ValueError("collect: --policy and --split belong to --out FOLDER, which takes their episodes")
    with open_world(config.controller.device) as world:
        if config.out:
            summary = collect_apart(config, world)
        else:
            with open_run(run_part(config), RUNS, world=world) as run:
                warm_up(run)
                summary = {"episodes": len(collected(run))}
        if world.is_first:
            print(json.dumps(summary))
