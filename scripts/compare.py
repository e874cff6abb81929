"""`matryoshka compare`: runs and evaluations with one another."""

from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.pilot.compare import compared, read_results, table


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], condition: tuple[str, ...] = (), json: bool = False
) -> None:
    """Print the conditions of several reports and their differences from the first one, paired over equal problems.

    Args:
        runs: Folders of runs, evaluations or `score --out`, or their report.json files; the first is the baseline.
        condition: The condition to compare: one for all runs, or one for each; default: all that they have in common.
        json: Print one JSON object instead of tables.
    """
    found = compared(read_results(runs), condition)
    print(dumps(found) if json else table(found))
