"""`matryoshka train-from`: the next policy of a gateway."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.pilot.gateway_record import train_from as train_next


def train_from(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Train the next policy on the episodes that have ended and print its summary; a running gateway serves it then.

    Args:
        run: The gateway's folder, e.g. runs/planner.
    """
    print(json.dumps(train_next(run)))
