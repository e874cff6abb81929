"""`matryoshka pairs`: preference pairs from recorded episodes."""

import json

from matryoshka.pilot.collected import PairsCommand, write_pairs_of


def pairs(config: PairsCommand) -> None:
    """Write the pairs of recorded episodes into a file and print the counts as JSON."""
    print(json.dumps(write_pairs_of(config)))
