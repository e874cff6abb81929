"""A pilot with its controller on vLLM and its generator on another server; each of the three processes is killed once.

    python -m matryoshka.benchmarks.vllm_kills --out benchmarks/results/vllm_kills.json [--config FILE]

kill -9 of vLLM and of the pilot itself in mid-collection, and of the generator in the evaluation. vLLM the pilot starts
again by itself; for the other two the same command is given once more. What was recorded and paid for before each kill
must be there, unchanged, at the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from matryoshka.core.config import load_toml, to_toml
from matryoshka.core.files import write_json, write_text
from matryoshka.inference.cache import ResponseCache
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.environment import environment

TIMEOUT_S = 1800.0


def main(out: Path, config: Path = Path("configs/vllm_tiny.toml"), name: str = "vllm-kills") -> None:
    """Run it all, write `out` and print it; raises RuntimeError where something recorded is lost or asked again.

    Args:
        out: JSON file to write.
        config: A pilot's configuration with engine = "vllm" and a [serve] model.
        name: The run's; what is in its folder is removed first.
    """
    folder = Path("runs") / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = replace(load_toml(RunConfig, config), name=name)
    path = folder.with_suffix(".toml")
    write_text(path, to_toml(settings))
    total = settings.task.train * settings.rollout.samples
    moments = (("vLLM", total // 4), ("pilot", total // 2), ("generator", total + settings.task.validation))
    steps: list[dict[str, Any]] = []
    began = time.monotonic()
    pilot = _start(path)
    for what, count in moments:
        steps.append(_kill(folder, pilot, what, count))
        if what == "vLLM":  # it is the pilot's to start again
            continue
        step = steps[-1]
        status = step["pilot then ended with status"] = pilot.wait(TIMEOUT_S)
        if what == "generator":
            step["saying"] = _errors(path)[-1][:300]
        if status == 0:
            raise RuntimeError(f"the {what} was killed, and the pilot went on as if nothing had happened")
        _wait_for_end(step.pop("_family"))
        pilot = _start(path)
    if status := pilot.wait(TIMEOUT_S):
        raise RuntimeError("\n".join([f"the pilot ended with status {status}:", *_errors(path)[-30:]]))
    episodes, answers = _recorded(folder)
    for step in steps:
        step.pop("_family", None)
        before: tuple[dict[str, str], dict[str, str]] = step.pop("_recorded")
        step["episodes before"], step["answers before"] = len(before[0]), len(before[1])
        step["all kept"] = all(a.items() <= b.items() for a, b in zip(before, (episodes, answers), strict=True))
    log = (folder / "vllm.log").read_text(errors="replace")
    result = {
        "what": "pilot with vLLM as controller and another server as generator, each process killed once",
        "kills": steps,
        "episodes": len(episodes),
        "answers": len(answers),
        "vLLM starts": log.count("Application startup complete"),
        "adapters loaded": log.count("Loaded new LoRA adapter"),
        "seconds": round(time.monotonic() - began),
        "summary": json.loads((folder / "summary.json").read_text()),
        "config": str(config),
        "machine": environment(),
    }
    write_json(out, result)
    print(json.dumps(result))
    if result["vLLM starts"] <= len(moments):  # once for each pilot, and once more by the first
        raise RuntimeError("the pilot got by without the vLLM that was killed: nothing is shown; take more episodes")
    if not all(step["all kept"] for step in steps):
        raise RuntimeError("something that was recorded before a kill is lost or has changed")


def _start(path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "matryoshka.scripts.cli", "pilot", "--config", str(path)]
    with path.with_suffix(".err").open("ab") as errors:
        return subprocess.Popen(command, stdout=errors, stderr=errors)


def _errors(path: Path) -> list[str]:
    return path.with_suffix(".err").read_text(errors="replace").splitlines()


def _kill(folder: Path, pilot: "subprocess.Popen[bytes]", what: str, episodes: int) -> dict[str, Any]:
    """kill -9 the process of that name as soon as so many episodes are recorded; return what was there then."""
    began = time.monotonic()
    while len(_recorded(folder)[0]) < episodes:
        if pilot.poll() is not None or time.monotonic() > began + TIMEOUT_S:
            raise RuntimeError("\n".join(["the pilot ended, or hung:", *_errors(folder.with_suffix(".toml"))[-30:]]))
        time.sleep(0.1)
    family = _descendants(pilot.pid)
    of = {"vLLM": "--served-model-name", "generator": "matryoshka.scripts.cli serve"}
    # The keeper's command line holds vLLM's; the younger of the two is vLLM.
    pid = pilot.pid if what == "pilot" else max(pid for pid, line in family.items() if of[what] in line)
    recorded = _recorded(folder)
    os.kill(pid, signal.SIGKILL)
    return {"killed": what, "_recorded": recorded, "_family": sorted(family)}


def _recorded(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return episodes and answers by key, as they are written."""
    journal, cache = folder / "trajectories.jsonl", folder / "cache.sqlite"
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    answers = {}
    if cache.exists():
        store = ResponseCache(cache)
        answers = {key: f"{at} {sample}" for key, _, at, sample in store.rows()}
        store.close()
    return {json.loads(line)["key"]: line for line in lines}, answers


def _descendants(pid: int) -> dict[int, str]:
    """Return the command lines of the processes below `pid`."""
    parents, lines = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile
            continue
    found, fresh = {}, [pid]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh and child in lines]
        found.update({child: lines[child] for child in fresh})
    return found


def _wait_for_end(pids: Sequence[int]) -> None:
    """Return when none of the processes is there; raises RuntimeError if one outlives the pilot."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} outlive the pilot that started them")
        time.sleep(0.1)


if __name__ == "__main__":
    tyro.cli(main)
