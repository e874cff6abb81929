"""The shipped styles render the same bytes as the code that they were once written in."""

from collections.abc import Callable, Iterator

import pytest

from matryoshka.core.records import Message, Messages, content_key
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS
from matryoshka.tasks.alfworld.prompt_style import Failure, Scene, Style

SCREEN = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a cabinet 1, and a stove 1.\n\n"
    "Your task is to: heat some yam and put it in cabinet."
)
PLANS = (
    "",
    "1. find yam: cabinet 2, stove\n2. heat yam: stove\n3. use lamp: desk\n 4) put yam: cabinet\nthen {{ rest }}",
    "General plan: go.\n[Step 1] Find a yam in cabinet or shelf 2 and take it.\n[Step 2] Put the yam in desk.",
)
REQUESTS: dict[str, Callable[[Style, Scene, str], Messages]] = {
    "plan": lambda style, scene, plan: style.plan(scene),
    "solve": lambda style, scene, plan: style.solve(scene, plan),
    "act": lambda style, scene, plan: style.act(scene, plan),
    "retry": lambda style, scene, plan: style.retry(scene, plan, "\nx = 1\n", Failure("It {{ broke }}.\nThus.")),
    "replan": lambda style, scene, plan: style.replan(scene, plan, "It broke."),
    "write": lambda style, scene, plan: (Message("assistant", style.write(EXEMPLARS[scene.task_type].steps)),),
}
STYLES = ("brief", "compact", "full")
# Keys of every prompt of a request, made by the functions that wrote these styles before they became files. The brief
# style's retry is younger; test_prompts.py has its words.
HASHES = {
    ("brief", "plan"): "9e255b28bb95666184673463b84328f1",
    ("brief", "solve"): "1562999983e24f124992311a88995c09",
    ("brief", "act"): "9243e648d14308fb968c62e6ad6cb65e",
    ("brief", "retry"): "7f1b97c4e70eb0a446594d13bcee52eb",
    ("brief", "replan"): "f6908a66a1370ff447293dc5d35f1c9a",
    ("brief", "write"): "2fd0976a700b639389d662c3a9aad3c9",
    ("compact", "plan"): "08e036bcadd3a43487d473773a3cf248",
    ("compact", "solve"): "52bc676ea7d7bed93ef4501cf9817c63",
    ("compact", "act"): "9243e648d14308fb968c62e6ad6cb65e",
    ("compact", "retry"): "12a9f450f36a5aab2e1dae1cf0d8c65f",
    ("compact", "replan"): "1acb40e57830a26227248ba710863d91",
    ("compact", "write"): "2fd0976a700b639389d662c3a9aad3c9",
    ("full", "plan"): "efec6b4933f18cd551f6ae1cb2fd4aba",
    ("full", "solve"): "864b37e1ba88eec1ad108f8d7221772a",
    ("full", "act"): "0fbf8c24fa1c77a5c3c3d35bd56eb25f",
    ("full", "retry"): "ee76b2ebde285d3d15720b18f6b2ce3f",
    ("full", "replan"): "2af7e2bc7d624f55c72f92cd68bf628f",
    ("full", "write"): "41aaf0adfce155ece232fdadc3924452",
}


def rendered(style: str, request: str) -> Iterator[Messages]:
    """Yield a request's prompts over both wordings, two lengths of a game, all task types and three plans."""
    for verbs in ("current", "old"):
        for steps in (50, 37):
            made = Style(style, steps, verbs)
            for task_type in EXEMPLARS:
                for plan in PLANS:
                    yield REQUESTS[request](made, Scene(SCREEN, task_type), plan)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("style", STYLES)
def test_a_style_s_bytes_are_those_of_before(style: str, request_name: str) -> None:
    """Oracle: hashes of what the code of commit b27320d rendered; a run's answers are kept by such texts."""
    assert content_key(*rendered(style, request_name)) == HASHES[style, request_name]


@pytest.mark.parametrize("style", STYLES)
def test_the_question_of_a_program_is_asked_as_before(style: str) -> None:
    """Oracle: as above."""
    assert content_key(Style(style).ask("Where is it?")) == "f15a393e09d8348baef1f72a28dddc03"
