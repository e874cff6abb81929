"""`matryoshka data`: a benchmark's own files."""

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.pilot.download import fetch
from matryoshka.tasks.find import task_names


def data(
    name: Annotated[str, tyro.conf.Positional], task: str = "", out: Path | None = None, mirror: tuple[str, ...] = ()
) -> None:
    """Fetch the files of a benchmark into a folder and print their paths.

    Run it again after an interruption to continue; complete files are only checked.

    Args:
        name: The benchmark: alfworld, gsm-hard, gsm8k or lamp.
        task: Which part of it: of LaMP 1, 2N (news categories), 2M (movie tags), 3 or 4; of GSM8K nothing or socratic.
        out: Folder for the files and their manifest; default: that of the configurations, such as data/gsm8k.
        mirror: Addresses that are tried before the benchmark's own site, for files that the manifest does not name yet;
            the paths behind them and the checksums are those of the site.
    """
    modules = {known: f"matryoshka.tasks.{known}.sources" for known in task_names()}
    found = [importlib.import_module(module) for module in modules.values() if importlib.util.find_spec(module)]
    known = {benchmark: module for module in found for benchmark in module.BENCHMARKS}
    if name not in known:
        raise ValueError(f"data: benchmark {name!r} has no files to fetch; choose from {', '.join(sorted(known))}")
    for path in fetch(known[name].sources(name, task), out or Path("data") / known[name].FOLDER, mirror):
        print(path)
