"""`matryoshka estimate`: the predicted cost of a pilot."""

import json

from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.estimate import estimate_run
from matryoshka.pilot.folder import RUNS


def estimate(config: RunConfig) -> None:
    """Run 20 training examples and print what the whole run will cost; the last line is the numbers as JSON."""
    found = estimate_run(config, RUNS)
    width = max(map(len, found["episodes"]))
    for stage, count in found["episodes"].items():
        print(f"{stage:<{width}}  {count:>9,} episodes")
    error = "" if found["usd_error"] is None else f" +- {found['usd_error']:.2f}"
    usd = "no price is known" if found["usd"] is None else f"{found['usd']:.2f}{error} USD"
    print(f"{found['calls']:,.0f} calls, {found['tokens']:,.0f} tokens, {usd}, going by {found['sampled']} episodes")
    print(json.dumps(found))
