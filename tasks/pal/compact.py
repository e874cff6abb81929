"""Short prompts for models of a hundred million parameters: chat turns as exemplars, one sub-question a line.

The controller sees two worked examples, written by us and outside the training and test problems. The generator sees no
examples: a model of this size is taught the format (see the embedded generator's README).
"""

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.pal.prompts import PromptStyle

GUIDANCE_SYSTEM = "Split the problem into short steps."
CODE_SYSTEM = "Write solution() from the steps."
EXEMPLARS = (
    (
        "Sue sews 5 shirts. Each shirt needs 3 white and 4 black buttons. How many buttons does Sue need?",
        "How many are 3 and 4 together?\nHow many for 5 times that?",
    ),
    (
        "Max has 60 dollars. He buys 4 hammers at 9 dollars each. How many dollars are left?",
        "How much for 4 at 9 dollars?\nHow much is left from 60 dollars?",
    ),
)


def guidance(question: str) -> Messages:
    """Return the controller's prompt."""
    shots = [turn for q, steps in EXEMPLARS for turn in (Message("user", q), Message("assistant", steps))]
    return (Message("system", GUIDANCE_SYSTEM), *shots, Message("user", question))


def code(question: str, guidance: str) -> Messages:
    """Return the generator's prompt; without guidance it is the bare question."""
    return (Message("system", CODE_SYSTEM), Message("user", f"{question}\n{guidance}".strip()))


def retry(question: str, guidance: str, previous: str, error: str) -> Messages:
    """Return the generator's prompt after code that raised: what it wrote and the real error."""
    return (*code(question, guidance), Message("assistant", previous), Message("user", f"It failed: {error}\nFix it."))


def replan(question: str, previous: str, feedback: str) -> Messages:
    """Return the controller's prompt after its steps led nowhere: the steps and what came of them."""
    again = Message("user", f"These steps failed: {feedback}\nWrite better steps.")
    return (*guidance(question), Message("assistant", previous), again)


COMPACT = PromptStyle("compact", guidance, code, retry, replan)
