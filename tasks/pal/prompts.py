"""The prompts of controller and generator. A `PromptStyle` consists of four functions from texts to messages.

`FULL` is the style for instruction-tuned models of a few billion parameters and more: a system message, three worked
examples, the question. The guidance is a header line and one sub-question a line; the program answers each
sub-question under a comment that repeats it. A retry and a new plan continue the conversation, so the model sees what
it wrote and what really happened.
`COMPACT` is the style for models of about a hundred million parameters: chat turns as exemplars, one sub-question a
line. The controller sees two worked examples, which are in no split. The generator sees none: a model of this size is
taught the format (see the embedded generator's README).
"""

from collections.abc import Callable
from dataclasses import dataclass

from matryoshka.core.records import Message, Messages

HEADER = "Let's break down this problem:"


@dataclass(frozen=True)
class PromptStyle:
    """How one family of models is asked; guidance "" means that there is none.

    guidance(question): asks the controller. code(question, guidance): asks the generator.
    retry(question, guidance, code, error): asks the generator again, with its previous code and the real error.
    replan(question, guidance, feedback): asks the controller again, with its previous guidance.
    """

    name: str
    guidance: Callable[[str], Messages]
    code: Callable[[str, str], Messages]
    retry: Callable[[str, str, str, str], Messages]
    replan: Callable[[str, str, str], Messages]


@dataclass(frozen=True)
class Exemplar:
    """A worked problem: the assignments that state what is given, then (sub-question, line of code) for each step."""

    question: str
    given: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]
    answer: int

    def guidance(self) -> str:
        """Return the header line and the sub-questions, one a line."""
        return "\n".join([HEADER, *(question for question, _ in self.steps)])

    def code(self, commented: bool) -> str:
        """Return `solution()`; `commented` puts every sub-question above the line that answers it."""
        lines = ["# Initialization of variables"] if commented else []
        lines += self.given
        for question, line in self.steps:
            lines += [f"# {question}", line] if commented else [line]
        body = "\n".join(f"    {line}" for line in [f'"""{self.question}"""', *lines, "return result"])
        return f"def solution():\n{body}"


EXEMPLARS = (
    Exemplar(
        "A bakery bakes 24 muffins every morning and 18 every afternoon, and packs them in boxes of 6. "
        "How many boxes does it fill in one day?",
        ("morning_muffins = 24", "afternoon_muffins = 18", "muffins_per_box = 6"),
        (
            ("How many muffins does the bakery bake in one day?", "muffins = morning_muffins + afternoon_muffins"),
            ("How many boxes do these muffins fill?", "result = muffins / muffins_per_box"),
        ),
        7,
    ),
    Exemplar(
        "Nadia earns $14 an hour at the library. Last week she worked 4 hours on each of 5 days and paid $35 for a "
        "train ticket. How much of her pay is left?",
        ("pay_per_hour = 14", "hours_per_day = 4", "days = 5", "ticket = 35"),
        (
            ("How many hours did Nadia work last week?", "hours = hours_per_day * days"),
            ("How much did she earn in these hours?", "earned = hours * pay_per_hour"),
            ("How much is left after she paid for the ticket?", "result = earned - ticket"),
        ),
        245,
    ),
    Exemplar(
        "A tank holds 480 liters of water. The garden takes a quarter of it, and the kitchen takes 90 liters of "
        "the rest. How many liters remain in the tank?",
        ("tank = 480", "garden_share = 1 / 4", "kitchen = 90"),
        (
            ("How many liters does the garden take?", "garden = tank * garden_share"),
            ("How many liters remain after the garden and the kitchen?", "result = tank - garden - kitchen"),
        ),
        270,
    ),
)

_GUIDANCE_SYSTEM = (
    "You split a math word problem into smaller questions that lead to its answer. "
    "Follow the format of the examples and write nothing else."
)
_CODE_SYSTEM = (
    "You solve math word problems by writing a Python function solution() that returns the answer as a number."
)
_GUIDED_SYSTEM = _CODE_SYSTEM + " Above each step a comment repeats the sub-question that the step answers."


def _fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _guidance(question: str) -> Messages:
    shots = "".join(f"Q: {shot.question}\nA: {shot.guidance()}\n\n" for shot in EXEMPLARS)
    return Message("system", _GUIDANCE_SYSTEM), Message("user", f"{shots}Q: {question}\nA:")


def _code(question: str, guidance: str) -> Messages:
    guided = bool(guidance)
    shots = "".join(
        f"Q: {shot.question}\n" + (f"{shot.guidance()}\n" if guided else "") + f"{_fenced(shot.code(guided))}\n\n"
        for shot in EXEMPLARS
    )
    asked = f"Now write solution() for this question.\nQ: {question}" + (f"\n{guidance}" if guided else "")
    return Message("system", _GUIDED_SYSTEM if guided else _CODE_SYSTEM), Message("user", shots + asked)


def _retry(question: str, guidance: str, code: str, error: str) -> Messages:
    complaint = f"This is what happened when I ran it:\n{error}\n\nCorrect it and write the whole function again."
    return *_code(question, guidance), Message("assistant", _fenced(code)), Message("user", complaint)


def _replan(question: str, guidance: str, feedback: str) -> Messages:
    complaint = (
        f"A program written from this plan failed:\n{feedback}\n\n"
        f"The plan may be mistaken. Write a better one for the same question, in the same format."
    )
    return *_guidance(question), Message("assistant", guidance), Message("user", complaint)


FULL = PromptStyle("full", _guidance, _code, _retry, _replan)

# The style "compact".

COMPACT_GUIDANCE_SYSTEM = "Split the problem into short steps."
COMPACT_CODE_SYSTEM = "Write solution() from the steps."
COMPACT_EXEMPLARS = (
    (
        "Sue sews 5 shirts. Each shirt needs 3 white and 4 black buttons. How many buttons does Sue need?",
        "How many are 3 and 4 together?\nHow many for 5 times that?",
    ),
    (
        "Max has 60 dollars. He buys 4 hammers at 9 dollars each. How many dollars are left?",
        "How much for 4 at 9 dollars?\nHow much is left from 60 dollars?",
    ),
)


def _compact_guidance(question: str) -> Messages:
    shots = [turn for q, steps in COMPACT_EXEMPLARS for turn in (Message("user", q), Message("assistant", steps))]
    return (Message("system", COMPACT_GUIDANCE_SYSTEM), *shots, Message("user", question))


def _compact_code(question: str, guidance: str) -> Messages:
    return (Message("system", COMPACT_CODE_SYSTEM), Message("user", f"{question}\n{guidance}".strip()))


def _compact_retry(question: str, guidance: str, previous: str, error: str) -> Messages:
    complaint = Message("user", f"It failed: {error}\nFix it.")
    return (*_compact_code(question, guidance), Message("assistant", previous), complaint)


def _compact_replan(question: str, previous: str, feedback: str) -> Messages:
    again = Message("user", f"These steps failed: {feedback}\nWrite better steps.")
    return (*_compact_guidance(question), Message("assistant", previous), again)


COMPACT = PromptStyle("compact", _compact_guidance, _compact_code, _compact_retry, _compact_replan)
STYLES = {style.name: style for style in (FULL, COMPACT)}
