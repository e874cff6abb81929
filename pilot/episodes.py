"""The episodes of one stage of a run: its jobs by content key, shared among the ranks, shown, and ended by a signal.

Each rank records the episodes that it ran in a journal of its own and reads those of the others when all ranks are
done. A recorded episode is never run again, whatever the number of ranks was then and is now.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from matryoshka.core.files import Journal
from matryoshka.core.protocols import Controller, Generator, GeneratorError, RunStopped, Task
from matryoshka.core.records import Example, RolloutSettings, Sampling, Trajectory, content_key, from_json, to_json
from matryoshka.core.redaction import to_redacted_json
from matryoshka.core.signals import Interrupted, async_stop_event
from matryoshka.inference.spending import Purse
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Run, Scheme
from matryoshka.pilot.progress import Progress
from matryoshka.pilot.ranks import Ranks, deal
from matryoshka.pilot.ray import run_on_ray
from matryoshka.tasks.rollout import Job, failures, job_key, recorded, run_rollouts

STEP_S = 0.2  # how often the ranks tell each other how far they are


Elsewhere = Callable[
    [Sequence[Job], Journal, Callable[[Job, Trajectory], None], asyncio.Event], Awaitable[list[Trajectory]]
]


def rollout_settings(config: RunConfig, greedy: bool) -> RolloutSettings:
    """Return the settings of an episode: the controller greedy or at the collection temperature, the generator greedy.
    """
    rollout = config.rollout
    return RolloutSettings(
        controller=Sampling(
            temperature=0.0 if greedy else rollout.temperature,
            top_p=1.0 if greedy else rollout.top_p,
            max_tokens=rollout.guidance_tokens,
        ),
        generator=Sampling(max_tokens=rollout.code_tokens),
        protocol=rollout.protocol,
        inner_attempts=rollout.inner_attempts,
        outer_turns=rollout.outer_turns,
        overlong=config.overlong,
    )


def sampled_settings(config: RunConfig, seed: int, samples: int) -> list[RolloutSettings]:
    """Return the settings of `samples` draws at the collection temperature."""
    settings = rollout_settings(config, greedy=False)
    draws = range(samples)
    return [replace(settings, controller=replace(settings.controller, seed=seed, draw=draw)) for draw in draws]


def policy_scheme(run: Run, stage: str) -> Scheme:
    """Return the scheme of the trained policy of `stage` ("": the base model), with greedy decoding."""
    name = run.policies.name(stage)
    settings = rollout_settings(run.config, greedy=True)
    return Scheme(name, lambda run, sampler: run.policies.controller(stage, sampler), settings)


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
    examples = [example for split in splits for example in run.task.examples(split)][:first]
    examples = [example for example in examples if only is None or example.id in only]
    with run.seconds.timed(label or f"{scheme.name} {'+'.join(splits)}"), run.open_sampler() as sampler:
        stage = Stage(
            label=label or scheme.name,
            task=run.task,
            controller=scheme.make(run, sampler),
            generator=run.generator,
            purse=run.purse,
            limit=run.limit,
            max_failed_share=run.config.rollout.max_failed_share,
            elsewhere=partial(run_on_ray, run, scheme) if run.config.executor == "ray" else None,
        )
        jobs = stage.jobs(examples, settings or [scheme.settings])
        return run.runner.run(_run_stage(stage, jobs, run.journal, run.ranks))


@dataclass(frozen=True)
class Stage:
    """What episodes of one scheme run with. label: of the progress line. limit: episodes in flight in a process.

    elsewhere: runs jobs in place of `run_rollouts` here; both take what is told of each episode, and the wish to stop.
    """

    label: str
    task: Task
    controller: Controller
    generator: Generator
    purse: Purse | None
    limit: int
    max_failed_share: float
    elsewhere: Elsewhere | None = None

    def jobs(self, examples: Sequence[Example], settings: Sequence[RolloutSettings]) -> list[Job]:
        """Return one job for each example and each of `settings`."""
        return [
            Job(job_key(self.task, example, setting, self.controller, self.generator), example, setting)
            for example in examples
            for setting in settings
        ]


async def _run_stage(stage: Stage, jobs: Sequence[Job], journal: Journal, ranks: Ranks) -> list[Trajectory]:
    """Return the trajectories of `jobs`, recorded ones read back; the ranks share the others by their examples.

    Every rank returns all of them. Raises RunStopped when the budget is spent, Interrupted on SIGINT or SIGTERM, both
    when the episodes in flight have ended, and on every rank when one of them stops; GeneratorError when more than
    `max_failed_share` of all failed, however few they are: what follows would take them for the controller's; otherwise
    as `run_rollouts` does.
    """
    # Prompts of one type of example begin alike: asked one after another, they keep a server's prefix cache warm.
    pending = [job for job in jobs if job.key not in journal.rows]
    pending.sort(key=lambda job: str(job.example.fields.get("task_type", "")))
    ranks.agree(content_key(*(job.key for job in pending)), f"{stage.label}: the episodes to run")
    mine = deal(pending, [job.example.id for job in pending], ranks.world.size)[ranks.world.rank]
    with Progress(stage.label, len(pending), ranks.world.is_first) as progress, async_stop_event() as stop:
        outcome, done = await _run_share(stage, mine, journal, ranks, progress, stop)
    told = ranks.texts(str(outcome or ""))
    if outcome is not None:
        raise outcome
    if others := [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]:
        raise RunStopped(f"{stage.label}: stopped, and all that ended is recorded; {others[0]}")
    journal.refresh()
    known = {job.key: trajectory for job, trajectory in zip(mine, done, strict=True)}
    # A failed episode is in no journal, so that it is tried again; whoever reports needs it all the same.
    failed = {key: to_json(trajectory) for key, trajectory in known.items() if key not in journal.rows}
    for text in ranks.texts(json.dumps(failed)):
        known |= {key: from_json(Trajectory, row) for key, row in json.loads(text).items()}
    found = [known[job.key] if job.key in known else recorded(journal, job.key) for job in jobs]
    lost = [trajectory for trajectory in found if trajectory.info.get("verdict") == "failed"]
    if len(lost) > stage.max_failed_share * len(found):
        raise GeneratorError(failures(lost, len(found), stage.max_failed_share))
    return found


async def _run_share(
    stage: Stage, jobs: Sequence[Job], journal: Journal, ranks: Ranks, progress: Progress, stop: asyncio.Event
) -> tuple[Exception | None, list[Trajectory]]:
    """Return why this rank's `jobs` are not all done, None if they are, and their trajectories, once all ranks end."""
    ended = right = 0
    of_others = (0, 0)  # ended and right, when the ranks last spoke
    is_done, by_others, is_alone = asyncio.Event(), False, False
    outcome: Exception | None = None
    done: list[Trajectory] = []

    def show() -> None:
        if count := ended + of_others[0]:
            cost = f" {stage.purse.shown()}" if stage.purse is not None else ""
            progress.update(count, f"right {(right + of_others[1]) / count:.2f}{cost}")

    def on_done(job: Job, trajectory: Trajectory) -> None:
        nonlocal ended, right
        ended, right = ended + 1, right + (trajectory.reward > 0.5)
        if trajectory.info.get("verdict") == "failed":
            _note_failure(stage, job, trajectory, journal)
        show()

    async def keep_step() -> None:
        """Tell the other ranks how far we are until all are done; one that stops, stops all."""
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
                async with asyncio.timeout(STEP_S):
                    await is_done.wait()

    steps = asyncio.create_task(keep_step())
    try:
        if stage.elsewhere is not None:
            done = await stage.elsewhere(jobs, journal, on_done, stop)
        else:
            done = await run_rollouts(
                stage.task, jobs, stage.controller, stage.generator, journal, stage.limit, on_done,
                stage.max_failed_share, stop,
            )  # fmt: skip
    except (RunStopped, GeneratorError) as err:
        if not (isinstance(err, RunStopped) and stop.is_set()):  # who made it stop says why
            outcome = err
    except BaseException:
        steps.cancel()
        raise
    is_done.set()
    await steps
    if is_alone:
        raise Interrupted(f"{stage.label}: another rank is gone; all that ended here is recorded")
    if outcome is None and stop.is_set() and not by_others:
        outcome = Interrupted(f"{stage.label}: stopped by signal; all that ended is recorded")
    return outcome, done


def _note_failure(stage: Stage, job: Job, trajectory: Trajectory, journal: Journal) -> None:
    """Append why an episode failed to the file beside the journal, which it is not in, so as to be tried again."""
    path = journal.path.with_name(journal.path.name.replace("trajectories", "failed", 1))
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": stage.label,
        "example": job.example.id,
        "draw": job.settings.controller.draw,
        "error": trajectory.info.get("error"),
        "key": job.key,
    }
    with path.open("a", encoding="utf-8") as handle:
        handle.write(to_redacted_json(row, ensure_ascii=False) + "\n")
