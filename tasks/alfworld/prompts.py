"""What controller and generator are shown of a household. A `Style` is four functions from texts to messages.

`full_style` is for instruction-tuned models of a few billion parameters and more: the plan's format with a worked
household of the same type of task, and for the generator the agent's methods with a worked program or, where it acts
itself, worked actions. A retry and a new plan continue the conversation, so a model sees what it wrote and what really
happened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld import react_exemplars as acted
from matryoshka.tasks.alfworld.agent import kind_of, receptacles_of, task_of
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS
from matryoshka.tasks.alfworld.plan_language import Step, program, write_full

PLAN_MARK = "\n\nPlan:\n"  # stands before the plan in what the generator is shown


@dataclass(frozen=True)
class Scene:
    """What is known of a household at first. screen: its first words; task_type: one of ALFWorld's six."""

    screen: str
    task_type: str

    @property
    def task(self) -> str:
        """The task sentence."""
        return task_of(self.screen)

    @property
    def kinds(self) -> list[str]:
        """The types of the receptacles, each once."""
        return list(dict.fromkeys(kind_of(receptacle) for receptacle in receptacles_of(self.screen)))


@dataclass(frozen=True)
class Style:
    """How one family of models is asked; plan "" means that there is none.

    plan(scene): asks the controller. solve(scene, plan): asks the generator for a program. act(scene, plan): asks it
    for the first of its direct actions. write(steps): a plan in the words of this style.
    """

    name: str
    plan: Callable[[Scene], Messages]
    solve: Callable[[Scene, str], Messages]
    act: Callable[[Scene, str], Messages]
    write: Callable[[Sequence[Step]], str]

    def replan(self, scene: Scene, plan: str, feedback: str) -> Messages:
        """Return the controller's prompt after a plan that led nowhere: the plan and what came of it."""
        complaint = f"This plan failed. {feedback}\n\nWrite a better plan for the same task, in the same format."
        return *self.plan(scene), Message("assistant", plan), Message("user", complaint)

    def retry(self, scene: Scene, plan: str, code: str, feedback: str) -> Messages:
        """Return the generator's prompt after a program that failed: the program and what really happened."""
        complaint = f"{feedback}\n\nCorrect the program and write all of its steps again."
        return *self.solve(scene, plan), Message("assistant", fenced(code)), Message("user", complaint)


PLAN_SYSTEM = """\
You plan household tasks. From what there is in a room and a task, write a general plan in one line and then the \
steps, one a line, each beginning with [Step number]. A step finds an object and takes it, cleans, heats or cools it, \
puts it somewhere, or turns on a lamp; it names the receptacles to try, the most likely first. Follow the format of \
the example and write nothing else."""

API = """\
agent.task, agent.receptacles, agent.location, agent.holding ("" if nothing), agent.seen (receptacle -> objects in it)
agent.go_to(receptacle), agent.open(receptacle), agent.close(receptacle)
agent.take(thing, receptacle)    where you are, from what is open, with nothing in hand
agent.put(thing, receptacle)     where you are, into what is open
agent.clean(thing, receptacle), agent.heat(thing, receptacle), agent.cool(thing, receptacle)
                                 the thing in hand, at a sinkbasin, a microwave or a fridge, open or not
agent.use(thing)                 turns on a lamp where you are
agent.slice(thing, knife), agent.examine(thing), agent.look(), agent.inventory()
    Each of these is one action and returns what the household answers; "Nothing happens." if it is not possible.
agent.places(*kinds)             the receptacles of these types ("cabinet") or names ("cabinet 2"), in this order
agent.visit(receptacle)          goes there, opens it if it is closed, and returns the list of things in it
agent.find(kind, places)         visits these places until a thing of this type is there: (thing, receptacle), or None
agent.ask(question)              the answer of a language model, in words
agent.report()                   the last actions and their answers, in words"""

SOLVE_SYSTEM = """\
You write Python programs that act in a household through an agent. For each step of the plan, your own if none is \
given, write one function: step_1(agent, memory), step_2(agent, memory) and so on; they run in this order. `memory` is \
a dict that keeps plain data for later steps. End each step with an assertion that it has reached its aim. Things and \
receptacles have names such as "mug 1" and "cabinet 2". There are {steps} actions in all.

"""

ACT_SYSTEM = """\
You act in a household, one action at a time. Reply with a line "Think: ..." and then a line "Act: ..." with a command:
go to RECEPTACLE | open RECEPTACLE | close RECEPTACLE | take THING from RECEPTACLE | {put} |
clean THING with RECEPTACLE | heat THING with RECEPTACLE | cool THING with RECEPTACLE | slice THING with THING |
use THING | examine THING | look | inventory
You can hold one thing. "Nothing happens." means that a command was not possible. There are {steps} actions in all."""

ASK_SYSTEM = "You answer questions about a household and where things are in it. Answer briefly."


def fenced(code: str) -> str:
    """Return `code` as a block of a reply."""
    return f"```python\n{code.strip()}\n```"


def with_plan(text: str, plan: str) -> str:
    """Return `text` with the plan below it, if there is one."""
    return f"{text}{PLAN_MARK}{plan}" if plan else text


def ask(question: str) -> Messages:
    """Return the generator's prompt for a question that a program asks."""
    return Message("system", ASK_SYSTEM), Message("user", question)


def act(scene: Scene, plan: str, max_steps: int, verbs: str, example: Messages = ()) -> Messages:
    """Return the generator's prompt for its first direct action. example: a conversation in another household."""
    put = "put THING in/on RECEPTACLE" if verbs == "old" else "move THING to RECEPTACLE"
    system = ACT_SYSTEM.replace("{steps}", str(max_steps)).replace("{put}", put)
    return Message("system", system), *example, Message("user", with_plan(scene.screen, plan))


def full_style(max_steps: int = 50, verbs: str = "current") -> Style:
    """Return the style for instruction-tuned models. max_steps, verbs: of the household, which the models are told."""

    def plan(scene: Scene) -> Messages:
        shot = EXEMPLARS[scene.task_type]
        turns = Message("user", shot.screen), Message("assistant", write_full(shot.steps))
        return Message("system", PLAN_SYSTEM), *turns, Message("user", scene.screen)

    def solve(scene: Scene, plan: str) -> Messages:
        shot = EXEMPLARS[scene.task_type]
        shown = with_plan(shot.screen, write_full(shot.steps) if plan else "")
        turns = Message("user", shown), Message("assistant", fenced(program(shot.steps)))
        system = SOLVE_SYSTEM.replace("{steps}", str(max_steps)) + API
        return Message("system", system), *turns, Message("user", with_plan(scene.screen, plan))

    def direct(scene: Scene, plan: str) -> Messages:
        shot = EXEMPLARS[scene.task_type]
        shown = Message("user", with_plan(shot.screen, write_full(shot.steps) if plan else ""))
        return act(scene, plan, max_steps, verbs, (shown, *acted.turns(scene.task_type, verbs)))

    return Style("full", plan, solve, direct, write_full)
