"""`matryoshka score`: predictions made elsewhere, by a task's own measure."""

import json

from matryoshka.pilot.score import ScoreCommand, score_files


def score(config: ScoreCommand) -> None:
    """Score files of predictions and print the metrics of each as JSON."""
    for row in score_files(config):
        print(json.dumps(row))
