"""ALFWorld through the command line: a tiny random controller, the scripted generator, households of our own."""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.intervals import wilson
from matryoshka.core.records import Example, RolloutSettings, Trajectory, from_json, to_json
from matryoshka.eval.baselines import ScriptedGuidance
from matryoshka.pilot import curve
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Problems, load_problems, open_run, open_task
from matryoshka.pilot.estimate import num_episodes
from matryoshka.pilot.stages import collect, examples_of, warm_up
from matryoshka.scripts import cli
from matryoshka.tasks.alfworld.games import TASK_TYPES
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.splits import example_of
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tasks.alfworld.textworld_backend import is_installed
from matryoshka.tests.pilot.conftest import with_context

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "alfworld_demo.toml"
FEW = {"task.warmup": 6, "task.train": 6, "task.validation": 3, "task.test": 6}


def config(**changes: Any) -> RunConfig:
    return load_toml(RunConfig, DEMO, {**FEW, "task.options.size": "small", **changes})


def load_splits(config: RunConfig) -> Problems:
    return load_problems(open_task(config, len))


def make_task(config: RunConfig, examples: Sequence[Example] = ()) -> ALFWorldTask:
    task = open_task(config, len)
    assert isinstance(task, ALFWorldTask)
    task.__dict__["_splits"] = {"test": examples}
    return task


def test_own_games_are_split_without_overlap_and_the_same_again() -> None:
    """Oracle: counts asked for, ids all different, the same games from the same seed and others from another."""
    splits = load_splits(config(**{"task.held_out": 6}))
    sizes = {"warmup": 6, "train": 6, "validation": 3, "test": 6, "held_out": 6}
    assert {name: len(examples) for name, examples in splits.items()} == sizes
    ids = [example.id for examples in splits.values() for example in examples]
    assert len(set(ids)) == len(ids)
    for name in ("warmup", "train", "test", "held_out"):
        assert {example.fields["task_type"] for example in splits[name]} == set(TASK_TYPES)
    assert all(example.id.startswith("valid_unseen/") for example in splits["held_out"])
    assert load_splits(config(**{"task.held_out": 6})) == splits
    others = load_splits(config(seed=1)).values()
    assert not set(ids) & {example.id for examples in others for example in examples}


def write(folder: Path, split: str, rows: list[Any]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_games_are_read_from_a_folder(tmp_path: Path) -> None:
    """Oracle: the rows that were written; a draw by the seed with the types in turn, whatever the file's order."""
    rows = sorted(households("train", 30, 3), key=lambda row: str(row["task_type"]))
    write(tmp_path, "train", rows)
    write(tmp_path, "valid_seen", households("valid_seen", 6, 3))
    mine = config(**{"task.options.data": str(tmp_path)})
    splits = load_splits(mine)
    written = {row["game"] for row in rows}
    assert {example.id for name in ("warmup", "train", "validation") for example in splits[name]} <= written
    assert {example.fields["task_type"] for example in splits["warmup"]} == set(TASK_TYPES)
    random.Random(0).shuffle(rows)
    other = load_splits(replace(mine, seed=1))
    assert [example.id for example in other["train"]] != [example.id for example in splits["train"]]
    engine = make_task(mine)._begin(splits["test"][0])
    assert engine.screen == splits["test"][0].fields["question"]


def test_what_is_wrong_with_the_games_is_said(tmp_path: Path) -> None:
    """Oracle: the words that name the trouble."""
    write(tmp_path, "train", households("train", 4, 3))
    folder = {"task.options.data": str(tmp_path)}
    with pytest.raises(ValueError, match="has 4 games of these types but the configuration takes 15"):
        load_splits(config(**folder))
    with pytest.raises(FileNotFoundError, match="valid_seen"):
        load_splits(config(**folder, **{"task.warmup": 1, "task.train": 1, "task.validation": 1}))
    with pytest.raises(ValueError, match="test: the id .* stands in warmup, too; each problem"):
        load_splits(config(**{"task.options.test_split": "train"}))
    with pytest.raises(ValueError, match="'literal'"):
        ALFWorldTask.scripted_generator("witty")
    slicing = {**households("train", 1, 3)[0], "walkthrough": ["slice apple 1 with knife 1"]}
    with pytest.raises(ValueError, match="cannot be read as a plan: .*'slice apple 1 with knife 1'"):
        example_of(slicing)


def test_a_game_without_a_walkthrough_has_no_gold() -> None:
    """Oracle: None, and a word for the reader."""
    row = {**households("train", 1, 3)[0], "walkthrough": []}
    example = example_of(row)
    task = make_task(config(), [example])
    assert task.gold_guidance(example) is None and example.fields["answer"] == "unknown"


def test_each_round_takes_the_next_examples(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: of six examples four a round, so the second round has the last two and the first two; the
    estimate counts what was sampled; 0 means all of them.
    """
    controller = with_context(tiny_dir, tmp_path / "tiny", 4096)
    few = {"rounds": 2, "warmup.source": "none", "rollout.samples": 2, "rollout.guidance_tokens": 4}
    mine = config(**few, **{"controller.path": str(controller), "serve.scripted": "literal", "rollout.examples": 4})
    with open_run(mine, tmp_path / "runs") as run:
        train = run.problems["train"]
        first = collect(run, 1)
        run.policies.keep("", "round-1")
        second = collect(run, 2)
        assert num_episodes(mine, run.task, run.problems)["collect"] == len(first) + len(second) == 16
    assert {episode.example_id for episode in first} == {example.id for example in train[:4]}
    assert {episode.example_id for episode in second} == {example.id for example in (*train[4:], *train[:2])}
    assert examples_of(config(), train, 2) == list(train) and not examples_of(mine, [], 1)


@pytest.mark.parametrize("verbs", ["current", "old"])
@pytest.mark.parametrize("backend", ["engine", "textworld"])
def test_gold_plans_win_whole_episodes_with_either_backend_and_verbs(backend: str, verbs: str) -> None:
    """Oracle: the household, which alone decides; TextWorld itself where it is installed. ALFWorld's two wordings of
    putting something down, of which each household knows one.
    """
    if backend == "textworld" and not is_installed():
        pytest.skip("the extra alfworld is not installed")
    mine = config(**{"task.options.backend": backend, "task.options.verbs": verbs})
    # TextWorld needs a second to load a game: the two types that put one thing and two things down stand for all.
    types = TASK_TYPES if backend == "engine" else (TASK_TYPES[0], TASK_TYPES[5])
    examples = [example_of(row) for row in households("train", len(types), 3, types=types)]
    task = make_task(mine, examples)
    gold = ScriptedGuidance("gold", {task.first_prompt(e): str(task.gold_guidance(e)) for e in examples})
    for example in examples:
        trajectory = asyncio.run(task.rollout(example, gold, LiteralGenerator(), RolloutSettings()))
        assert trajectory.reward == 1.0, example.id
        story = trajectory.turns[0].calls[0].outcome
        put = 0 if "look_at" in example.id else 2 if "two_obj" in example.id else 1
        wordings = (" in/on ", "\n> put ", "\nYou put "), ("\n> move ", "\nYou move ")
        used, unused = wordings if verbs == "old" else wordings[::-1]
        assert [story.count(words) for words in used[-2:]] == [put, put], story
        assert not any(words in story for words in unused), story
        assert ("You arrive at loc " in story) is (verbs == "old")


@pytest.mark.parametrize(
    "name", ["alfworld_demo.toml", "alfworld_tiny.toml", "alfworld_valid_seen.toml", "alfworld_llama3.toml"]
)
def test_the_configurations_that_come_with_it_are_valid(name: str) -> None:
    """Oracle: the reader, which refuses unknown keys and wrong values."""
    loaded = load_toml(RunConfig, ROOT / "configs" / name)
    assert loaded.task.name == "alfworld" and isinstance(loaded.task.options, AlfworldOptions)


@pytest.fixture(scope="module")
def controller(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(tiny_dir, tmp_path_factory.mktemp("controller") / "tiny", 2048)


def flags(controller: Path, **changes: Any) -> list[str]:
    values = {**FEW, "controller.path": controller, "task.options.size": "small", "rollout.guidance_tokens": 12}
    pairs = {f"--{key.replace('_', '-')}": str(value) for key, value in {**values, **changes}.items()}
    return ["--config", str(DEMO), *(word for pair in pairs.items() for word in pair)]


@pytest.mark.parametrize("protocol", ["label_free", "oracle"])
def test_evaluate_gold_wins_everything_and_the_rest_nothing(
    protocol: str, controller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a literal reader of plans; Wilson's closed form; the protocol's own label in the report."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *flags(controller, name="e", **{"rollout.protocol": protocol})]) == 0
    *rows, last = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    scores = {name: row for conditions in rows for name, row in conditions.items()}
    assert scores["gold_guidance"]["success"] == to_json(wilson(6, 6))
    assert {f"success {kind}" for kind in TASK_TYPES} < set(scores["gold_guidance"])
    for name in ("no_guidance", "wrong_guidance", "untrained"):
        assert scores[name]["success"]["value"] <= 1 / 6
    assert 0 < scores["own_guidance"]["success"]["value"] < 1
    assert last["gold_guidance"] == 1.0
    report = (tmp_path / "runs" / "e" / "report.md").read_text()
    assert f"{protocol.replace('_', '-')} protocol" in report and all(kind in report for kind in TASK_TYPES)
    verdicts = json.loads((tmp_path / "runs" / "e" / "report.json").read_text())["verdicts"]
    assert set(verdicts["gold_guidance"].values()) == {"right"} and len(verdicts["untrained"]) == 6
    told = [json.loads(line)["trajectory"] for line in (tmp_path / "runs/e/trajectories.jsonl").open()]
    gold = next(t for t in told if t["info"]["controller"].startswith("gold_guidance"))
    assert "> go to " in gold["turns"][0]["calls"][0]["outcome"]


def test_a_curve_over_seeds(
    controller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the runs' own verdicts, pooled by hand; the warm-up learns from episodes that the generator won."""
    monkeypatch.chdir(tmp_path)
    text = DEMO.read_text().replace("rounds = 1", "rounds = 0")
    (tmp_path / "curve.toml").write_text(text)
    changes = {**FEW, "controller.path": controller, "task.options.size": "small", "rollout.guidance_tokens": 12}
    changes |= {"name": "c", "warmup.samples": 2, "warmup.train.batch_size": 4}
    words = [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["curve", "--config", "curve.toml", "--seeds", "3", "4", *words]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["seeds"] == [3, 4]
    runs = {seed: curve.outcomes(tmp_path / "runs" / f"c-{seed}") for seed in (3, 4)}
    for name, row in result["conditions"].items():
        won = [sum(map(bool, runs[seed][name].values())) for seed in (3, 4)]
        assert row["by_seed"] == {"3": round(won[0] / 6, 4), "4": round(won[1] / 6, 4)}
        assert row["pooled"] == to_json(wilson(sum(won), 12))
    assert result["conditions"]["gold_guidance"]["pooled"]["value"] == 1.0
    assert [(gain["first"], gain["second"], gain["n"]) for gain in result["gains"]] == [("untrained", "warmup", 12)]
    assert "| gold_guidance | 1.000 | 1.000 | 1.000 |" in out
    assert json.loads((tmp_path / "runs" / "c-curve.json").read_text())["conditions"] == result["conditions"]
    # Every text of the warm-up won an episode: as many steps as winners of one batch size would make.
    told = [json.loads(line)["trajectory"] for line in (tmp_path / "runs/c-3/trajectories.jsonl").open()]
    own = [t for t in told if t["info"]["controller"].startswith("own-guidance") and t["info"]["draw"] in (0, 1)]
    own = [t for t in own if t["example_id"].startswith("train/")]
    won_texts = {(t["example_id"], t["turns"][-1]["action"]["text"]) for t in own if t["reward"] == 1}
    assert len(own) == 12 and 0 < len(won_texts) < 12
    steps = [json.loads(line) for line in (tmp_path / "runs/c-3/warmup/metrics.jsonl").open()]
    assert len(steps) == -(-len(won_texts) // 4)


def test_gold_makes_up_for_types_without_a_win(controller: Path, tmp_path: Path) -> None:
    """Oracle: one step for each text that won and for each type of household, of which there is one each, without."""
    changes = {**FEW, "controller.path": str(controller), "task.options.size": "small", "warmup.samples": 2}
    changes |= {"warmup.gold_per_group": 1, "warmup.train.batch_size": 1, "warmup.train.epochs": 1}
    with open_run(load_toml(RunConfig, DEMO, changes), tmp_path) as run:
        warm_up(run)
        episodes = [from_json(Trajectory, row["trajectory"]) for row in run.journal.rows.values()]
    shared = changes | {"name": "shared", "seed": 5, "warmup.seed": 0, "task.options.games_seed": 0}
    with open_run(load_toml(RunConfig, DEMO, shared), tmp_path) as other:
        warm_up(other)
        assert set(other.journal.rows) == set(run.journal.rows)  # the same episodes, of another run's seed
    won = {(episode.example_id, episode.turns[-1].action.text) for episode in episodes if episode.reward == 1}
    steps = (run.folder / "warmup" / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(won) and len(steps) == len(won) + 6 - len({example for example, _ in won})


def test_pooled_gains_by_hand() -> None:
    """Oracle: three seeds' problems as one sample: 2 gained and 1 lost of 6."""
    before = {"a": True, "b": False}
    after = {"a": True, "b": True}
    worse = {"a": False, "b": False}
    runs = {
        0: {"untrained": before, "warmup": after, "round_1": after},
        1: {"untrained": before, "warmup": after, "round_1": after},
        2: {"untrained": before, "warmup": worse, "round_1": after, "only_here": after},
    }
    result = curve.summary(runs)
    assert list(result["conditions"]) == ["untrained", "warmup", "round_1"]
    first, second, whole = result["gains"]
    assert (first["gained"], first["lost"], round(first["difference"], 4)) == (2, 1, 0.1667)
    assert (second["gained"], second["lost"]) == (2, 0)
    assert (whole["first"], whole["second"], whole["gained"], whole["lost"]) == ("untrained", "round_1", 3, 0)
