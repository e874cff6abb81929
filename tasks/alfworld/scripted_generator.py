"""A generator that is a script: it follows a plan literally, so the plan alone decides how an episode ends.

Asked for a program, it translates the plan's steps, good or bad; without a plan its program does nothing. Asked for an
action, it gives the next one that this program would take. Asked for a plan, it writes one with the right steps and
guesses where things are. Some of these plans win, and a warm-up learns from those. Answers are a function of the prompt
and the seed.
"""

import random
import re
from collections.abc import Callable, Sequence

from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Messages, Sample, Sampling, stable_seed
from matryoshka.tasks.alfworld.agent import Agent, kind_of, receptacles_of, task_of
from matryoshka.tasks.alfworld.plan_language import Step, parse_plan, program, write_compact, write_full
from matryoshka.tasks.alfworld.prompt_style import PLAN_MARK, fenced

# What a task sentence asks for: object, then where it goes or the lamp.
_SENTENCES = (
    ("two", r"(?:put|find) two (\w+) (?:and put them )?in (\w+)"),
    ("light", r"(?:look at|examine) (?:the )?(\w+) (?:under|with) the (\w+)"),
    *((verb, rf"{verb} some (\w+) and put it in (\w+)") for verb in ("clean", "heat", "cool")),
    *((verb, rf"put a {mark} (\w+) in (\w+)") for verb, mark in (("clean",) * 2, ("heat", "hot"), ("cool",) * 2)),
    ("put", r"put (?:a|some) (\w+) (?:in|on) (\w+)"),
)
_APPLIANCES = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
# How the shipped styles begin to ask: for a program, for an action, for a plan in sentences, for a compact plan.
PROGRAM = (
    "You write Python programs that act in a household",
    "Write step_1(agent, memory), step_2(agent, memory)",
    "You write a Python function step_1(agent, memory) that acts in a household",
)
ACTION = "You act in a household, one action at a time."
PLAN_FULL, PLAN_COMPACT = "You plan household tasks.", "Plan the household task in short steps."
GUESSES = (2, 4)  # how many types of receptacles a plan of its own names, at least and at most


class LiteralGenerator:
    """A core.protocols.Generator that follows plans literally. Its name changes whenever its answers do."""

    name = "scripted-literal-1"

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return a program, an action or a plan, as asked. Raises GeneratorError for a prompt that asks for none."""
        system = prompt[0].content
        if system.startswith(PROGRAM):
            return Sample(fenced(program(parse_plan(_plan_in(prompt)))))
        if system.startswith(ACTION):
            return Sample(_next_action(prompt))
        if system.startswith(PLAN_FULL):
            text = next(m.content for m in reversed(prompt) if "Your task is to: " in m.content)
            kinds = list(dict.fromkeys(map(kind_of, receptacles_of(text))))
            return Sample(own_plan(task_of(text), kinds, write_full, _draws(prompt, sampling)))
        if system.startswith(PLAN_COMPACT):
            # The last message that is no complaint about a plan.
            asked = [m.content for m in prompt if m.role == "user" and not m.content.startswith("This plan failed.")]
            shown, _, task = asked[-1].partition("\n")
            return Sample(own_plan(task, shown.split(", "), write_compact, _draws(prompt, sampling)))
        raise GeneratorError(f"{self.name} writes programs, actions and plans only, and was asked: {system[:80]!r}")


def _plan_in(prompt: Messages) -> str:
    """Return the plan that the last request for a program shows, "" if it shows none."""
    asked = [message.content for message in prompt if message.role == "user"]
    shown = [text for text in asked if PLAN_MARK in text]
    return shown[-1].partition(PLAN_MARK)[2] if shown else ""


class _NextAction(Exception):
    """Carries the first command that has no answer yet, and stops the program that gave it."""


def _next_action(prompt: Messages) -> str:
    """Return the reply with the action that the plan's program takes after the answers that the conversation shows."""
    # An example's conversation may come first; this household begins with the last screen.
    begin = max(i for i, message in enumerate(prompt) if "Your task is to: " in message.content)
    screen, answers = prompt[begin].content, iter([message.content for message in prompt[begin + 2 :: 2]])

    def act(command: str) -> str:
        for answer in answers:
            return answer
        raise _NextAction(command)

    # `program` wrote this source, and of the plan it contains names and quoted words alone, so it is safe to execute.
    names: dict[str, Callable[[Agent, dict[str, str]], None]] = {}
    exec(program(parse_plan(_plan_in(prompt))), names)
    verbs = "old" if " in/on " in prompt[0].content else "current"
    agent, memory = Agent(screen.partition(PLAN_MARK)[0], act, str, verbs), dict[str, str]()
    try:
        for step in [value for name, value in names.items() if name.startswith("step_")]:
            step(agent, memory)
    except _NextAction as found:
        return f"Think: The plan says so.\nAct: {found}"
    except (AssertionError, KeyError) as err:  # a step that cannot be done, or one whose thing was never found
        return f"Think: {err}"
    return "Think: The plan has been followed to its end."


def _draws(prompt: Messages, sampling: Sampling) -> random.Random:
    return random.Random(stable_seed(prompt, sampling.seed, sampling.draw))


def own_plan(task: str, kinds: Sequence[str], write: Callable[[Sequence[Step]], str], draws: random.Random) -> str:
    """Return a plan with the right steps for the task sentence, and places guessed from the types `kinds`.

    Raises GeneratorError if the sentence is none of ALFWorld's.
    """
    found = ((kind, match) for kind, pattern in _SENTENCES if (match := re.fullmatch(pattern, task)))
    kind, match = next(found, ("", None))
    if match is None:
        raise GeneratorError(f"{LiteralGenerator.name}: no plan is scripted for the task {task!r}")
    thing, target = match.groups()

    def guess() -> tuple[str, ...]:
        return tuple(draws.sample(list(kinds), min(len(kinds), draws.randint(*GUESSES))))

    steps = [Step("find", thing, guess())]
    if kind == "light":
        steps.append(Step("use", target, guess()))
    else:
        if kind in _APPLIANCES:
            steps.append(Step(kind, thing, (_APPLIANCES[kind],)))
        steps.append(Step("put", thing, (target,)))
    if kind == "two":
        steps *= 2
    return write(steps)
