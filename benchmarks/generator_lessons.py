"""The step language of the embedded generator: which sub-question means which expression. Its training data only.

The embedded generator is a translator: one line of code per step, as the step says, right or wrong. So it is good with
good steps and poor without them, and a controller's worth shows. It is taught on gold steps and, under the same
questions, on random steps with the program that follows them to the letter.
"""

import random
from dataclasses import dataclass

from matryoshka.core.records import stable_seed
from matryoshka.tasks.pal.synthetic_problems import ITEMS, Problem, problems, program

# {x}, {y}: numbers. {last}: name of the previous line's result; {before}: of the line before that.
OPENING = (
    ("How many {item} in {x} boxes of {y}?", "{x} * {y}"),
    ("How much for {x} at {y} dollars?", "{x} * {y}"),
    ("How many are {x} times {y}?", "{x} * {y}"),
    ("How many are {x} and {y} together?", "{x} + {y}"),
    ("How many are {y} more than {x}?", "{x} + {y}"),
    ("How many of {x} are left after losing {y}?", "{x} - {y}"),
    ("How many are {y} fewer than {x}?", "{x} - {y}"),
    ("How much is {y} less than {x} dollars?", "{x} - {y}"),
    ("How many are half of {x}?", "{x} / 2"),
    ("How many of {x} for each of {y}?", "{x} / {y}"),
)
FOLLOWING = (
    ("How many with {x} more?", "{last} + {x}"),
    ("How many with the first {x}?", "{last} + {x}"),
    ("How many are left after losing {x}?", "{last} - {x}"),
    ("How much is left after spending {x}?", "{last} - {x}"),
    ("How much is left from {x} dollars?", "{x} - {last}"),
    ("How many for {x} times that?", "{last} * {x}"),
    ("How many for each of {x}?", "{last} / {x}"),
    ("How many are half of that?", "{last} / 2"),
)
CLOSING = (("How much are both together?", "{before} + {last}"),)


@dataclass(frozen=True)
class Lesson:
    """One training example of the generator: steps and the program that follows them, under a question."""

    question: str
    steps: str
    program: str


def lessons(num_questions: int, seed: int) -> list[Lesson]:
    """Return three lessons for each of `num_questions` training problems: the gold steps, and twice random steps."""
    draws = random.Random(stable_seed("lessons", seed))
    rows = []
    for problem in problems("train", num_questions, seed):
        rows.append(Lesson(problem.question, "\n".join(problem.steps), problem.program))
        rows += [_random_lesson(problem, draws) for _ in range(2)]
    return rows


def _random_lesson(problem: Problem, draws: random.Random) -> Lesson:
    numbers = [*problem.numbers, draws.randint(2, 99), draws.randint(2, 20)]
    steps: list[str] = []
    expressions: list[str] = []
    for line in range(draws.choice((1, 2, 2, 2, 3))):
        forms: tuple[tuple[str, str], ...] = OPENING
        if line:
            forms = draws.choices((OPENING, FOLLOWING, CLOSING), (1, 5, 1))[0]
        if forms is CLOSING and line < 2:
            forms = FOLLOWING
        step, expression = draws.choice(forms)
        x, y = draws.choice(numbers), draws.choice(numbers)
        words = {
            "x": x,
            "y": y,
            "item": draws.choice(ITEMS),
            "last": chr(ord("a") + line - 1),
            "before": chr(ord("a") + line - 2),
        }
        steps.append(step.format(**words))
        expressions.append(expression.format(**words))
    return Lesson(problem.question, "\n".join(steps), program(expressions))
