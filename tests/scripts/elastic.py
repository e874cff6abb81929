"""A command on two ranks under torchrun's own agent, for tests that start ranks again and again.

    python tests/scripts/elastic.py PIDS MAX_RESTARTS SHUTDOWN_S COMMAND...

The ranks are forks of the agent, so that they start in no time; under `torch.distributed.run` this file is one rank.
Each rank leaves its process id in the file PIDS/<rank>.
"""

import os
import sys
from pathlib import Path

from matryoshka.scripts import cli, finetune

assert finetune  # what takes long to import is there before the ranks are forked


def rank(pids: Path, arguments: list[str]) -> None:
    """Run the command as one rank."""
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    if status := cli.main(arguments):
        sys.exit(status)


def main(pids: str, max_restarts: str, shutdown_s: str, *arguments: str) -> None:
    if "RANK" in os.environ:
        rank(Path(pids), list(arguments))
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=int(max_restarts),
        start_method="fork", monitor_interval=0.05, shutdown_timeout=int(shutdown_s),
    )  # fmt: skip
    elastic_launch(config, rank)(Path(pids), list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
