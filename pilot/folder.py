"""A run's folder: its lock, the configuration that it was started with, its caches, and how long its stages took."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from matryoshka.core.config import diff, load_toml
from matryoshka.core.files import folder_lock, recover_folder, write_folder, write_json
from matryoshka.core.training.train import FREE
from matryoshka.inference.cache import ResponseCache
from matryoshka.pilot.config import RunConfig
from matryoshka.tasks.find import task_class

RUNS = Path("runs")  # where the commands keep runs
CONFIG = "config.toml"
GATEWAY = "gateway.toml"  # the configuration of a gateway, in the folder of its record

# Settings whose value may change when a run is continued.
_PATIENCE = ("concurrency", "requests_per_minute", "tokens_per_minute", "max_retries", "timeout_s", "total_timeout_s")
FREE_TO_CHANGE = (
    *("budget_usd:", "budget_tokens:", "rollout.max_failed_share:", "generator.endpoints", "controller.vllm."),
    *("rounds:", "executor:", "ray_tasks:", "parallel.", "tensorboard:", "rollout.limit:", "overlong:"),
    # How the work fits the machine: an error that asks for another value of these must not end the run for good.
    *("controller.threads:", "controller.max_rows:", "serve.threads:", "serve.copies:", "serve.max_rows:"),
    *(f"{table}.train.{name}:" for table in ("warmup", "dpo") for name in (*FREE, "attention", "compile_blocks")),
    *(f"generator.{name}:" for name in (*_PATIENCE, "backoff_s", "api_key_env", "prices")),
)
DECISIVE = "controller.vllm.dtype:"  # the exception among those: the samples depend on it


def claim(config: RunConfig, folder: Path, stack: ExitStack) -> tuple[bool, list[str]]:
    """Lock the folder and tidy it; return whether it has a configuration, and how `config` differs from that."""
    stack.enter_context(folder_lock(folder))
    _sweep(folder)
    saved = (folder / CONFIG).exists()
    changed = diff(load_toml(RunConfig, folder / CONFIG), config) if saved else []
    free = (*FREE_TO_CHANGE, *(f"task.options.{name}:" for name in task_class(config.task.name).free_options))
    if changes := [line for line in changed if not line.startswith(free) or line.startswith(DECISIVE)]:
        raise ValueError(
            f"{folder}: was started with another configuration: {'; '.join(changes)}. "
            "Take the old values to continue, or another name to start afresh"
        )
    return saved, changed


def cache_path(folder: Path, node: str = "") -> Path:
    """Return the cache of the machine `node`, "" for the first: a WAL database is for the processes of one machine."""
    return folder / (f"cache.node-{node}.sqlite" if node else "cache.sqlite")


def deal_caches(folder: Path, num_nodes: int) -> None:
    """Collect all machines' caches of an earlier start in the first machine's, and copy its answers to the others.

    The caller holds the run's lock, and no process uses the caches. If the process is killed here, spending may be
    counted twice, never too low.
    """
    others = sorted(folder.glob("cache.node-*.sqlite"))
    if num_nodes == 1 and not others:
        return
    cache = ResponseCache(cache_path(folder))
    try:
        for path in others:
            cache.take_in(path)
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        for node in range(1, num_nodes):
            temporary = folder / f".cache.node-{node}.tmp"
            cache.copy_answers(temporary)
            os.replace(temporary, cache_path(folder, str(node)))
    finally:
        cache.close()


def trained_stages(run: Path) -> dict[str, Path]:
    """Return stage -> the folder of its policy, an adapter or a model, of the run in the folder `run`."""
    return {path.parent.name: path for path in sorted(run.glob("*/*")) if path.name in ("adapter", "model")}


class StageSeconds:
    """Wall-clock seconds by stage, added up over restarts; the last part of a stage that was killed is not in them."""

    def __init__(self, path: Path, writes: bool) -> None:
        """path: the file that keeps them. writes: whether this process is the one that writes it."""
        self._path, self._writes = path, writes
        self._seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to `stage`, unless it raises."""
        started = time.monotonic()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - started
        if self._writes:
            write_json(self._path, self._seconds)

    def as_dict(self) -> dict[str, float]:
        return dict(self._seconds)


def _sweep(folder: Path) -> None:
    """Remove half-written files that a kill left; while we hold the lock, no other process writes here."""
    for path in list(folder.rglob(".*.*.old")):
        if path.name.split(".")[-2].isdecimal():  # by `write_folder`; a checkpoint's `.step-<n>.old` is half removed
            recover_folder(path)
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder so that `target` appears complete."""
    with write_folder(target) as temporary:
        shutil.copytree(source, temporary)
