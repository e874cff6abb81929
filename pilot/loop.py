"""The main job, which is the algorithm: warm-up; rounds of collect, pair, train, refresh; evaluation; the report.

Choices (learning rate, round) are made on validation problems; the held-out problems are used for the report alone.
"""

from pathlib import Path
from typing import Any

from matryoshka.core.distributed import ALONE, World
from matryoshka.core.records import Trajectory
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.evaluate import evaluate, schemes
from matryoshka.pilot.run_report import write_run_report
from matryoshka.pilot.stages import collect, train_round, train_star, warm_up, write_pairs


def run_pilot(config: RunConfig, root: Path = Path("runs"), world: World = ALONE) -> dict[str, Any]:
    """Run or continue the pilot in `root/<name>` and return its summary: accuracies, p values, the report's path.

    world: the ranks that share its episodes and its training.
    """
    with open_run(config, root, world=world) as run:
        warm_up(run)
        trajectories: list[Trajectory] = []
        counts: dict[str, Any] = {}
        for round in range(1, config.rounds + 1):
            # A round samples from the policy of the round before, which is also its reference: it is refreshed here.
            trajectories += collect(run, round)
            pairs, found = write_pairs(run, trajectories)
            counts[f"round_{round}"] = found.as_dict()
            train_round(run, round, pairs, trajectories)
            if round == 1 and config.star:
                train_star(run, trajectories)
        conditions = evaluate(run, schemes(run))
        return write_run_report(run, conditions, counts)
