"""The pilot with [controller] tune = "full": every stage trains all weights and leaves a model folder."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.torch import load_file

from matryoshka.core.files import read_jsonl
from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import SINGLE, weights_hash
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.records import Trajectory
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import completion, distinct, preference_items
from matryoshka.dpo.parity import difference, trainer_logps
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.lora.files import adapter_hash
from matryoshka.pilot.config import ControllerConfig, RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.policies import _heaviest
from matryoshka.pilot.serving import open_vllm
from matryoshka.pilot.stages import check_parity, collect, train_round, train_star, warm_up, write_pairs
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import Runs, assert_equal_runs, lines, small
from matryoshka.tests.pilot.test_rank_episodes import RankRuns, runs
from matryoshka.tests.pilot.test_sharded_pilot import TINY_VLLM

__all__ = ["runs"]  # a fixture
STAGES = ("warmup", "round-1", "star")


def full(name: str, controller: Path, generator: Generator, rounds: int = 1) -> RunConfig:
    config = small(name, controller, generator.url(name), rounds)
    return replace(config, controller=replace(config.controller, tune="full"))


def assert_drawn_by(model_folder: Path, episodes: list[Trajectory]) -> None:
    """The samples' log-probs are those of the weights in `model_folder`; two programs, so up to fp32 rounding."""
    model = load_model(model_folder)
    for turn in (turn for episode in episodes for turn in episode.turns):
        assert turn.prompt_ids is not None and turn.action.logprobs is not None
        computed = trainer_logps(model, completion(turn.prompt_ids, replace(turn.action, logprobs=None)))
        assert difference(computed, turn.action.logprobs).largest < 1e-4


def num_rows(path: Path) -> int:
    database = sqlite3.connect(path)
    (count,) = database.execute("SELECT count(*) FROM logps").fetchone()
    database.close()
    return int(count)


def test_rounds_of_all_weights(
    tmp_path: Path, controller_dir: Path, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracles: log-probs of the weights in each stage's folder, read anew; ln 2 to the last bit of fp32; the number of
    distinct sequences in the file of reference log-probs, into which round 1's were copied before round 2.
    """
    config = full("full", controller_dir, generator, rounds=2)
    config = replace(config, dpo=replace(config.dpo, learning_rates=(1e-3, 1e-2)))
    folder = tmp_path / "full"
    with open_run(config, tmp_path) as run:
        warm_up(run)
        episodes = collect(run, 1)
        assert_drawn_by(folder / "warmup" / "model", episodes)
        train_round(run, 1, write_pairs(run, episodes)[0], episodes)
        chosen = json.loads((folder / "round-1" / "selection.json").read_text())["chosen"]["stage"]
        for stage in ("round-1", chosen, "warmup", ""):  # "" is read again, after others were loaded
            place = folder / stage / "model" if stage else controller_dir
            assert_drawn_by(place, run_episodes(run, policy_scheme(run, stage), ["test"]))
        items, _ = distinct(preference_items(write_pairs(run, episodes)[0]))
        reference = folder / "round-1" / "reference.sqlite"
        assert num_rows(reference) == len({sequence for item in items for sequence in item.sequences})
        (folder / "round-2").mkdir()
        shutil.copy(reference, folder / "round-2")
        both = episodes + collect(run, 2)
        train_round(run, 2, write_pairs(run, both)[0], both)
        items, _ = distinct(preference_items(write_pairs(run, both)[0]))
        others = num_rows(folder / "round-2" / "reference.sqlite") - num_rows(reference)
        assert others == len({sequence for item in items for sequence in item.sequences})
        train_star(run, [])  # nothing to imitate: the warm-up's, unchanged
    weights = {"base": load_file(controller_dir / SINGLE)}
    weights |= {stage: load_file(folder / stage / "model" / SINGLE) for stage in (*STAGES, "round-2")}
    for first, second in (("base", "warmup"), ("warmup", "round-1"), ("round-1", "round-2")):
        assert not any(weights[first][key].equal(value) for key, value in weights[second].items())
    assert all(weights["star"][key].equal(value) for key, value in weights["warmup"].items())
    for stage in ("round-1/lr-0.001", "round-1/lr-0.01", "round-2/lr-0.001"):
        first_row, *_ = read_jsonl(folder / stage / "metrics.jsonl")
        assert first_row["loss"] == float(np.float32(np.log(2))) and first_row["margin"] == 0
        assert not list((folder / stage).glob("step-*"))
    capsys.readouterr()
    assert cli.main(["export", "--run", str(folder), "--out", str(tmp_path / "out"), "--stage", "round-1"]) == 0
    digest = weights_hash(folder / "round-1" / "model")
    assert capsys.readouterr().out.split() == [str(tmp_path / "out"), digest]
    assert policy_scheme(run, "round-1").name == f"tiny+{digest}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_killed_run_equals_the_undisturbed_one(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: an undisturbed run: the same episodes, pairs, weights and verdicts, bit for bit."""
    undisturbed = Runs(tmp_path, generator)
    whole = full("full-whole", controller_dir, generator)
    summary = undisturbed.finish(whole)
    assert {"untrained", "warmup", "round_1", "star"} <= summary.keys()
    config = full("full-killed", controller_dir, generator)
    killed = Runs(tmp_path, generator)
    folder = killed.folder(config)
    for seen in (
        lines(folder / "warmup" / "metrics.jsonl", 3),
        lines(folder / "trajectories.jsonl", 5),
        lines(folder / "round-1" / "train" / "metrics.jsonl", 2),
        lines(folder / "trajectories.jsonl", 25),
    ):
        killed.stop_when(config, seen)
    killed.finish(config)
    assert_equal_runs(folder, undisturbed.folder(whole))
    killed.assert_nothing_asked_twice(config)


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(runs: RankRuns, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the pilot of one process, weights within a tenth of one step of 1e-3 after some 40 of them.

    Sums in another order: AdamW divides a gradient by its size, so that where it is nearly 0 its rounding becomes part
    of a step; 3.9e-5 was measured.
    """
    one, two = (full(name, controller_dir, generator) for name in ("full-one", "full-two"))
    summary, found = runs.finish(one), runs.finish_on(2, "pilot", two)[-1]
    worst = 0.0
    for stage in STAGES:
        a, b = (load_file(runs.folder(config) / stage / "model" / SINGLE) for config in (one, two))
        worst = max(worst, *((a[key] - b[key]).abs().max().item() for key in a))
    print(f"weights of one process and of two ranks are {worst:.2g} apart")
    assert worst < 1e-4
    reports = [json.loads((runs.folder(config) / "report.json").read_text()) for config in (one, two)]
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    assert {**found, "seconds": 0, "report": ""} == {**summary, "seconds": 0, "report": ""}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quantization": "nf4"}, "quantization 'nf4' is for a frozen base"),
        ({"engine": "vllm", "vllm": VllmConfig(base_url="http://h/v1")}, "again for every policy; leave base_url out"),
        ({"dtype": "bfloat16"}, "bfloat16 is too coarse for small steps"),
    ],
)
def test_what_does_not_go_with_all_weights(changes: dict[str, Any], problem: str) -> None:
    """Oracle: the message, before anything is opened."""
    with pytest.raises(ValueError, match=problem):
        ControllerConfig("model", tune="full", **changes)


def test_all_weights_lie_on_every_rank() -> None:
    """Oracle: the message."""
    controller = ControllerConfig("model", engine="vllm", tune="full")
    with pytest.raises(ValueError, match="layout 'shard': with tune = 'full' every rank .* the whole model"):
        RunConfig("run", controller, GeneratorConfig("http://h/v1", "m"), parallel=ParallelConfig("shard"))


@pytest.mark.parametrize(
    ("tune", "says"), [("adapter", "they share one server; .* --lora-rank 2"), ("full", "a single process can do")]
)
def test_ranks_share_a_server_of_somebody_else(
    tune: Literal["adapter", "full"], says: str, controller_dir: Path, tmp_path: Path
) -> None:
    """Oracle: the messages."""
    config = small("ranks", controller_dir, "http://h/v1")
    controller = replace(config.controller, deterministic=False, engine="vllm", tune=tune)
    with pytest.raises(ValueError, match=f"over several processes.*{says}"):
        open_vllm(replace(config, controller=controller), Tokenizer.load(controller_dir), tmp_path / "log", num_ranks=2)


@pytest.mark.slow
def test_vllm_is_started_again_with_the_weights_of_each_stage(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: log-probs of the weights in each stage's folder; then other weights are served, and training refuses."""
    config = full("full-vllm", controller_dir, generator)
    vllm = VllmConfig(" ".join(TINY_VLLM))
    controller = replace(config.controller, deterministic=False, engine="vllm", vllm=vllm)
    folder = tmp_path / "full-vllm"
    with open_run(replace(config, controller=controller), tmp_path) as run:
        assert run.vllm is not None
        warm_up(run)
        episodes = collect(run, 1)
        assert_drawn_by(folder / "warmup" / "model", episodes)
        train_round(run, 1, write_pairs(run, episodes)[0], episodes)
        for stage in ("round-1", ""):
            place = folder / stage / "model" if stage else controller_dir
            assert_drawn_by(place, run_episodes(run, policy_scheme(run, stage), ["test"]))
        assert run.vllm.num_restarts == 0  # none was for a server that died
        use = run.vllm.use_model
        monkeypatch.setattr(run.vllm, "use_model", lambda _: use(controller_dir))
        wrong = run_episodes(run, policy_scheme(run, "warmup"), ["test"])
        with pytest.raises(ValueError, match="parity: .* example .* the trainer computes"):
            check_parity(run, wrong, "warmup")
    with open_run(replace(config, controller=controller), tmp_path, trains=False) as run:
        assert run.model.head_weight.is_meta and run_episodes(run, policy_scheme(run, "warmup"), ["test"]) == wrong


@pytest.mark.parametrize("layout", ["shard", "hybrid"])
def test_a_layout_that_cuts_the_model_up_needs_vllm(
    layout: str, controller_dir: Path, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the messages: of our own sampler, and of vLLM's without torchrun; under "auto" nothing is asked for."""
    config, parallel = small("cut", controller_dir, generator.url("cut")), ParallelConfig(layout)
    with pytest.raises(ValueError, match="needs the whole model on every rank .* sampled by the vLLM engine"):
        replace(config, parallel=parallel)
    controller = replace(config.controller, deterministic=False, engine="vllm")
    controller = replace(controller, vllm=replace(controller.vllm, base_url="http://127.0.0.1:9"))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=f"layout '{layout}' is for ranks; start with torchrun"):
        with open_run(replace(config, controller=controller, parallel=parallel), tmp_path):
            pass
    with open_run(replace(config, controller=controller), tmp_path) as run:
        assert not run.model.head_weight.is_meta
        run.policies.keep("", "weighty")
    with open_run(replace(config, controller=controller, parallel=parallel), tmp_path, trains=False) as run:
        assert run.model.head_weight.is_meta
        run.policies.keep("", "weightless")  # what vLLM serves as the base model needs no weights of ours
        folders = [run.policies.folder(stage) for stage in ("weighty", "weightless")]
    assert adapter_hash(folders[0]) == adapter_hash(folders[1])


def test_a_layout_is_planned_for_the_largest_training(controller_dir: Path) -> None:
    """Oracle: by hand; a warm-up that does not happen takes nothing."""
    config = small("planned", controller_dir, "http://h/v1")
    warmup = replace(config.warmup, train=replace(config.warmup.train, micro_batch_tokens=9000, activations="none"))
    dpo = replace(config.dpo, train=replace(config.dpo.train, micro_batch_tokens=5000, optimizer="adamw8bit"))
    planned = _heaviest(config := replace(config, warmup=warmup, dpo=dpo))
    assert (planned.micro_batch_tokens, planned.activations, planned.optimizer) == (9000, "none", "adamw")
    assert _heaviest(replace(config, star=False, warmup=replace(warmup, source="none"))) == dpo.train
