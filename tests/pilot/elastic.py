"""A command on two ranks under torchrun's own agent, for tests that start ranks again and again.

`launch` makes the ranks as forks of the process that calls it, so that they start in no time. As a script,

    python -m torch.distributed.run --nproc-per-node 2 tests/pilot/elastic.py PIDS COMMAND...

it is one rank. Each rank leaves its process id in the file PIDS/<rank>.
"""

import importlib
import os
import sys
from pathlib import Path

from matryoshka.scripts import cli


def rank(pids: Path, arguments: list[str]) -> None:
    """Run the command as one rank."""
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    if status := cli.main(arguments):
        sys.exit(status)


def warm() -> None:
    """Import what training imports on its way and takes long."""
    for name in ("torch._dynamo", "torch.distributed.tensor", "matryoshka.pilot.finetune"):
        importlib.import_module(name)


def launch(pids: Path, max_restarts: int, arguments: list[str]) -> None:
    """Run the command under torchrun's agent until it is done, or failed once more than `max_restarts` times."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=max_restarts,
        start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, rank)(pids, arguments)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), sys.argv[2:])
