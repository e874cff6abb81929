"""Runs many episodes at once and records each as it ends: the driver of collection and evaluation.

At most `limit` episodes are in flight, each a coroutine of its task, so a slow call delays nobody. A journal keyed by
content makes a run resumable: recorded episodes are read back and never run again. An episode whose black-box call
failed for good (verdict "failed") is returned but not recorded as done, so that a resumed run tries it again; too many
of them stop the run. When the budget is spent or the user stops the run, no further episode begins, and those in flight
go on as far as they can and are recorded.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from matryoshka.core.files import Journal
from matryoshka.core.protocols import Controller, Generator, GeneratorError, RunStopped, Task
from matryoshka.core.records import Example, RolloutSettings, Trajectory, content_key, from_json, to_json
from matryoshka.tasks.episode import Episode

# While others are still to come, a share of failed episodes says something only after this many.
MIN_EPISODES = 20
SYNC_S = 0.05
# Hundreds of episodes in flight allocate many objects that are freed without the collector of cycles, which took a
# fifth of the process's time at Python's own threshold of 700.
COLLECT_AFTER = 50_000


@dataclass(frozen=True)
class Job:
    """One episode to run; `key` names its content (see `job_key`)."""

    key: str
    example: Example
    settings: RolloutSettings


def job_key(
    task: Task, example: Example, settings: RolloutSettings, controller: Controller, generator: Generator
) -> str:
    """Return the journal key of an episode: equal for equal task version, example, settings and models.

    A controller's name carries the hash of its adapter, so another adapter is another key. `overlong` is left out: what
    was recorded under "error" did fit, and is the same under "skip".
    """
    settings = replace(settings, overlong="error")
    return content_key(task.name, task.version, example, settings, controller.name, generator.name)


@dataclass(frozen=True)
class Setup:
    """What an episode takes besides its problem."""

    task: Task
    controller: Controller
    generator: Generator


async def run_rollouts(
    setup: Setup,
    jobs: Sequence[Job],
    journal: Journal,
    limit: int,
    on_done: Callable[[Job, Trajectory], None] | None = None,
    max_failed_share: float = 0.2,
    stop: asyncio.Event | None = None,
) -> list[Trajectory]:
    """Return the trajectories of `jobs`, in their order, running those that `journal` does not hold.

    limit: episodes in flight. on_done is called once for every episode that ends in this call, not for those read back.
    Any exception other than GeneratorError and RunStopped cancels the episodes in flight and is raised; those that had
    ended are recorded. Raises GeneratorError when more than `max_failed_share` of at least MIN_EPISODES ended episodes
    failed; RunStopped, once all in flight have ended, when an episode raised it or `stop` was set before all were done;
    ValueError for a limit below 1 or two jobs with one key.
    """
    if limit < 1:
        raise ValueError(f"rollouts: limit is {limit}; expected at least 1 episode in flight")
    key, count = Counter(job.key for job in jobs).most_common(1)[0] if jobs else ("", 0)
    if count > 1:
        raise ValueError(f"rollouts: {count} jobs have the key {key}; give each its own `draw` in the settings")
    done = {job.key: recorded(journal, job.key) for job in jobs if job.key in journal.rows}
    failed: list[Trajectory] = []
    stopped: list[RunStopped] = []
    ended = 0

    async def work(queue: Iterator[Job]) -> None:
        nonlocal ended
        for job in queue:
            if stopped or (stop is not None and stop.is_set()):
                return
            try:
                trajectory = await play_episode(setup, job)
            except RunStopped as err:
                stopped.append(err)
                return
            ended += 1
            if trajectory.info.verdict == "failed":
                failed.append(trajectory)
            else:
                journal.append(job.key, {"trajectory": to_json(trajectory)}, sync=False)
            done[job.key] = trajectory
            if on_done is not None:
                on_done(job, trajectory)
            if ended >= MIN_EPISODES and len(failed) > max_failed_share * ended:
                raise GeneratorError(failures(failed, ended, max_failed_share))

    pending = [job for job in jobs if job.key not in done]
    queue = iter(pending)
    all_ended = asyncio.Event()
    thresholds = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *thresholds[1:])
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_keep_synced(journal, all_ended))
            if workers := [group.create_task(work(queue)) for _ in range(min(limit, len(pending)))]:
                await asyncio.wait(workers)
            all_ended.set()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    finally:
        gc.set_threshold(*thresholds)
        journal.sync()
    if stopped:
        raise stopped[0]
    if len(done) < len(jobs):
        raise RunStopped(f"rollouts: stopped with {len(done)} of {len(jobs)} episodes done, all of them recorded")
    return [done[job.key] for job in jobs]


async def _keep_synced(journal: Journal, all_ended: asyncio.Event) -> None:
    """Sync the journal to its disk as it grows, in a thread: all episodes would wait for it otherwise.

    Raises OSError if the disk fails. The error appears once: a later sync may succeed although data was lost.
    """
    synced = len(journal.rows)
    while not all_ended.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(SYNC_S):
                await all_ended.wait()
        if synced < len(journal.rows):
            synced = len(journal.rows)
            await asyncio.to_thread(journal.sync)


async def play_episode(setup: Setup, job: Job) -> Trajectory:
    """Return the episode of `job`; a GeneratorError that the task let through makes it a failed one.

    Raises ValueError if the task returns no trajectory.
    """
    task, controller, generator = setup.task, setup.controller, setup.generator
    episode = Episode(task.name, job.example, controller, generator, job.settings)
    with episode:
        try:
            found: object = await task.rollout(job.example, controller, generator, job.settings)
        except Exception as err:
            if not hasattr(err, "__notes__"):  # several episodes may wait for one call, and get one exception
                err.add_note(f"in the episode of task {task.name} on example {job.example.id}")
            raise
        if not isinstance(found, Trajectory):
            expected = "expected `return episode.trajectory(...)`"
            raise ValueError(f"task {task.name}: rollout returned {found!r:.60}; {expected}")
        return found
    return episode.trajectory(0.0, "failed")


def recorded(journal: Journal, key: str) -> Trajectory:
    """Return the trajectory that `journal` holds under `key`. Raises ValueError if the row is not one."""
    try:
        return from_json(Trajectory, journal.rows[key].get("trajectory"))
    except ValueError as err:
        raise ValueError(f"{journal.path}: the row of key {key} holds no trajectory: {err}") from err


def failures(failed: Sequence[Trajectory], ended: int, max_failed_share: float) -> str:
    """Return what to say of too many failed episodes among `ended`: their share and the commonest reason."""
    (reason, count), *_ = Counter(str(trajectory.info.error) for trajectory in failed).most_common(1)
    return (
        f"rollouts: {len(failed)} of {ended} episodes failed, more than {max_failed_share:.0%}; most often ({count} "
        f"times): {reason}. All others are recorded: mend the cause and run again to go on from there"
    )
