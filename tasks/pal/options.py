"""The options of the task "pal"."""

from dataclasses import dataclass

from matryoshka.tasks.sandbox_config import SandboxConfig


@dataclass(frozen=True)
class PalOptions:
    """How the models are asked, where the problems come from, and what a program may use."""

    prompts: str = "compact"
    """Prompts: "compact" for models of about a hundred million parameters, "full" for larger ones, or a .toml file of
    your own (tasks/pal/prompts/ holds the shipped ones)."""
    train_file: str = ""
    """GSM8K or GSM-Hard JSONL file for warm-up, training and validation; "" makes all problems from the seed."""
    test_file: str = ""
    """GSM8K or GSM-Hard JSONL file of the test problems; it goes with train_file."""
    held_out_file: str = ""
    """GSM8K or GSM-Hard JSONL file of further test problems of another kind, which [task] held_out counts."""
    sandbox: SandboxConfig = SandboxConfig()
    """Limits of one program, and the boundary around it."""
