"""Episodes as tasks of a Ray cluster (`--executor ray`): the same jobs, run elsewhere, recorded here.

A task is one share of a stage's jobs. It opens what it needs in its own process (problems, client, model, sampler),
keeps that for the next stage's task, and streams trajectories back; the driver alone writes the journal, so either
executor continues what the other began. Every machine of the cluster sees the run's folder and the model under the same
path and has the keys in its environment.
"""

import asyncio
import importlib
import io
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka.core.config import to_toml
from matryoshka.core.files import Journal
from matryoshka.core.protocols import GeneratorError, RunStopped
from matryoshka.core.records import Trajectory, from_json, to_json
from matryoshka.core.redaction import redact_output
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.episodes import Scheme
from matryoshka.pilot.folder import cache_path
from matryoshka.pilot.ranks import deal
from matryoshka.tasks.rollout import Job, run_rollouts

if TYPE_CHECKING:
    from matryoshka.pilot.context import Run

STOP = ".stop"  # a file in the run's folder that asks the tasks to end in order
POLL_S = 0.1
_END = {"stopped": RunStopped, "failed": GeneratorError}


@contextmanager
def connected() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else one that starts and ends on this machine with the block.

    Raises ValueError naming the extra where Ray is not installed. Does nothing where it is connected already.
    """
    try:
        import ray
    except ImportError as err:
        raise ValueError("executor = 'ray' needs the extra `cluster`: pip install 'matryoshka-pilot[cluster]'") from err
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        ray.shutdown()


async def run_on_ray(
    run: "Run",
    scheme: Scheme,
    jobs: Sequence[Job],
    journal: Journal,
    on_done: Callable[[Job, Trajectory], None],
    stop: asyncio.Event,
) -> list[Trajectory]:
    """Return the trajectories of `jobs`, in their order, run as Ray tasks; raises as `run_rollouts` does.

    A task that dies with its machine or by a signal ends the run with RuntimeError; what had come back is recorded.
    """
    import ray

    done: dict[str, Trajectory] = {}
    by_key = {job.key: job for job in jobs}
    ends: list[Exception] = []
    file = run.folder / STOP
    file.unlink(missing_ok=True)

    async def take(stream: Any) -> None:
        """Record what a task sends until it ends; if not in order, the others are asked to end too."""
        async for reference in stream:
            kind, body = await reference
            if kind == "episodes":
                for key, row in body:
                    trajectory = done[key] = from_json(Trajectory, row)
                    if trajectory.info.get("verdict") != "failed":
                        journal.append(key, {"trajectory": row}, sync=False)
                    on_done(by_key[key], trajectory)
                await asyncio.to_thread(journal.sync)
            else:
                ends.append(_END[kind](body))
                file.touch()

    async def pass_on() -> None:
        await stop.wait()
        file.touch()

    count = run.config.ray_tasks or _places(run)
    shares = [share for share in deal(jobs, [job.example.id for job in jobs], count) if share]
    on_gpu = run.config.controller.device.startswith("cuda")
    task = ray.remote(num_returns="streaming", max_retries=0, num_gpus=int(on_gpu))(_task)
    scheme_bytes = _dumps(scheme, run)
    streams = [
        task.remote(_config_of(run, i, len(shares)), socket.gethostname(), os.getcwd(), run.folder, scheme_bytes, share)
        for i, share in enumerate(shares)
    ]
    watch = asyncio.create_task(pass_on())
    try:
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(take(stream))
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


def _places(run: "Run") -> int:
    """Return how many tasks the cluster takes at once: one for each GPU or, on CPUs, for each machine."""
    alive = _machines()
    if run.config.controller.device.startswith("cuda"):
        return max(1, int(sum(machine["Resources"].get("GPU", 0) for machine in alive)))
    return len(alive)


def _machines() -> list[dict[str, Any]]:
    ray: Any = importlib.import_module("ray")
    return [node for node in ray.nodes() if node["Alive"]]


def _config_of(run: "Run", index: int, count: int) -> RunConfig:
    """Return the configuration that task `index` of `count` opens: the driver's black box, its part of the limits."""
    machines = len(_machines())
    threads = max(1, (os.cpu_count() or 1) // -(-count // machines))  # tasks on one machine share its cores
    controller = replace(run.config.controller, threads=run.config.controller.threads or threads)
    config, generator = replace(run.config, controller=controller), getattr(run.generator, "config", None)
    if generator is None:
        return config
    if machines > 1:
        budget = config.budget_usd or config.budget_tokens
        if budget or config.serve.model:
            raise ValueError(
                f"executor = 'ray': {'a budget' if budget else '[serve] model'} is for one machine, and this cluster "
                "has several; use torchrun, which gives every machine its own"
            )
    return replace(config, generator=generator.part(index, count), serve=ServeConfig())


def _cause(err: BaseException) -> BaseException:
    """Return what a task raised, if that is for the user to mend."""
    cause = getattr(err, "cause", None)
    if isinstance(cause, ValueError | OSError | GeneratorError):
        return cause
    return err


# In a task's process.


def _task(
    config: RunConfig, first: str, cwd: str, folder: Path, scheme_bytes: bytes, jobs: Sequence[Job]
) -> Iterator[tuple[str, Any]]:
    """Yield ("episodes", [(key, trajectory as JSON)]) as they end; last ("stopped" or "failed", why) if not all did.

    first: the driver's machine.
    """
    redact_output()
    os.chdir(cwd)
    run = _opened(config, folder, first)
    scheme: Scheme = _Unpickler(scheme_bytes, run).load()
    ended: list[tuple[str, Any]] = []
    stop = asyncio.Event()

    async def begin(controller: Any) -> "asyncio.Task[list[Trajectory]]":
        limit, share = run.limit, config.rollout.max_failed_share
        episodes = run_rollouts(
            *(run.task, jobs, controller, run.generator, _Unwritten(), limit),
            *(lambda job, trajectory: ended.append((job.key, to_json(trajectory))), share, stop),
        )
        return asyncio.create_task(episodes)

    async def go_on(task: "asyncio.Task[list[Trajectory]]") -> None:
        while not ended and not task.done():
            await asyncio.wait({task}, timeout=POLL_S)
            if (folder / STOP).exists():
                stop.set()

    with run.open_sampler() as sampler:
        # The loop stands still while Ray takes what is yielded.
        task = run.runner.run(begin(scheme.make(sampler)))
        while ended or not task.done():
            run.runner.run(go_on(task))
            if ended:
                yield "episodes", ended[:]
                ended.clear()
        try:
            task.result()
        except RunStopped as err:
            yield "stopped", str(err)
        except GeneratorError as err:
            yield "failed", str(err)


_open_runs: dict[str, tuple[ExitStack, "Run"]] = {}


def _opened(config: RunConfig, folder: Path, first: str) -> "Run":
    """Return this process's run, opened once: Ray gives the next stage's task to the same process."""
    from matryoshka.pilot.context import Run

    key = f"{folder}\n{to_toml(config)}"
    if key not in _open_runs:
        while _open_runs:
            _open_runs.popitem()[1][0].close()
        with ExitStack() as stack:
            here = socket.gethostname()
            run = Run(config, folder, stack, cache_path(folder, "" if here == first else here), trains=False)
            _open_runs[key] = (stack.pop_all(), run)
    return _open_runs[key][1]


def _dumps(scheme: Scheme, run: "Run") -> bytes:
    """Return `scheme` as bytes; where it refers to `run`, it will refer to the run of the process that reads it."""
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, thing: object) -> str | None:
            return "run" if thing is run else None

    buffer = io.BytesIO()
    Pickler(buffer).dump(scheme)
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, run: "Run") -> None:
        super().__init__(io.BytesIO(data))
        self._run = run

    def persistent_load(self, name: str) -> "Run":
        return self._run


class _Unwritten(Journal):
    """The journal of a task, whose episodes the driver records."""

    def __init__(self) -> None:
        self.rows = {}

    def append(self, key: str, row: dict[str, Any], sync: bool = True) -> None:
        self.rows[key] = row

    def sync(self) -> None:
        pass
