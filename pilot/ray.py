"""Episodes as tasks of a Ray cluster (`--executor ray`): the same jobs, run elsewhere, recorded here.

A task runs one share of a stage's jobs. It opens the run in its own process (problems, client, model, sampler), keeps
it open for the next stage's task, and streams trajectories back. The driver alone writes the journal, so each executor
continues the work of the other. Every machine of the cluster must see the run's folder and the model under the same
path and have the keys in its environment.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.core.config import to_toml
from matryoshka.core.files import UnwrittenJournal
from matryoshka.core.machine import usable_cores
from matryoshka.core.protocols import Controller, GeneratorError, RunStopped
from matryoshka.core.records import Trajectory, from_json, to_json
from matryoshka.core.redaction import redact_output
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.context import Run, Scheme, assemble
from matryoshka.pilot.folder import cache_path
from matryoshka.pilot.ranks import Ranks, deal
from matryoshka.pilot.ray_cluster import machines, num_places
from matryoshka.tasks.rollout import Job, Setup, run_rollouts

STOP = ".stop"  # a file in the run's folder that asks the tasks to end in order
POLL_S = 0.1
_END = {"stopped": RunStopped, "failed": GeneratorError}


@dataclass(frozen=True)
class Driver:
    """The process that starts the tasks and records their episodes."""

    machine: str
    cwd: str
    folder: Path
    """The run's folder."""


async def run_on_ray(
    run: Run,
    scheme: Scheme,
    jobs: Sequence[Job],
    on_done: Callable[[Job, Trajectory], None],
    stop: asyncio.Event,
) -> list[Trajectory]:
    """Return the trajectories of `jobs`, in their order, run as Ray tasks; raises as `run_rollouts` does.

    A task that dies with its machine or by a signal ends the run with RuntimeError; the episodes received are recorded.
    """
    import ray

    journal, done = run.journal, dict[str, Trajectory]()
    by_key = {job.key: job for job in jobs}
    ends: list[Exception] = []
    file = run.folder / STOP
    file.unlink(missing_ok=True)

    async def receive(stream: Any) -> None:
        """Record the episodes that a task sends; if it ends without all of them, ask the other tasks to end, too."""
        async for reference in stream:
            kind, body = await reference
            if kind == "episodes":
                for key, row in body:
                    trajectory = done[key] = from_json(Trajectory, row)
                    if trajectory.info.verdict != "failed":
                        journal.append(key, {"trajectory": row}, sync=False)
                    on_done(by_key[key], trajectory)
                await asyncio.to_thread(journal.sync)
            else:
                ends.append(_END[kind](body))
                file.touch()

    async def request_stop() -> None:
        await stop.wait()
        file.touch()

    count = run.config.ray_tasks or num_places(run.config.controller.device)
    shares = [share for share in deal(jobs, [job.example.id for job in jobs], count) if share]
    on_gpu = run.config.controller.device.startswith("cuda")
    task = ray.remote(num_returns="streaming", max_retries=0, num_gpus=int(on_gpu))(_task)
    driver = Driver(socket.gethostname(), os.getcwd(), run.folder)
    streams = [
        task.remote(_config_of_task(run, i, len(shares)), driver, scheme, share) for i, share in enumerate(shares)
    ]
    watch = asyncio.create_task(request_stop())
    try:
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(receive(stream))
    except BaseExceptionGroup as errors:
        file.touch()
        raise _cause(errors.exceptions[0]) from errors
    finally:
        watch.cancel()
        journal.sync()
    file.unlink(missing_ok=True)
    if ends:
        raise ends[0]
    return [done[job.key] for job in jobs]


def _config_of_task(run: Run, index: int, count: int) -> RunConfig:
    """Return the configuration of task `index` of `count`: the driver's generator with a part of the limits."""
    num_machines = len(machines())
    threads = max(1, usable_cores() // -(-count // num_machines))  # tasks on one machine share its cores
    controller = replace(run.config.controller, threads=run.config.controller.threads or threads)
    config, generator = replace(run.config, controller=controller), getattr(run.generator, "config", None)
    if generator is None:
        return config
    if num_machines > 1:
        budget = config.budget_usd or config.budget_tokens
        if budget or config.serve.model:
            raise ValueError(
                f"executor = 'ray': {'a budget' if budget else '[serve] model'} is for one machine, and this cluster "
                "has several; use torchrun, which gives every machine its own"
            )
    return replace(config, generator=generator.part(index, count), serve=ServeConfig())


def _cause(err: BaseException) -> BaseException:
    """Return the error that the task raised if a user can mend it, else Ray's own."""
    cause = getattr(err, "cause", None)
    if isinstance(cause, ValueError | OSError | GeneratorError):
        return cause
    return err


# In a task's process.


def _task(config: RunConfig, driver: Driver, scheme: Scheme, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
    """Yield ("episodes", [(key, trajectory as JSON)]) as they end; last ("stopped" or "failed", why) if not all did."""
    redact_output()
    os.chdir(driver.cwd)
    run = _worker_run(config, driver)
    ended: list[tuple[str, Any]] = []
    stop = asyncio.Event()

    def on_done(job: Job, trajectory: Trajectory) -> None:
        ended.append((job.key, to_json(trajectory)))

    async def begin(controller: Controller) -> "asyncio.Task[list[Trajectory]]":
        setup, share = Setup(run.task, controller, run.generator), config.rollout.max_failed_share
        episodes = run_rollouts(setup, jobs, UnwrittenJournal(), run.limit, on_done, share, stop)
        return asyncio.create_task(episodes)

    async def wait_for_episode(task: "asyncio.Task[list[Trajectory]]") -> None:
        while not ended and not task.done():
            await asyncio.wait({task}, timeout=POLL_S)
            if (driver.folder / STOP).exists() and not stop.is_set():
                stop.set()
                run.stop_sending()

    with run.open_sampler() as sampler:
        # The event loop stands still while Ray takes an item.
        task = run.runner.run(begin(scheme.make(run, sampler)))
        while ended or not task.done():
            run.runner.run(wait_for_episode(task))
            if ended:
                yield "episodes", ended[:]
                ended.clear()
        try:
            task.result()
        except RunStopped as err:
            yield "stopped", str(err)
        except GeneratorError as err:
            yield "failed", str(err)


_open_runs: dict[str, tuple[ExitStack, Run]] = {}


def _worker_run(config: RunConfig, driver: Driver) -> Run:
    """Return this process's run, opened once: Ray gives the next stage's task to the same process."""
    key = f"{driver.folder}\n{to_toml(config)}"
    if key not in _open_runs:
        while _open_runs:
            _open_runs.popitem()[1][0].close()
        with ExitStack() as stack:
            machine = socket.gethostname()
            cache = cache_path(driver.folder, "" if machine == driver.machine else machine)
            run = assemble(config, driver.folder, cache, Ranks(), stack, trains=False)
            _open_runs[key] = (stack.pop_all(), run)
    return _open_runs[key][1]
