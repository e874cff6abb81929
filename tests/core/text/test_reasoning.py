"""core/text/reasoning.py and the parsing of every task: a model's thoughts are no part of its answer."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Example, Messages, RolloutSettings, Sample, Sampling
from matryoshka.core.text.reasoning import without_reasoning
from matryoshka.tasks.alfworld.react import action_in
from matryoshka.tasks.episode import Guidance, Reply
from matryoshka.tasks.lamp.rewards import judge
from matryoshka.tasks.lamp.task_specs import KINDS
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.pal.task import PALTask
from matryoshka.tasks.sandbox_config import SandboxConfig

# Each: how a model thinks aloud around its answer, {} standing for the thought and ANSWER for the answer.
FORMS = {
    "a block": "<think>{}</think>ANSWER",
    "a block on lines of its own": "<think>\n{}\n</think>\n\nANSWER",
    "the opening tag stood in the prompt": "{}\n</think>\n\nANSWER",
    "capitals and blanks": "<Think >{}</ THINK>ANSWER",
    "another name": "<reasoning>{}</reasoning> ANSWER",
    "two blocks": "<think>{}</think>\n<think>{}</think>\nANSWER",
    "a block in a block": "<think>{} <think>{}</think> {}</think>ANSWER",
    "square brackets": "[THINK]{}[/THINK]ANSWER",
    "Kimi's marks": "\u25c1think\u25b7{}\u25c1/think\u25b7ANSWER",
    "a block behind the answer": "ANSWER\n<think>{}</think>",
    "a second thought that the token limit cut": "ANSWER<think>{}",
    "a thought that speaks of its own end": "<think>{} I write </think> at the end. {}</think>ANSWER",
    "an answer in a block of its own": "<think>{}</think>\n<answer>\nANSWER\n</answer>",
    "an answer in a block that was cut": "<think>{}</think>\n<answer>ANSWER",
    "ERNIE's response": "<think>\n{}\n</think>\n\n<response>\nANSWER\n</response>\n",
    "GLM's box": "<think>{}</think><|begin_of_box|>ANSWER<|end_of_box|>",
    "LongCat's marks": "<longcat_think>\n{}\n</longcat_think>\nANSWER",
    "MedGemma's marks": "<unused94>thought\n{}<unused95>ANSWER",
    "Apriel's marks": "Here are my reasoning steps:\n{}\n[BEGIN FINAL RESPONSE]\nANSWER\n[END FINAL RESPONSE]\n<|end|>",
    "Gemma 4's marks": "<|channel>thought\n{}<channel|>ANSWER",
    "Cohere's marks": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>ANSWER<|END_RESPONSE|>",
    "gpt-oss's channels": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>ANSWER",
    "gpt-oss's channels, several of them": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>"
    "commentary<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>text<|message|>ANSWER<|return|>",
}
CUT = ("<think>{}", "<think>\n{} <think>{}", "[THINK]{}", "<|channel|>analysis<|message|>{}", "<|channel>thought\n{}",
       "<longcat_think>{}", "<unused94>thought\n{}")  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_only_the_answer_is_left(form: str) -> None:
    """Oracle: the answer that the reply was built around."""
    assert without_reasoning(form.replace("{}", "It is 5.").replace("ANSWER", "It is 7.")) == "It is 7."


@pytest.mark.parametrize("form", CUT)
def test_a_thought_that_never_ended_leaves_no_answer(form: str) -> None:
    """Oracle: the empty text."""
    assert without_reasoning(form.replace("{}", "It is 5.")) == ""


def test_ten_thousand_nested_thoughts_are_read_in_one_pass() -> None:
    """Oracle: the answer; searching for the innermost block again and again took minutes."""
    assert without_reasoning("<think>" * 10_000 + "</think>" * 10_000 + "7") == "7"


@given(st.text())
def test_a_reply_without_tags_stays_as_it_is(reply: str) -> None:
    """Invariants: nothing is lost of a plain reply, and taking reasoning out twice is taking it out once."""
    if "think" not in reply.casefold() and "<" not in reply and "[" not in reply:
        assert without_reasoning(reply) == reply
    assert without_reasoning(without_reasoning(f"<think>{reply}")) == without_reasoning(f"<think>{reply}")


PROGRAM = "```python\ndef solution():\n    return {}\n```"
# Each: what a task makes of a reply, the answer, the thought, and the result for the answer.
PARSERS: dict[str, tuple[Callable[[str], object], str, str, object]] = {
    "PAL's program": (lambda reply: run_pal(reply), PROGRAM.format(7), PROGRAM.format(5), 7),
    "LaMP's label": (lambda reply: lamp("2M", reply), "comedy", "action or comedy?", "comedy"),
    "LaMP's score": (lambda reply: lamp("3", reply), "4", "Between 1 and 5, so 2", 4.0),
    "LaMP's headline": (lambda reply: lamp("4", reply), '"Rain in May"', "Maybe Sun in May", "Rain in May"),
    "ALFWorld's action": (lambda reply: action_in(read(reply)), "Act: look", "Act: go to bed 1", "look"),
    "the controller's guidance": (lambda reply: guidance(reply), "How many?", "Perhaps: How much?", "How many?"),
}


def read(reply: str) -> str:
    return Reply((), Sample(reply)).text


def guidance(reply: str) -> str:
    return Guidance((), None, Sample(reply)).text


def lamp(name: str, reply: str) -> object:
    if name == "4":
        pytest.importorskip("rouge_score")
    return judge(KINDS[name], read(reply), {"2M": "comedy", "3": "4", "4": "Rain in May"}[name]).prediction


class Says:
    name = "says"

    def __init__(self, text: str) -> None:
        self.text = text

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        return Sample(self.text)

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        return [Sample("")]

    def prompt_ids(self, prompt: Messages) -> None:
        return None

    def count_tokens(self, prompt: Messages) -> int:
        return 0


def run_pal(reply: str) -> object:
    task = PALTask(PalOptions(sandbox=SandboxConfig(timeout_s=60.0)), TaskSetting({}))
    example = Example("e", {"question": "?", "answer": 7})
    return asyncio.run(task.rollout(example, Says(""), Says(reply), RolloutSettings())).info.prediction


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize("form", ["ANSWER", *list(FORMS.values())[:3]])
def test_every_task_reads_the_answer_alone(parser: tuple[Callable[[str], object], str, str, object], form: str) -> None:
    """Oracle: the answer as such gives the same; the thought holds another answer of the same kind."""
    parse, answer, thought, expected = parser
    assert parse(form.replace("{}", thought).replace("ANSWER", answer)) == expected
