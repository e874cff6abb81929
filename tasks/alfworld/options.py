"""The options of the task "alfworld"."""

from dataclasses import dataclass
from typing import Literal

from matryoshka.core.config import check_least
from matryoshka.tasks.sandbox_config import SandboxConfig


@dataclass(frozen=True)
class AlfworldOptions:
    """Where the games come from, how the generator acts in them, and what it may use."""

    prompts: str = "compact"
    """Prompts: "compact" for models of about a hundred million parameters, "full" for larger ones, "brief", which asks
    a generator on slow hardware for short programs, "published" in the form of the original's, or a .toml file of your
    own (tasks/alfworld/prompts/ holds the shipped ones)."""
    data: str = ""
    """Folder of games, in ALFWorld's own layout or as <split>.jsonl.xz; "" makes households from the seed."""
    train_split: str = "train"
    """ALFWorld's split that warm-up, training and validation are taken from."""
    test_split: str = "valid_seen"
    """ALFWorld's split of the test games."""
    held_out_split: str = "valid_unseen"
    """ALFWorld's split of the held-out games."""
    size: Literal["small", "medium", "large"] = "medium"
    """Size of the households that are made from the seed."""
    types: tuple[str, ...] = ()
    """Types of household tasks; none stands for all six."""
    games_seed: int = -1
    """Seed that draws the games; -1 is the run's own. Runs of several seeds over the same games set it."""
    mode: Literal["program", "react"] = "program"
    """How the generator acts: it writes programs, or it gives one command after the other ("react")."""
    backend: Literal["engine", "textworld"] = "engine"
    """The engine of the games: ours or the package textworld."""
    verbs: Literal["current", "old"] = "current"
    """Words of the commands; "old" is ALFWorld before 0.4.0."""
    max_steps: int = 50
    """Commands that one household takes."""
    asks: int = 5
    """Questions that one program may ask."""
    sandbox: SandboxConfig = SandboxConfig()
    """Limits of one program, and the boundary around it."""

    def __post_init__(self) -> None:
        check_least(self, "", max_steps=1, asks=0)
