"""One playthrough of a household: it enforces `max_steps` and records every command and observation.

The environment decides what a command does. It is our engine, or TextWorld behind the same interface.
"""

from collections.abc import Sequence
from typing import Protocol

from matryoshka.tasks.alfworld.agent import Agent, kind_of
from matryoshka.tasks.alfworld.engine import Observation


class Environment(Protocol):
    """A household that can be started afresh and acted upon."""

    def reset(self) -> Observation: ...

    def step(self, command: str) -> Observation: ...


class StepsSpentError(RuntimeError):
    """All commands of this playthrough are used up, or its task is done."""


class Session:
    """One playthrough of `environment`, from its start. history: (command, observation) so far; won: the task is done.

    It takes commands until the task is done or max_steps of them are used up.
    """

    def __init__(self, environment: Environment, max_steps: int, verbs: str = "current") -> None:
        self._environment = environment
        first = environment.reset()
        self.screen = screen_text(first.text)
        self.verbs = verbs
        self.max_steps = max_steps
        self.history: list[tuple[str, str]] = []
        self.won = first.won

    @property
    def steps_left(self) -> int:
        return 0 if self.won else self.max_steps - len(self.history)

    def act(self, command: str) -> str:
        """Return the household's answer to `command`. Raises StepsSpentError if no more commands are allowed."""
        if self.steps_left <= 0:
            raise StepsSpentError(f"all {self.max_steps} actions in this household are used up")
        # A line break would make one command look like several in the record.
        command = " ".join(command.split())
        observation = self._environment.step(command)
        self.history.append((command, observation.text))
        self.won = observation.won
        return observation.text

    def report(self) -> str:
        """Return the last interactions, where the agent is, what it holds, and how many actions are used."""
        return f"{self._witness().report()} {len(self.history)} of {self.max_steps} actions are used."

    def searched(self) -> list[str]:
        """Return the types of the receptacles that were looked into, each once, in order."""
        return list(dict.fromkeys(map(kind_of, self._witness().seen)))

    def _witness(self) -> Agent:
        """Return an agent that knows what was seen so far and gives no commands."""
        return Agent(self.screen, _nothing, _nothing, self.verbs, self.history)


def screen_text(text: str) -> str:
    """Return the first screen without its title: what there is to see, and the task."""
    return text.partition("=-\n\n")[2] or text


def transcript(history: Sequence[tuple[str, str]]) -> str:
    """Return interactions as text: "> command", then its answer."""
    return "\n".join(f"> {command}\n{observation}" for command, observation in history)


def _nothing(_: str) -> str:
    return ""
