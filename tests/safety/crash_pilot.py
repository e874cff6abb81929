"""Runs one pilot again and again, each time in a fork that is killed or meets a fault of its disk, until it is done.

Arguments: the configuration file, the mode ("kills" or "faults"), how many at most, a seed, and the longest time in
seconds before a kill. Forks of one process
that has imported everything start in milliseconds. "kills": SIGKILL after a random time. "faults": each start meets the
next kind of fault at one of its first 30 fsyncs and renames, drawn from the seed. The last line printed is JSON: the
number of starts, and of ends by kind.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter

from matryoshka.scripts import cli
from matryoshka.tests.safety.faults import KINDS, install

FURTHEST = 30  # operation at which a fault is met
LAZY = ("matryoshka.pilot.loop", "aiohttp", "httpx2", "openai")  # what a pilot imports when it needs it


def start(config: str, kind: str, at: int, errors: str) -> int:
    """Return the process number of a pilot in a fork."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kind:
            install(kind, at)
        status = cli.main(["pilot", "--config", config])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    config, mode, most, seed, longest_s = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    for name in LAZY:  # once, here, and not in every fork
        importlib.import_module(name)

    draws = random.Random(seed)
    ends: Counter[str] = Counter()
    errors = f"{config}.err"
    for number in range(most + 1):
        is_last = number == most
        kind = KINDS[number % len(KINDS)] if mode == "faults" and not is_last else ""
        child = start(config, kind, draws.randint(1, FURTHEST), errors)
        if mode == "kills" and not is_last:
            time.sleep(draws.uniform(0.0, longest_s))
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still this child's
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends["killed" if status == -signal.SIGKILL else f"exit {status}"] += 1
        if kind:
            ends[f"{kind} tried"] += 1
        if status == 0:
            break
    print(json.dumps({"starts": sum(n for name, n in ends.items() if "tried" not in name), **ends}))


if __name__ == "__main__":
    main()
