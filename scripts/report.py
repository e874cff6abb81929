"""`matryoshka report`: the report of a run again."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.pilot.run_report import report_again


def report(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write a run's report again from its record and print the summary; nothing is asked and no model is loaded.

    Args:
        run: The run's folder, e.g. runs/demo-0.
    """
    print(json.dumps(report_again(run)))
