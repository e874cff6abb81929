"""The pilot on LaMP, end to end on a tiny random controller and a scripted generator, in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Preference, from_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.eval.statistics import paired_difference, paired_scores
from matryoshka.pilot import curve
from matryoshka.scripts.cli import main

CONFIG = """
name = "lamp"
rounds = 1
star = false
[controller]
path = "{path}"
threads = 1
[generator]
base_url = "http://127.0.0.1:1/v1"
model = "none"
api_key_env = ""
[serve]
scripted = "careful"
[task]
name = "lamp"
warmup = 2
train = 3
validation = 2
test = 4
[task.options]
task = "{task}"
prompt_tokens = 500
[warmup.train]
epochs = 1
[rollout]
samples = 2
guidance_tokens = 12
bootstrap = {bootstrap}
[dpo]
pairs_per_example = 2
"""
CONDITIONS = ["no_guidance", "wrong_guidance", "gold_guidance", "own_guidance", "rag_1", "rag_4"]
CONDITIONS += ["untrained", "warmup", "round_1"]
Command = Callable[..., list[Any]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a subcommand in a folder of its own and returns the JSON objects that it printed, one a line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[Any]:
        status = main(arguments)
        said = capsys.readouterr()
        assert status == 0, said.err
        return [json.loads(line) for line in said.out.splitlines()]

    return run


def configured(folder: Path, controller: Path, task: str, bootstrap: int = 0) -> str:
    path = folder / "lamp.toml"
    path.write_text(CONFIG.format(path=controller, task=task, bootstrap=bootstrap))
    return str(path)


def test_last_line_report_and_transfer(command: Command, tmp_path: Path, controller_dir: Path) -> None:
    """Oracle: the report's own episodes: shares and McNemar recomputed; gold 1, none 0 (the reader knows nothing).

    With other readers gold is 1 too, the talkative one's through the parser, and the pilot's own times stay.
    """
    config = configured(tmp_path, controller_dir, "2N")
    summary, last = command("pilot", "--config", config)
    assert list(last) == ["task", "examples", "untrained", "trained", "p", "seconds"]
    assert (last["task"], last["examples"]) == ("LaMP-2N", 4)
    folder = tmp_path / "runs" / "lamp"
    report = json.loads((folder / "report.json").read_text())
    assert list(report["verdicts"]) == CONDITIONS
    right = {name: [verdict == "right" for verdict in row.values()] for name, row in report["verdicts"].items()}
    assert (summary["gold_guidance"], summary["no_guidance"], summary["wrong_guidance"]) == (1.0, 0.0, 0.0)
    assert last["trained"] == summary["round_1"] == sum(right["round_1"]) / 4
    assert last["p"] == paired_difference(right["untrained"], right["round_1"]).p
    assert report["counts"]["metrics"]["gold_guidance"]["accuracy"] == 1.0
    assert any("is a script (scripted-careful)" in note for note in report["notes"])

    before = json.loads((folder / "seconds.json").read_text())
    assert last["seconds"] == pytest.approx(sum(before.values()), abs=0.05) and before["train warmup"] > 0
    rows = command("evaluate", "--config", config, "--generators", "hasty,talkative")
    assert [row["generator"] for row in rows] == ["hasty", "talkative"]
    assert all(row["gold_guidance"] == 1.0 and set(CONDITIONS) < row.keys() for row in rows)
    (again,) = command("evaluate", "--config", config, "--generators", "talkative")
    assert again["trained"] == rows[1]["trained"]
    written = json.loads((folder / "transfer.json").read_text())  # the earlier generator's row stays
    assert {name: row["trained"] for name, row in written.items()} == {r["generator"]: r["trained"] for r in rows}
    after = json.loads((folder / "seconds.json").read_text())
    assert {name: after[name] for name in before} == before
    assert (folder / "report.json").read_text() == json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def test_graded_scores_are_compared_by_sign_flips(command: Command, tmp_path: Path, controller_dir: Path) -> None:
    """Oracle: the mean of the episodes' scores, and the test on them, read back from the journal."""
    summary, last = command("pilot", "--config", configured(tmp_path, controller_dir, "3"))
    folder = tmp_path / "runs" / "lamp"
    assert summary["gold_guidance"] == 1.0 and 0 < summary["no_guidance"] < 1
    rows = [row["trajectory"] for row in read_jsonl(folder / "trajectories.jsonl")]
    test = [row for row in rows if row["example_id"].startswith("test_")]
    stages: dict[str, dict[str, float]] = {}
    for row in test:
        stages.setdefault(row["info"]["controller"], {})[row["example_id"]] = row["info"]["score"]
    untrained = stages["tiny"]
    assert last["untrained"] == pytest.approx(sum(untrained.values()) / 4, abs=1e-4)
    trained = [scores for name, scores in stages.items() if name.startswith("tiny+")][-1]
    ids = sorted(untrained)
    assert last["p"] == paired_scores([untrained[i] for i in ids], [trained[i] for i in ids]).p
    report = json.loads((folder / "report.json").read_text())
    assert report["counts"]["metrics"]["untrained"]["closeness"] == pytest.approx(last["untrained"], abs=1e-4)


def test_questions_without_a_positive_are_bootstrapped(command: Command, tmp_path: Path, controller_dir: Path) -> None:
    """Oracle: the random controller wins nothing, so every chosen side is the generator's summary, in our tokens.

    A single held-out user has no other's summary as a control.
    """
    config = configured(tmp_path, controller_dir, "2N", bootstrap=1)
    summary, _ = command("pilot", "--config", config, "--task.test", "1")
    assert "gold_guidance" in summary and "wrong_guidance" not in summary
    rows = read_jsonl(tmp_path / "runs" / "lamp" / "preferences.jsonl")
    pairs = [from_json(Preference, row) for row in rows]
    assert 1 <= len(pairs) <= 6
    tokenizer = Tokenizer.load(controller_dir)
    for pair in pairs:
        assert pair.provenance["chosen"][0]["controller"] == "own-guidance-of-scripted-careful"
        ids = pair.chosen.token_ids or ()
        assert tokenizer.decode(ids[:-1]) == pair.chosen.text and ids[-1] == tokenizer.eos_id and pair.prompt_ids


def test_a_curve_of_graded_scores(tmp_path: Path, controller_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the journals' scores, pooled by hand, sign-flip tests on them, and each run's own summary."""
    config = configured(tmp_path, controller_dir, "3")
    monkeypatch.chdir(tmp_path)
    assert main(["curve", "--config", config, "--seeds", "0", "1"]) == 0
    folder = tmp_path / "runs"
    result = json.loads((folder / "lamp-curve.json").read_text())
    runs = [curve.outcomes(folder / f"lamp-{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        rows = [row["trajectory"] for row in read_jsonl(folder / f"lamp-{seed}" / "trajectories.jsonl")]
        told = {r["example_id"]: r["info"]["score"] for r in rows if r["info"]["controller"] == "tiny"}
        assert told == run["untrained"]
        own = json.loads((folder / f"lamp-{seed}" / "summary.json").read_text())
        assert result["runs"][str(seed)] == {key: own[key] for key in result["runs"][str(seed)]}
    pooled = {name: [*runs[0][name].values(), *runs[1][name].values()] for name in CONDITIONS}
    for name, scores in pooled.items():
        assert result["conditions"][name]["pooled"]["value"] == pytest.approx(sum(scores) / 8)
    whole = result["gains"][-1]
    assert (whole["first"], whole["second"]) == ("untrained", "round_1")
    assert {key: whole[key] for key in ("n", "p")} == {
        "n": 8,
        "p": paired_scores(pooled["untrained"], pooled["round_1"]).p,
    }
    assert curve.table(result).splitlines()[-1].count("|") == 7
