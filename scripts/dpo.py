"""`matryoshka dpo`: preference training on a user's own pairs."""

import json

from matryoshka.pilot.finetune import DpoCommand, finetune


def dpo(config: DpoCommand) -> None:
    """Train on preference pairs; the last line printed is a summary as JSON."""
    if (summary := finetune(config)) is not None:
        print(json.dumps(summary))
