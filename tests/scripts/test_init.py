"""`matryoshka init`, the demo's adapter by name, and what of both is in a built wheel."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from matryoshka.core.config import load_toml
from matryoshka.pilot.config import EMBEDDED_ADAPTER, RunConfig, ServeConfig
from matryoshka.pilot.recipes import RECIPES, commented_recipe, field_help, recipe_names
from matryoshka.scripts import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_with_comments_says_the_same(name: str, tmp_path: Path) -> None:
    """Oracle: the recipe itself, read without the comments."""
    path = tmp_path / "mine.toml"
    path.write_text(commented_recipe(name))
    assert load_toml(RunConfig, path) == load_toml(RunConfig, RECIPES / f"{name}.toml")


def test_init_writes_into_the_current_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the field's own docstring above its key; the nearest name; a file that is there stays as it is."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "demo"]) == 0
    lines = (tmp_path / "demo.toml").read_text().splitlines()
    assert lines[lines.index("rounds = 2") - 1] == f"# {field_help(RunConfig)['rounds']}"
    (tmp_path / "demo.toml").write_text("mine")
    assert cli.main(["init", "demo"]) == 2 and (tmp_path / "demo.toml").read_text() == "mine"
    assert cli.main(["init", "demoo"]) == 2
    error = capsys.readouterr().err
    assert "nothing is overwritten" in error and "unknown recipe 'demoo'; did you mean 'demo'?" in error


def test_the_adapter_of_the_demo_has_a_name() -> None:
    """Oracle: the folder in this package."""
    assert (EMBEDDED_ADAPTER / "adapter_model.safetensors").is_file()
    assert ServeConfig(adapter="embedded").adapter_folder == EMBEDDED_ADAPTER
    assert ServeConfig(adapter="mine").adapter_folder == Path("mine") and ServeConfig().adapter_folder is None


def test_the_package_data_names_recipes_and_adapter() -> None:
    """Oracle: the files on disk, against the globs of pyproject.toml; the slow test below builds the wheel."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set((ROOT / "configs").rglob("*.toml")) == {
        path for glob in data["matryoshka.configs"] for path in (ROOT / "configs").glob(glob)
    }
    inference = {path for glob in data["matryoshka.inference"] for path in (ROOT / "inference").glob(glob)}
    assert EMBEDDED_ADAPTER / "adapter_model.safetensors" in inference
    for folder in sorted({path.parent for path in (ROOT / "tasks").glob("*/task.py")}):
        globs = data.get(f"matryoshka.tasks.{folder.name}", [])
        assert set(folder.rglob("*.toml")) == {path for glob in globs for path in folder.glob(glob)}


@pytest.mark.slow
def test_an_installed_wheel_has_the_demo_and_the_recipes(tmp_path: Path) -> None:
    """Oracle: a wheel that pip builds, unpacked where no checkout is; both commands work there as from a clone."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    (source := tmp_path / "source").mkdir()  # setuptools leaves its build/ there
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").exists() or path.name == "configs":
            shutil.copytree(path, source / path.name)
        elif path.is_file():
            shutil.copy(path, source)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    def matryoshka(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "matryoshka.scripts.cli", *arguments], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    matryoshka("init", "demo")
    config = load_toml(RunConfig, tmp_path / "demo.toml")
    assert config == load_toml(RunConfig, RECIPES / "demo.toml")
    assert str(tmp_path / "site" / "matryoshka" / "configs" / "demo.toml") in "".join(
        matryoshka("demo", "--help").replace("\u2502", "").split()
    )
    assert (tmp_path / "site" / "matryoshka" / "inference" / "demo_generator" / "adapter_model.safetensors").is_file()
