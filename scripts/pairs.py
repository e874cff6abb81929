"""`matryoshka pairs`: the preference pairs of a pilot."""

import json

from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.stages import collected, write_pairs


def pairs(config: RunConfig) -> None:
    """Make preferences.jsonl from the episodes collected so far and print the counts as JSON."""
    with open_run(config, RUNS, trains=False) as run:
        _, counts = write_pairs(run, collected(run))
        print(json.dumps(counts.as_dict()))
