"""What controller and generator are shown of a household; the texts are in `prompts/*.toml`.

Templates see `screen` (the first words of the household), `receptacles`, `kinds` (their types), `task`, `task_type`,
`max_steps`, `verbs` and `plan` ("" for none). `exemplar` is the worked household of the same type of task, `exemplars`
has all of them by type; each has `screen`, `receptacles`, `kinds`, `task` and `steps`, and whatever a file's own
[exemplars.TYPE] says besides. Plans are written by functions: `sentences(steps)`, `compact(steps)`, `of_kinds(steps)`,
`in_sentences(plan)`; programs by `program(steps)`, `straight_program(steps)` and `fenced(code)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.core.config import nearest
from matryoshka.core.records import Messages
from matryoshka.tasks.alfworld.agent import kind_of, receptacles_of, task_of
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS, turns
from matryoshka.tasks.alfworld.plan_language import (
    Step,
    in_sentences,
    of_kinds,
    program,
    steps_of,
    straight_program,
    write_compact,
    write_full,
)
from matryoshka.tasks.prompt_files import PromptFile

SHIPPED = Path(__file__).with_name("prompts")
PLAN_MARK = "\n\nPlan:\n"  # stands before the plan in what the shipped styles show the generator
REQUESTS = ("plan", "solve", "act", "retry", "replan", "ask")


@dataclass(frozen=True)
class Scene:
    """What is known of a household at first. screen: its first words; task_type: one of ALFWorld's six."""

    screen: str
    task_type: str


@dataclass(frozen=True)
class Failure:
    """The outcome of a program that failed. feedback: the whole account, to be shown as it is."""

    feedback: str
    error: str = ""
    """The last line of the program's error, "" if it ended by itself."""
    searched: Sequence[str] = ()
    """Types of the receptacles that it and the programs before it looked into."""


def fenced(code: str) -> str:
    """Return `code` as a block of a reply."""
    return f"```python\n{code.strip()}\n```"


FUNCTIONS = {
    "sentences": write_full,
    "compact": write_compact,
    "of_kinds": of_kinds,
    "in_sentences": in_sentences,
    "program": program,
    "straight_program": straight_program,
    "fenced": fenced,
}


class Style:
    """One family of prompts: a shipped style or a user's own file. plan "" means that there is none."""

    def __init__(self, prompts: str, max_steps: int = 50, verbs: str = "current") -> None:
        """max_steps, verbs: of the household, which the models are told. Raises as `PromptFile`."""
        self.file = PromptFile(prompts, SHIPPED, REQUESTS, {"written": "{{ compact(steps) }}"}, known=["exemplars"])
        self.name = self.file.name
        own = _own_exemplars(self.file)
        exemplars = {
            task_type: _seen(shot.screen) | {"steps": shot.steps} | own.get(task_type, {})
            for task_type, shot in EXEMPLARS.items()
        }
        self._verbs = verbs
        self._exemplars = exemplars
        self._values: dict[str, Any] = {**FUNCTIONS, "max_steps": max_steps, "verbs": verbs, "exemplars": exemplars}

    def plan(self, scene: Scene) -> Messages:
        """Return the request for a plan."""
        return self._render("plan", scene, "")

    def solve(self, scene: Scene, plan: str) -> Messages:
        """Return the request for a program."""
        return self._render("solve", scene, plan)

    def act(self, scene: Scene, plan: str) -> Messages:
        """Return the request for the first direct action."""
        return self._render("act", scene, plan, played=turns(scene.task_type, self._verbs))

    def write(self, steps: Sequence[Step]) -> str:
        """Return a plan in the words of this style."""
        return self.file.text("written", **self._values, steps=steps)

    def replan(self, scene: Scene, plan: str, feedback: str) -> Messages:
        """Return the controller's prompt after a plan that led nowhere: the plan and what came of it."""
        return self._render("replan", scene, plan, conversation=self.plan(scene), feedback=feedback)

    def retry(self, scene: Scene, plan: str, code: str, failure: Failure) -> Messages:
        """Return the generator's prompt after a program that failed: the program and what really happened."""
        before = self.solve(scene, plan)
        return self._render("retry", scene, plan, conversation=before, code=code, **vars(failure))

    def ask(self, question: str) -> Messages:
        """Return the generator's prompt for a question that a program asks."""
        return self.file.render("ask", question=question)

    def _render(self, request: str, scene: Scene, plan: str, **more: Any) -> Messages:
        exemplar = self._exemplars[scene.task_type]
        shown = _seen(scene.screen) | {"task_type": scene.task_type, "plan": plan, "exemplar": exemplar}
        return self.file.render(request, **self._values, **shown, **more)


def _seen(screen: str) -> dict[str, Any]:
    """Return what a template sees of a household: its first words, its receptacles and their types, its task."""
    receptacles = receptacles_of(screen)
    kinds = list(dict.fromkeys(map(kind_of, receptacles)))
    return {"screen": screen, "receptacles": receptacles, "kinds": kinds, "task": task_of(screen)}


def _own_exemplars(file: PromptFile) -> dict[str, dict[str, Any]]:
    """Return what a file's own [exemplars.TYPE] change, by type. Raises ValueError for tables of another form."""
    tables = file.values.get("exemplars", {})
    if not isinstance(tables, dict):
        raise ValueError(f"{file.path}: exemplars is {tables!r:.60}; expected a table [exemplars.TYPE] for each type")
    found = {}
    for task_type, table in tables.items():
        where = f"{file.path}: [exemplars.{task_type:.60}]"
        if task_type not in EXEMPLARS:
            raise ValueError(f"{where}: no type of task has this name; {nearest(task_type, EXEMPLARS)}")
        try:
            seen = _seen(table["screen"]) if "screen" in table else {}
            steps = {"steps": steps_of(table["steps"])} if "steps" in table else {}
            found[task_type] = {**seen, **table, **steps}
        except (AttributeError, TypeError, ValueError) as err:
            expected = "expected a table, in which screen is a text and steps has rows [verb, thing, [place, ...]]"
            raise ValueError(f"{where}: {expected}; {err}") from err
        known = {"screen", "steps", "receptacles", "kinds", "task", *file.attributes}
        if unknown := sorted(set(table) - known):
            raise ValueError(f"{where}: no template uses the key {unknown[0]!r}; {nearest(unknown[0], sorted(known))}")
    return found
