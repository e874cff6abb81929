"""`matryoshka bench env`: a tiny run works without the stock environment, and wrong settings are refused."""

import json

import pytest

from matryoshka.benchmarks import env
from matryoshka.benchmarks.env import Config
from matryoshka.scripts import cli
from matryoshka.tasks.alfworld import textworld_backend
from matryoshka.tasks.alfworld.engine import Engine, Observation
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.games import Logic, Row

TINY = [
    "--games",
    "3",
    "--steps",
    "12",
    "--repeats",
    "1",
    "--concurrent",
    "5",
    "--stock-games",
    "1",
    "--stock-steps",
    "3",
]


def test_our_engine_alone_has_rows_and_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by definition; without a peer there is nothing to divide by."""
    assert cli.main(["bench", "env", *TINY, "--against", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [(row["name"], row["unit"]) for row in result["rows"]]
    assert names == [
        *(("engine", "steps/s"), ("engine, load", "ms"), ("engine, reset", "ms")),
        ("engine, 5 games at once", "MiB"),
    ]
    assert all(row["value"] > 0 for row in result["rows"][:3]) and result["ratio"] is None and result["holds"] is None


def test_both_play_the_same_commands_and_the_ratio_is_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an engine of ours in TextWorld's place that notes what it is told; the ratio is the rows' quotient."""
    played: list[str] = []

    class Stock(Engine):
        def __init__(self, row: Row, verbs: str = "current", logic: Logic | None = None) -> None:
            super().__init__(load_game(row), verbs)

        def step(self, command: str) -> Observation:
            played.append(command)
            return super().step(command)

    monkeypatch.setattr(env, "TextWorldEngine", Stock)
    monkeypatch.setattr(textworld_backend, "is_installed", lambda: True)
    config = Config(games=2, steps=10, repeats=1, stock_games=1, stock_steps=4, concurrent=0)
    result = env.run(config)
    row = env._rows(config)[0]
    assert played == env._commands(row, 10, 0)[:4] == row["walkthrough"][:4]
    rates = {row.name: row.value for row in result.rows if row.unit == "steps/s"}
    assert rates["engine"] is not None and rates["stock"] is not None
    assert result.ratio == rates["engine"] / rates["stock"] and result.target == 400


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: each message names the setting or the missing package."""
    with pytest.raises(ValueError, match="--against 'stok' is unknown; did you mean 'stock'"):
        Config(against=("stok",))
    with pytest.raises(ValueError, match="games cover stock_games"):
        Config(against=(), games=1, stock_games=2)
    monkeypatch.setattr(textworld_backend, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="needs the packages textworld and alfworld"):
        Config()
