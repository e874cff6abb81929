"""The facts that place a measured number: hardware, versions, commit, and the command as it was typed."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ("torch", "safetensors", "tokenizers", "numpy", "aiohttp", "openai", "pydantic", "tyro", "rich", "jinja2")
GIB = 1024**3
TYPED = "MATRYOSHKA_TYPED"  # set by a shell script that runs a command for its user: the user's command line


def environment() -> dict[str, Any]:
    """Return hardware, versions and commit as JSON-ready values: they go into run folders and reports."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "versions": {name: version(name) for name in RUNTIME},
        "commit": _commit(ROOT),
    }


def hardware(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an `environment` says of the machine itself."""
    return {name: value for name, value in machine.items() if name not in ("versions", "commit", "python")}


def versions(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions in an `environment`: Python, packages, commit."""
    return {"python": machine["python"], **machine["versions"], "commit": machine["commit"]}


def typed_command() -> str:
    """Return the command line that started this process as its user typed it, quoted for a shell.

    Under torchrun that is the launcher's, which is this process's parent.
    """
    if typed := os.environ.get(TYPED):
        return typed
    words = sys.orig_argv
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and parent.is_file():
        words = os.fsdecode(parent.read_bytes()).rstrip("\0").split("\0")
    interpreter, *rest = words
    # An installed command is a script beside the interpreter, which its first line names.
    if rest and Path(rest[0]).is_absolute() and Path(rest[0]).parent == Path(interpreter).parent:
        interpreter, *rest = rest
    # A path need not be UTF-8, but a report is.
    return shlex.join([Path(interpreter).name, *rest]).encode(errors="replace").decode()


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / GIB, 1),
                "capability": f"{properties.major}{properties.minor}",
            }
        )
    return found


def _commit(root: Path) -> str | None:
    """Return the commit of the checkout at `root`, "+changes" appended where files differ; None outside a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside somebody else's repository.
    if top is None or Path(top) != root:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return commit and commit + ("+changes" if _git(root, "status", "--porcelain") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
