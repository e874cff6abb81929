"""The folders stay at the top level and are imported as `matryoshka.<folder>`; see pyproject.toml for the rest."""

from setuptools import setup

FOLDERS = [
    "core", "core.models", "core.text", "core.training", "core.parallel", "lora", "dpo", "inference",
    "tasks", "tasks.pal", "tasks.alfworld", "tasks.lamp", "eval", "pilot", "scripts", "benchmarks",
]

# Data alone: recipes are installed as files beside the code.
DATA_FOLDERS = ["configs"]

setup(
    packages=[f"matryoshka.{name}" for name in (*FOLDERS, *DATA_FOLDERS)],
    package_dir={f"matryoshka.{name}": name.replace(".", "/") for name in (*FOLDERS, *DATA_FOLDERS)},
)
