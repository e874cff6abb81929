"""The driver of many episodes: order, concurrency, recording, resuming, failing and stopping."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from matryoshka.core.files import Journal
from matryoshka.core.protocols import Controller, Generator, GeneratorError, RunStopped, Task
from matryoshka.core.records import (
    EpisodeInfo,
    Example,
    Message,
    Messages,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
    Verdict,
    from_json,
    to_json,
)
from matryoshka.tasks.episode import Episode
from matryoshka.tasks.rollout import Job, Setup, job_key, run_rollouts

Play = Callable[[Example], Awaitable[str]]


class Nobody:
    """A controller and generator that is never asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        raise NotImplementedError

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        raise NotImplementedError

    def prompt_ids(self, prompt: Messages) -> None:
        return None

    def count_tokens(self, prompt: Messages) -> int:
        return 0


class PlayedTask(Task):
    """A task whose episode is the given coroutine: it returns the verdict."""

    name = "played"

    def __init__(self, play: Play) -> None:
        self.play = play
        self.started: list[str] = []

    def examples(self, split: str) -> Sequence[Example]:
        return []

    def first_prompt(self, example: Example) -> Messages:
        return ()

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        self.started.append(example.id)
        verdict = await self.play(example)
        info = EpisodeInfo(cast(Verdict, verdict), "label_free", "c", "g", error="why")
        return Trajectory(self.name, example.id, (), float(verdict == "right"), info)


CONTROLLER, GENERATOR = Nobody("controller-1"), Nobody("generator-1")
JOBS = [Job(f"k{i}", Example(str(i), {"i": i}), RolloutSettings()) for i in range(40)]


def drive(
    play: Play,
    journal: Path,
    jobs: Sequence[Job] = JOBS,
    limit: int = 8,
    on_done: Callable[[Job, Trajectory], None] | None = None,
) -> tuple[PlayedTask, list[Trajectory]]:
    task, record = PlayedTask(play), Journal(journal)
    try:
        return task, asyncio.run(run_rollouts(Setup(task, CONTROLLER, GENERATOR), jobs, record, limit, on_done))
    finally:
        record.close()


def test_the_driver_s_own_record_of_a_failed_episode_lacks_nothing(tmp_path: Path) -> None:
    """Oracle: the fields of the record by hand: a call that the task let through fails the episode of its settings."""

    async def play(example: Example) -> str:
        raise GeneratorError("429")

    settings = RolloutSettings(Sampling(1.0, seed=5, draw=3), protocol="oracle")
    _, (run,) = drive(play, tmp_path / "j", [Job("k", Example("7", {}), settings)])
    expected = EpisodeInfo("failed", "oracle", "controller-1", "generator-1", seed=5, draw=3, error="429")
    assert (run.task, run.example_id, run.turns, run.reward, run.info) == ("played", "7", (), 0.0, expected)
    assert from_json(Trajectory, to_json(run)) == run


@pytest.mark.parametrize("found", [None, "right", ("right", 1.0)])
def test_a_rollout_without_a_trajectory_is_said(found: object, tmp_path: Path) -> None:
    """Oracle: the message names the task and what it forgot: most often a `return`."""

    class Forgetful(PlayedTask):
        async def rollout(self, *_: object) -> Trajectory:
            return cast(Trajectory, found)

    setup = Setup(Forgetful(right), CONTROLLER, GENERATOR)
    with pytest.raises(ValueError, match=r"task played: rollout returned .*; expected `return episode.trajectory"):
        asyncio.run(run_rollouts(setup, JOBS[:1], Journal(tmp_path / "j"), 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((float("nan"), "wrong"), "reward is nan; expected a finite number"),
        ((None, "wrong"), "reward is None; expected a finite number"),
        (("1", "right"), "reward is '1'; expected a finite number"),
        ((1.0, "correct"), "the verdict is 'correct'; expected one of .*right.*wrong"),
        ((1.0, "right", True), "the prediction is True; expected a text, a number or None"),
        ((1.0, "right", float("nan")), "the prediction is nan; expected a finite number"),
        ((1.0, "right", ["x"]), r"the prediction is \['x'\]; expected a text"),
        ((1.0, "right", "x", None, float("inf")), "score is inf; expected a finite number"),
        ((1.0, "right", "x", None, 1.0, {"steps": None}), "steps is None; expected a finite number"),
    ],
)
def test_what_could_not_be_read_back_is_not_recorded(values: tuple[Any, ...], message: str) -> None:
    """Oracle: each message by hand; a reward that is a bool is recorded as a float, which is what reading expects."""
    episode = Episode("own", Example("7", {}), CONTROLLER, GENERATOR, RolloutSettings())
    with pytest.raises(ValueError, match=f"task own: {message}"):
        episode.trajectory(*values)
    measures: dict[str, Any] = {"steps": 3, "share": np.float32(0.5), "n": np.int64(2)}
    sound = episode.trajectory(True, "right", 4, measures=measures)
    assert from_json(Trajectory, json.loads(json.dumps(to_json(sound)))) == sound
    assert type(sound.reward) is float and sound.info.measures == {"steps": 3, "share": 0.5, "n": 2}


class Speaker(Nobody):
    """A controller and generator of a user, which says `said`."""

    def __init__(self, said: Any) -> None:
        super().__init__("mine")
        self.said = said

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> Any:
        return self.said

    async def complete(self, prompt: Messages, sampling: Sampling) -> Any:
        return self.said


@pytest.mark.parametrize("said", [None, [], "plan", ["plan"], [Sample("a"), Sample("b")], Sample("a")])
def test_a_scheme_that_gives_no_sample_is_named(said: Any) -> None:
    """Oracle: the message names the controller and what `propose` is to return."""
    episode = Episode("own", Example("7", {}), Speaker(said), GENERATOR, RolloutSettings())
    with pytest.raises(ValueError, match="controller mine: propose returned .*; expected a list of as many Samples"):
        asyncio.run(episode.propose((Message("user", "q"),)))


@pytest.mark.parametrize("said", [None, "answer", [Sample("a")]])
def test_a_generator_that_gives_no_sample_is_named(said: Any) -> None:
    """Oracle: the message names the generator and what `complete` is to return."""
    episode = Episode("own", Example("7", {}), Speaker([Sample("plan")]), Speaker(said), RolloutSettings())
    asyncio.run(episode.propose((Message("user", "q"),)))
    with pytest.raises(ValueError, match=r"generator mine: complete returned .*; expected a Sample\(text\)"):
        asyncio.run(episode.complete((Message("user", "q"),)))


ODD_TEXT = Message("user", cast(str, 3))
ODD_PROMPTS: list[Any] = ["q", (), [Message("user", "q")], ("q",), Message("user", "q"), (ODD_TEXT,)]


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=repr)
def test_a_prompt_that_is_none_is_refused(prompt: Any) -> None:
    """Oracle: the message names the method of the episode and the form of a prompt, before any model is asked."""
    episode = Episode("own", Example("7", {}), Speaker([Sample("plan")]), Speaker(Sample("a")), RolloutSettings())
    with pytest.raises(ValueError, match="task own: the prompt given to `propose` is .*; expected a tuple of Message"):
        asyncio.run(episode.propose(prompt))
    with pytest.raises(ValueError, match="task own: the prompt given to `complete` is .*; expected a tuple of Message"):
        asyncio.run(episode.complete(prompt))
    with pytest.raises(ValueError, match="task own: `complete` comes before `propose`, which begins a turn"):
        asyncio.run(episode.complete((Message("user", "q"),)))


def test_methods_that_are_no_coroutines_are_named() -> None:
    """Oracle: the message says which method of which model needs `async def`."""

    class Plain(Nobody):
        def propose(self, *_: object) -> Any:
            return [Sample("plan")]

        complete = propose  # type: ignore[assignment]

    plain: Any = Plain("plain-1")
    episode = Episode("own", Example("7", {}), plain, plain, RolloutSettings())
    with pytest.raises(ValueError, match="controller plain-1: propose returned .*begin it with `async def`"):
        asyncio.run(episode.propose((Message("user", "q"),)))
    episode = Episode("own", Example("7", {}), Speaker([Sample("plan")]), plain, RolloutSettings())
    asyncio.run(episode.propose((Message("user", "q"),)))
    with pytest.raises(ValueError, match="generator plain-1: complete returned .*begin it with `async def`"):
        asyncio.run(episode.complete((Message("user", "q"),)))


def test_an_error_of_the_task_says_on_which_example(tmp_path: Path) -> None:
    """Oracle: the note of the exception, once, though two episodes raise the same one."""
    error = KeyError("mine")

    async def breaks(example: Example) -> str:
        raise error

    with pytest.raises(KeyError) as caught:
        drive(breaks, tmp_path / "j", JOBS[:2])
    assert caught.value.__notes__ == ["in the episode of task played on example 0"]


def keys(journal: Path) -> list[str]:
    return [json.loads(line)["key"] for line in journal.read_text().splitlines()]


async def right(example: Example) -> str:
    await asyncio.sleep(0)
    return "right"


def test_results_come_in_job_order_whatever_ends_first(tmp_path: Path) -> None:
    """Oracle: by hand. Each episode waits for the end of the next; the record is in the order of ending, the result in
    the order of the jobs.
    """
    ended: list[str] = []

    async def backwards(example: Example) -> str:
        while len(ended) < 9 - example.fields["i"]:
            await asyncio.sleep(0.001)
        return "right"

    _, runs = drive(backwards, tmp_path / "j", JOBS[:10], 10, lambda job, trajectory: ended.append(job.key))
    assert [run.example_id for run in runs] == [str(i) for i in range(10)]
    assert keys(tmp_path / "j") == ended == [f"k{i}" for i in reversed(range(10))]


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_at_most_limit_episodes_are_in_flight(limit: int, tmp_path: Path) -> None:
    """Oracle: a counter inside the episodes. The limit is also reached: episodes do overlap."""
    flying, peak = 0, 0

    async def count(example: Example) -> str:
        nonlocal flying, peak
        flying += 1
        peak = max(peak, flying)
        await asyncio.sleep(0.001)
        flying -= 1
        return "right"

    drive(count, tmp_path / "j", limit=limit)
    assert peak == min(limit, 40)


def test_a_resumed_run_runs_only_what_is_missing_and_returns_the_same(tmp_path: Path) -> None:
    """Oracle: the uninterrupted run. Replayed episodes are equal to the ones that ran."""
    _, first = drive(right, tmp_path / "j", JOBS[:5])
    told: list[str] = []
    task, both = drive(right, tmp_path / "j", JOBS[:9], on_done=lambda job, trajectory: told.append(job.key))
    assert task.started == ["5", "6", "7", "8"] and told == ["k5", "k6", "k7", "k8"]
    assert both[:5] == first and both == drive(right, tmp_path / "fresh", JOBS[:9])[1]
    assert drive(right, tmp_path / "j", JOBS[:9])[0].started == []


def test_an_exception_stops_the_run_and_keeps_what_had_ended(tmp_path: Path) -> None:
    """Oracle: by hand. Episodes 0 to 4 end, 5 breaks, 6 and 7 hang: they are cancelled, and none is recorded."""
    cancelled: list[str] = []

    async def breaks(example: Example) -> str:
        i = example.fields["i"]
        if i == 5:
            await asyncio.sleep(0.01)
            raise ZeroDivisionError("a bug")
        if i > 5:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(example.id)
                raise
        return "right"

    with pytest.raises(ZeroDivisionError, match="a bug"):
        drive(breaks, tmp_path / "j", JOBS[:8])
    assert keys(tmp_path / "j") == [f"k{i}" for i in range(5)] and sorted(cancelled) == ["6", "7"]
    assert drive(right, tmp_path / "j", JOBS[:8])[0].started == ["5", "6", "7"]


def test_a_disk_that_refuses_a_sync_stops_the_run(tmp_path: Path) -> None:
    """Oracle: the error of the one sync that failed; Linux tells it once, and the next fsync of the file succeeds."""

    class Refusing(Journal):
        syncs = 0

        def sync(self) -> None:
            self.syncs += 1
            if self.syncs == 1:
                raise OSError("no space")
            super().sync()

    async def slow(example: Example) -> str:
        await asyncio.sleep(0.03)
        return "right"

    record = Refusing(tmp_path / "j")
    with pytest.raises(OSError, match="no space"):
        asyncio.run(run_rollouts(Setup(PlayedTask(slow), CONTROLLER, GENERATOR), JOBS, record, 2))
    record.close()
    assert 2 <= len(keys(tmp_path / "j")) < 40


@pytest.mark.parametrize("raised", [True, False])
def test_a_failed_episode_is_returned_but_tried_again_on_resume(raised: bool, tmp_path: Path) -> None:
    """Oracle: the same error, whether the task reports "failed" or lets the GeneratorError through."""

    async def fails(example: Example) -> str:
        if example.id != "2":
            return "right"
        if raised:
            raise GeneratorError("429")
        return "failed"

    _, runs = drive(fails, tmp_path / "j", JOBS[:4])
    assert [run.info.verdict for run in runs] == ["right", "right", "failed", "right"]
    assert runs[2].info.error == ("429" if raised else "why") and runs[2].reward == 0.0
    task, again = drive(right, tmp_path / "j", JOBS[:4])
    assert task.started == ["2"] and [run.info.verdict for run in again] == ["right"] * 4


def test_too_many_failures_stop_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    """Oracle: one at a time, every fourth fails. 5 of 20 is the first count after 20 episodes above 20%."""

    async def every_fourth(example: Example) -> str:
        return "failed" if example.fields["i"] % 4 == 0 else "right"

    with pytest.raises(RuntimeError, match=r"5 of 20 episodes failed, more than 20%; most often \(5 times\): why"):
        drive(every_fourth, tmp_path / "j", limit=1)
    assert len(keys(tmp_path / "j")) == 15
    task, runs = drive(right, tmp_path / "j")
    assert len(task.started) == 25 and len(runs) == 40


def test_failures_within_the_allowed_share_do_not_stop_the_run(tmp_path: Path) -> None:
    """Oracle: by hand. Exactly 20% is allowed, at every count from 20 on: the first of every five fails, after four
    that do not.
    """

    async def every_fifth(example: Example) -> str:
        return "failed" if example.fields["i"] % 5 == 4 else "right"

    _, runs = drive(every_fifth, tmp_path / "j", limit=1)
    assert sum(run.info.verdict == "failed" for run in runs) == 8


def test_a_spent_budget_lets_the_others_end(tmp_path: Path) -> None:
    """Oracle: of eight in flight the third is refused; the other seven end and are recorded, and none begins after."""

    async def third_is_refused(example: Example) -> str:
        await asyncio.sleep(0.01)
        if example.id == "2":
            raise RunStopped("the budget")
        await asyncio.sleep(0.05)
        return "right"

    with pytest.raises(RunStopped, match="the budget"):
        drive(third_is_refused, tmp_path / "j")
    assert sorted(keys(tmp_path / "j")) == sorted(f"k{i}" for i in range(8) if i != 2)
    assert len(drive(right, tmp_path / "j")[1]) == 40


def test_a_stop_lets_those_in_flight_end(tmp_path: Path) -> None:
    """Oracle: the event is set by the fifth of the first eight; all that had begun are recorded, no other begins."""

    async def main() -> None:
        stop = asyncio.Event()

        async def sets(example: Example) -> str:
            await asyncio.sleep(0.02)
            if example.id == "4":
                stop.set()
            return "right"

        task, record = PlayedTask(sets), Journal(tmp_path / "j")
        with pytest.raises(RunStopped, match="of 40 episodes done"):
            await run_rollouts(Setup(task, CONTROLLER, GENERATOR), JOBS, record, 8, stop=stop)
        record.close()
        assert 8 <= len(task.started) <= 12  # workers 0 to 3 had begun another one by then
        assert sorted(keys(tmp_path / "j")) == sorted(f"k{i}" for i in task.started)

    asyncio.run(main())


def test_two_jobs_of_one_key_are_an_error(tmp_path: Path) -> None:
    """Oracle: each message, by hand."""
    with pytest.raises(ValueError, match="2 jobs have the key k1; give each its own `draw`"):
        drive(right, tmp_path / "j", [*JOBS[:3], JOBS[1]])
    with pytest.raises(ValueError, match="limit is 0"):
        drive(right, tmp_path / "j", limit=0)


def test_no_jobs_is_no_work(tmp_path: Path) -> None:
    """Oracle: by definition."""
    assert drive(right, tmp_path / "j", [])[1] == []


def test_a_record_that_is_no_trajectory_is_named(tmp_path: Path) -> None:
    """Oracle: the message names the file, the key and the missing field."""
    (tmp_path / "j").write_text('{"key": "k0", "trajectory": {"task": "played"}}\n')
    with pytest.raises(ValueError, match=r"j: the row of key k0 holds no trajectory: .*example_id"):
        drive(right, tmp_path / "j")


def test_the_key_changes_with_everything_that_makes_another_episode() -> None:
    """Invariant: equal content, equal key; any other task version, problem, setting or model, another key."""
    task, settings, example = PlayedTask(right), RolloutSettings(), JOBS[0].example
    base = job_key(task, example, settings, CONTROLLER, GENERATOR)
    newer = PlayedTask(right)
    newer.version = 2
    others = [
        job_key(newer, example, settings, CONTROLLER, GENERATOR),
        job_key(task, JOBS[1].example, settings, CONTROLLER, GENERATOR),
        job_key(task, replace(example, fields={"i": 9}), settings, CONTROLLER, GENERATOR),
        job_key(task, example, replace(settings, protocol="oracle"), CONTROLLER, GENERATOR),
        job_key(task, example, replace(settings, controller=Sampling(draw=1)), CONTROLLER, GENERATOR),
        job_key(task, example, settings, Nobody("controller-2"), GENERATOR),
        job_key(task, example, settings, CONTROLLER, Nobody("generator-2")),
    ]
    assert base == job_key(PlayedTask(right), Example("0", {"i": 0}), RolloutSettings(), CONTROLLER, GENERATOR)
    assert len({base, *others}) == 8
