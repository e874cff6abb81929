"""The episodes of one stage of a run: its jobs by content key, what is shown of them, and how a signal ends them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matryoshka.core.files import Journal
from matryoshka.core.protocols import Controller, Generator, RunStopped, Task
from matryoshka.core.records import Example, RolloutSettings, Trajectory
from matryoshka.core.train import Interrupted
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.spending import Purse
from matryoshka.scripts.interrupt import stop_on_signal
from matryoshka.scripts.progress import Progress
from matryoshka.tasks.rollout import Job, job_key, run_rollouts


@dataclass(frozen=True)
class Scheme:
    """One way to guide the generator: made from the open sampler, with the settings that its episodes run under."""

    name: str
    make: Callable[[Sampler], Controller]
    settings: RolloutSettings


@dataclass(frozen=True)
class Stage:
    """What episodes of one scheme run with. label: of the progress line. limit: episodes in flight."""

    label: str
    task: Task
    controller: Controller
    generator: Generator
    purse: Purse | None
    limit: int
    max_failed_share: float

    def jobs(self, examples: Sequence[Example], settings: Sequence[RolloutSettings]) -> list[Job]:
        """Return one job for each example and each of `settings`."""
        return [
            Job(job_key(self.task, example, setting, self.controller, self.generator), example, setting)
            for example in examples
            for setting in settings
        ]


async def run_stage(stage: Stage, jobs: Sequence[Job], journal: Journal) -> list[Trajectory]:
    """Return the trajectories of `jobs`, those that `journal` holds read back.

    Raises RunStopped when the budget is spent, Interrupted on SIGINT or SIGTERM, both when the episodes in flight have
    ended; otherwise as `run_rollouts` does.
    """
    with Progress(stage.label, len(jobs)) as progress, stop_on_signal() as stop:
        right = ended = 0

        def show(job: Job, trajectory: Trajectory) -> None:
            nonlocal right, ended
            ended, right = ended + 1, right + (trajectory.reward > 0.5)
            cost = f" {stage.purse.shown()}" if stage.purse is not None else ""
            progress.update(ended, f"right {right / ended:.2f}{cost}")

        try:
            done = await run_rollouts(
                stage.task,
                jobs,
                stage.controller,
                stage.generator,
                journal,
                stage.limit,
                show,
                stage.max_failed_share,
                stop,
            )
        except RunStopped:
            if not stop.is_set():
                raise
        if stop.is_set():
            raise Interrupted(f"{stage.label}: stopped by signal; all that ended is recorded")
        return done
