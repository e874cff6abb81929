"""pilot/stages.py and progress.py: the decisions of a stage, on a run whose episodes take a second."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml
from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Message, Preference, Sample
from matryoshka.lora.files import WEIGHTS
from matryoshka.pilot.config import RunConfig, WarmupConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.progress import Progress, StatusLine
from matryoshka.pilot.recipes import RECIPES
from matryoshka.pilot.stages import collect, is_trained, left_out, train_round, train_star, warm_up, write_pairs
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import small


def test_the_learning_rate_is_chosen_on_validation(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the validation episodes in the journal, counted here; the round's adapter is the chosen candidate's."""
    config = small("rates", controller_dir, generator.url("rates"))
    config = replace(
        config,
        warmup=WarmupConfig("none"),
        task=replace(config.task, validation=6),
        dpo=replace(config.dpo, learning_rates=(1e-3, 3e-2)),
    )
    with open_run(config, tmp_path) as run:
        episodes = collect(run, 1)
        pairs, _ = write_pairs(run, episodes)
        assert train_round(run, 1, pairs, episodes) == "round-1"
        written = (tmp_path / "rates" / "round-1" / "adapter" / WEIGHTS).stat().st_mtime_ns
        assert train_round(run, 1, pairs, episodes) == "round-1"  # done already: nothing is trained again
        assert (tmp_path / "rates" / "round-1" / "adapter" / WEIGHTS).stat().st_mtime_ns == written
        names = {rate: policy_scheme(run, f"round-1/lr-{rate:g}").name for rate in config.dpo.learning_rates}
        validation = {example.id for example in run.problems["validation"]}
    folder = tmp_path / "rates" / "round-1"
    rows = [row["trajectory"] for row in read_jsonl(tmp_path / "rates" / "trajectories.jsonl")]
    validated = [row for row in rows if row["example_id"] in validation]
    right = {
        rate: sum(row["reward"] for row in validated if row["info"]["controller"] == name)
        for rate, name in names.items()
    }
    assert len(validated) == 2 * len(validation)
    best = max(right, key=lambda rate: right[rate])  # the first of equals
    adapters = {rate: (folder / f"lr-{rate:g}" / "adapter" / WEIGHTS).read_bytes() for rate in names}
    assert adapters[1e-3] != adapters[3e-2]
    assert (folder / "adapter" / WEIGHTS).read_bytes() == adapters[best]


@pytest.mark.parametrize("source", ["gold", "none"])
def test_a_stage_without_data_keeps_the_policy(
    source: str, tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the bytes of the adapter before; without warm-up, the base model's greedy episodes."""
    config = small("nothing", controller_dir, generator.url("nothing"))
    if source == "none":
        config = replace(config, warmup=WarmupConfig("none"))
    with open_run(config, tmp_path) as run:
        warm_up(run)
        assert train_round(run, 1, [], []) == "round-1"
        train_star(run, [])
        kept = [(run.policies.folder(stage) / WEIGHTS).read_bytes() for stage in ("round-1", "star")]
        if source == "gold":
            before = (run.policies.folder("warmup") / WEIGHTS).read_bytes()
        else:
            before = kept[0]
            schemes = [policy_scheme(run, stage) for stage in ("", "round-1")]
            turns = [[e.turns for e in run_episodes(run, scheme, ["test"])] for scheme in schemes]
            assert turns[0] == turns[1]
    assert kept == [before, before]


def test_a_users_warm_up_rows_are_checked_before_the_run_is_bound(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the message with file and line; no configuration is saved, so that the corrected command may differ."""
    config = small("user", controller_dir, generator.url("user"))
    data = tmp_path / "chats.jsonl"
    data.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n')
    config = replace(config, warmup=replace(config.warmup, source="file", data=str(data)))
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: field 'completion' is missing"):
        with open_run(config, tmp_path):
            pass
    none = replace(config, task=replace(config.task, warmup=0), warmup=replace(config.warmup, source="gold"))
    with pytest.raises(ValueError, match=r"source = 'gold', but \[task\] warmup is 0"), open_run(none, tmp_path):
        pass
    assert not (tmp_path / "user" / "config.toml").exists()
    data.write_text('{"prompt": "p", "completion": "c"}\n')
    with open_run(config, tmp_path) as run:
        warm_up(run)
        assert is_trained(run, "warmup")


def test_what_no_adapter_can_be_trained_on_is_refused_before_anything_is_paid(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: nothing is asked and nothing bound, though the first training would come after the first collection."""
    config = small("typo", controller_dir, generator.url("typo"))
    config = replace(config, warmup=WarmupConfig("none"), lora=replace(config.lora, targets=("q_porj",)))
    with pytest.raises(ValueError, match="lora: target 'q_porj' matches no linear layer"), open_run(config, tmp_path):
        pass
    assert generator.asked("typo") == [] and not (tmp_path / "typo" / "config.toml").exists()


def test_settings_that_fit_a_run_to_its_machine_may_change(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: the remedies of errors that a run may meet after it has paid for episodes (a larger micro_batch_tokens,
    other activations, fewer rows) are taken up; whatever decides the result is still refused, by name.
    """
    config = small("moved", controller_dir, generator.url("moved"))
    with open_run(config, tmp_path):
        pass
    dpo = replace(config.dpo.train, micro_batch_tokens=9000, activations="full", save_every=1, keep_checkpoints=2)
    fitted = replace(
        config,
        controller=replace(config.controller, max_rows=3),
        rollout=replace(config.rollout, limit=2),
        warmup=replace(config.warmup, train=replace(config.warmup.train, micro_batch_tokens=9000)),
        dpo=replace(config.dpo, train=dpo),
    )
    with open_run(fitted, tmp_path) as run:
        assert load_toml(RunConfig, run.folder / "config.toml") == fitted
    decisive = replace(fitted, dpo=replace(config.dpo, train=replace(dpo, batch_size=3)))
    with pytest.raises(ValueError, match=r"another configuration: dpo\.train\.batch_size: \d+ -> 3\. Take"):
        with open_run(decisive, tmp_path):
            pass


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"rollout.top_p": 0}, "top_p 0.0 must lie in"),
        ({"collect.top_p": 1.5}, "top_p 1.5 must lie in"),
        ({"dpo.learning_rates": [1e-4, 0.0]}, "learning_rate 0.0 must be above 0"),
        ({"dpo.train.beta2": 1.0}, "beta1 and beta2 must be below 1"),
        ({"controller.tune": "full", "dpo.train.lora_plus_ratio": 16}, "trains no adapter, but lora_plus_ratio is 16"),
    ],
)
def test_settings_that_only_a_later_stage_would_refuse(overrides: dict[str, Any], problem: str) -> None:
    """Oracle: the sampler's own range, and the optimizer's own condition."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_toml(RunConfig, RECIPES / "demo.toml", overrides)


def test_training_items_that_do_not_fit_are_counted(tmp_path: Path, controller_dir: Path, generator: Generator) -> None:
    """Oracle: one of two conversations is longer than the context of 1024."""
    config = small("items", controller_dir, generator.url("items"))
    data = tmp_path / "chats.jsonl"
    data.write_text(f'{{"prompt": "p", "completion": "c"}}\n{{"prompt": "{"p" * 1100}", "completion": "c"}}\n')
    config = replace(config, warmup=replace(config.warmup, source="file", data=str(data)))
    with open_run(config, tmp_path / "error") as run:
        with pytest.raises(ValueError, match="1 of 2 items exceed the context of 1024 tokens"):
            warm_up(run)
        assert not is_trained(run, "warmup")
    with open_run(replace(config, overlong="skip"), tmp_path / "skip") as run:
        warm_up(run)
        assert left_out(run) == {"warmup items": 1}


def test_what_is_too_long_does_not_end_a_run_for_good(
    tmp_path: Path, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: one of two pairs is longer than the context of 1024, as the generator's guidance may be in the
    controller's tokens; with overlong = "skip" the same run goes on, reads its episodes back and trains on the other.
    """
    config = replace(small("long", controller_dir, generator.url("long")), warmup=WarmupConfig("none"))
    with open_run(config, tmp_path) as run:
        better, worse = (Sample(text, token_ids=(id, run.tokenizer.eos_id)) for id, text in ((5, "a"), (6, "b")))
        short = Preference((Message("user", "p"),), (3, 4), better, worse, 1.0, 0.0, "one")
        pairs = [short, replace(short, chosen=Sample("c", token_ids=(5,) * 1100), example_id="two")]
        episodes = collect(run, 1)
        with pytest.raises(ValueError, match="1 of 2 items exceed the context of 1024 .* set overlong = 'skip'"):
            train_round(run, 1, pairs, [])
    asked = generator.asked("long")
    with open_run(replace(config, overlong="skip"), tmp_path) as run:
        assert collect(run, 1) == episodes and generator.asked("long") == asked
        assert train_round(run, 1, pairs, []) == "round-1"
        assert left_out(run) == {"round-1/train items": 1}


def test_progress_off_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a clock of ours; first, after 15 s, and the last, each one line with the rate's remaining time."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("collect", 40) as shown:
        for done in range(1, 41):
            now[0] += 1.0
            shown.update(done, f"right {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "collect 1/40 right 1 [1 s, 1.0/s, 39 s left]",
        "collect 16/40 right 16 [16 s, 1.0/s, 24 s left]",
        "collect 31/40 right 31 [31 s, 1.0/s, 9 s left]",
        "collect 40/40 right 40 [40 s, 1.0/s, 0 s left]",
    ]


def test_a_status_line_ends_where_its_block_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the terminal's bytes by hand; a line that showed nothing ends nothing."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with StatusLine() as line:
        line.show("one")
        line.show("too soon")
        line.show("two", always=True)
    with StatusLine():
        pass
    with StatusLine(is_shown=False) as hidden:
        hidden.show("unseen")
    assert capsys.readouterr().err == "\r\x1b[Kone\r\x1b[Ktwo\n"
