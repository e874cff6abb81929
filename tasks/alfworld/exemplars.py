"""One worked household for each type of task, read from `exemplars.toml`: first screen, plan, the plan as actions."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld.agent import receptacles_of
from matryoshka.tasks.alfworld.game import in_verbs
from matryoshka.tasks.alfworld.plan_language import Step, steps_of


@dataclass(frozen=True)
class Exemplar:
    """screen: the first words of a household, in the game's wording. steps: a plan that wins there.

    actions: the same as (thought, command, answer), in the verbs of ALFWorld 0.4.0 and later.
    """

    screen: str
    steps: tuple[Step, ...]
    actions: Sequence[tuple[str, str, str]]


def _read(path: Path) -> dict[str, Exemplar]:
    found = {}
    for task_type, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        actions = []
        for line in table["played"].splitlines():
            thought, command, answer = line.split(" | ")
            actions.append((thought, command, answer))
        found[task_type] = Exemplar(table["screen"], steps_of(table["steps"]), actions)
    return found


EXEMPLARS = _read(Path(__file__).with_suffix(".toml"))


def played(task_type: str, verbs: str = "current") -> list[tuple[str, str, str]]:
    """Return (thought, command, answer) of each action in the exemplar's household."""
    exemplar = EXEMPLARS[task_type]
    places = receptacles_of(exemplar.screen)
    found = []
    for thought, command, answer in exemplar.actions:
        if command.startswith("go to "):
            place = command.removeprefix("go to ")
            # Before ALFWorld 0.4.0 one arrived at numbered positions, whose order says nothing.
            arrived = place if verbs == "current" else f"loc {places.index(place) + 1}"
            answer = f"You arrive at {arrived}. {answer}"
        elif command.startswith("move ") and verbs == "old":
            answer = answer.replace("You move ", "You put ").replace(" to the ", " in/on the ")
        found.append((thought, in_verbs(command, verbs), answer))
    return found


def turns(task_type: str, verbs: str) -> Messages:
    """Return the exemplar's actions as a conversation that ends with the last one."""
    messages: list[Message] = []
    for thought, command, answer in played(task_type, verbs):
        messages += Message("assistant", f"Think: {thought}\nAct: {command}"), Message("user", answer)
    return tuple(messages[:-1])
