"""`matryoshka cache` on a file made by hand."""

import json
from pathlib import Path

import pytest

from matryoshka.core.records import Sample, Usage
from matryoshka.inference.cache import ResponseCache
from matryoshka.scripts.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = ResponseCache(tmp_path / "cache.sqlite")
    for i in range(3):
        cache.put(f"k{i}", Sample(f"answer {i}", usage=Usage(1_000_000, 500_000)), "gpt-4o-mini@http://a/v1")
    cache.put("other", Sample("n\u00e9", usage=Usage(5, 5)), "mine@http://b/v1")
    cache.close()
    return tmp_path


def test_stats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand: 3 million tokens at 0.15 and 1.5 million at 0.60 a million are 1.35 dollars."""
    assert main(["cache", "stats", str(folder), "--json"]) == 0
    mine, mini = sorted(json.loads(capsys.readouterr().out)["generators"], key=lambda row: row["answers"])
    assert (mini["answers"], mini["prompt_tokens"], mini["completion_tokens"]) == (3, 3_000_000, 1_500_000)
    assert mini["usd_at_most"] == pytest.approx(1.35) and mine["usd_at_most"] is None
    assert main(["cache", "stats", str(folder / "cache.sqlite")]) == 0
    assert main(["cache", "stats", str(folder), "--json", "--generator", "mine@http://b/v1"]) == 0
    shown, alone = capsys.readouterr().out.rsplit("\n{", 1)
    assert "gpt-4o-mini" not in alone and '"answers": 1' in alone
    assert "1.3500" in shown and "no price" in shown


def test_stats_know_the_prices_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand: 5 tokens read at 2 dollars a million and 5 written at 4; a file of prices given now goes first.
    """
    cache = ResponseCache(folder / "cache.sqlite")
    cache.set_price("mine@http://b/v1", 2.0, 4.0)
    cache.close()
    own = folder / "own.toml"
    own.write_text("mine = { input = 20, output = 40 }\n")
    for arguments, usd in (([], 30e-6), (["--prices", str(own)], 300e-6)):
        assert main(["cache", "stats", str(folder), "--json", *arguments]) == 0
        rows = {row["generator"]: row["usd_at_most"] for row in json.loads(capsys.readouterr().out)["generators"]}
        assert rows["mine@http://b/v1"] == pytest.approx(usd)


def test_export_and_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the answers that were put, and the count that is left."""
    out = folder / "out.jsonl"
    assert main(["cache", "export", str(folder), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["key"]: row["sample"]["text"] for row in rows} == {
        **{f"k{i}": f"answer {i}" for i in range(3)},
        "other": "n\u00e9",
    }
    assert main(["cache", "export", str(folder), "--out", str(out), "--generator", "mine@http://b/v1"]) == 0
    assert len(out.read_text().splitlines()) == 1
    assert main(["cache", "prune", str(folder), "--older-than-days", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pruned"] == 0
    assert main(["cache", "prune", str(folder), "--older-than-days", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["pruned"] == 4
    assert main(["cache", "stats", str(folder), "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["generators"]
    assert [row["answers"] for row in left] == [0, 0] and sum(row["ever_answered"] for row in left) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prune", "."], "prune needs --older-than-days"),
        (["export", "."], "export needs --out"),
        (["prune", ".", "--older-than-days", "-1"], "older-than-days -1.0 must not be negative"),
        (["stats", ".", "--out", "x"], "--out belongs to export, not to stats"),
        (["stats", "absent"], "absent: no such file; give a run's folder"),
        (["prune", ".", "--older-than-days", "0", "--generator", "mine"], "has no answers of 'mine'; it has those of"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: status 2 and the message for each command line, by hand."""
    monkeypatch.chdir(folder)
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err
