"""Metrics of training for TensorBoard and Weights & Biases: every number of a row under its own name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matryoshka.core.records import content_key


@contextmanager
def scalar_writer(folder: Path, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that writes a metrics row, which must have "step", as scalars into `folder`.

    After a resume the steps that are done again replace the old ones. Not enabled, it does nothing.
    Raises ValueError naming the extra when TensorBoard is not installed.
    """
    if not enabled:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise ValueError("tensorboard = true needs the extra `track`: pip install 'matryoshka-pilot[track]'") from err
    make_writer: Any = SummaryWriter  # its methods are not annotated
    writer: Any = None

    def write(row: Mapping[str, float]) -> None:
        nonlocal writer
        step = int(row["step"])
        if writer is None:
            writer = make_writer(folder, purge_step=step)
        for name, value in row.items():
            if name not in ("step", "steps"):
                writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def wandb_writer(folder: Path, project: str, title: str) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that logs a metrics row, which must have "step", to a run of `project` named after `folder`.

    Its own environment variables decide where it goes (WANDB_MODE=offline keeps it in `folder`). With project "" it
    does nothing. A continued training continues its run. Raises ValueError naming the extra without the package wandb.
    """
    if not project:
        yield lambda row: None
        return
    try:
        import wandb
    except ImportError as err:
        raise ValueError("wandb needs the extra `track`: pip install 'matryoshka-pilot[track]'") from err
    folder.mkdir(parents=True, exist_ok=True)
    identity = content_key(project, str(folder.absolute()))[:16]
    run = wandb.init(project=project, name=folder.name, group=title, dir=folder, id=identity, resume="allow")


    def write(row: Mapping[str, float]) -> None:
        run.log({name: value for name, value in row.items() if name not in ("step", "steps")}, step=int(row["step"]))

    try:
        yield write
    finally:
        run.finish()
