"""tasks/lamp/prompt_style.py: the token budget against trying every length, and the place of each text."""

import random
import time
from collections.abc import Sequence

import pytest

from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Messages
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.tasks.lamp.options import LampOptions
from matryoshka.tasks.lamp.prompt_style import Line, answer, joined, line, open_prompts, summarise
from matryoshka.tasks.lamp.scripted_generator import HISTORY, KNOWN
from matryoshka.tasks.lamp.task import LampTask
from matryoshka.tasks.lamp.task_specs import KINDS

NEWS, PAPERS = KINDS["2N"], KINDS["1"]


def letters(prompt: Messages) -> int:
    return len(prompt[-1].content)


def request(lines: Sequence[Line]) -> str:
    return summarise(NEWS, lines, lambda prompt: 0, 0).prompt[-1].content


def test_as_many_lines_as_the_budget_allows() -> None:
    """Oracle: every number of lines tried; one letter more would not fit, and dropped entries are counted."""
    draws = random.Random(0)
    lines = [("x" * draws.randint(0, 30), "sports") for _ in range(25)]
    base = len(request([]))
    for budget in range(base, len(request(lines)) + 3, 7):
        fitted = summarise(NEWS, lines, letters, budget)
        whole = [n for n in range(1, 26) if len(request(lines[:n])) <= budget]
        if whole:
            assert fitted.prompt[-1].content == request(lines[: max(whole)])
            assert (fitted.dropped, fitted.cut) == (25 - max(whole), False)
        else:
            assert fitted.cut and letters(fitted.prompt) <= budget


def test_one_over_long_entry_is_cut_and_keeps_its_value() -> None:
    """Oracle: the cut prompt takes exactly the budget; with room for no letter the history is empty, not an error."""
    value, empty = "v" * 40, len(request([]))
    fitted = summarise(NEWS, [("y" * 1000, value)], letters, empty + 100)
    assert letters(fitted.prompt) == empty + 100 and fitted.prompt[-1].content.endswith(f"y => {value}")
    assert (fitted.dropped, fitted.cut) == (0, True)
    tight = summarise(NEWS, [("y" * 1000, value)], letters, empty + 30)
    assert tight.prompt[-1].content == request([]) and (tight.dropped, tight.cut) == (1, True)
    with pytest.raises(ValueError, match=f"takes {empty} tokens without any history, more than prompt_tokens 5"):
        summarise(NEWS, [("y", value)], letters, 5)


def test_the_budget_is_exact_in_the_controller_s_own_tokens(smollm2: Tokenizer) -> None:
    """Oracle: the rendered chat, counted; the next line, or the next letter of a cut one, would be too much."""

    def count(prompt: Messages) -> int:
        return len(smollm2.render(prompt, add_generation_prompt=True).ids)

    lines = [(f"Notes on {'rivers and hills ' * (i % 5 + 1)}", "travel") for i in range(30)]
    fitted = summarise(NEWS, lines, count, 200)
    kept = 30 - fitted.dropped
    assert count(fitted.prompt) <= 200 < count(summarise(NEWS, lines[: kept + 1], count, 4000).prompt)
    long = [("quiet green rivers " * 60_000, "travel")]  # more than a megabyte
    start = time.thread_time()
    cut = summarise(NEWS, [line(NEWS, {"title": "", "text": long[0][0], "category": "travel"}, 2000)[0]], count, 100)
    assert cut.cut and 95 <= count(cut.prompt) <= 100 and time.thread_time() - start < 5


def test_lines_of_all_tasks() -> None:
    """Oracle: by hand: blanks are single, empty fields leave nothing, long parts are cut and that is said."""
    assert line(PAPERS, {"title": "A\n b", "abstract": "no"}, 99) == (("A b", ""), False)
    assert line(NEWS, {"title": "", "text": " x ", "category": "sports"}, 99) == (("x", "sports"), False)
    assert line(NEWS, {"title": "T", "text": "x", "category": "sports"}, 3) == (("T. ", "spo"), True)
    assert line(KINDS["4"], {"title": "H", "text": "body"}, 99) == (("body", "H"), False)
    assert joined([("a", "1"), ("b", "")]) == "a => 1\nb"


def test_the_question_is_left_out_unless_asked_for() -> None:
    """Oracle: by hand."""
    question, lines = NEWS.ask("ZEBRA"), [("x", "sports")]
    assert "ZEBRA" not in summarise(NEWS, lines, letters, 4000).prompt[-1].content
    assert summarise(NEWS, lines, letters, 4000, question).prompt[-1].content.endswith(f"The question is: {question}")
    assert "(no history)" in summarise(NEWS, [], letters, 4000).prompt[-1].content


def test_the_generator_sees_guidance_history_and_question() -> None:
    """Oracle: by hand; without either part it is the question alone."""
    question = NEWS.ask("X")
    (message,) = answer(NEWS, question, "sports: X", [("a", "crime")])
    lines = ["sports: X", HISTORY, "a => crime", f"The question is: {question}"]
    assert message.content.split(f"{KNOWN}\n")[1] == "\n".join(lines)
    assert [m.content for m in answer(NEWS, question, "", [])] == [f"The question is: {question}"]


def test_the_published_form_is_a_single_message_without_the_question() -> None:
    """Oracle: the structure of the original, by hand: entries joined by ", and ", summary, question, reminder."""
    published = open_prompts("published")
    (asked,) = summarise(NEWS, [("a", "sports"), ("b", "crime")], letters, 4000, prompts=published).prompt
    assert asked.role == "user" and asked.content.endswith('"a" (sports), and "b" (crime)')
    (answered,) = answer(KINDS["4"], "Q?", "X wins", prompts=published)
    said = "Template: X wins\nThe question is: Q?\nOutput only the headline."
    assert answered.content.partition("Output only the headline.\n")[2] == said
    assert [m.content for m in answer(NEWS, "Q?", "", prompts=published)] == ["The question is: Q?"]
    task = LampTask(LampOptions(prompts="published"), TaskSetting({}))
    assert task.name == f"{LampTask(LampOptions(), TaskSetting({})).name}-published"
