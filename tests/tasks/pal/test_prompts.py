"""The prompts of style `full`: every worked example is executed, and every text has the documented structure."""

import asyncio
import os
import re
from pathlib import Path

import pytest

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.pal.task import open_prompts
from matryoshka.tasks.sandbox import extract_code, run_solution
from matryoshka.tests.tasks.pal import requests

FULL = open_prompts("full")
HEADER, EXEMPLARS = FULL.values["header"], FULL.values["exemplars"]
QUESTION = "Tom has 3 cats. How many paws are there?"
GUIDANCE = f"{HEADER}\nHow many paws does one cat have?\nHow many paws do they have together?"


def text_of(messages: Messages) -> str:
    return "\n".join(message.content for message in messages)


@pytest.mark.parametrize("guidance", ["", GUIDANCE], ids=["plain", "guided"])
def test_every_worked_program_gives_the_answer(guidance: str) -> None:
    """Oracle: the answers, worked out by hand: (24 + 18) / 6 = 7; 4 * 5 * 14 - 35 = 245; 480 - 120 - 90 = 270."""
    programs = re.findall(r"```python\n(.*?)\n```", text_of(requests.code(FULL, QUESTION, guidance)), re.DOTALL)
    values = [asyncio.run(run_solution(program, 5.0, 256 * 2**20)).value for program in programs]
    assert values == [(24 + 18) / 6, 4 * 5 * 14 - 35, 480 - 480 / 4 - 90]
    for program, shot in zip(programs, EXEMPLARS, strict=True):
        lines = program.split("\n")
        assert lines[:2] == ["def solution():", f'    """{shot["question"]}"""'] and lines[-1] == "    return result"
        comments = [line.strip()[2:] for line in lines if line.strip().startswith("#")]
        questions = [question for question, _ in shot["steps"]]
        assert comments == (["Initialization of variables", *questions] if guidance else [])


def test_prompts_without_guidance_show_none() -> None:
    """Oracle: the texts. The baseline without a controller sees neither sub-questions nor the comments that repeat
    them.
    """
    plain, guided = text_of(requests.code(FULL, QUESTION, "")), text_of(requests.code(FULL, QUESTION, GUIDANCE))
    for shot in EXEMPLARS:
        for sub_question, _ in shot["steps"]:
            assert sub_question.endswith("?") and sub_question not in plain and guided.count(sub_question) == 2
            assert f"{HEADER}\n{shot['steps'][0][0]}\n" in text_of(FULL.render("guidance", question=QUESTION))
    assert HEADER not in plain and guided.endswith(f"Q: {QUESTION}\n{GUIDANCE}") and plain.endswith(f"Q: {QUESTION}")


def test_gold_guidance_has_the_form_that_the_prompt_asks_for(tmp_path: Path) -> None:
    """Oracle: the worked examples of the prompt itself: a header in "full", none in "compact", the default for a file.

    A warm-up on gold teaches these texts, so they must be what the prompt asks for.
    """
    shot = EXEMPLARS[0]
    steps = [question for question, _ in shot["steps"]]
    assert f"A: {FULL.text('written', steps=steps)}\n\n" in FULL.render("guidance", question=QUESTION)[1].content
    compact = open_prompts("compact")
    said = compact.render("guidance", question=QUESTION)[2].content
    assert compact.text("written", steps=said.split("\n")) == said
    (tmp_path / "mine.toml").write_text(OWN)
    assert open_prompts(str(tmp_path / "mine.toml")).text("written", steps=["a?", "b?"]) == "a?\nb?"


def test_a_retry_has_the_previous_code_the_guidance_and_the_error() -> None:
    """Oracle: the messages of a retry: the first request, the earlier code, the error."""
    code, error = "def solution():\n    return 3 * paws", "NameError: name 'paws' is not defined"
    retry = requests.retry(FULL, QUESTION, GUIDANCE, code, error)
    assert retry[:2] == requests.code(FULL, QUESTION, GUIDANCE)
    assert [message.role for message in retry] == ["system", "user", "assistant", "user"]
    assert extract_code(retry[2].content).strip() == code and error in retry[3].content


def test_a_new_plan_has_the_previous_one_and_the_feedback() -> None:
    """Oracle: the messages of a new plan: the first request, the earlier plan, the feedback."""
    replan = requests.replan(FULL, QUESTION, GUIDANCE, "ZeroDivisionError: division by zero")
    assert replan[:2] == FULL.render("guidance", question=QUESTION) and replan[2].content == GUIDANCE
    assert "ZeroDivisionError: division by zero" in replan[3].content


def test_prompts_of_different_questions_share_their_beginning() -> None:
    """Oracle: the texts. All of a prompt up to the question is the same, which makes the prefix tree pay."""
    one, other = FULL.render("guidance", question="Why?"), FULL.render("guidance", question="How?")
    assert one[0] == other[0]
    shared = os.path.commonprefix([one[1].content, other[1].content])
    assert len(shared) == len(one[1].content) - len("Why?\nA:")


OWN = """
greeting = "Hello"
[[guidance]]
role = "user"
content = "{{ greeting }}, split: {{ question }}"
[[code]]
role = "user"
content = "{{ question }} {{ guidance }}"
[[retry]]
role = "user"
content = "{{ error }}"
[[replan]]
role = "user"
content = "{{greeting}}, {{ feedback }}"
"""


def test_a_user_s_own_prompts_are_a_file(tmp_path: Path) -> None:
    """Oracle: by hand. Another text has another name, so its episodes are other ones; shipped styles keep names."""
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    own = open_prompts(str(path))
    (message,) = own.render("guidance", question="1 + 1?")
    assert message == Message("user", "Hello, split: 1 + 1?")
    assert requests.retry(own, "q", "g", "c", "e")[-1].content == "e"
    path.write_text(OWN.replace("Hello", "Hi"))
    assert own.name.startswith("mine-") and own.name != open_prompts(str(path)).name
    assert [open_prompts(name).name for name in ("compact", "full")] == ["compact", "full"]
    path.write_text(OWN, encoding="utf-8-sig")  # with a byte order mark it is the same file
    assert open_prompts(str(path)).name == own.name


@pytest.mark.parametrize("hostile", ["{{ 7 * 7 }}", "{% for x in y %}", "{{ ''.__class__ }}", "[[code]]\nrole = 'x'"])
def test_a_question_is_never_read_as_a_template(hostile: str) -> None:
    """Oracle: the text itself, in every request."""
    for style in (FULL, open_prompts("compact")):
        first = style.render("guidance", question=hostile)
        later = requests.code(style, hostile, hostile), requests.retry(style, "q", "g", hostile, hostile)
        assert all(hostile in text_of(messages) for messages in (first, *later))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[retry]]", "[[retries]]"), r"mine\.toml: \[\[retry\]\] is missing; expected one table for each message"),
        (('role = "user"', 'role = "robot"'), r"mine\.toml: \[\[guidance\]\]: got .*robot.*; expected the keys role"),
        (("{{ greeting }}", "{{ greeting"), r"mine\.toml: "),
        (("{{ greeting }}", "{{ greeting }} {{ you }}"), r"mine\.toml: \[\[guidance\]\]: 'you' is undefined"),
        (("greeting =", "greetings ="), r"mine\.toml: no template uses the key 'greetings'; did you mean 'greeting'\?"),
        (("greeting =", "writen = ''\ngreeting ="), r"mine\.toml: .* key 'writen'; did you mean 'written'\?"),
        (("{{ greeting }}", "{{ ''.__class__.__mro__ }}"), r"mine\.toml: \[\[guidance\]\]: access to attribute"),
        (("greeting =", "greeting"), r"mine\.toml: "),
        (("Hello", "H\udcff"), r"mine\.toml: 'utf-8' codec can't decode"),
        (('greeting = "Hello"', f"greeting = {'[' * 3000}"), r"mine\.toml: .*(recursion|nest)"),
        (('greeting = "Hello"', f"greeting = {'9' * 5000}"), r"mine\.toml: Exceeds the limit"),
        (("{{ greeting }}", "{{ greetings | shout }}"), r"mine\.toml: No filter named 'shout'"),
        (("{{ greeting }}", "{% include 'other.txt' %}"), r"mine\.toml: \[\[guidance\]\]: no loader"),
        (("{{ greeting }}", "{{ greeting + 1 }}"), r"mine\.toml: \[\[guidance\]\]: can only concatenate"),
        (("{{ greeting }}", "{{ 1 / 0 }}"), r"mine\.toml: \[\[guidance\]\]: division by zero"),
        (("{{ greeting }}", "{{ '{} {}'.format(1) }}"), r"mine\.toml: \[\[guidance\]\]: .*out of range"),
        (("{{ greeting }}", "{% for i in range(10**9) %}{% endfor %}"), r"mine\.toml: \[\[guidance\]\]: Range too big"),
        (("{{ greeting }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), r"\[\[guidance\]\]: .*recursion"),
        (
            ('role = "user"\ncontent = "{{ greeting }}, split: {{ question }}"', 'insert = "question"'),
            r"mine\.toml: \[\[guidance\]\]: there are no messages 'question' to insert here",
        ),
        (
            ('[[guidance]]\nrole = "user"\ncontent = "{{ greeting }}, split: {{ question }}"', "guidance = []"),
            r"mine\.toml: \[\[guidance\]\] is missing; expected one table for each message",
        ),
        (("greeting", "written = 3\ngreeting"), r"mine\.toml: written is 3; expected a text"),
    ],
)
def test_what_is_wrong_with_a_prompt_file_is_said(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    """Oracle: each message by hand."""
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(*change, 1), errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        open_prompts(str(path)).render("guidance", question="q")
    with pytest.raises(FileNotFoundError, match="'fall': no such file; expected compact, full, published or the path"):
        open_prompts("fall")
