"""The pilot with a tiny random controller, against a scripted generator behind real HTTP in another process.

The oracle of nearly everything here is an undisturbed run of the same configuration.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core import models
from matryoshka.core.config import load_toml, to_toml
from matryoshka.core.files import folder_lock, read_jsonl, write_jsonl
from matryoshka.core.models import load
from matryoshka.core.models.weights import sampled_digest
from matryoshka.core.protocols import GeneratorError
from matryoshka.core.records import Messages, Sample, Sampling
from matryoshka.core.training.train import TrainConfig
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.local_controller import LocalController, TokenSampler
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.files import adapter_hash
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.config import (
    ControllerConfig,
    DpoConfig,
    RolloutConfig,
    RunConfig,
    ServeConfig,
    TaskConfig,
    WarmupConfig,
    rollout_settings,
)
from matryoshka.pilot.context import Scheme, open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.stages import left_out, warm_up
from matryoshka.scripts import cli
from matryoshka.scripts.demo import KEYS
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.sandbox_config import SandboxConfig
from matryoshka.tests.pilot.conftest import Generator, command, environment, with_context

CONCURRENCY = 4
POLICIES = ("no_guidance", "wrong_guidance", "gold_guidance", "untrained", "warmup")


def small(name: str, controller: Path, url: str, rounds: int = 1) -> RunConfig:
    """Return a run of a few seconds; every stage saves every second step. The warm-up is long enough to be stopped."""
    train = TrainConfig(learning_rate=1e-3, epochs=4, batch_size=2, save_every=2)
    return RunConfig(
        name=name,
        controller=ControllerConfig(str(controller), threads=1, deterministic=True),
        generator=GeneratorConfig(url, "scripted", "", identity="scripted", concurrency=CONCURRENCY, max_retries=0),
        rounds=rounds,
        task=TaskConfig(
            warmup=4,
            train=4,
            validation=2,
            test=4,
            held_out=2,
            options=PalOptions(sandbox=SandboxConfig(timeout_s=30.0)),
        ),
        lora=LoraConfig(rank=2, targets=("q_proj", "down_proj")),
        warmup=WarmupConfig(train=replace(train, epochs=16)),
        rollout=RolloutConfig(samples=4, guidance_tokens=12, code_tokens=16),
        dpo=DpoConfig(train=replace(train, epochs=2)),
    )


class Runs:
    """Runs in one folder: started as processes, killed when something is seen, continued, read."""

    def __init__(self, root: Path, generator: Generator) -> None:
        self.root = root
        self.generator = generator
        self.num_lost = 0  # at most so many requests were sent, but a kill kept their answer from being received

    def write(self, config: RunConfig) -> Path:
        path = self.root / f"{config.name}.toml"
        path.write_text(to_toml(config))
        return path

    def folder(self, config: RunConfig) -> Path:
        return self.root / "runs" / config.name

    def start(self, config: RunConfig) -> "subprocess.Popen[bytes]":
        with (self.root / f"{config.name}.err").open("ab") as errors:
            return subprocess.Popen(
                command("pilot", "--config", str(self.write(config))),
                cwd=self.root, env=environment(), stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip

    def finish(self, config: RunConfig) -> dict[str, Any]:
        """Run to the end and return the summary, the last line printed."""
        output, _ = (process := self.start(config)).communicate(timeout=300)
        assert process.returncode == 0, (self.root / f"{config.name}.err").read_text()[-3000:]
        summary: dict[str, Any] = json.loads(output.splitlines()[-1])
        return summary

    def stop_when(self, config: RunConfig, seen: Callable[[], bool], number: int = signal.SIGKILL) -> int:
        """Start, send the signal to the process group as soon as something is seen, and return the exit status."""
        process = self.start(config)
        deadline = time.monotonic() + 120
        while not seen():
            assert process.poll() is None and time.monotonic() < deadline, "ended, or hung, before it could be stopped"
            time.sleep(0.001)
        assert process.poll() is None
        os.killpg(process.pid, number)
        status = process.wait(300)
        assert process.stdout is not None
        process.stdout.close()
        in_flight = len(set(self.generator.asked(config.name))) - self.num_kept(config)
        most = 1 if config.controller.deterministic else CONCURRENCY
        assert 0 <= in_flight <= most
        self.num_lost += most if number == signal.SIGKILL else in_flight  # the server may log the last one later
        return status

    def num_kept(self, config: RunConfig) -> int:
        """Return how many answers are in the run's cache."""
        path = self.folder(config) / "cache.sqlite"
        if not path.exists():
            return 0
        cache = ResponseCache(path)
        try:
            return sum(totals.answers for totals in cache.totals().values())
        finally:
            cache.close()

    def assert_nothing_asked_twice(self, config: RunConfig) -> None:
        """No answer that was received, and so is in the cache, is ever asked for again."""
        asked = self.generator.asked(config.name)
        assert len(set(asked)) == self.num_kept(config)
        assert len(asked) <= len(set(asked)) + self.num_lost


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines(path: Path, count: int) -> Callable[[], bool]:
    return lambda: num_lines(path) >= count


def journal(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of trajectories.jsonl sorted by key: token ids, log-probs, calls, rewards; they hold no times."""
    rows: list[dict[str, Any]] = sorted(read_jsonl(folder / "trajectories.jsonl"), key=lambda row: str(row["key"]))
    return rows


def policies(folder: Path) -> dict[str, bytes]:
    """Return the weights of all stages, of adapters or of whole models."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("**/*model.safetensors"))}


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Keys, token ids, log-probs, rewards, pairs and policies are the same, bit for bit; so is the report."""
    assert journal(folder) == journal(expected)
    assert (folder / "preferences.jsonl").read_bytes() == (expected / "preferences.jsonl").read_bytes()
    assert policies(folder) == policies(expected) and len(policies(folder)) >= 4
    ours, theirs = (json.loads((run / "report.json").read_text()) for run in (folder, expected))
    assert ours["verdicts"] == theirs["verdicts"]
    for stage in theirs["training"]:
        rows = [[{**row, "seconds": 0} for row in report["training"][stage]] for report in (ours, theirs)]
        assert rows[0] == rows[1]
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, controller_dir: Path, generator: Generator) -> Runs:
    """A finished deterministic run named `whole`, of one round."""
    runs = Runs(tmp_path_factory.mktemp("runs"), generator)
    runs.finish(small("whole", controller_dir, generator.url("whole")))
    return runs


def test_a_run_leaves_what_it_promises(undisturbed: Runs) -> None:
    """Oracle: the files of the design, and counts that follow from the configuration."""
    folder = undisturbed.root / "runs" / "whole"
    for name in ("config.toml", "environment.json", "cache.sqlite", "report.html", "report.md", "summary.json"):
        assert (folder / name).stat().st_size > 0
    rows = [row["trajectory"] for row in read_jsonl(folder / "trajectories.jsonl")]
    assert len(rows) == 4 * 4 + 2 * 2 + 6 * len([*POLICIES, "round_1", "star"])
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    pairs = read_jsonl(folder / "preferences.jsonl")
    assert pairs and all(p["chosen_reward"] > p["rejected_reward"] for p in pairs)
    sampled = {tuple(turn["action"]["token_ids"]) for row in rows for turn in row["turns"] if turn["prompt_ids"]}
    assert all(tuple(pair[side]["token_ids"]) in sampled for pair in pairs for side in ("chosen", "rejected"))
    first, *_ = read_jsonl(folder / "round-1" / "train" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)  # ln 2: policy and reference are equal
    summary = json.loads((folder / "summary.json").read_text())
    assert set(KEYS) - {"round_2"} <= summary.keys()  # what the demo's last line takes from it; this run has one round
    assert summary["examples"] == 4 and {*POLICIES, "round_1", "star", "p_trained_vs_untrained"} <= summary.keys()
    counts = json.loads((folder / "report.json").read_text())["counts"]
    assert counts["round_1"]["samples"] == 16 and counts["round_1"]["pairs"] == len(pairs)
    assert counts["left_out"] == {}
    asked = undisturbed.generator.asked("whole")
    assert len(asked) == len(set(asked)) > 0  # equal greedy calls are asked once


def test_a_stopped_and_killed_run_equals_the_undisturbed_one(undisturbed: Runs, controller_dir: Path) -> None:
    """Oracle: the undisturbed run. SIGTERM in the warm-up saves and says so; then kill -9 in collection."""
    generator = undisturbed.generator
    runs = Runs(undisturbed.root, generator)
    config = small("stopped", controller_dir, generator.url("stopped"))
    folder = runs.folder(config)
    assert runs.stop_when(config, lines(folder / "warmup" / "metrics.jsonl", 1), signal.SIGTERM) == 143
    assert "state saved" in (runs.root / "stopped.err").read_text()
    assert list((folder / "warmup").glob("step-*")) and not (folder / "warmup" / "adapter").exists()
    assert runs.stop_when(config, lines(folder / "trajectories.jsonl", 5)) == -signal.SIGKILL
    runs.finish(config)
    assert_equal_runs(folder, undisturbed.root / "runs" / "whole")
    runs.assert_nothing_asked_twice(config)
    assert set(generator.asked("stopped")) == set(generator.asked("whole"))


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: an undisturbed run of two rounds. kill -9 in every stage, each at a moment drawn from a seed."""
    runs = Runs(tmp_path, generator)
    whole = small("whole-2", controller_dir, generator.url("whole-2"), rounds=2)
    runs.finish(whole)
    expected = runs.folder(whole)
    config = small("ten-kills", controller_dir, generator.url("ten-kills"), rounds=2)
    folder = runs.folder(config)
    draws = random.Random(7)

    def steps(stage: str) -> Callable[[], bool]:
        return lines(folder / stage / "metrics.jsonl", draws.randint(1, num_lines(expected / stage / "metrics.jsonl")))

    def episodes(before: int, count: int) -> Callable[[], bool]:
        return lines(folder / "trajectories.jsonl", before + draws.randint(1, count - 1))

    def reporting() -> bool:
        seconds = folder / "seconds.json"
        return "validate round-2" in seconds.read_text() if seconds.exists() else False

    moments: Sequence[Callable[[], bool]] = (
        steps("warmup"),
        episodes(0, 16),
        (folder / "preferences.jsonl").exists,
        steps("round-1/train"),
        episodes(16, 2),
        steps("star"),
        episodes(18, 16),
        steps("round-2/train"),
        episodes(36, 48),
        reporting,
    )
    for seen in moments:
        assert runs.stop_when(config, seen) == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    runs.finish(config)
    assert_equal_runs(folder, expected)
    runs.assert_nothing_asked_twice(config)
    assert set(generator.asked("ten-kills")) == set(generator.asked("whole-2"))


@pytest.mark.slow
def test_kills_in_the_default_mode_lose_and_double_nothing(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the (controller, draw, example) grid that the configuration describes, each cell recorded once."""
    runs = Runs(tmp_path, generator)
    config = small("default", controller_dir, generator.url("default"))
    config = replace(config, controller=replace(config.controller, deterministic=False))
    folder = runs.folder(config)
    for seen in (
        lines(folder / "warmup" / "metrics.jsonl", 3),
        lines(folder / "trajectories.jsonl", 3),
        lines(folder / "trajectories.jsonl", 11),
        lines(folder / "star" / "metrics.jsonl", 1),
        lines(folder / "trajectories.jsonl", 40),
    ):
        assert runs.stop_when(config, seen) == -signal.SIGKILL
    runs.finish(config)
    rows = read_jsonl(folder / "trajectories.jsonl")
    assert len({row["key"] for row in rows}) == len(rows) == 4 * 4 + 2 * 2 + 6 * 7
    cells = Counter((row["trajectory"]["info"]["controller"], row["trajectory"]["example_id"]) for row in rows)
    names = {stage: f"tiny+{adapter_hash(folder / stage / 'adapter')}" for stage in ("warmup", "round-1", "star")}
    with open_run(config, tmp_path / "runs") as run:
        ids = {split: [e.id for e in run.problems[split]] for split in ("train", "validation", "test", "held_out")}
    held_out = [*ids["test"], *ids["held_out"]]
    expected = Counter({(names["warmup"], id): 4 for id in ids["train"]})
    expected.update((names[stage], id) for stage in ("warmup", "round-1") for id in ids["validation"])
    fixed = ("no-guidance", "wrong_guidance-0", "gold_guidance-0", "tiny")
    expected.update((name, id) for name in (*fixed, *names.values()) for id in held_out)
    assert cells == expected
    runs.assert_nothing_asked_twice(config)


def test_a_finished_run_is_read_back(
    undisturbed: Runs, controller_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: nothing asked, nothing recorded, the same numbers; the single stages read the same run."""
    monkeypatch.chdir(undisturbed.root)
    folder = undisturbed.root / "runs" / "whole"
    before = journal(folder), policies(folder), undisturbed.generator.asked("whole")
    pairs = (folder / "preferences.jsonl").read_bytes()
    first = json.loads((folder / "summary.json").read_text())
    for stage in ("collect", "evaluate"):
        assert cli.main([stage, "--config", "whole.toml"]) == 0
    assert cli.main(["pairs", "--in", str(folder), "--out", str(folder / "preferences.jsonl")]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == {"episodes": 16} and printed[-1]["pairs"] == pairs.count(b"\n")
    assert {**printed[-2], "seconds": 0} == {**first, "seconds": 0}
    assert (folder / "preferences.jsonl").read_bytes() == pairs
    assert (journal(folder), policies(folder), undisturbed.generator.asked("whole")) == before
    assert json.loads((folder / "report.json").read_text())["counts"]["round_1"]["samples"] == 16


def test_evaluation_takes_the_policies_that_there_are(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand; nothing is trained yet, so the controls and the untrained controller are compared."""
    monkeypatch.chdir(tmp_path)
    path = Runs(tmp_path, generator).write(small("fresh", controller_dir, generator.url("fresh")))
    assert cli.main(["evaluate", "--config", str(path)]) == 0
    summary = json.loads((tmp_path / "runs" / "fresh" / "summary.json").read_text())
    assert {"no_guidance", "gold_guidance", "untrained"} <= summary.keys()
    assert not {"warmup", "round_1", "star"} & summary.keys()


def test_a_changed_configuration_and_a_second_process_are_refused(
    undisturbed: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the difference by hand; the lock held here; every file stays as it is."""
    monkeypatch.chdir(undisturbed.root)
    folder = undisturbed.root / "runs" / "whole"
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    changed = ["pilot", "--config", "whole.toml", "--seed", "1", "--dpo.objective.beta", "0.2"]
    assert cli.main(changed) == 2
    error = capsys.readouterr().err
    assert "another configuration: seed: 0 -> 1; dpo.objective.beta: 0.1 -> 0.2" in error
    with folder_lock(folder):
        assert cli.main(["pilot", "--config", "whole.toml"]) == 2
    assert f"another process (pid {os.getpid()}) is working in this run directory" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, "no answer from http://127.0.0.1:9/v1"),
        ({"api_key_env": "MATRYOSHKA_TEST_NO_SUCH_KEY"}, "variable MATRYOSHKA_TEST_NO_SUCH_KEY holds no key"),
        ({"model": "scriptd"}, "model 'scriptd' is not served at"),
    ],
)
def test_a_generator_that_cannot_work_binds_nobody(
    tmp_path: Path, controller_dir: Path, generator: Generator, changes: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: status 2, the message, no configuration written, so that the mended one may take the same name."""
    monkeypatch.chdir(tmp_path)
    good = small("run", controller_dir, generator.url("mended"))
    path = Runs(tmp_path, generator).write(replace(good, generator=replace(good.generator, **changes)))
    assert cli.main(["pilot", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not {"config.toml", "trajectories.jsonl", "warmup"} & {p.name for p in (tmp_path / "runs" / "run").iterdir()}
    with open_run(good, Path("runs")) as run:
        assert load_toml(RunConfig, run.folder / "config.toml") == good


def test_a_server_of_ours_that_does_not_start(
    tmp_path: Path, controller_dir: Path, generator: Generator,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the server's own complaint reaches the user, with status 2."""
    monkeypatch.chdir(tmp_path)
    config = small("run", controller_dir, generator.url("x"))
    config = replace(config, serve=ServeConfig(model=str(tmp_path / "absent")))
    assert cli.main(["pilot", "--config", str(Runs(tmp_path, generator).write(config))]) == 2
    error = capsys.readouterr().err
    assert "the generator's server ended with status 2" in error and "absent: no such" in error
    assert not (tmp_path / "runs" / "run" / "config.toml").exists()


def test_a_server_of_ours_answers(tmp_path: Path, tiny_dir: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the run's own server answers under its name in every episode, and its process ends with the block."""
    config = small("own", controller_dir, generator.url("x"))
    config = replace(config, serve=ServeConfig(model=str(controller_dir), name="tiny-generator"))
    with open_run(config, tmp_path) as run:
        assert isinstance(run.generator, OpenAIGenerator)
        url = run.generator.config.base_url
        rows = run_episodes(run, policy_scheme(run, ""), ["test"])
    served = f"tiny-generator@{controller_dir.name}+{sampled_digest(controller_dir)[:16]}"
    assert {row.info.generator for row in rows} == {served}
    assert all(row.info.calls == 1 and row.info.completion_tokens > 0 for row in rows)
    assert generator.asked("x") == []
    with pytest.raises(ValueError, match="no answer from"), open_run(
        replace(config, name="later", serve=ServeConfig(), generator=replace(config.generator, base_url=url)), tmp_path
    ):
        pass


@pytest.mark.parametrize("samples", [4, 6])  # with 4, a stage has fewer episodes than say something on their way
def test_a_generator_that_dies_stops_the_run(
    samples: int, tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand; 16 or 24 episodes fail for good, none is recorded, nothing is taken for trained, and the command
    ends with status 2.
    """
    monkeypatch.chdir(tmp_path)
    config = small("dying", controller_dir, generator.url("dying"))
    config = replace(config, rollout=replace(config.rollout, samples=samples), warmup=WarmupConfig("none"))
    path = Runs(tmp_path, generator).write(config)

    async def lost(self: object, prompt: Messages, sampling: Sampling) -> Sample:
        raise GeneratorError("connection failed")

    monkeypatch.setattr(OpenAIGenerator, "complete", lost)
    assert cli.main(["pilot", "--config", str(path)]) == 2
    assert (tmp_path / "runs" / "dying" / "trajectories.jsonl").read_bytes() == b""
    assert not (tmp_path / "runs" / "dying" / "round-1").exists()
    notes = read_jsonl(tmp_path / "runs" / "dying" / "failed.jsonl")
    assert len(notes) >= min(20, 4 * samples) and {note["stage"] for note in notes} == {"collect 1"}
    assert {note["error"] for note in notes} == {"connection failed"}


def test_tensorboard_events_hold_the_metrics(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: metrics.jsonl, read back from the event file by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(small("tracked", controller_dir, generator.url("tracked")), tensorboard=True)
    with open_run(config, tmp_path) as run:
        warm_up(run)
    rows = read_jsonl(tmp_path / "tracked" / "warmup" / "metrics.jsonl")
    events = accumulator.EventAccumulator(str(tmp_path / "tracked" / "warmup"))
    events.Reload()
    for name in ("loss", "grad_norm", "lr", "tokens"):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert len(rows) == 32


def test_problems_that_do_not_fit_are_refused_or_left_out_of_everything(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: prompt sizes counted here; the sampler's own refusal one token beyond what the run accepts."""
    config = small("long", controller_dir, generator.url("long"))
    with open_run(config, tmp_path / "all") as run:
        controller = LocalController(_no_sampler(run.tokenizer), None, "counts")
        sizes = {
            split: {e.id: controller.count_tokens(run.task.first_prompt(e)) for e in examples}
            for split in ("train", "test")
            for examples in [run.problems[split]]
        }
    longest = max(sizes["test"].values())
    context = longest + config.rollout.guidance_tokens - 1
    short = with_context(controller_dir, tmp_path / "short" / "tiny", context)
    config = replace(config, controller=replace(config.controller, path=str(short)))
    with pytest.raises(ValueError, match=rf"exceed the controller's context of {context}; .* overlong = 'skip'"):
        with open_run(config, tmp_path / "error"):
            pass
    with open_run(replace(config, overlong="skip"), tmp_path / "skip") as run:
        for split, counted in sizes.items():
            kept = [e.id for e in run.problems[split]]
            assert kept == [id for id, size in counted.items() if size + config.rollout.guidance_tokens <= context]
        assert 0 < len(run.problems["test"]) < len(sizes["test"])
        assert left_out(run)["test problems"] == 4 - len(run.problems["test"])
        rows = run_episodes(run, policy_scheme(run, ""), ["test"])  # the sampler takes everything that was kept
        assert [row.example_id for row in rows] == [e.id for e in run.problems["test"]]
        with Sampler(run.model, run.tokenizer) as sampler:
            prompt, limit = [1] * longest, config.rollout.guidance_tokens
            with pytest.raises(ValueError, match=rf"exceed the context of {context}"):
                run.runner.run(sampler.generate(prompt, Sampling(max_tokens=limit)))
            run.runner.run(sampler.generate(prompt[1:], Sampling(max_tokens=limit)))


class Twice:
    """A control scheme in one class: guidance, and then guidance on the guidance."""

    name = "twice"

    def __init__(self, sampler: TokenSampler) -> None:
        self.inner = LocalController(sampler, None, "inner")

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        first = await self.inner.propose(prompt, n, sampling)
        return [replace(sample, text=f"{prompt[-1].content[:5]} {sample.text}") for sample in first]

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...]:
        return self.inner.prompt_ids(prompt)

    def count_tokens(self, prompt: Messages) -> int:
        return self.inner.count_tokens(prompt)


def test_swapping_the_controller_is_one_file(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an architecture file that shifts Llama's hidden states, and a scheme object, run and train unchanged."""
    architectures = tmp_path / "models"
    architectures.mkdir()
    (architectures / "shifted.py").write_text(
        "from matryoshka.core.models import llama\n"
        "from matryoshka.core.models.llama import Config, Model as Llama, read_config\n"
        "LORA_TARGETS = llama.LORA_TARGETS\n"
        "class Model(Llama):\n"
        "    def forward(self, ids_BT, positions_BT=None, attend=None):\n"
        "        return super().forward(ids_BT, positions_BT, attend) + 1\n"
    )
    monkeypatch.setattr(load, "MODELS", architectures)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(architectures)])
    folder = with_context(controller_dir, tmp_path / "shifted", 1024, model_type="shifted")
    config = small("swapped", folder, generator.url("swapped"))
    with open_run(config, tmp_path / "runs") as run:
        assert type(run.model).__module__ == "matryoshka.core.models.shifted"
        plain = run_episodes(run, policy_scheme(run, ""), ["test"])
        scheme = Scheme("twice", lambda _, sampler: Twice(sampler), rollout_settings(config, greedy=True))
        own = run_episodes(run, scheme, ["test"])
        warm_up(run)
        trained = run_episodes(run, policy_scheme(run, "warmup"), ["test"])
    questions = [example.fields["question"] for example in run.problems["test"]]
    for question, before, after in zip(questions, plain, own, strict=True):
        assert after.turns[0].action.text == f"{question[:5]} {before.turns[0].action.text}"
        assert after.turns[0].calls[0].prompt[-1].content.startswith(f"{question}\n{question[:5]}")
    assert {row.info.controller for row in (*plain, *own)} == {"shifted", "twice"}
    assert trained[0].info.controller.startswith("shifted+")


def _no_sampler(tokenizer: Any) -> Any:
    return type("Tokens", (), {"tokenizer": tokenizer})()


def test_a_report_is_written_again_from_the_record_alone(
    undisturbed: Runs, controller_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Oracles: the first report; no weights are there to be read, nothing is asked and no episode is added."""
    folder = tmp_path / "runs" / "whole"
    shutil.copytree(undisturbed.root / "runs" / "whole", folder)
    shutil.copytree(controller_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.toml").write_text(
        (folder / "config.toml").read_text().replace(str(controller_dir), str(tmp_path / "tiny"))
    )
    written = json.loads((folder / "report.json").read_text())
    for name in ("report.json", "report.md", "report.html", "summary.json"):
        (folder / name).unlink()
    asked, episodes = undisturbed.generator.asked("whole"), (folder / "trajectories.jsonl").read_bytes()
    seconds = (folder / "seconds.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(folder)]) == 0
    summary = json.loads(capsys.readouterr().out)
    again = json.loads((folder / "report.json").read_text())
    for report in (written, again):
        del report["versions"]["commit"]  # of the tree, which may be edited while the tests run
    changed = {key for key in written if written[key] != again[key]}
    assert changed <= {"command", "config", "counts"} and again["counts"]["round_1"] == written["counts"]["round_1"]
    assert again["problems"] == written["problems"] and len(written["problems"]) == 6
    first = json.loads((undisturbed.root / "runs" / "whole" / "summary.json").read_text())
    ignored = {"seconds": 0, "report": ""}
    assert {**summary, **ignored} == {**first, **ignored}
    assert undisturbed.generator.asked("whole") == asked
    assert (folder / "trajectories.jsonl").read_bytes() == episodes
    assert (folder / "seconds.json").read_bytes() == seconds
    # A condition that is not recorded is left out; the untrained controller cannot be.
    rows = read_jsonl(folder / "trajectories.jsonl")
    for name, status, said in (("no-guidance", 0, "the report has no row"), ("tiny", 2, "evaluate --config` runs")):
        infos = [row["trajectory"]["info"] for row in rows]
        rows = [row for row, info in zip(rows, infos, strict=True) if info["controller"] != name]
        write_jsonl(folder / "trajectories.jsonl", rows)
        assert cli.main(["report", str(folder)]) == status
        assert said in caplog.text + capsys.readouterr().err
    assert "no_guidance" not in json.loads((folder / "report.json").read_text())["verdicts"]
    assert cli.main(["report", str(tmp_path)]) == 2 and "no config.toml; expected the folder" in capsys.readouterr().err
