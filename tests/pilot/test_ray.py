"""Episodes on a Ray cluster of this machine, against the same run in this process."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Message, RolloutSettings
from matryoshka.eval.baselines import NoGuidance, ScriptedGuidance
from matryoshka.pilot import ray as ray_episodes
from matryoshka.pilot.config import RunConfig, WarmupConfig
from matryoshka.pilot.context import Scheme
from matryoshka.pilot.episodes import policy_scheme
from matryoshka.pilot.evaluate import _fixed
from matryoshka.pilot.ray_cluster import joined_cluster
from matryoshka.pilot.stages import generator_scheme
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator, environment
from matryoshka.tests.pilot.test_pilot import Runs, small
from matryoshka.tests.pilot.test_rank_episodes import USD, rows

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs of this machine, no dashboard, nothing reported to anybody."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(), "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.slow
def test_ray_runs_the_same_episodes_and_either_executor_goes_on(
    tmp_path: Path, controller_dir: Path, generator: Generator, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run in this process: the same rows, verdicts and requests. A budget stops it twice on the way."""
    monkeypatch.chdir(tmp_path)
    runs = Runs(tmp_path, generator)
    (tmp_path / "prices.toml").write_text("scripted = { input = 0.01, output = 20 }\n")

    def config(name: str) -> RunConfig:
        config = small(name, controller_dir, generator.url(name))
        client = replace(config.generator, prices="prices.toml")  # a path that a task has to find from our folder
        return replace(config, generator=client, warmup=WarmupConfig("none"))

    def run(stage: str, config: RunConfig) -> int:
        return cli.main([stage, "--config", str(runs.write(config))])

    local = config("here")
    remote = replace(config("there"), executor="ray", ray_tasks=2)
    assert [run(stage, local) for stage in ("collect", "evaluate")] == [0, 0]
    budget = 5 * USD + 17 * 20 / 1e6  # five answers and what one request may cost at most
    assert run("collect", replace(remote, budget_usd=budget)) == 3
    kept = runs.num_kept(remote)
    assert 0 < kept and kept * USD <= budget and len(generator.asked("there")) == kept
    assert run("collect", replace(remote, executor="local", budget_usd=budget + 3 * USD)) == 3
    assert kept < runs.num_kept(remote)
    assert [run(stage, remote) for stage in ("collect", "evaluate")] == [0, 0]
    ours, theirs = runs.folder(remote), runs.folder(local)
    assert rows(ours) == rows(theirs) == sorted(read_jsonl(ours / "trajectories.jsonl"), key=lambda r: str(r["key"]))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ours, theirs)]
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    asked = generator.asked("there")
    assert len(asked) == len(set(asked)) and set(asked) == set(generator.asked("here"))
    assert not (ours / ray_episodes.STOP).exists()


@pytest.mark.slow
def test_what_a_task_cannot_open_is_said(
    tmp_path: Path, controller_dir: Path, generator: Generator, cluster: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the driver has the key, the cluster, which was started before, has not: one line says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLY_HERE", "sk-planted-for-ray-81c2")
    config = small("keyless", controller_dir, generator.url("keyless"))
    client = replace(config.generator, api_key_env="ONLY_HERE")
    config = replace(config, generator=client, warmup=WarmupConfig("none"), executor="ray", ray_tasks=1)
    assert cli.main(["collect", "--config", str(Runs(tmp_path, generator).write(config))]) == 2
    error = capsys.readouterr().err
    assert "error: generator: environment variable ONLY_HERE holds no key" in error and "Traceback" not in error
    assert "sk-planted-for-ray" not in error


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the extra's name, from pyproject.toml."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs the extra `cluster`: pip install 'matryoshka-pilot\[cluster\]'"):
        with joined_cluster():
            pass


def test_a_scheme_travels_without_its_run() -> None:
    """Oracle: Ray's own pickling, there and back; the run refuses to be pickled, and the copy works in another run."""

    class Policies:
        def name(self, stage: str) -> str:
            return f"tiny+{stage}"

        def controller(self, stage: str, sampler: str) -> tuple[str, str]:
            return stage, sampler

    class HereOnly:
        """A run of this process."""

        policies = Policies()
        generator = NoGuidance()

        def __init__(self, config: RunConfig) -> None:
            self.config = config

        def __reduce__(self) -> str:
            raise AssertionError("the run is pickled")

    run: Any = HereOnly(small("travels", Path("model"), "http://h/v1"))
    there: Any = HereOnly(run.config)
    gold = ScriptedGuidance("gold", {(Message("user", "q"),): "step"})
    known = Scheme("gold", _fixed(gold), RolloutSettings())
    schemes = [policy_scheme(run, "round-1"), generator_scheme(run.config), known]
    policy, own, fixed = (ray.cloudpickle.loads(ray.cloudpickle.dumps(scheme)) for scheme in schemes)
    assert policy.make(there, "sampler") == ("round-1", "sampler") and policy.name == "tiny+round-1"
    assert own.make(there, "sampler")._generator is there.generator
    assert fixed.make(there, "sampler").name == "gold"
