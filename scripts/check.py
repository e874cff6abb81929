"""`matryoshka check`: a pilot's configuration, with no model loaded and no call made."""

import json

from matryoshka.pilot.check import check_run
from matryoshka.pilot.config import RunConfig


def check(config: RunConfig) -> None:
    """Print each kind of prompt and what a run would take, and every fault that keeps it from starting.

    The last line is the numbers as JSON. Raises ValueError with all faults, if there are any.
    """
    checked = check_run(config)
    for kind, messages in checked.prompts.items():
        print(f"--- {kind}")
        for message in messages:
            print(f"[{message.role}]\n{message.content}")
        print()
    for line in checked.lines:
        print(line)
    if checked.faults:
        noun = "fault keeps" if len(checked.faults) == 1 else "faults keep"
        raise ValueError("\n".join([f"{len(checked.faults)} {noun} this run from starting", *checked.faults]))
    print(json.dumps(checked.numbers))
