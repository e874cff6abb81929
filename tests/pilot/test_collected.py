"""Collection, pairs and single rounds apart from `matryoshka pilot`: the same episodes, pairs and policies."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.distributed import ALONE
from matryoshka.core.files import read_jsonl, write_jsonl
from matryoshka.core.records import Preference, from_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import read_conversations, read_preferences
from matryoshka.lora.files import adapter_hash
from matryoshka.pilot.collected import CollectConfig, PairsCommand, collect_apart, read_episodes, write_pairs_of
from matryoshka.pilot.config import RunConfig, WarmupConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.stages import collect, replanned, train_round, warm_up, write_pairs
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_lamp_pilot import configured
from matryoshka.tests.pilot.test_pilot import Runs, small


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the last line printed."""
    row: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return row


@pytest.mark.slow
def test_a_run_by_single_commands(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the stages in one process as `run_pilot` calls them: the same policies and pairs, bit for bit."""
    monkeypatch.chdir(tmp_path)
    config = small("stages", controller_dir, generator.url("stages"), rounds=2)
    short = replace(config.warmup.train, epochs=1)
    config = replace(config, warmup=WarmupConfig(train=short), dpo=replace(config.dpo, train=short))
    with open_run(replace(config, name="whole"), Path("runs")) as run:
        warm_up(run)
        episodes = run_episodes(run, policy_scheme(run, "warmup"), ["test"])  # not to be taken for collected ones
        assert len(episodes) == config.task.test
        trajectories = collect(run, 1)
        train_round(run, 1, write_pairs(run, trajectories)[0], trajectories)
        trajectories += collect(run, 2)
        train_round(run, 2, write_pairs(run, trajectories)[0], trajectories)
    path = str(Runs(tmp_path, generator).write(config))
    assert cli.main(["round", "2", "--config", path]) == 2
    assert "round 2 starts from the policy of round-1, which is not trained" in capsys.readouterr().err
    assert cli.main(["round", "--config", path]) == 0
    assert (first := last(capsys))["round"] == 1 and first["starts_from"] == "warmup" and first["pairs"] > 0
    assert cli.main(["round", "2", "--config", path]) == 0
    assert (second := last(capsys))["round"] == 2 and second["episodes"] == 2 * first["episodes"]
    for stage in ("warmup", "round-1", "round-2"):
        one, other = (Path("runs") / name / stage / "adapter" for name in ("stages", "whole"))
        assert adapter_hash(one) == adapter_hash(other), stage
    whole = Path("runs/whole/preferences.jsonl").read_bytes()
    assert Path("runs/stages/preferences.jsonl").read_bytes() == whole
    # The pairs of a run's folder are those of the run, whatever else is recorded there (evaluations, validations).
    assert cli.main(["pairs", "--in", "runs/whole", "--out", "pairs.jsonl"]) == 0
    assert Path("pairs.jsonl").read_bytes() == whole and last(capsys)["rows"] == whole.count(b"\n")
    assert cli.main(["round", "2", "--config", path]) == 0  # it is trained, and nothing is written
    assert last(capsys) == {key: second[key] for key in ("round", "starts_from", "policy")}
    assert cli.main(["round", "--config", path]) == 2
    assert "round 3: the run has rounds = 2; a larger number (--rounds) adds rounds" in capsys.readouterr().err
    with open_run(replace(config, rounds=3), Path("runs")) as run:
        assert run.config.rounds == 3


@pytest.mark.slow
def test_episodes_of_any_policy_become_pairs_that_train(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracles: a run's own collection from the same policy (equal pairs), the scripted server's list of requests, TRL's
    reading of the three forms, and training on each.
    """
    from trl.data_utils import is_conversational, maybe_extract_prompt

    monkeypatch.chdir(tmp_path)
    config = replace(small("own", controller_dir, generator.url("apart")), warmup=WarmupConfig("none"), star=False)
    path = str(Runs(tmp_path, generator).write(config))
    assert cli.main(["collect", "--config", path, "--out", "data/one"]) == 0
    summary = last(capsys)
    assert summary["episodes"] == 16 and summary["out"] == "data/one" and 0 < summary["right"] < 16
    asked = generator.asked("apart")
    assert cli.main(["collect", "--config", path, "--out", "data/one"]) == 0
    assert last(capsys) == summary and generator.asked("apart") == asked
    assert not Path("runs/own/config.toml").exists() and not Path("runs/own/trajectories.jsonl").exists()
    files = {form: f"{form}.jsonl" for form in ("ours", "trl", "original", "sft")}
    for form, file in files.items():
        assert cli.main(["pairs", "--in", "data/one", "--out", file, "--form", form]) == 0
    rows = {form: read_jsonl(Path(file)) for form, file in files.items()}
    assert cli.main(["round", "--config", path]) == 0  # it asks nothing: the answers are shared
    assert len(generator.asked("apart")) == len(asked) + config.task.validation
    assert Path("runs/own/preferences.jsonl").read_bytes() == Path("ours.jsonl").read_bytes()
    pairs = [from_json(Preference, row) for row in rows["ours"]]
    for pair, trl, original in zip(pairs, rows["trl"], rows["original"], strict=True):
        assert is_conversational(trl) and maybe_extract_prompt(dict(original)) == trl
        assert [row["content"] for row in trl["prompt"]] == [message.content for message in pair.prompt]
        assert (trl["chosen"][0]["content"], trl["rejected"][0]["content"]) == (pair.chosen.text, pair.rejected.text)
    tokenizer = Tokenizer.load(controller_dir)
    assert len(read_preferences(Path("trl.jsonl"), tokenizer)) == len(pairs)
    assert read_preferences(Path("trl.jsonl"), tokenizer) == read_preferences(Path("original.jsonl"), tokenizer)
    assert len(read_conversations(Path("sft.jsonl"), tokenizer)) == len(rows["sft"]) > 0
    train = ["--model", str(controller_dir), "--threads", "1", "--train.batch-size", "2", "--lora.rank", "2"]
    for command, form in (("dpo", "ours"), ("dpo", "original"), ("sft", "sft")):
        assert cli.main([command, "--data", files[form], "--out", f"trained/{form}", *train]) == 0
        assert last(capsys)["items"] > 0
    # Another policy's episodes go into the same folder; its pairs are among the same policy's samples' texts or not.
    assert cli.main(["collect", "--config", path, "--out", "data/one", "--policy", "trained/ours/adapter"]) == 0
    assert last(capsys)["episodes"] == 16 and len(read_jsonl(Path("data/one/trajectories.jsonl"))) == 32
    assert cli.main(["collect", "--config", path, "--out", "data/guided", "--policy", "own"]) == 0
    assert last(capsys)["policy"].startswith("own-guidance-of-")


@pytest.mark.slow
def test_pairs_leave_incomplete_groups_out(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: by hand; of an example with a lost draw nothing is paired, and the count says so."""
    config = replace(small("gap", controller_dir, generator.url("gap")), warmup=WarmupConfig("none"), star=False)
    with open_run(config, tmp_path) as run:
        collect(run, 1)
    folder = tmp_path / "gap"
    found = read_episodes(folder)
    assert len(found.rows) == 16 and found.left_out == 0
    journal = folder / "trajectories.jsonl"
    rows = read_jsonl(journal)
    lost = rows[0]["trajectory"]["example_id"]
    write_jsonl(journal, rows[1:])
    found = read_episodes(folder)
    assert found.left_out == 3 and all(row.example_id != lost for row in found.rows.values())
    counts = write_pairs_of(PairsCommand((folder,), tmp_path / "pairs.jsonl"))
    assert counts["left_out"] == 3 and counts["episodes"] == 12
    # Of a file every trajectory counts, bare or in a journal's row, and the same one twice counts once.
    write_jsonl(tmp_path / "bare.jsonl", [row["trajectory"] for row in rows])
    both = write_pairs_of(PairsCommand((journal, folder), tmp_path / "pairs.jsonl"))
    assert both["episodes"] == 15
    assert write_pairs_of(PairsCommand((tmp_path / "bare.jsonl",), tmp_path / "pairs.jsonl"))["episodes"] == 16


def test_what_the_generator_said_is_paired_as_in_the_run(controller_dir: Path, tmp_path: Path) -> None:
    """Oracle: the run's own pairs of sampled and of bootstrapped summaries, byte for byte."""
    config = load_toml(RunConfig, configured(tmp_path, controller_dir, "2N", bootstrap=4), {"warmup.source": "none"})
    with open_run(config, tmp_path) as run:
        episodes = collect(run, 1)
        pairs, _ = write_pairs(run, episodes)
    assert any(row.info.controller.startswith("own-guidance-of-") for row in episodes) and pairs
    counts = write_pairs_of(PairsCommand((tmp_path / "lamp",), tmp_path / "pairs.jsonl"))
    assert counts["rows"] == len(pairs)
    assert (tmp_path / "pairs.jsonl").read_bytes() == (tmp_path / "lamp" / "preferences.jsonl").read_bytes()


@pytest.mark.slow
def test_new_plans_in_one_state_are_paired_as_in_the_run(
    controller_dir: Path, tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run's own episodes and pairs, first turns left out where they were replayed; a collection apart from
    the run gives the same.
    """
    monkeypatch.chdir(tmp_path)
    config = replace(small("again", controller_dir, generator.url("again")), warmup=WarmupConfig("none"), star=False)
    config = replace(config, rollout=replace(config.rollout, outer_turns=2, replans=3))
    with open_run(config, Path("runs")) as run:
        episodes = collect(run, 1)
        pairs, _ = write_pairs(run, episodes)
        # As after a restart that completed a failed draw: another failed plan comes first, and nothing is asked again.
        asked = generator.asked("again")
        later = [row for row in episodes if "+after-" not in row.info.controller and row.info.draw > 0]
        again = replanned(run, policy_scheme(run, ""), 1, later)
        assert again and all(row in episodes for row in again) and generator.asked("again") == asked
    replayed = [row for row in episodes if "+after-" in row.info.controller]
    assert replayed and {len(row.turns) for row in replayed} == {1}
    found = read_episodes(Path("runs/again")).rows.values()
    assert sorted(map(repr, found)) == sorted(map(repr, episodes))
    assert write_pairs_of(PairsCommand((Path("runs/again"),), Path("pairs.jsonl")))["rows"] == len(pairs)
    whole = Path("pairs.jsonl").read_bytes()
    assert whole == Path("runs/again/preferences.jsonl").read_bytes()
    given = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    collect_apart(CollectConfig(**given, out="data/again"), ALONE)
    write_pairs_of(PairsCommand((Path("data/again"),), Path("pairs.jsonl")))
    assert Path("pairs.jsonl").read_bytes() == whole


def test_what_makes_no_pairs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: status 2 and a message that names the place and the remedy."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    run = ["pairs", "--out", str(tmp_path / "out.jsonl"), "--in"]
    for given, said in (
        (tmp_path / "none.jsonl", "none.jsonl: no such file"),
        (tmp_path, "no trajectories.jsonl; expected the folder of a run"),
        (tmp_path / "rows.jsonl", "rows.jsonl:1: not a trajectory (Trajectory: unknown field 'prompt'"),
    ):
        assert cli.main([*run, str(given)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
