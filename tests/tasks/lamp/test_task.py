"""tasks/lamp/task.py: the loop against scripted models: its prompts, its records, and the cost of a failure."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from matryoshka.core.protocols import GeneratorError, TaskSetting
from matryoshka.core.records import (
    EpisodeInfo,
    Example,
    Messages,
    Metric,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
    Usage,
    from_json,
    to_json,
)
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.options import LampOptions
from matryoshka.tasks.lamp.retrieval import bm25, recency
from matryoshka.tasks.lamp.scripted_generator import KNOWN
from matryoshka.tasks.lamp.splits import make_example
from matryoshka.tasks.lamp.task import MAIN_METRIC, LampTask
from matryoshka.tasks.lamp.task_specs import KINDS

NEWS = KINDS["2N"]
PROFILE = [
    {"title": "Wine", "text": "We drank wine in town", "category": "food & drink", "date": "2020-01-01"},
    {"title": "", "text": "A fight in town", "category": "crime", "date": "2020-01-03"},
    {"title": "Tea", "text": "word " * 3000, "category": "travel", "date": "2020-01-02"},
]
ITEM = Item("u1", NEWS.ask("A fight about wine"), PROFILE, "crime")
EXAMPLE = make_example(NEWS, ITEM, bm25)


def letters(prompt: Messages) -> int:
    return sum(len(message.content) for message in prompt)


def make_task(examples: Sequence[Example] = (EXAMPLE,), **options: Any) -> LampTask:
    task = LampTask(LampOptions(**options), TaskSetting({}, count_tokens=letters))
    task.__dict__["_splits"] = {"test": list(examples)}
    return task


class Controller:
    name = "controller-0"

    def __init__(self, text: str, end: str = "stop") -> None:
        self.sample = Sample(text, end, (1, 2), (-0.1, -0.2))

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        return [self.sample]

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...]:
        return (7, 8)

    def count_tokens(self, prompt: Messages) -> int:
        return letters(prompt)


class Generator:
    name = "generator-0"

    def __init__(self, reply: str | Exception) -> None:
        self.reply = reply
        self.asked: list[str] = []

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        self.asked.append(prompt[-1].content)
        if isinstance(self.reply, Exception):
            raise self.reply
        return Sample(self.reply, usage=Usage(100, 10))


def roll(generator: Generator, controller: Any = None, task: LampTask | None = None) -> Trajectory:
    task = task or make_task()
    controller = controller or Controller(" crime: fights \n")
    return asyncio.run(task.rollout(EXAMPLE, controller, generator, RolloutSettings(Sampling(draw=3))))


def test_an_example_holds_the_ranked_history() -> None:
    """Oracle: by hand: two words of the query, then one, then none; the long entry is cut and counted."""
    fields = EXAMPLE.fields
    assert [body[:9] for body, _ in fields["entries"]] == ["A fight i", "Wine. We ", "Tea. word"]
    assert [value for _, value in fields["entries"]] == ["crime", "food & drink", "travel"]
    assert (fields["profile"], fields["cut"], len(fields["entries"][2][0])) == (3, 1, 2000)
    assert fields["baselines"]["rag_1"] == "A fight in town => crime"
    assert fields["baselines"]["rag_4"].count(" => ") == 3
    newest = make_example(NEWS, ITEM, recency, limit=2, entry_characters=5).fields
    assert (newest["entries"], newest["cut"]) == ([("A fig", "crime"), ("Tea. ", "trave")], 2)
    assert from_json(Example, to_json(EXAMPLE)).fields["entries"] == [list(row) for row in fields["entries"]]


def test_an_empty_history_is_a_question_like_others() -> None:
    """Oracle: by hand."""
    example = make_example(NEWS, replace(ITEM, profile=[]), bm25)
    assert (example.fields["entries"], example.fields["profile"]) == ([], 0)
    task = make_task([example])
    assert task.first_prompt(example)[-1].content == "(no history)"


def test_an_episode_is_recorded_completely() -> None:
    """Oracle: by hand: one turn, one call, the kept part of the history; the question is in the second prompt alone."""
    generator = Generator("Crime.")
    trajectory = roll(generator)
    (turn,) = trajectory.turns
    assert (trajectory.reward, turn.prompt_ids, len(turn.calls)) == (1.0, (7, 8), 1)
    assert trajectory.info == EpisodeInfo(
        "right",
        "label_free",
        "controller-0",
        "generator-0",
        draw=3,
        attempts=1,
        calls=1,
        prompt_tokens=100,
        completion_tokens=10,
        prediction="crime",
        measures={"entries": 3, "dropped_entries": 0, "cut_entries": 1},
    )
    assert "A fight about wine" not in turn.prompt[-1].content
    assert f"{KNOWN}\ncrime: fights\nThe question is: {ITEM.question}" in generator.asked[0]
    assert from_json(Trajectory, to_json(trajectory)) == trajectory


def test_options_change_prompts_and_the_task_s_name() -> None:
    """Oracle: by hand."""
    plain = make_task()
    task = make_task(prompt_tokens=letters(plain.first_prompt(EXAMPLE)) - 1, show_question=False, retrieved=1)
    generator = Generator("women")
    info = roll(generator, task=task).info
    assert (info.measures["entries"], info.measures["dropped_entries"], info.verdict) == (2, 1, "wrong")
    assert "From the user's history:\nA fight in town => crime\nThe question" in generator.asked[0]
    shown = make_task(show_question=True)
    assert shown.first_prompt(EXAMPLE)[-1].content.endswith(f"The question is: {ITEM.question}")
    assert len({plain.name, task.name, shown.name}) == 3


def test_no_guidance_is_the_question_alone_and_a_cut_summary_is_counted() -> None:
    """Oracle: by hand."""
    generator = Generator("?")
    info = roll(generator, Controller("  ", "length")).info
    assert generator.asked == [f"The question is: {ITEM.question}"]
    assert (info.verdict, info.prediction, info.cut) == ("error", None, 1)


class Failing(Controller):
    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        raise GeneratorError("it is down")


@pytest.mark.parametrize("controller", [Controller("crime: fights"), Failing("")])
def test_a_call_that_failed_for_good_fails_the_episode(controller: Controller) -> None:
    """Oracle: by hand, for the generator as such and for one that guides itself; the guidance is kept."""
    trajectory = roll(Generator(GeneratorError("it is down")), controller)
    info = trajectory.info
    assert (info.verdict, info.error, info.prediction, info.calls) == ("failed", "it is down", None, 0)
    assert trajectory.reward == 0.0 and len(trajectory.turns) == (0 if isinstance(controller, Failing) else 1)


@pytest.mark.parametrize(("name", "gold", "worst"), [("2N", "crime", 0.0), ("3", "2", 0.25), ("4", "A Fight", 0.0)])
def test_missing_answers_count_as_wrong(name: str, gold: str, worst: float) -> None:
    """Oracle: one right, one that says nothing, one that failed, by hand: they stay in the denominator."""
    if name == "4":
        pytest.importorskip("rouge_score")
    kind = KINDS[name]
    examples = [make_example(kind, Item(str(i), kind.ask("x"), [], gold), bm25) for i in range(3)]
    task = make_task(examples, task=name)
    replies: Sequence[str | Exception] = (gold, "", GeneratorError("down"))
    rows = [
        asyncio.run(task.rollout(example, Controller("s"), Generator(reply), RolloutSettings()))
        for example, reply in zip(examples, replies, strict=True)
    ]
    scored = task.score(rows)
    assert list(scored)[0] == MAIN_METRIC[name] == task.main_metric
    assert scored[task.main_metric].value == pytest.approx((1 + 2 * worst) / 3)
    assert scored["failed"].value == pytest.approx(1 / 3) and scored["unparsed"].value == pytest.approx(2 / 3)


def test_meteor_is_scored_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the function's own value over the predictions, a missing one being empty; other tasks have none."""
    pytest.importorskip("rouge_score")
    seen: list[tuple[Sequence[str], Sequence[str]]] = []

    def meteor(predictions: Sequence[str], golds: Sequence[str]) -> Metric:
        seen.append((predictions, golds))
        return Metric(0.5, 0.4, 0.6, 1)

    monkeypatch.setattr("matryoshka.tasks.lamp.task.meteor", meteor)
    example = make_example(KINDS["4"], Item("1", KINDS["4"].ask("x"), [], "Rain"), bm25)
    info = EpisodeInfo("error", "label_free", "c", "g")
    row = Trajectory("t", "1", (), 0.0, info)
    assert "meteor" not in make_task([example], task="4").score([row])
    assert make_task([example], task="4", meteor=True).score([row])["meteor"].value == 0.5
    assert seen == [([""], ["Rain"])]
    assert "meteor" not in make_task(meteor=True).score([Trajectory("t", "u1", (), 0.0, info)])


def test_splits_gold_and_rule() -> None:
    """Oracle: by hand."""
    task = make_task()
    assert task.gold_guidance(EXAMPLE) is None
    known = replace(EXAMPLE, fields={**EXAMPLE.fields, "summary": "crime: fights"})
    assert task.gold_guidance(known) == "crime: fights"
    rules = {name: make_task(task=name).pair_rule for name in KINDS}
    assert [rules[name].kind for name in KINDS] == ["binary", "binary", "binary", "ranked", "ranked"]
    assert all(rule.cap == 2 for rule in rules.values())
