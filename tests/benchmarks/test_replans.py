"""benchmarks/replans.py: second plans in one and the same state are compared, and nothing else."""

from dataclasses import replace

import pytest

from matryoshka.benchmarks.replans import SETTINGS, second_plans, summary
from matryoshka.core.config import load_toml
from matryoshka.core.records import EpisodeInfo, Message, Sample, Trajectory, Turn, Verdict
from matryoshka.pilot.config import RunConfig, rollout_settings
from matryoshka.pilot.recipes import RECIPES


def episode(game: str, reward: float, *prompts: str) -> Trajectory:
    turns = tuple(Turn((Message("user", prompt),), None, Sample("plan"), (), "") for prompt in prompts)
    verdict: Verdict = "right" if reward else "wrong"
    return Trajectory("alfworld", game, turns, reward, EpisodeInfo(verdict, "label_free", "c", "g"))


BEFORE = [
    episode("a", 1.0, "1"), episode("b", 0.0, "1"), episode("c", 0.0, "1", "b"), episode("d", 0.0, "1", "d"),
    episode("e", 1.0, "1", "e"),
]  # fmt: skip
AFTER = [episode("c", 1.0, "1", "b"), episode("d", 1.0, "1", "d"), episode("e", 0.0, "1", "e")]


def test_only_games_with_a_second_plan_count() -> None:
    """Oracle: by hand: of five games one is won at once and one stops without a complaint; of the other three the
    trained policy wins two more and loses one.
    """
    found = second_plans(BEFORE, AFTER, {"pairs": 7}, {})
    assert (found.games, found.first, found.stopped) == (5, 1, 1)
    assert found.before == {"c": False, "d": False, "e": True} and found.after == {"c": True, "d": True, "e": False}
    pooled = summary({0: found, 1: found})
    assert pooled["by_seed"]["1"] == {"n": 3, "before": 0.3333, "after": 0.6667}
    assert (pooled["before"]["value"], pooled["after"]["n"]) == (pytest.approx(1 / 3), 6)
    assert (pooled["difference"]["gained"], pooled["difference"]["lost"]) == (4, 2)


def test_another_state_is_refused() -> None:
    """Oracle: the message; a complaint that differs makes another prompt, and a game that is missing another set."""
    for after in ([replace(AFTER[0], turns=episode("c", 1.0, "1", "x").turns), *AFTER[1:]], AFTER[:2]):
        with pytest.raises(ValueError, match="the replayed first plans led to other states"):
            second_plans(BEFORE, after, {}, {})


def test_its_settings_are_those_of_a_pilot() -> None:
    """Oracle: the configuration that they make: two plans an episode in collection and in evaluation."""
    config = load_toml(RunConfig, RECIPES / "alfworld_demo.toml", SETTINGS)
    assert [rollout_settings(config, greedy).outer_turns for greedy in (False, True)] == [2, 2]
