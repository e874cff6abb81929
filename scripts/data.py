"""`matryoshka data`: a benchmark's own files."""

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.pilot.download import fetch
from matryoshka.tasks.find import task_names


def data(
    name: Annotated[str, tyro.conf.Positional], task: str = "", out: Path | None = None, site: str = ""
) -> None:
    """Fetch the files of a benchmark into a folder and print their paths.

    Run it again after an interruption to continue; complete files are only checked.

    Args:
        name: The benchmark, such as lamp.
        task: Which part of it; of LaMP 1, 2N (news categories), 2M (movie tags), 3 or 4.
        out: Folder for the files and their manifest; default: data/NAME.
        site: Where the files are, for those that the manifest does not name yet; default: the benchmark's own site.
    """
    modules = {known: f"matryoshka.tasks.{known}.sources" for known in task_names()}
    known = [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]
    if name not in known:
        raise ValueError(f"data: benchmark {name!r} has no files to fetch; choose from {', '.join(known)}")
    files = importlib.import_module(modules[name]).sources(task, site)
    for path in fetch(files, out or Path("data") / name):
        print(path)
