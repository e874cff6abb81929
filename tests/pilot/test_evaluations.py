"""Policies under other settings than their run's, in a folder of their own; adapters to start from."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.lora.files import adapter_hash
from matryoshka.lora.files import read_config as adapter_config
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.config import EpisodeConfig, RunConfig, WarmupConfig, rollout_settings
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.evaluate import evaluate, policy_conditions, schemes
from matryoshka.pilot.run_report import notes
from matryoshka.pilot.stages import collect, train_round, warm_up, write_pairs
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import Runs, small


def evaluated(root: Path, config: RunConfig, *flags: str) -> list[dict[str, Any]]:
    """Evaluate with the flags and return the rows of the one new folder's evaluation.json."""
    before = set((root / "runs").glob("*/evaluation.json"))
    assert cli.main(["evaluate", "--config", f"{config.name}.toml", *flags]) == 0
    found = set((root / "runs").glob("*/evaluation.json")) - before
    (path,) = found
    written = json.loads(path.read_text())
    rows: list[dict[str, Any]] = written["policies"]
    return rows


def test_collection_and_evaluation_have_settings_of_their_own() -> None:
    """Oracle: by hand; what a table leaves out is as in [rollout], but that evaluation is greedy."""
    config = small("settings", Path("model"), "http://h/v1")
    config = replace(
        config,
        collect=EpisodeConfig(temperature=0.7, outer_turns=3),
        evaluate=EpisodeConfig(protocol="oracle", inner_attempts=6, guidance_tokens=40),
    )
    collected, greedy = (rollout_settings(config, greedy) for greedy in (False, True))
    assert (collected.controller.temperature, collected.outer_turns, collected.inner_attempts) == (0.7, 3, 1)
    assert (greedy.controller.temperature, greedy.controller.top_p, greedy.outer_turns) == (0.0, 1.0, 1)
    assert (greedy.protocol, greedy.inner_attempts, greedy.controller.max_tokens) == ("oracle", 6, 40)
    assert (collected.protocol, collected.controller.max_tokens) == ("label_free", config.rollout.guidance_tokens)
    sampled = replace(config, evaluate=EpisodeConfig(temperature=0.5))
    assert rollout_settings(sampled, greedy=True).controller.temperature == 0.5


def test_any_policy_under_any_setting(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracles: the scripted server's list of requests, the run's own files, and equal weights giving equal scores."""
    monkeypatch.chdir(tmp_path)
    config = small("one", controller_dir, generator.url("evaluations"))
    Runs(tmp_path, generator).write(config)
    with open_run(config, Path("runs")) as run:
        warm_up(run)
    shutil.copytree("runs/one/warmup/adapter", "foreign")
    shutil.copytree(controller_dir, "base")
    files = [path for path in Path("runs/one").rglob("*") if path.is_file() and "cache" not in path.name]
    untouched = {path: path.read_bytes() for path in files}
    Path("other.toml").write_text(
        f'base_url = "{generator.url("remote")}"\nmodel = "scripted"\napi_key_env = ""\nmax_retries = 0\n'
    )
    policies = ["none", "untrained", "runs/one:warmup", "foreign", "base", "other.toml"]
    oracle = ("--evaluate.protocol", "oracle", "--evaluate.inner-attempts", "2", "--split", "test")
    rows = {row["policy"]: row for row in evaluated(tmp_path, config, "--policy", *policies, *oracle)}
    assert list(rows) == ["no_guidance", "untrained", "runs_one_warmup", "foreign", "base", "other_toml"]
    assert rows["runs_one_warmup"]["metrics"] == rows["foreign"]["metrics"]
    assert rows["base"]["metrics"] == rows["untrained"]["metrics"]
    assert all(row["episodes"] == config.task.test for row in rows.values())
    assert {path: path.read_bytes() for path in untouched} == untouched
    (folder,) = (path.parent for path in Path("runs").glob("*/evaluation.json"))
    episodes = [row["trajectory"] for row in read_jsonl(folder / "trajectories.jsonl")]
    assert {row["info"]["protocol"] for row in episodes} == {"oracle"}
    assert len(generator.asked("remote")) > 0 and (folder / "report.html").is_file()
    # The same command asks nothing, and policies with equal weights are one policy in the journal.
    asked = [generator.asked(tenant) for tenant in ("evaluations", "remote")]
    assert cli.main(["evaluate", "--config", "one.toml", "--policy", *policies, *oracle]) == 0
    assert [generator.asked(tenant) for tenant in ("evaluations", "remote")] == asked
    # A mistake in the last of several policies costs nothing, and a report's spelling of a stage is understood.
    for wrong, message in (
        (["base", "runs/one:round-7"], "policy 'runs/one:round-7': that run has no such stage; choose from warmup"),
        (["untrained", "absent"], "policy 'absent' is neither a condition (no_guidance,"),
        (["none", "--split", "tset"], "split 'tset' has no problems; choose from warmup, train, validation, test"),
    ):
        capsys.readouterr()
        more = ("--evaluate.inner-attempts", "3")
        assert cli.main(["evaluate", "--config", "one.toml", *more, "--policy", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert [generator.asked(tenant) for tenant in ("evaluations", "remote")] == asked


def test_policies_of_other_kinds_and_names_that_clash(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracles: equal weights give equal scores, whether a model's folder or a stage that trained all weights holds
    them, and with a warm-up that takes an adapter; what would lose a row or a report is refused before it is asked.
    """
    monkeypatch.chdir(tmp_path)
    first = small("first", controller_dir, generator.url("kinds"))
    with open_run(first, Path("runs")) as run:
        warm_up(run)
    for model in (Path("base"), Path("runs/full/round-1/model")):
        shutil.copytree(controller_dir, model)
    for name in ("a-b", "a_b"):
        shutil.copytree("runs/first/warmup/adapter", name)
    config = small("kinds", controller_dir, generator.url("kinds"))
    config = replace(config, controller=replace(config.controller, adapter="a-b"), warmup=WarmupConfig("adapter"))
    Runs(tmp_path, generator).write(config)
    test = ("--split", "test")
    rows = evaluated(tmp_path, config, "--policy", "untrained", "base", "runs/full:round-1", "base", *test)
    assert [row["policy"] for row in rows] == ["untrained", "base", "runs_full_round_1"]
    assert rows[0]["metrics"] == rows[1]["metrics"] == rows[2]["metrics"]
    asked = generator.asked("kinds")
    full = ("--controller.tune", "full", "--controller.adapter", "", "--warmup.source", "none")
    for flags, message in (
        (("--policy", "a-b", "a_b"), "policies 'a-b' and 'a_b' would both be named 'a_b'"),
        (("--policy", "none", "--out", "runs/kinds"), "out runs/kinds is the run's own folder"),
        ((*full, "--policy", "runs/first:warmup"), "is an adapter, and [controller] tune = 'full' computes none"),
    ):
        assert cli.main(["evaluate", "--config", "kinds.toml", *flags]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["collect", "--config", "kinds.toml", "--policy", "own", "--out", "runs/kinds"]) == 2
    assert generator.asked("kinds") == asked


def test_fixed_guidance_is_known_for_every_split_and_a_report_says_how_it_was_drawn(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the guidance of each episode is its problem's own gold; the notes say what [evaluate] says."""
    config = small("splits", controller_dir, generator.url("splits"))
    config = replace(config, evaluate=EpisodeConfig(temperature=0.5))
    with open_run(config, tmp_path) as run, ExitStack() as stack:
        found = policy_conditions(run, ["gold"], stack, ("validation",))
        (condition,) = evaluate(run, found, splits=("validation",))
        golds = [run.task.gold_guidance(example) for example in run.problems["validation"]]
        said = notes(run, {"chosen": "warmup"})
    assert [episode.turns[0].action.text for episode in condition.trajectories] == golds
    assert "Guidance is sampled at temperature 0.5 and top-p 1, and code is decoded greedily in evaluation." in said
    what = "over 4 held-out problems and 2 of other families; the summary's numbers are over the first alone."
    assert said[2] == f"The table of all examples is {what}"


def test_what_the_generator_says_to_itself_is_counted(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the scripted server's log: a guidance and an answer for each of the test problems."""
    config = small("self", controller_dir, generator.url("self"))
    with open_run(config, tmp_path) as run, ExitStack() as stack:
        (found,) = evaluate(run, policy_conditions(run, ["own"], stack), splits=["test"])
    assert found.calls == len(generator.asked("self")) == 2 * config.task.test


def test_one_condition_costs_one_condition(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the episodes in the run's journal; a part of the conditions makes no report."""
    monkeypatch.chdir(tmp_path)
    config = small("part", controller_dir, generator.url("part"))
    path = Runs(tmp_path, generator).write(config)
    assert cli.main(["evaluate", "--config", str(path), "--only", "gold", "untrained", "--skip", "untrained"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)) == ["gold_guidance"]
    rows = read_jsonl(tmp_path / "runs" / "part" / "trajectories.jsonl")
    assert len(rows) == config.task.test + config.task.held_out
    assert not (tmp_path / "runs" / "part" / "report.json").exists()
    assert cli.main(["evaluate", "--config", str(path), "--only", "round_9"]) == 2
    assert "condition 'round_9' is not there; choose from no_guidance" in capsys.readouterr().err


def test_wrong_guidance_is_left_out_of_the_report_alone(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the names of the conditions, with and without the switch; --policy still finds the one left out."""
    config = small("switch", controller_dir, generator.url("switch"))
    with open_run(config, tmp_path) as run, ExitStack() as stack:
        everything = schemes(run)
        without = replace(run, config=replace(config, wrong=False))
        assert everything.keys() - schemes(without).keys() == {"wrong_guidance"}
        assert list(policy_conditions(without, ["wrong"], stack)) == ["wrong_guidance"]


def test_training_starts_from_an_adapter(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracles: the adapter's hash in the policies' names, its rank in what is trained, and a first loss of ln 2, which
    only the right reference gives.
    """
    first = small("first", controller_dir, generator.url("first"))
    first = replace(first, lora=LoraConfig(rank=3, targets=("q_proj",)))
    with open_run(first, tmp_path) as run:
        warm_up(run)
        adapter = run.policies.folder("warmup")
    digest = adapter_hash(adapter)
    config = small("second", controller_dir, generator.url("second"))
    controller = replace(config.controller, adapter=str(adapter))
    with open_run(replace(config, controller=controller, warmup=WarmupConfig("none")), tmp_path) as run:
        assert warm_up(run) == "" and policy_scheme(run, "").name == f"tiny+{digest}"
        episodes = collect(run, 1)
        assert {row.info.controller for row in episodes} == {f"tiny+{digest}"}
        pairs, counts = write_pairs(run, episodes)
        assert counts.pairs and train_round(run, 1, pairs, episodes) == "round-1"
        assert adapter_config(run.policies.folder("round-1")).rank == 3
    row, *_ = read_jsonl(tmp_path / "second" / "round-1" / "train" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    third = replace(config, name="third", controller=controller, warmup=WarmupConfig("adapter"))
    with open_run(third, tmp_path) as run:
        assert warm_up(run) == "warmup" and policy_scheme(run, "warmup").name == f"tiny+{digest}"
        assert policy_scheme(run, "").name == "tiny"
        assert len(run_episodes(run, policy_scheme(run, ""), ["test"])) == config.task.test
    with pytest.raises(ValueError, match=r"\[controller\] adapter names no folder"):
        replace(config, warmup=WarmupConfig("adapter"))
