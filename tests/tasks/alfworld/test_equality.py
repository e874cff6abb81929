"""Our engine against TextWorld, where it is installed, and the comparison itself against planted faults.

The whole comparison is `python -m matryoshka.benchmarks.alfworld_equality`; its committed result is checked here too.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from matryoshka.benchmarks import alfworld_equality
from matryoshka.benchmarks.alfworld_equality import Config, Difference, Pair, choose, compare, engine_hash, run
from matryoshka.tasks.alfworld import textworld_backend
from matryoshka.tasks.alfworld.engine import Engine, Observation
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.games import Logic, Row, read_logic
from matryoshka.tasks.alfworld.households import households
from matryoshka.tasks.alfworld.textworld_backend import TextWorldEngine
from matryoshka.tests.tasks.alfworld.kitchen import TRANSCRIPT, row

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("MATRYOSHKA_DATA", ROOT.parent / "shared" / "data")) / "alfworld"
RESULT = ROOT / "benchmarks" / "results" / "alfworld_equality.json"
needs_textworld = pytest.mark.skipif(
    not textworld_backend.is_installed(), reason="textworld and alfworld are not installed (the extra `alfworld`)"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set MATRYOSHKA_DATA")


def games_for(folder: Path) -> Path:
    """Return ALFWorld's games or, on a machine without them, as many large households of our own in `folder`."""
    if DATA.is_dir():
        return DATA
    for split in ("train", "valid_seen"):
        rows = households(split, 40, 1, "large")
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(game) + "\n" for game in rows))
    return folder


@pytest.mark.slow
@needs_textworld
def test_eighty_games_are_equal_step_by_step(tmp_path: Path) -> None:
    """Oracle: TextWorld, over 80 games from the seed, each its walkthrough and 50 random and invalid commands."""
    config = Config(
        games_for(tmp_path),
        valid_seen=40,
        train=40,
        seed=1,
        processes=2,
        out=tmp_path / "out.json",
        journal=tmp_path / "journal.jsonl",
    )
    result = run(config)
    assert result["first_mismatches"] == [] and result["mismatches"] == 0
    assert result["games"] == {"train": 40, "valid_seen": 40, "valid_unseen": 0} and result["steps"] >= 80 * 53


@pytest.mark.slow
@needs_textworld
@needs_data
def test_old_verbs_are_equal_too() -> None:
    """Oracle: TextWorld with the grammar's four wordings as they were before ALFWorld 0.4.0."""
    for game in choose(Config(DATA, valid_seen=4, train=0, seed=2)):
        assert compare(game, read_logic(DATA), "old", 50, 0)["mismatch"] is None, game["game"]


@pytest.mark.slow
@needs_textworld
def test_the_kitchen_and_our_households_are_equal_in_textworld() -> None:
    """Oracle: TextWorld with the domain and grammar that the installed package brings."""
    pair = Pair(row(), None, "current")
    for command, text in TRANSCRIPT:
        pair.step(command)
        assert pair.stock.observation.text == text
    for game in households("valid_unseen", 6, 5):
        pair = Pair(game, None, "current")
        for command in game["walkthrough"]:
            pair.step(command)
        assert pair.stock.observation.won


class Flawed(Engine):
    """An engine with one fault, in the place of TextWorld."""

    flaw: Callable[[Observation], Observation]

    def __init__(self, row: Row, verbs: str = "current", logic: Logic | None = None) -> None:
        super().__init__(load_game(row), verbs)

    def step(self, command: str) -> Observation:
        return type(self).flaw(super().step(command))


def flawed(monkeypatch: pytest.MonkeyPatch, field: str, value: Callable[[Observation], Any]) -> None:
    def flaw(seen: Observation) -> Observation:
        fields = {name: getattr(seen, name) for name in alfworld_equality.FIELDS}
        return Observation(**{**fields, field: value(seen)})

    monkeypatch.setattr(Flawed, "flaw", staticmethod(flaw), raising=False)
    monkeypatch.setattr(alfworld_equality, "TextWorldEngine", Flawed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", lambda seen: seen.text.replace("You heat", "You warm")),
        ("admissible", lambda seen: tuple(c for c in seen.admissible if not c.startswith("heat"))),
        ("score", lambda seen: 0.0),
        ("done", lambda seen: False),
        ("won", lambda seen: False),
    ],
)
def test_a_planted_fault_is_found_and_told(
    field: str, value: Callable[[Observation], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a fault planted in one field; the comparison names that field and the commands that led to it."""
    flawed(monkeypatch, field, value)
    found = compare(row(), None, "current", 10, 0)["mismatch"]
    assert found["field"] == field and found["ours"] != found["textworld"]
    # Each fault shows at the microwave, with the potato in hand, or at the end of the walkthrough.
    assert len(found["commands"]) == {"text": 4, "admissible": 3}.get(field, 7)


def test_without_a_fault_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: two engines of ours; the count of commands is that of the walkthrough and the steps asked for."""
    flawed(monkeypatch, "text", lambda seen: seen.text)
    for steps in (0, 1, 51):
        done = compare(row(), None, "old", steps, 3)
        assert done["mismatch"] is None and done["steps"] == 7 + steps
    with pytest.raises(Difference):
        pair = Pair(row(), None, "current")
        pair.ours.step("go to fridge 1")
        pair.step("look")


def test_a_walkthrough_that_does_not_win_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a walkthrough of one look, which wins nothing."""
    flawed(monkeypatch, "text", lambda seen: seen.text)
    found = compare(row(walkthrough=["look"]), None, "current", 5, 0)["mismatch"]
    assert found["field"] == "walkthrough" and found["commands"] == ["look"]


def test_a_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no game that the journal holds is played again; another seed or other code starts anew."""
    (tmp_path / "valid_seen.jsonl").write_text(
        "".join(json.dumps(game) + "\n" for game in households("valid_seen", 4, 0))
    )
    played: list[str] = []

    def job(given: tuple[str, Row, Logic | None, Config]) -> tuple[str, dict[str, Any]]:
        key, game, _, config = given
        played.append(game["game"])
        seconds = {"ours": 0.0, "textworld": 1.0}
        return key, {"game": game["game"], "split": "valid_seen", "steps": 9, "seconds": seconds, "mismatch": None}

    pool = nullcontext(SimpleNamespace(imap_unordered=map))
    context = SimpleNamespace(Pool=lambda *_, **__: pool)
    monkeypatch.setattr(alfworld_equality, "_job", job)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(alfworld_equality, "PACKAGES", ("pytest",))

    def start(games: int, seed: int = 0) -> int:
        out, journal, before = tmp_path / "out.json", tmp_path / "journal.jsonl", len(played)
        result = run(Config(tmp_path, valid_seen=games, train=0, seed=seed, out=out, journal=journal))
        assert json.loads(out.read_text()) == result and result["mismatches"] == 0
        assert result["steps"] == 9 * games == 9 * result["games"]["valid_seen"]
        return len(played) - before

    assert [start(4), start(4), start(4, seed=1)] == [4, 0, 4]
    monkeypatch.setattr(alfworld_equality, "engine_hash", lambda: "other code")
    assert start(4) == 4


def test_too_few_games_are_an_error(tmp_path: Path) -> None:
    """Oracle: the message names both counts."""
    (tmp_path / "valid_seen.jsonl").write_text(json.dumps(row()) + "\n")
    with pytest.raises(ValueError, match="1 games of valid_seen; --valid_seen asks for 2"):
        choose(Config(tmp_path, valid_seen=2, train=0))


def test_the_committed_result_is_of_this_engine() -> None:
    """Oracle: the hash of the engine's code, without which the result would be somebody else's."""
    if not RESULT.is_file():
        pytest.skip(f"no {RESULT.name} committed; run python -m matryoshka.benchmarks.alfworld_equality")
    result = json.loads(RESULT.read_text())
    assert result["mismatches"] == 0 and result["random_steps_a_game"] >= 50
    assert result["games"]["valid_seen"] == 140 and result["games"]["train"] >= 300
    if result["versions"]["python"].split(".")[:2] != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"its hash is of Python {result['versions']['python']}; syntax trees differ between versions")
    assert result["engine_code_sha256"] == engine_hash()


def test_the_backend_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message names the packages to install, or the unknown verbs."""
    monkeypatch.setattr(textworld_backend, "is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"not installed; run pip install 'textworld\[pddl\]'"):
        TextWorldEngine(row())
    with pytest.raises(ValueError, match="verbs 'new' are unknown"):
        TextWorldEngine(row(), "new")
