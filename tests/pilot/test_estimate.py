"""pilot/estimate.py: what a few examples say of a whole run."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import EpisodeInfo, Trajectory
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import load_problems
from matryoshka.pilot.estimate import extrapolate
from matryoshka.pilot.recipes import RECIPES
from matryoshka.tasks.find import task_class


def estimated(*tokens: int) -> dict[str, Any]:
    """Return the estimate from episodes of so many tokens, one call each, without a price."""
    sizes = {"task.warmup": 2, "task.train": 4, "task.validation": 2, "task.test": 2}
    config = load_toml(RunConfig, RECIPES / "demo.toml", sizes)
    task = task_class(config.task.name)(config.task.options, TaskSetting(config.task.sizes))
    run = SimpleNamespace(config=config, task=task, problems=load_problems(task), account=None)
    infos = [EpisodeInfo("right", "label_free", "c", "g", calls=1, prompt_tokens=n) for n in tokens]
    return extrapolate(cast(Any, run), [Trajectory("t", str(i), (), 1.0, info) for i, info in enumerate(infos)])


def test_one_example_has_no_interval() -> None:
    """Oracle: by hand: one value has no spread, two have 1.96 standard errors; no Infinity is in the JSON."""
    one, two = estimated(100), estimated(90, 110)
    episodes = sum(one["episodes"].values())
    assert (one["tokens"], one["tokens_error"], one["usd"], one["usd_error"]) == (100 * episodes, None, None, None)
    assert json.loads(json.dumps(one, allow_nan=False))["sampled"] == 1
    assert two["tokens"] == 100 * episodes
    assert two["tokens_error"] == pytest.approx(episodes * 1.96 * 200**0.5 / 2**0.5)
