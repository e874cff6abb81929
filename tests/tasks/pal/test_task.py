"""The PAL loop against scripted models: its requests, its end, its records; gold answers stay unseen."""

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.core.protocols import ContextError, GeneratorError, TaskSetting
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
    Verdict,
    from_json,
    to_json,
)
from matryoshka.tasks.pal.gsm8k import load
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.pal.task import PALTask, open_prompts
from matryoshka.tasks.sandbox_config import SandboxConfig
from matryoshka.tests.tasks.pal import requests

DATA = Path(os.environ.get("MATRYOSHKA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "gsm8k"
EXAMPLE = Example("e1", {"question": "How much is 3 times 4?", "answer": 12})
FULL = open_prompts("full")
RIGHT, WRONG, CRASH = "return 3 * 4", "return 3 + 4", "return 3 * four"
CRASH_ERROR = (
    'Traceback (most recent call last):\n  File "<solution>", line 2, in solution\n    return 3 * four\n'
    "NameError: name 'four' is not defined"
)


class ScriptedController:
    """Says its lines in order; prompt ids are the prompt's character codes."""

    name = "controller-0"

    def __init__(self, *lines: str, finish_reason: str = "stop") -> None:
        self.lines = list(lines)
        self.finish_reason = finish_reason
        self.asked: list[tuple[Messages, int, Sampling]] = []

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        self.asked.append((prompt, n, sampling))
        return [Sample(self.lines[(len(self.asked) - 1) % len(self.lines)], self.finish_reason, (1, 2), (-0.1, -0.2))]

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in prompt[-1].content)

    def count_tokens(self, prompt: Messages) -> int:
        return len(self.prompt_ids(prompt))


class ScriptedGenerator:
    """Answers with programs of the given bodies in order; an exception in the list is raised."""

    name = "generator-0"

    def __init__(self, *bodies: str | Exception) -> None:
        self.bodies = list(bodies)
        self.asked: list[tuple[Messages, Sampling]] = []

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        body = self.bodies[len(self.asked) % len(self.bodies)]
        self.asked.append((prompt, sampling))
        if isinstance(body, Exception):
            raise body
        return Sample(f"```python\ndef solution():\n    {body}\n```", usage=Usage(100, 10))


def make_task(timeout_s: float = 5.0) -> PALTask:
    return PALTask(PalOptions("full", sandbox=SandboxConfig(timeout_s=timeout_s)), TaskSetting({}))


def roll(
    controller: ScriptedController,
    generator: ScriptedGenerator,
    settings: RolloutSettings,
    example: Example = EXAMPLE,
) -> Trajectory:
    trajectory = asyncio.run(make_task().rollout(example, controller, generator, settings))
    assert from_json(Trajectory, json.loads(json.dumps(to_json(trajectory)))) == trajectory
    return trajectory


def texts(asked: Sequence[tuple[Messages, Sampling]]) -> list[str]:
    return ["\n".join(message.content for message in prompt) for prompt, _ in asked]


def test_one_right_attempt_is_recorded_completely() -> None:
    """Oracle: every field, written out by hand."""
    controller, generator = ScriptedController(" How much?\n"), ScriptedGenerator(RIGHT)
    settings = RolloutSettings(controller=Sampling(1.0, draw=3), generator=Sampling(max_tokens=99), inner_attempts=6)
    trajectory = roll(controller, generator, settings)
    prompt = FULL.render("guidance", question="How much is 3 times 4?")
    assert controller.asked == [(prompt, 1, settings.controller)]
    assert generator.asked == [(requests.code(FULL, "How much is 3 times 4?", "How much?"), settings.generator)]
    (turn,) = trajectory.turns
    assert (turn.prompt, turn.prompt_ids) == (prompt, controller.prompt_ids(prompt))
    assert turn.action.text == " How much?\n" and turn.feedback == ""
    (call,) = turn.calls
    assert call.prompt == generator.asked[0][0] and call.outcome == "value 12"
    assert (trajectory.task, trajectory.example_id, trajectory.reward) == ("pal-full", "e1", 1.0)
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
        prediction=12,
    )


def test_label_free_stops_at_a_wrong_answer_and_retries_only_errors() -> None:
    """Oracle: the protocol. A program that runs ends the episode, right or not."""
    generator = ScriptedGenerator(CRASH, WRONG, RIGHT)
    trajectory = roll(ScriptedController("g"), generator, RolloutSettings(inner_attempts=6, outer_turns=2))
    assert (trajectory.reward, trajectory.info.verdict, trajectory.info.attempts) == (0.0, "wrong", 2)
    assert trajectory.info.prediction == 7 and len(trajectory.turns) == 1


def test_a_retry_shows_the_previous_code_the_guidance_and_the_real_error() -> None:
    """Oracle: `FULL.retry` of exactly these texts; the traceback is Python's for that program."""
    generator = ScriptedGenerator(CRASH, RIGHT)
    trajectory = roll(ScriptedController("What is four?"), generator, RolloutSettings(inner_attempts=2))
    code = f"def solution():\n    {CRASH}\n"
    assert generator.asked[1][0] == requests.retry(FULL, EXAMPLE.fields["question"], "What is four?", code, CRASH_ERROR)
    assert [call.outcome for call in trajectory.turns[0].calls] == [CRASH_ERROR, "value 12"]
    assert trajectory.reward == 1.0


def test_exhausted_attempts_make_the_controller_plan_again() -> None:
    """Oracle: two attempts under each of two guidances; the second prompt has the first guidance and the error."""
    controller, generator = ScriptedController("plan one", "plan two"), ScriptedGenerator(CRASH)
    trajectory = roll(controller, generator, RolloutSettings(inner_attempts=2, outer_turns=2))
    question = EXAMPLE.fields["question"]
    assert [prompt for prompt, _, _ in controller.asked] == [
        FULL.render("guidance", question=question),
        requests.replan(FULL, question, "plan one", CRASH_ERROR),
    ]
    assert ["plan one" in text for text in texts(generator.asked)] == [True, True, False, False]
    assert ["plan two" in text for text in texts(generator.asked)] == [False, False, True, True]
    assert [len(turn.calls) for turn in trajectory.turns] == [2, 2]
    assert [turn.feedback for turn in trajectory.turns] == [CRASH_ERROR, CRASH_ERROR]
    info = trajectory.info
    assert (trajectory.reward, info.verdict, info.error) == (0.0, "error", CRASH_ERROR)
    assert (info.attempts, len(trajectory.turns), info.prompt_tokens, info.completion_tokens) == (4, 2, 400, 40)


def test_a_replan_beyond_the_context_stops_or_ends_the_episode_as_configured() -> None:
    """Oracle: the setting's contract; the first prompt never ends quietly, whatever the setting."""

    class Narrow(ScriptedController):
        """Has room for a few prompts only."""

        room = 1

        async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
            if len(self.asked) == self.room:
                raise ContextError("too long")
            return await super().propose(prompt, n, sampling)

    settings = RolloutSettings(outer_turns=3)
    with pytest.raises(ContextError):
        roll(Narrow("first"), ScriptedGenerator(CRASH), settings)
    trajectory = roll(Narrow("first"), ScriptedGenerator(CRASH), replace(settings, overlong="skip"))
    assert len(trajectory.turns) == 1 and trajectory.info.overlong is True
    assert trajectory.info.verdict == "error"
    nothing = Narrow("first")
    nothing.room = 0
    with pytest.raises(ContextError):
        roll(nothing, ScriptedGenerator(CRASH), replace(settings, overlong="skip"))
    with pytest.raises(ValueError, match="overlong 'cut' is unknown"):
        RolloutSettings(overlong="cut")


def test_later_requests_are_new_draws_and_reproducible() -> None:
    """Oracle: the requests' seeds. A repeated prompt must not be answered from the record of the first: every request
    of an episode has a seed of its own, the same in every run.
    """
    settings = RolloutSettings(Sampling(1.0, seed=5), Sampling(1.0, seed=7), inner_attempts=2, outer_turns=2)
    runs = []
    for _ in range(2):
        controller, generator = ScriptedController("g"), ScriptedGenerator(CRASH)
        roll(controller, generator, settings)
        runs.append(([s.seed for _, _, s in controller.asked], [s.seed for _, s in generator.asked]))
    assert runs[0] == runs[1]
    assert runs[0][0][0] == 5 and runs[0][1][0] == 7
    assert len(set(runs[0][0])) == 2 and len(set(runs[0][1])) == 4


@pytest.mark.parametrize("bodies", [(CRASH, CRASH, WRONG), (RIGHT,), (WRONG,), (CRASH,)])
def test_label_free_never_looks_at_gold(bodies: tuple[str, ...]) -> None:
    """Invariant: another gold answer changes the reward and nothing that any model is shown."""
    settings = RolloutSettings(inner_attempts=2, outer_turns=3)
    seen = []
    for answer in (12, 7, -1):
        controller, generator = ScriptedController("one", "two"), ScriptedGenerator(*bodies)
        trajectory = roll(
            controller, generator, settings, replace(EXAMPLE, fields={**EXAMPLE.fields, "answer": answer})
        )
        seen.append((controller.asked, generator.asked, [turn.feedback for turn in trajectory.turns]))
    assert seen[0] == seen[1] == seen[2]


def test_oracle_retries_a_wrong_answer_and_says_so() -> None:
    """Oracle: the paper's loop, under its own name. The same script stops at 7 under label_free."""
    controller, generator = ScriptedController("one", "two"), ScriptedGenerator(WRONG, WRONG, RIGHT, CRASH)
    trajectory = roll(controller, generator, RolloutSettings(protocol="oracle", inner_attempts=2, outer_turns=2))
    complaint = "It ran and returned 7, but the answer is not correct."
    assert complaint in texts(generator.asked)[1] and complaint in controller.asked[1][0][-1].content
    assert (trajectory.reward, trajectory.info.attempts, trajectory.info.protocol) == (1.0, 3, "oracle")
    assert [turn.feedback for turn in trajectory.turns] == [complaint, ""]


def test_the_last_program_decides() -> None:
    """Oracle: by definition. A value of an earlier program is no prediction once a later one has failed."""
    settings = RolloutSettings(protocol="oracle", inner_attempts=2)
    trajectory = roll(ScriptedController("g"), ScriptedGenerator(WRONG, CRASH), settings)
    assert (trajectory.info.verdict, trajectory.info.prediction) == ("error", None)


def test_guidance_cut_by_length_runs_and_is_counted() -> None:
    """Oracle: by hand: two outer turns, both with guidance that the limit cut."""
    controller = ScriptedController("How mu", finish_reason="length")
    trajectory = roll(controller, ScriptedGenerator(CRASH), RolloutSettings(outer_turns=2))
    assert trajectory.info.cut == 2 and trajectory.info.attempts == 2


def test_a_failed_call_fails_the_episode_and_keeps_what_was_paid_for() -> None:
    """Oracle: reward 0, the reason, and the usage of the one call that was answered."""
    generator = ScriptedGenerator(CRASH, GeneratorError("429 after 6 tries"))
    trajectory = roll(ScriptedController("g"), generator, RolloutSettings(inner_attempts=3))
    info = trajectory.info
    assert (trajectory.reward, info.verdict, info.error) == (0.0, "failed", "429 after 6 tries")
    assert (info.calls, info.prompt_tokens, len(trajectory.turns)) == (1, 100, 1)


def test_other_exceptions_are_not_hidden() -> None:
    """Oracle: the generator's own exception."""
    with pytest.raises(ZeroDivisionError):
        roll(ScriptedController("g"), ScriptedGenerator(ZeroDivisionError()), RolloutSettings())


def test_no_guidance_asks_the_plain_question() -> None:
    """Oracle: the requests. A controller that says nothing is the baseline without a controller."""
    generator = ScriptedGenerator(RIGHT)
    roll(ScriptedController(" \n"), generator, RolloutSettings())
    assert generator.asked[0][0] == requests.code(FULL, EXAMPLE.fields["question"], "")


def test_score_counts_verdicts() -> None:
    """Oracle: counting by hand; intervals are `wilson`'s, tested there."""
    verdicts: list[Verdict] = ["right", "right", "wrong", "error", "failed"]
    infos = [EpisodeInfo(verdict, "label_free", "c", "g") for verdict in verdicts]
    runs = [Trajectory("pal-full", str(i), (), float(info.verdict == "right"), info) for i, info in enumerate(infos)]
    score = make_task().score(runs)
    assert {name: (metric.value, metric.n) for name, metric in score.items()} == {
        "accuracy": (0.4, 5),
        "executable": (0.6, 5),
        "failed": (0.2, 5),
    }
    assert all(isinstance(metric, Metric) and metric.low < metric.value < metric.high for metric in score.values())
    with pytest.raises(ValueError, match="0 successes of 0"):
        make_task().score([])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set MATRYOSHKA_DATA")
def test_the_verifier_accepts_gold_programs_of_gsm_hard_and_refuses_garbage() -> None:
    """Oracle: the data set. A row's own `code` earns 1 and a program that returns garbage 0, for 60 rows, those with
    the largest targets among them."""
    path = DATA / "gsmhard_first200.jsonl"
    rows = sorted(zip(read_jsonl(path), load(path), strict=True), key=lambda pair: -abs(pair[0]["target"]))[::3][:60]
    task = make_task(20.0)

    class Fixed:
        name = "fixed"

        def __init__(self, code: str) -> None:
            self.code = code

        async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
            return Sample(f"```python\n{self.code}\n```")

    async def rewards(codes: list[str]) -> list[float]:
        controller, settings = ScriptedController("g"), RolloutSettings()
        pairs = zip(rows, codes, strict=True)
        episodes = [task.rollout(example, controller, Fixed(code), settings) for (_, example), code in pairs]
        return [trajectory.reward for trajectory in await asyncio.gather(*episodes)]

    assert asyncio.run(rewards([row["code"] for row, _ in rows])) == [1.0] * 60
    assert asyncio.run(rewards([f"def solution():\n    return {i * 7 + 0.123}" for i in range(60)])) == [0.0] * 60
