"""The original ALFWorld environment behind the interface of `Engine`; TextWorld interprets the problem.

It is some hundred times slower than our engine and needs the packages of the extra `alfworld`, which are imported when
the first environment is made. Tests compare our engine with it.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matryoshka.tasks.alfworld.engine import VERBS, Observation
from matryoshka.tasks.alfworld.games import Logic, read_logic

# What ALFWorld 0.4.0 changed in the grammar, current -> old; it also brought the action `help`.
OLD_WORDS = (
    ("You arrive at {r.name}.", "You arrive at {lend.name}."),
    ("move {o} to {r}", "put {o} in/on {r}"),
    ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
)


def is_installed() -> bool:
    """Return whether the packages of the extra `alfworld` are here."""
    return all(importlib.util.find_spec(name) is not None for name in ("alfworld", "textworld", "fast_downward"))


class TextWorldEngine:
    """One play of a game in TextWorld; see `Engine` for what the methods mean.

    row: as for `games.check_row`. logic: the domain and grammar to play with, by default those that come with the
    package alfworld. Raises ValueError where the extra is not installed.
    """

    def __init__(self, row: Mapping[str, Any], verbs: str = "current", logic: Logic | None = None) -> None:
        if verbs not in VERBS:
            raise ValueError(f"engine: verbs {verbs!r} are unknown; choose 'current' or 'old'")
        if not is_installed():
            raise ValueError(
                "backend 'textworld': TextWorld and ALFWorld are not installed; run pip install 'textworld[pddl]' and "
                "pip install --no-deps alfworld, or use the backend 'engine'"
            )
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs import PddlEnv

        logic = logic or _packaged()
        domain, grammar = logic.domain, logic.grammar.replace("UNKNOWN GOAL", row["task"])
        if verbs == "old":
            for current, old in OLD_WORDS:
                grammar = grammar.replace(current, old)
            domain = _without(domain, "(:action help")
        # One wrapper for each environment: a wrapper that several share mixes their names up.
        self._environment = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True, feedback=True)))
        with _own_arguments():
            self._environment.load({"pddl_domain": domain, "grammar": grammar, "pddl_problem": row["pddl_problem"]})
        self.observation = self.reset()

    def reset(self) -> Observation:
        """Return the first screen of the game, started afresh."""
        with _own_arguments():
            return self._observe(self._environment.reset())

    def step(self, command: str) -> Observation:
        """Return what `command` does; one that is not admissible does nothing."""
        return self._observe(self._environment.step(command)[0])

    def _observe(self, state: Mapping[str, Any]) -> Observation:
        score, done = float(state.get("score") or 0), bool(state.get("done"))
        won = bool(state["won"])
        self.observation = Observation(state["feedback"], tuple(state["admissible_commands"]), score, done, won)
        return self.observation


@contextmanager
def _own_arguments() -> Iterator[None]:
    """Give the process its own sys.argv back: TextWorld's translator puts others in its place."""
    arguments = sys.argv
    try:
        yield
    finally:
        sys.argv = arguments


def _packaged() -> Logic:
    import alfworld

    logic = read_logic(Path(next(iter(alfworld.__path__))) / "data")
    if logic is None:
        raise FileNotFoundError("alfworld: the installed package has no data/alfred.pddl and data/alfred.twl2")
    return logic


def _without(domain: str, opening: str) -> str:
    """Return `domain` without the expression that begins with `opening`."""
    start = domain.find(opening)
    if start < 0:
        return domain
    depth = 0
    for end in range(start, len(domain)):
        depth += {"(": 1, ")": -1}.get(domain[end], 0)
        if depth == 0:
            return domain[:start] + domain[end + 1 :]
    raise ValueError(f"pddl: the expression {opening} ... is not closed")
