"""`matryoshka sft`: supervised training on a user's own conversations."""

import json

from matryoshka.pilot.finetune import SftCommand, finetune


def sft(config: SftCommand) -> None:
    """Train on conversations; the last line printed is a summary as JSON."""
    if (summary := finetune(config)) is not None:
        print(json.dumps(summary))
