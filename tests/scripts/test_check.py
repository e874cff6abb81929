"""`matryoshka check` on every shipped configuration, with generated data of full size, and what it finds wrong."""

import json
import lzma
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml
from matryoshka.pilot.check import check_run
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.recipes import RECIPES, recipe_names
from matryoshka.scripts import cli
from matryoshka.tasks.alfworld.games import TASK_TYPES
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.task_specs import CATEGORIES, KINDS, Kind
from matryoshka.tests.tasks.lamp.lamp_files import write_items

# As the benchmarks have them: openai/grade-school-math, reasoning-machines/pal, ALFWorld, LaMP (paper, table 18).
GSM8K = {"train": 7473, "test": 1319, "gsmhardv2": 1319}
ALFWORLD = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
LAMP = {("2N", "train"): 5914, ("2N", "dev"): 1052, ("1", "train"): 236, ("4", "train"): 326}
# Thousands of real rows take minutes to count; the other recipes make their problems from a seed or take few of them.
LARGE = [name for name in recipe_names() if name.startswith(("gsm8k", "lamp_llama3", "real_households"))]
LARGE += ["alfworld_demo", "alfworld_llama3", "alfworld_valid_seen"]


def gsm8k_row(number: int) -> dict[str, Any]:
    pens, boxes = number % 17 + 3, number % 23 + 2
    question = f"Shop {number} has {boxes} boxes with {pens} pens each and sells 2 pens. How many pens are left?"
    steps = f"There are {boxes}*{pens} = <<{boxes}*{pens}={boxes * pens}>>{boxes * pens} pens."
    return {"question": question, "answer": f"{steps}\n#### {boxes * pens - 2}"}


def lamp_items(kind: Kind, split: str, count: int) -> list[Item]:
    """Return questions of few users with many rows each: shares of the rows fall as 1 / rank, as authors' do."""
    draws = random.Random(split)
    users = [f"{split}{number}" for number in range(320)]
    found = []
    for number in range(count):
        (user,) = draws.choices(users, [1 / (rank + 1) for rank in range(len(users))])
        value = {"2N": CATEGORIES[number % 15], "1": "[1]", "4": f"Headline {number}"}[kind.name]
        profile = [
            {name: f"{user} {name} {i}" for name in kind.texts} | ({kind.value: value} if kind.value else {})
            for i in range(3)
        ]
        texts = ["a", "b", "c"] if kind.name == "1" else [f"text {number}"]
        found.append(Item(f"{split}-{number}", kind.ask(*texts), profile, value))
    return found


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=0) if path.suffix == ".xz" else text.encode())


@pytest.fixture(scope="session")
def world(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every shipped configuration finds what it names, data in full size, models tiny."""
    folder = tmp_path_factory.mktemp("world")
    shipped = [load_toml(RunConfig, RECIPES / f"{name}.toml") for name in recipe_names()]
    fields = json.loads((tiny_dir / "config.json").read_text()) | {"max_position_embeddings": 65536}
    for path in {Path(model) for config in shipped for model in (config.controller.path, config.serve.model) if model}:
        if path.suffix == ".gguf":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(b"GGUF")
            continue
        shutil.copytree(tiny_dir, folder / path)
        (folder / path / "config.json").write_text(json.dumps(fields))
    program = folder / ".venv-vllm" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for split, count in GSM8K.items():
        first = list(GSM8K).index(split) * 10_000
        rows = [gsm8k_row(first + number) for number in range(count)]
        if split == "gsmhardv2":
            rows = [{"input": row["question"], "code": "", "target": float(i)} for i, row in enumerate(rows)]
        write_rows(folder / "data" / "gsm8k" / f"{split}.jsonl", rows)
    for (task, split), count in LAMP.items():
        place = folder / "data" / "lamp" / f"LaMP_{task}"
        place.mkdir(parents=True, exist_ok=True)
        write_items(lamp_items(KINDS[task], split, count), KINDS[task], place, split)
    return folder


@pytest.fixture(scope="session")
def games(world: Path) -> Callable[[], None]:
    """Writes ALFWorld's games when they are first wanted: thousands of them take half a minute."""

    def write() -> None:
        for split, count in ALFWORLD.items():
            if not (path := world / "data" / "alfworld" / f"{split}.jsonl.xz").exists():
                write_rows(path, households(split, count, 0, "small", TASK_TYPES))

    return write


def check(name: str, world: Path, games: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    config = load_toml(RunConfig, RECIPES / f"{name}.toml")
    if getattr(config.task.options, "data", ""):
        games()
    checked = check_run(config)
    assert checked.faults == []
    sizes = next(line for line in checked.lines if line.startswith("problems: "))
    for split, count in config.task.sizes.items():
        assert not count or f"{count:,} {split}" in sizes
    wanted = {"controller: guidance", "generator: first request"}
    wanted |= {"generator: second request"} if config.rollout.inner_attempts > 1 else set()
    wanted |= {"controller: new guidance after a failure"} if config.rollout.outer_turns > 1 else set()
    assert checked.prompts.keys() == wanted
    assert checked.numbers["tokens"] <= checked.numbers["tokens_at_most"]
    paid = config.generator.api_key_env and not config.serve.scripted
    assert (checked.numbers["usd"] is not None) is bool(paid)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(LARGE)))
def test_every_small_configuration_passes(
    name: str, world: Path, games: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sizes and the loop that the configuration asks for."""
    check(name, world, games, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_every_large_configuration_passes(
    name: str, world: Path, games: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above, with as many rows as the benchmarks have."""
    check(name, world, games, monkeypatch)


def test_all_faults_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: three things that are not there; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MISSING_KEY", raising=False)
    arguments = ["check", "--config", str(RECIPES / "gsm8k_tiny.toml"), "--serve.model", ""]
    assert cli.main([*arguments, "--generator.api-key-env", "MISSING_KEY"]) == 2
    error = capsys.readouterr().err
    assert "3 faults keep this run from starting" in error and "models/smollm2-135m-instruct: no such folder" in error
    assert "`matryoshka convert --out FOLDER` makes one of the embedded SmolLM2-135M-Instruct" in error
    assert "MISSING_KEY holds no key" in error and "data/gsm8k/train.jsonl: no such file" in error
    assert "`matryoshka data gsm8k` and" in error
    assert os.listdir(tmp_path) == []


def test_what_only_training_would_find_is_found_before(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: a micro-batch that no pair fits, a checkpoint of another shape, a warm-up of no rows."""
    monkeypatch.chdir(world)
    small = load_toml(RunConfig, RECIPES / "demo.toml", {"dpo.train.micro_batch_tokens": 60})
    assert [fault for fault in check_run(small).faults if "a pair may take" in fault]
    sizes = []
    for turns in (1, 2):  # the prompt of a new plan holds the one before it
        planned = load_toml(RunConfig, RECIPES / "demo.toml", {"rollout.outer_turns": turns})
        line = next(line for line in check_run(planned).lines if line.startswith("pairs: at most "))
        sizes.append(int(line.split()[3].replace(",", "")))
    assert sizes[1] >= sizes[0] + small.rollout.guidance_tokens
    empty = load_toml(RunConfig, RECIPES / "demo.toml", {"task.warmup": 0})
    assert check_run(empty).faults == [
        "[warmup] source = 'gold', but [task] warmup is 0, so there is nothing to learn from"
    ]
    (typo,) = check_run(load_toml(RunConfig, RECIPES / "demo.toml", {"lora.targets": ("q_porj",)})).faults
    assert "lora: target 'q_porj' matches no linear layer" in typo
    other = world / "models" / "other"
    shutil.copytree(world / "models" / "smollm2-135m-instruct", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    (fault,) = check_run(load_toml(RunConfig, RECIPES / "demo.toml", {"controller.path": str(other)})).faults
    assert "mlp.down_proj.weight has shape (32, 64), the model expects (32, 48)" in fault


def test_calls_at_most_are_all_calls(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: an episode that the generator guides itself has a call for each guidance besides its answers."""
    monkeypatch.chdir(world)
    loop = {"rollout.outer_turns": 2, "rollout.inner_attempts": 3}
    config = load_toml(RunConfig, RECIPES / "demo.toml", loop)
    without, guided = (check_run(replace(config, rollout=replace(config.rollout, bootstrap=n))).numbers for n in (0, 1))
    episodes = guided["episodes"]["bootstrap, at most"]
    assert episodes == config.rounds * config.task.train
    assert guided["calls_at_most"] - without["calls_at_most"] == episodes * (2 * 3 + 2)
    assert guided["tokens_at_most"] > without["tokens_at_most"]
