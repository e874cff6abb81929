"""TensorBoard events of training: every number of a metrics row under its own name, beside metrics.jsonl."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
