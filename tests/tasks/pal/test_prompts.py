"""The prompts of style `full`: every worked example is executed, and every text has the documented structure."""

import asyncio
import os

import pytest

from matryoshka.core.records import Messages
from matryoshka.tasks.pal.prompts import EXEMPLARS, FULL, HEADER, Exemplar
from matryoshka.tasks.sandbox import extract_code, run_solution

QUESTION = "Tom has 3 cats. How many paws are there?"
GUIDANCE = f"{HEADER}\nHow many paws does one cat have?\nHow many paws do they have together?"


def text_of(messages: Messages) -> str:
    return "\n".join(message.content for message in messages)


@pytest.mark.parametrize("shot", EXEMPLARS, ids=lambda shot: str(shot.answer))
@pytest.mark.parametrize("commented", [True, False])
def test_every_worked_program_gives_the_answer(shot: Exemplar, commented: bool) -> None:
    """Oracle: the answers, worked out by hand: (24 + 18) / 6 = 7; 4 * 5 * 14 - 35 = 245; 480 - 120 - 90 = 270."""
    outcome = asyncio.run(run_solution(shot.code(commented), 5.0, 256 * 2**20))
    assert outcome.error is None and outcome.value == shot.answer


def test_worked_answers_by_hand() -> None:
    assert [shot.answer for shot in EXEMPLARS] == [(24 + 18) / 6, 4 * 5 * 14 - 35, 480 - 480 / 4 - 90]


@pytest.mark.parametrize("shot", EXEMPLARS, ids=lambda shot: str(shot.answer))
def test_structure_of_a_worked_example(shot: Exemplar) -> None:
    """Header, one sub-question a line; docstring with the question, one comment per sub-question in order, result."""
    header, *questions = shot.guidance().split("\n")
    assert header == HEADER and len(questions) >= 2 and all(line.endswith("?") for line in questions)
    lines = shot.code(commented=True).split("\n")
    assert (
        lines[0] == "def solution():" and lines[1] == f'    """{shot.question}"""' and lines[-1] == "    return result"
    )
    comments = [line.strip()[2:] for line in lines if line.strip().startswith("#")]
    assert comments == ["Initialization of variables", *questions]
    assert "#" not in shot.code(commented=False)


def test_prompts_without_guidance_show_none() -> None:
    """The baseline without a controller sees neither sub-questions nor the comments that repeat them."""
    plain, guided = text_of(FULL.code(QUESTION, "")), text_of(FULL.code(QUESTION, GUIDANCE))
    for shot in EXEMPLARS:
        for sub_question, _ in shot.steps:
            assert sub_question not in plain and guided.count(sub_question) == 2
    assert HEADER not in plain and guided.endswith(f"Q: {QUESTION}\n{GUIDANCE}") and plain.endswith(f"Q: {QUESTION}")


def test_a_retry_has_the_previous_code_the_guidance_and_the_error() -> None:
    code, error = "def solution():\n    return 3 * paws", "NameError: name 'paws' is not defined"
    retry = FULL.retry(QUESTION, GUIDANCE, code, error)
    assert retry[:2] == FULL.code(QUESTION, GUIDANCE)
    assert [message.role for message in retry] == ["system", "user", "assistant", "user"]
    assert extract_code(retry[2].content).strip() == code and error in retry[3].content


def test_a_new_plan_has_the_previous_one_and_the_feedback() -> None:
    replan = FULL.replan(QUESTION, GUIDANCE, "ZeroDivisionError: division by zero")
    assert replan[:2] == FULL.guidance(QUESTION) and replan[2].content == GUIDANCE
    assert "ZeroDivisionError: division by zero" in replan[3].content


def test_prompts_of_different_questions_share_their_beginning() -> None:
    """What makes the prefix tree pay: everything up to the question is the same text."""
    one, other = FULL.guidance("Why?"), FULL.guidance("How?")
    assert one[0] == other[0]
    shared = os.path.commonprefix([one[1].content, other[1].content])
    assert len(shared) == len(one[1].content) - len("Why?\nA:")
