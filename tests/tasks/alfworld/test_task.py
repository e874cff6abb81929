"""The loop in the kitchen known by heart, with controllers and generators whose every word is written here."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from matryoshka.core.protocols import ContextError, GeneratorError, RunStopped, TaskSetting
from matryoshka.core.records import (
    EpisodeInfo,
    Example,
    Messages,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
    Usage,
    Verdict,
    from_json,
    to_json,
)
from matryoshka.dpo.pairs import make_pairs
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.playthrough import screen_text
from matryoshka.tasks.alfworld.program import Limits
from matryoshka.tasks.alfworld.prompt_style import Style
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tests.tasks.alfworld import kitchen

GAME = load_game(kitchen.row())
GOLD = [["find", "potato", ["countertop 1"]], ["heat", "potato", ["microwave 1"]], ["put", "potato", ["fridge 1"]]]
EXAMPLE = Example(
    "kitchen",
    {
        "question": screen_text(Engine(GAME).observation.text),
        "answer": ", ".join(kitchen.WALKTHROUGH),
        "task_type": GAME.task_type,
        "gold": GOLD,
    },
)
TAKE = """
def step_1(agent, memory):
    agent.visit("countertop 1")
    agent.take("potato 2", "countertop 1")
    memory["potato"] = agent.holding
"""
HEAT = """
def step_2(agent, memory):
    agent.go_to("microwave 1")
    agent.heat(memory["potato"], "microwave 1")
"""
PUT = """
def step_3(agent, memory):
    agent.visit("fridge 1")
    agent.put(memory["potato"], "fridge 1")
"""
STUCK = '\ndef step_2(agent, memory):\n    assert False, "I am stuck"\n'
IDLE = "def step_1(agent, memory):\n    agent.look()\n"


LIMITS = Limits(10.0, 128 * 2**20, 2, 7)


class Voice:
    """Says its texts in order and keeps its requests; the last text is repeated."""

    name = "voice"

    def __init__(self, *texts: str | Exception) -> None:
        self._texts = list(texts)
        self.prompts: list[Messages] = []
        self.samplings: list[Sampling] = []

    def _next(self, prompt: Messages, sampling: Sampling) -> Sample:
        text = self._texts[min(len(self.prompts), len(self._texts) - 1)]
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        if isinstance(text, Exception):
            raise text
        return Sample(text, usage=Usage(10, 1))

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        return self._next(prompt, sampling)

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        return [self._next(prompt, sampling) for _ in range(n)]

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        return (1, 2)

    def count_tokens(self, prompt: Messages) -> int:
        return 2


def make_task(mode: Any = "program", limits: Limits = LIMITS, **options: Any) -> ALFWorldTask:
    task = ALFWorldTask(AlfworldOptions("full", mode=mode, **options), TaskSetting({}))
    task.__dict__["_splits"] = {"test": [EXAMPLE]}
    task.household, task.limits = lambda example: Engine(GAME), limits
    return task


def play(
    generator: Voice,
    controller: Any = None,
    protocol: str = "label_free",
    inner: int = 1,
    outer: int = 1,
    mode: str = "program",
    **options: Any,
) -> Trajectory:
    settings = RolloutSettings(Sampling(1.0, seed=5, draw=3), Sampling(seed=7), protocol, inner, outer)
    rollout = make_task(mode, **options).rollout(EXAMPLE, controller or Voice("the plan"), generator, settings)
    return asyncio.run(rollout)


def fenced(*parts: str) -> str:
    return f"Here it is:\n```python\n{''.join(parts)}\n```"


def test_a_retry_learns_of_every_place_that_was_searched() -> None:
    """Oracle: by hand: each program looks into one more place, and the next request names them all, in their order."""
    looks = [f"def step_1(agent, memory):\n    agent.fetch('cup', ['{place}'])\n" for place in ("fridge", "microwave")]
    generator, task = Voice(*looks), make_task()
    task.style = Style("brief")
    settings = RolloutSettings(protocol="oracle", inner_attempts=3)
    asyncio.run(task.rollout(EXAMPLE, Voice("1. find cup: fridge"), generator, settings))
    first, second, third = (prompt[-1].content for prompt in generator.prompts)
    assert "It is not in" not in first
    assert "It is not in 'fridge'. Search " in second and "'microwave'" in second
    assert "It is not in 'fridge' or 'microwave'. Search " in third


def test_a_program_that_wins() -> None:
    """Oracle: the kitchen's walkthrough; every count by hand."""
    generator, controller = Voice(fenced(TAKE, HEAT, PUT)), Voice("the plan")
    trajectory = play(generator, controller)
    assert trajectory.reward == 1.0
    (turn,) = trajectory.turns
    assert turn.prompt == make_task().first_prompt(EXAMPLE) == controller.prompts[0]
    assert (turn.prompt_ids, turn.feedback) == ((1, 2), "")
    story = turn.calls[0].outcome
    assert [line[2:] for line in story.splitlines() if line.startswith("> ")] == kitchen.WALKTHROUGH
    assert "You heat the potato 2 using the microwave 1." in story and story.endswith("[the task is done]")
    assert "the plan" in generator.prompts[0][-1].content
    assert trajectory.info == EpisodeInfo(
        "right",
        "label_free",
        "voice",
        "voice",
        seed=5,
        draw=3,
        attempts=1,
        calls=1,
        prompt_tokens=10,
        completion_tokens=1,
        prediction="done",
        measures={"steps": 7},
    )
    assert from_json(Trajectory, to_json(trajectory)) == trajectory
    # The first request of each kind has the settings' own seed.
    assert (controller.samplings[0].seed, generator.samplings[0].seed) == (5, 7)


@pytest.mark.parametrize(("protocol", "attempts"), [("label_free", 1), ("oracle", 3)])
def test_only_the_oracle_protocol_retries_what_ended_by_itself(protocol: str, attempts: int) -> None:
    """Oracle: the two protocols in words: an undone task is no reason to try again unless one may look at it."""
    generator = Voice(fenced(IDLE))
    trajectory = play(generator, protocol=protocol, inner=3)
    assert len(generator.prompts) == attempts
    assert (trajectory.reward, trajectory.info.verdict) == (0.0, "wrong")
    shown = [message.content for prompt in generator.prompts for message in prompt]
    assert any("the task is not done" in text for text in shown) is (protocol == "oracle")


def test_a_mistake_is_mended_where_it_was_made() -> None:
    """Oracle: the second program's own step 1 would fail, yet it wins: it went on in the same household and memory."""
    generator = Voice(fenced(TAKE, STUCK), fenced("def step_1(agent, memory): assert False\n", HEAT, PUT))
    trajectory = play(generator, inner=6)
    assert (trajectory.reward, trajectory.info.attempts, trajectory.info.measures["steps"]) == (1.0, 2, 7)
    *before, said, complaint = generator.prompts[1]
    assert tuple(before) == generator.prompts[0] and STUCK.strip() in said.content
    for words in (
        "failed in step 2",
        'line 8, in step_2\n    assert False, "I am stuck"\nAssertionError: I am stuck',
        "> take potato 2 from countertop 1\nYou pick up the potato 2 from the countertop 1.",
        "You are at countertop 1, holding potato 2. 2 of 50 actions are used.",
        "goes on at step 2",
        "memory = {'potato': 'potato 2'}",
    ):
        assert words in complaint.content
    first, second = trajectory.turns[0].calls
    assert first.outcome.count("> ") == 2 and second.outcome.count("> ") == 5
    assert "I am stuck" in first.outcome and generator.samplings[0].seed != generator.samplings[1].seed


@pytest.mark.parametrize(
    ("broken", "inner"),
    [
        (fenced("def step_1(agent, memory):\n    agent.look()\n    assert False"), 6),  # its first step failed
        (fenced(TAKE, STUCK), 2),  # too late for mending
        (fenced(TAKE, "\ndef step_2(agent, memory):\n    while True: agent.look()"), 6),  # no actions left
    ],
)
def test_otherwise_all_begins_anew(broken: str, inner: int) -> None:
    """Oracle: the second program needs the untouched kitchen, and all of its fifty actions, to pass."""
    check = "def step_1(agent, memory):\n    assert not memory and not agent.holding and not agent.location\n"
    check += '    assert agent.visit("countertop 1").count("potato 2") == 1\n    for _ in range(49): agent.look()\n'
    trajectory = play(Voice(broken, fenced(check)), inner=inner, limits=Limits(20.0, 128 * 2**20))
    assert trajectory.info.verdict == "wrong"
    assert trajectory.turns[0].calls[1].outcome.count("> ") == 50
    assert "at step 1, in the household as it was at first" in str(trajectory.turns[0].calls[1].prompt)


def test_a_new_plan_after_all_attempts_failed() -> None:
    """Oracle: six attempts, a new plan that knows why, and attempts in a fresh household under it; then give up."""
    stuck = "def step_1(agent, memory):\n    agent.look()\n    assert False, 'no idea'"
    generator, controller = Voice(fenced(stuck)), Voice("first plan", "second plan")
    trajectory = play(generator, controller, inner=6, outer=2)
    assert (len(controller.prompts), len(generator.prompts)) == (2, 12)
    asked = controller.prompts[1]
    assert asked[: len(controller.prompts[0])] == controller.prompts[0]
    assert asked[-2].content == "first plan" and "no idea" in asked[-1].content and "step 1" in asked[-1].content
    assert "second plan" in generator.prompts[6][-1].content and len(generator.prompts[6]) == len(generator.prompts[0])
    info = trajectory.info
    assert (info.attempts, len(trajectory.turns), info.measures["steps"], info.verdict) == (12, 2, 12, "error")
    assert trajectory.turns[0].feedback and trajectory.turns[1].feedback
    assert len({sampling.seed for sampling in generator.samplings}) == 12


def test_a_new_plan_beyond_the_context_stops_or_ends_the_episode_as_configured() -> None:
    """Oracle: the setting's contract; the first prompt never ends quietly, whatever the setting."""
    stuck = fenced("def step_1(agent, memory):\n    assert False")

    def episode(overlong: str, *said: str | Exception) -> Trajectory:
        settings = RolloutSettings(outer_turns=3, overlong=overlong)
        return asyncio.run(make_task().rollout(EXAMPLE, Voice(*said), Voice(stuck), settings))

    with pytest.raises(ContextError):
        episode("error", "plan", ContextError("too long"))
    with pytest.raises(ContextError):
        episode("skip", ContextError("too long"))
    ended = episode("skip", "plan", ContextError("too long"))
    assert (ended.info.overlong, len(ended.turns), ended.info.verdict) == (True, 1, "error")


def test_no_new_plan_where_none_is_called_for() -> None:
    """Oracle: the controller is asked once if the program won, and once if it ended by itself."""
    for program in (fenced(TAKE, HEAT, PUT), fenced(IDLE)):
        controller = Voice("plan")
        play(Voice(program), controller, inner=2, outer=3)
        assert len(controller.prompts) == 1


@pytest.mark.parametrize("inner", [1, 3])
def test_a_call_that_fails_for_good_fails_the_episode_and_keeps_the_rest(inner: int) -> None:
    """Oracle: the texts from before the failure are in the record."""
    texts = [fenced(TAKE, STUCK)] * (inner - 1)
    trajectory = play(Voice(*texts, GeneratorError("gone")), inner=inner)
    assert (trajectory.reward, trajectory.info.verdict, trajectory.info.error) == (0.0, "failed", "gone")
    assert len(trajectory.turns) == 1 and len(trajectory.turns[0].calls) == inner - 1
    assert from_json(Trajectory, to_json(trajectory)) == trajectory


def test_a_stopped_run_is_not_swallowed() -> None:
    """Oracle: the exception that means the end of the run."""
    with pytest.raises(RunStopped):
        play(Voice(RunStopped("budget")))
    with pytest.raises(RunStopped):
        play(Voice(fenced("def step_1(agent, memory): agent.ask('?')"), RunStopped("budget")))


def test_a_question_is_answered_by_the_generator_within_its_own_budget() -> None:
    """Oracle: the question and the budget of seven tokens, as the generator sees them; the third of two is refused."""
    body = "def step_1(agent, memory):\n    agent.ask('Where is a potato?')\n    agent.ask('b')\n    agent.ask('c')"
    generator = Voice(fenced(body), " countertop \n")
    trajectory = play(generator)
    assert generator.prompts[1][-1].content == "Where is a potato?" and generator.samplings[1].max_tokens == 7
    assert "all 2 questions are used up" in trajectory.turns[0].calls[0].outcome
    assert [call.outcome for call in trajectory.turns[0].calls[1:]] == ["asked by the program"] * 2
    assert (trajectory.info.calls, trajectory.info.attempts) == (3, 1)


def test_a_question_that_fails_for_good_fails_the_episode() -> None:
    """Oracle: verdict "failed"; the program that asked is in the record."""
    trajectory = play(Voice(fenced("def step_1(agent, memory): agent.ask('?')"), GeneratorError("gone")))
    assert trajectory.info.verdict == "failed" and len(trajectory.turns[0].calls) == 1


@pytest.mark.parametrize(
    ("body", "verdict", "reason"),
    [
        ("while True: pass", "error", "did not finish within 1 s"),
        ("__import__('os').fork()", "error", "PermissionError"),
        ("open('/etc/passwd')", "error", "Error: [Errno"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "error", "PermissionError"),
        ("__import__('sys').exit()", "error", "SystemExit"),
        ("x = 'x' * 10**9", "error", "MemoryError"),
        ("for _ in range(100): print('x' * 10**6)", "error", "File too large"),
        ("agent.__class__.go_to = lambda self, place: 'You win.'\n    agent.go_to('fridge 1')", "wrong", "not done"),
    ],
)
def test_a_hostile_program_is_a_recorded_failure_of_its_episode(body: str, verdict: str, reason: str) -> None:
    """Oracle: reward 0 and the reason in the record, which goes to JSON and back."""
    generator = Voice(fenced(f"def step_1(agent, memory):\n    {body}\n"))
    trajectory = play(generator, limits=Limits(1.0 if "while" in body else 10.0, 128 * 2**20))
    assert (trajectory.reward, trajectory.info.verdict) == (0.0, verdict)
    assert reason in trajectory.turns[0].calls[0].outcome
    assert from_json(Trajectory, to_json(trajectory)) == trajectory


def actor(commands: Sequence[str]) -> Voice:
    return Voice(*(f"Think: on I go.\nAct: {command}" for command in commands))


def test_direct_action_wins_command_by_command() -> None:
    """Oracle: the walkthrough, one call a command, each shown the answers to all before."""
    generator = actor(kitchen.WALKTHROUGH)
    trajectory = play(generator, mode="react")
    assert (trajectory.reward, trajectory.info.calls, trajectory.info.measures["steps"]) == (1.0, 7, 7)
    assert "the plan" in generator.prompts[0][-1].content
    assert generator.prompts[1][-1].content.startswith("You arrive at countertop 1. On the countertop 1, you see")
    assert generator.prompts[6][: len(generator.prompts[5])] == generator.prompts[5]
    heated = "> heat potato 2 with microwave 1\nYou heat the potato 2 using the microwave 1."
    assert trajectory.turns[0].calls[3].outcome == heated


def test_direct_action_without_guidance_shows_none() -> None:
    """Oracle: the first prompt is the screen alone."""
    generator = actor(kitchen.WALKTHROUGH)
    assert play(generator, NoGuidance(), mode="react").reward == 1.0
    assert generator.prompts[0][-1].content == EXAMPLE.fields["question"]


def test_direct_action_ends_with_its_actions_and_begins_anew() -> None:
    """Oracle: three actions a household and two attempts are six calls; words without a command spend an action."""
    generator = Voice("I would rather think.")
    trajectory = play(generator, mode="react", inner=2, max_steps=3)
    assert len(generator.prompts) == 6 and len(generator.prompts[3]) == len(generator.prompts[0])
    assert "Nothing happens. End your reply with" in generator.prompts[1][-1].content
    assert (trajectory.info.verdict, trajectory.info.attempts, trajectory.info.measures["steps"]) == ("error", 2, 6)
    assert "All 3 actions" in str(trajectory.info.error)


def test_scores_by_type_with_their_intervals() -> None:
    """Oracle: shares and means by hand; Wilson's interval for 2 of 3 from its closed form (0.2077, 0.9385)."""

    def episode(kind: str, verdict: Verdict, steps: int) -> Trajectory:
        info = EpisodeInfo(verdict, "label_free", "c", "g", attempts=1, calls=2, measures={"steps": steps})
        return Trajectory("t", kind, (), float(verdict == "right"), info)

    failed = Trajectory("t", "c", (), 0.0, EpisodeInfo("failed", "label_free", "c", "g", error="x"))
    rows = [episode("a", "right", 4), episode("a", "wrong", 8), episode("a", "right", 6), episode("b", "error", 50)]
    task = make_task()
    task.__dict__["_splits"] = {"test": [Example(kind, {**EXAMPLE.fields, "task_type": kind}) for kind in "abc"]}
    scores = task.score([*rows, failed])
    shown = {name: (round(metric.value, 4), metric.n) for name, metric in scores.items()}
    assert shown == {
        "success": (0.4, 5), "success a": (0.6667, 3), "success b": (0.0, 1), "success c": (0.0, 1),
        "executable": (0.6, 5), "failed": (0.2, 5), "attempts": (1.0, 4), "steps": (17.0, 4), "calls": (2.0, 4),
    }  # fmt: skip
    assert (round(scores["success a"].low, 4), round(scores["success a"].high, 4)) == (0.2077, 0.9385)
    assert scores["steps"].low < 17 < scores["steps"].high
    assert make_task().main_metric in scores


def test_gold_and_names() -> None:
    """Oracle: by hand."""
    task = make_task()
    assert task.name == "alfworld-full-program" and make_task("react").name == "alfworld-full-react"
    assert "[Step 2] Heat the potato with microwave 1." in str(task.gold_guidance(EXAMPLE))
    assert task.gold_guidance(Example("x", {**EXAMPLE.fields, "gold": []})) is None
    with pytest.raises(ValueError, match="max_steps 0"):
        make_task(max_steps=0)


def test_pairs_have_the_controllers_own_text_on_both_sides() -> None:
    """Oracle: of two plans for one game, one led to a win: that is one pair, and its sides are the two plans."""

    class Follower(Voice):
        async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
            return Sample(fenced(TAKE, HEAT, PUT) if "good" in prompt[-1].content else fenced(TAKE, STUCK))

    episodes = [play(Follower(""), Voice(plan)) for plan in ("good plan", "bad plan", "good plan")]
    (pair,), counts = make_pairs(episodes, make_task().pair_rule, 0)
    assert (pair.chosen.text, pair.rejected.text) == ("good plan", "bad plan")
    assert (pair.chosen_reward, pair.rejected_reward, counts.prompts) == (1.0, 0.0, 1)


def test_the_generator_can_guide_itself() -> None:
    """Oracle: the first answer is the plan, the second the program, of one and the same voice."""
    generator = Voice("my own plan", fenced(TAKE, HEAT, PUT))
    trajectory = play(generator, GeneratorGuidance(generator))
    assert trajectory.reward == 1.0 and trajectory.turns[0].action.text == "my own plan"
    assert generator.samplings[0].draw == 3


def test_many_episodes_at_once() -> None:
    """Oracle: forty concurrent episodes, every one with its own household, all win."""
    settings = RolloutSettings()
    task = make_task()

    async def all_of_them() -> list[Trajectory]:
        texts: Callable[[], Voice] = lambda: Voice(fenced(TAKE, HEAT, PUT))  # noqa: E731
        return await asyncio.gather(*(task.rollout(EXAMPLE, Voice("p"), texts(), settings) for _ in range(40)))

    assert [trajectory.info.measures["steps"] for trajectory in asyncio.run(all_of_them())] == [7] * 40
