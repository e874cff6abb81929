"""The episodes of one stage of a run: keyed by content, shared among the ranks, shown on a progress line, stoppable.

Each rank records the episodes that it ran in a journal of its own and reads those of the others when all ranks are
done. A recorded episode is never run again, whatever the number of ranks was then and is now.
"""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from matryoshka.core.files import append_jsonl
from matryoshka.core.protocols import Controller, GeneratorError, RunStopped
from matryoshka.core.records import (
    Example,
    Messages,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
    content_key,
    from_json,
    to_json,
)
from matryoshka.core.signals import Interrupted, async_stop_event
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.config import RunConfig, rollout_settings
from matryoshka.pilot.context import Run, Scheme
from matryoshka.pilot.progress import Progress
from matryoshka.pilot.ranks import deal
from matryoshka.pilot.ray import run_on_ray
from matryoshka.tasks.find import check_named, own_class
from matryoshka.tasks.rollout import Job, Setup, failures, job_key, recorded, run_rollouts

EXCHANGE_S = 0.2  # how often the ranks tell each other how far they are


class NotRecordedError(ValueError):
    """Episodes that a run which is only read does not hold."""


def sampled_settings(config: RunConfig, seed: int, samples: int) -> list[RolloutSettings]:
    """Return the settings of `samples` draws at the collection temperature."""
    settings = rollout_settings(config, greedy=False)
    draws = range(samples)
    return [replace(settings, controller=replace(settings.controller, seed=seed, draw=draw)) for draw in draws]


def policy_scheme(run: Run, stage: str) -> Scheme:
    """Return the scheme of the trained policy of `stage` ("": the base model), with greedy decoding."""

    def controller(run: Run, sampler: TokenSampler) -> Controller:
        policy, scheme = run.policies.controller(stage, sampler), run.config.controller.scheme
        if not scheme:
            return policy
        own: Controller = own_class(scheme, "[controller] scheme")(policy)
        check_named(own, f"[controller] scheme {scheme!r}")
        return own

    return Scheme(run.policies.name(stage), controller, rollout_settings(run.config, greedy=True))


def failed_first_plans(done: Sequence[Trajectory]) -> dict[Messages, Sample]:
    """Return first prompt -> a guidance to it that failed, so that a new one followed: the first in the order given."""
    found: dict[Messages, Sample] = {}
    for trajectory in done:
        if len(trajectory.turns) > 1:
            found.setdefault(trajectory.turns[0].prompt, trajectory.turns[0].action)
    return found


class Replay:
    """A controller that gives recorded guidance to the prompts of `table` and asks `policy` for all others.

    Its name is not the policy's, so that its episodes are others. It ends with `name`, and else changes with the table.
    """

    def __init__(self, policy: Controller, table: Mapping[Messages, Sample], name: str = "") -> None:
        self._policy, self._table = policy, table
        said = [(prompt, sample.text) for prompt, sample in table.items()]
        self.name = f"{policy.name}+after-{name or content_key(*said)[:12]}"

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return the recorded guidance n times, or n samples of the policy."""
        if prompt in self._table:
            return [self._table[prompt]] * n
        return await self._policy.propose(prompt, n, sampling)

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return the policy's."""
        return self._policy.prompt_ids(prompt)

    def count_tokens(self, prompt: Messages) -> int:
        """Return the policy's count."""
        return self._policy.count_tokens(prompt)


def run_episodes(
    run: Run,
    scheme: Scheme,
    splits: Sequence[str],
    settings: Sequence[RolloutSettings] = (),
    label: str = "",
    first: int | None = None,
    only: Collection[str] | None = None,
) -> list[Trajectory]:
    """Return the episodes of `scheme` over `splits` (once each, or once per settings); recorded ones are read back.

    label: of the progress line, and of the time that is counted. first: only so many examples. only: only examples with
    these ids. Raises RunStopped when the budget is spent, Interrupted on SIGINT or SIGTERM; the other errors are those
    of `_run_stage`.
    """
    examples = [example for split in splits for example in run.problems[split]][:first]
    examples = [example for example in examples if only is None or example.id in only]
    timed = run.seconds.timed(label or f"{scheme.name} {'+'.join(splits)}")
    with nullcontext() if run.is_read else timed, run.open_sampler() as sampler:
        stage = Stage(run, label or scheme.name, scheme, scheme.make(run, sampler))
        return run.runner.run(_run_stage(stage, stage.jobs(examples, settings or [scheme.settings])))


@dataclass(frozen=True)
class Stage:
    """Episodes of one scheme in one run; label: names them on the progress line."""

    run: Run
    label: str
    scheme: Scheme
    controller: Controller

    def jobs(self, examples: Sequence[Example], settings: Sequence[RolloutSettings]) -> list[Job]:
        """Return one job for each example and each of `settings`."""
        task, generator = self.run.task, self.run.generator
        return [
            Job(job_key(task, example, setting, self.controller, generator), example, setting)
            for example in examples
            for setting in settings
        ]


async def _run_stage(stage: Stage, jobs: Sequence[Job]) -> list[Trajectory]:
    """Return the trajectories of `jobs`, recorded ones read back; the ranks share the others by their examples.

    Every rank returns all of them. Raises RunStopped when the budget is spent, when the episodes in flight have ended;
    Interrupted on SIGINT or SIGTERM, when the requests that were sent are answered; both on every rank when one of them
    stops; GeneratorError when more than `max_failed_share` of all episodes failed, however few they are, since later
    stages would count the failures against the controller; otherwise as `run_rollouts` does.
    """
    run, ranks, journal = stage.run, stage.run.ranks, stage.run.journal
    max_failed_share = run.config.rollout.max_failed_share
    # Prompts of one type of example begin alike: asked one after another, they keep a server's prefix cache warm.
    pending = [job for job in jobs if job.key not in journal.rows]
    if pending and run.is_read:
        raise NotRecordedError(f"{stage.label}: {len(pending)} of {len(jobs)} episodes are not recorded")
    pending.sort(key=lambda job: str(job.example.fields.get("task_type", "")))
    ranks.agree(content_key(*(job.key for job in pending)), f"{stage.label}: the episodes to run")
    mine = deal(pending, [job.example.id for job in pending], ranks.world.size)[ranks.world.rank]
    with Progress(stage.label, len(pending), ranks.world.is_first) as progress, async_stop_event() as stop:
        outcome, done = await _run_share(stage, mine, progress, stop)
    outcomes = ranks.texts(str(outcome or ""))
    if outcome is not None:
        raise outcome
    if others := [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text]:
        raise RunStopped(f"{stage.label}: stopped, and all episodes that ended are recorded; {others[0]}")
    journal.refresh()
    known = {job.key: trajectory for job, trajectory in zip(mine, done, strict=True)}
    # A failed episode is in no journal, so that a restart runs it again, but this stage's result needs it.
    failed = {key: to_json(trajectory) for key, trajectory in known.items() if key not in journal.rows}
    for text in ranks.texts(json.dumps(failed)):
        known |= {key: from_json(Trajectory, row) for key, row in json.loads(text).items()}
    found = [known[job.key] if job.key in known else recorded(journal, job.key) for job in jobs]
    lost = [trajectory for trajectory in found if trajectory.info.verdict == "failed"]
    if len(lost) > max_failed_share * len(found):
        raise GeneratorError(failures(lost, len(found), max_failed_share))
    return found


async def _run_share(
    stage: Stage, jobs: Sequence[Job], progress: Progress, stop: asyncio.Event
) -> tuple[Exception | None, list[Trajectory]]:
    """Return why this rank's `jobs` are not all done, None if they are, and their trajectories, once all ranks end."""
    run, ranks = stage.run, stage.run.ranks
    ended = right = 0
    of_others = (0, 0)  # ended and right of the other ranks, when they last said
    is_done, by_others, is_alone = asyncio.Event(), False, False
    outcome: Exception | None = None
    done: list[Trajectory] = []

    def show() -> None:
        if count := ended + of_others[0]:
            cost = f" {run.account.shown()}" if run.account is not None else ""
            progress.update(count, f"right {(right + of_others[1]) / count:.2f}{cost}")

    def on_done(job: Job, trajectory: Trajectory) -> None:
        nonlocal ended, right
        ended, right = ended + 1, right + (trajectory.reward > 0.5)
        if trajectory.info.verdict == "failed":
            _note_failure(stage, job, trajectory)
        show()

    async def exchange_progress() -> None:
        """Tell the other ranks how far this one is until all are done; a rank that stops, stops all."""
        nonlocal of_others, by_others, is_alone
        while ranks.world.size > 1:
            own = [ended, right, is_done.is_set(), stop.is_set() or outcome is not None]
            try:
                sums = await asyncio.to_thread(ranks.sums, own)
            except RuntimeError:
                is_alone = True
                stop.set()
                return
            if of_others != (of_others := (sums[0] - own[0], sums[1] - own[1])):
                show()
            if sums[3] > own[3] and not stop.is_set():
                by_others = True
                stop.set()
            if sums[2] == ranks.world.size:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(EXCHANGE_S):
                    await is_done.wait()

    async def stop_sending() -> None:
        await stop.wait()
        run.stop_sending()

    exchange, stopping = asyncio.create_task(exchange_progress()), asyncio.create_task(stop_sending())
    try:
        if run.config.executor == "ray":
            done = await run_on_ray(run, stage.scheme, jobs, on_done, stop)
        else:
            setup = Setup(run.task, stage.controller, run.generator)
            share = run.config.rollout.max_failed_share
            done = await run_rollouts(setup, jobs, run.journal, run.limit, on_done, share, stop)
    except (RunStopped, GeneratorError) as err:
        if not (isinstance(err, RunStopped) and stop.is_set()):  # the cause of `stop` is reported instead
            outcome = err
    except BaseException:
        exchange.cancel()
        raise
    finally:
        stopping.cancel()
    is_done.set()
    await exchange
    if is_alone:
        raise Interrupted(f"{stage.label}: another rank is dead; all episodes that ended here are recorded")
    if outcome is None and stop.is_set() and not by_others:
        outcome = Interrupted(f"{stage.label}: stopped by signal; all episodes that ended are recorded")
    return outcome, done


def _note_failure(stage: Stage, job: Job, trajectory: Trajectory) -> None:
    """Append why an episode failed to a file beside the journal; it is not in the journal, so that it is run again."""
    journal = stage.run.journal.path
    path = journal.with_name(journal.name.replace("trajectories", "failed", 1))
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": stage.label,
        "example": job.example.id,
        "draw": job.settings.controller.draw,
        "error": trajectory.info.error,
        "key": job.key,
    }
    append_jsonl(path, row)
