"""The embedded word problems: splits that share nothing, gold steps and programs that are right, the step language."""

import asyncio
import re
from itertools import islice, product

import pytest

from matryoshka.benchmarks.generator_lessons import lessons
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Messages, RolloutSettings, Sample, Sampling
from matryoshka.eval.baselines import NoGuidance
from matryoshka.tasks.pal import synthetic_problems as words
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.pal.task import PALTask, open_prompts
from matryoshka.tasks.sandbox import extract_code, run_solution
from matryoshka.tasks.sandbox_config import SandboxConfig
from matryoshka.tests.tasks.pal import requests

COMPACT = open_prompts("compact")
SHOTS = [message.content for message in COMPACT.render("guidance", question="Q?")[1:-1]]
COMPACT_EXEMPLARS = list(zip(SHOTS[::2], SHOTS[1::2], strict=True))
MEMORY = 512 * 2**20
MANY = {split: words.problems(split, 300, 0) for split in words.SPLITS}


def skeleton(question: str) -> str:
    """Return the wording of a question: every number, name and item is replaced."""
    text = re.sub(r"\d+", "#", question)
    for kind, choices in (("NAME", words.NAMES), ("ITEM", words.ITEMS)):
        text = re.sub(rf"\b({'|'.join(choices)})\b", kind, text)
    return text


def ran(program: str) -> float | int | None:
    return asyncio.run(run_solution(program, 30.0, MEMORY)).value


def test_no_wording_and_no_numbers_of_one_split_occur_in_another() -> None:
    """Oracle: wordings recovered from the questions, (family, numbers) from the records; all pairwise disjoint."""
    wordings = {split: {skeleton(p.question) for p in rows} for split, rows in MANY.items()}
    numbers = {split: {(p.family, p.numbers) for p in rows} for split, rows in MANY.items()}
    for split in words.SPLITS:
        for other in words.SPLITS[words.SPLITS.index(split) + 1 :]:
            assert not wordings[split] & wordings[other], (split, other)
            assert not numbers[split] & numbers[other], (split, other)
    assert min(len(found) for found in wordings.values()) >= 4  # the comparison is not of single wordings


def test_every_wording_of_every_family_has_one_split() -> None:
    """Oracle: all combinations of clauses, used or not; every family has some in each split, and none comes twice."""
    listed = []
    for family in words.FAMILIES:
        wordings = list(product(*family.clauses))
        listed += [" ".join(clauses) for clauses in wordings]
        assert {words.partition(family.name, clauses) for clauses in wordings} >= {"train", "test"}
    assert len(set(listed)) == len(listed)


def test_two_families_are_held_out_whole() -> None:
    """Oracle: the records; no lesson of the generator has one of their wordings."""
    assert {p.family for p in MANY["held_out"]} == set(words.HELD_OUT) and len(words.HELD_OUT) == 2
    others = {family.name for family in words.FAMILIES} - set(words.HELD_OUT)
    for split in ("train", "validation", "test"):
        assert {p.family for p in MANY[split]} == others
    held_out = {skeleton(p.question) for p in MANY["held_out"]}
    assert not held_out & {skeleton(lesson.question) for lesson in lessons(300, 0)}


def test_a_split_is_a_pure_function_of_the_seed() -> None:
    """Invariants: equal again; another seed, another draw; a longer list begins with the shorter; no question twice."""
    for split, rows in MANY.items():
        assert words.problems(split, 300, 0) == rows
        assert words.problems(split, 40, 0) == rows[:40]
        assert words.problems(split, 40, 1) != rows[:40]
        assert len({p.question for p in rows}) == len(rows) == len({e.id for e in words.load(split, 300, 0)})
    with pytest.raises(ValueError, match="unknown split 'dev'; choose from"):
        words.problems("dev", 1, 0)


def test_every_step_names_its_line_and_every_number_is_asked_for() -> None:
    """Invariants over all splits: one step a line; the question shows the numbers; answers are whole and positive."""
    for rows in MANY.values():
        for p in rows:
            assert len(p.steps) == len(p.expressions) == len(p.program.splitlines()) - 2
            assert p.answer > 0 and p.answer == int(p.answer)
            shown = [int(text) for text in re.findall(r"\d+", p.question)]
            assert sorted(shown) == sorted(p.numbers), p.question
            assert "{" not in p.question + "".join(p.steps)
            for step, expression in zip(p.steps, p.expressions, strict=True):
                used = set(re.findall(r"\d+", expression))
                assert used == set(re.findall(r"\d+", step)), (step, expression)


@pytest.mark.parametrize("family", words.FAMILIES, ids=lambda family: family.name)
def test_gold_programs_give_the_answer(family: words.Family) -> None:
    """Oracle: the sandbox, that is Python itself, against our own arithmetic; two problems of each family and split."""
    splits = ["held_out"] if family.name in words.HELD_OUT else ["train", "validation", "test"]
    for split in splits:
        for p in islice((p for p in MANY[split] if p.family == family.name), 2):
            assert ran(p.program) == p.answer


def test_programs_by_hand() -> None:
    """Oracle: written out; later lines use earlier results."""
    assert words.program(["4 * 6", "a - 5"]) == "def solution():\n    a = 4 * 6\n    b = a - 5\n    return b"
    assert words.results(["4 * 6", "a - 5"]) == [24, 19]
    assert words.results(["2 * 3", "4 * 5", "a + b"]) == [6, 20, 26]
    assert words.results(["2 + 4", "a / 3"]) == [6, 2]


class Says:
    """A generator with one answer."""

    name = "says"

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[Messages] = []

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        self.asked.append(prompt)
        return Sample(self.text)


def test_gold_is_worth_one_and_garbage_nothing() -> None:
    """Oracle: reward(gold program) = 1; another problem's program, prose and an error are worth 0."""
    first, second = words.load("test", 2, 0)
    task = PALTask(PalOptions(sandbox=SandboxConfig(timeout_s=30.0)), TaskSetting({}))
    assert first.fields["answer"] != second.fields["answer"]
    for text, reward in (
        (first.fields["program"], 1.0),
        (second.fields["program"], 0.0),
        ("I do not know.", 0.0),
        ("def solution():\n    return nothing", 0.0),
    ):
        trajectory = asyncio.run(task.rollout(first, NoGuidance(), Says(text), RolloutSettings()))
        assert trajectory.reward == reward


def test_compact_prompts_are_short_chats() -> None:
    """Oracle: the messages by hand; every turn alternates, the question stands last."""
    guidance = COMPACT.render("guidance", question="Q?")
    assert [m.role for m in guidance] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert guidance[-1].content == "Q?" and guidance[1].content == COMPACT_EXEMPLARS[0][0]
    code = requests.code(COMPACT, "Q?", "How much?")
    assert [m.content for m in code] == ["Write solution() from the steps.", "Q?\nHow much?"]
    assert requests.code(COMPACT, "Q?", "")[-1].content == "Q?"
    retry = requests.retry(COMPACT, "Q?", "g", "old", "NameError")
    assert retry[:2] == requests.code(COMPACT, "Q?", "g") and [m.role for m in retry[2:]] == ["assistant", "user"]
    assert retry[2].content == "old" and "NameError" in retry[3].content
    replan = requests.replan(COMPACT, "Q?", "old steps", "NameError")
    assert replan[:6] == guidance and replan[6].content == "old steps" and "NameError" in replan[7].content


def test_exemplars_stand_outside_the_problems() -> None:
    """Oracle: their wordings are none of ours, and their steps are in the language that the generator is taught."""
    wordings = {skeleton(p.question) for rows in MANY.values() for p in rows}
    for question, steps in COMPACT_EXEMPLARS:
        assert skeleton(question) not in wordings
        assert len(steps.splitlines()) == 2


def test_lessons_translate_their_steps_line_by_line() -> None:
    """Invariants: a line a step, with the step's numbers; the gold lesson is the problem; random ones mostly differ."""
    rows = lessons(40, 3)
    assert rows == lessons(40, 3) != lessons(40, 4)
    for index, lesson in enumerate(rows):
        lines = lesson.program.splitlines()
        steps = lesson.steps.splitlines()
        assert len(lines) == len(steps) + 2 and lines[0] == "def solution():"
        assert [line.strip()[:4] for line in lines[1:-1]] == [f"{chr(97 + i)} = " for i in range(len(steps))]
        assert lines[-1] == f"    return {chr(96 + len(steps))}"
        for step, line in zip(steps, lines[1:-1], strict=True):
            # "half" is the only number that is said in words.
            numbers = re.findall(r"\d+", step) + ["2"] * ("half" in step)
            assert sorted(numbers) == sorted(re.findall(r"\d+", line)), (step, line)
        if index % 3 == 0:
            problem = words.problems("train", 40, 3)[index // 3]
            assert (lesson.question, lesson.steps) == (problem.question, "\n".join(problem.steps))
            assert lesson.program == problem.program and extract_code(lesson.program) == lesson.program
    gold, random_ones = rows[::3], [row for index, row in enumerate(rows) if index % 3]
    assert len({row.steps for row in random_ones} - {row.steps for row in gold}) > 70


def test_every_step_of_the_problems_is_taught_with_the_same_meaning() -> None:
    """Invariant: a step form that stands in two places means the same operation everywhere, lessons included."""
    meaning: dict[str, set[str]] = {}
    problems = [p for rows in MANY.values() for p in rows]
    pairs = [pair for p in problems for pair in zip(p.steps, p.expressions, strict=True)]
    taught: set[str] = set()
    for lesson in lessons(200, 0):
        taught.update(map(skeleton, lesson.steps.splitlines()))
        lines = [line.split(" = ")[1] for line in lesson.program.splitlines()[1:-1]]
        pairs += zip(lesson.steps.splitlines(), lines, strict=True)
    for step, expression in pairs:
        kind = re.sub(r"\b[a-z]\b", "last", re.sub(r"\d+", "#", expression))
        meaning.setdefault(skeleton(step), set()).add(kind)
    assert {step: kinds for step, kinds in meaning.items() if len(kinds) > 1} == {}
    assert {skeleton(step) for p in problems for step in p.steps} <= taught
