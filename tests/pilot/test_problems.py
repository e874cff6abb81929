"""pilot/context.py: a run's splits from the generator of word problems and from GSM8K files; the configurations."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.config import load_toml, to_toml
from matryoshka.core.protocols import Task, TaskSetting
from matryoshka.core.records import Example, Message, Messages
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.pilot.config import ControllerConfig, RunConfig, TaskConfig, WarmupConfig
from matryoshka.pilot.context import Problems, fitting_problems, load_problems, open_task
from matryoshka.tasks.pal.options import PalOptions

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = RunConfig("n", ControllerConfig("m"), GeneratorConfig("http://x/v1", "m"))


def gsm8k_file(path: Path, questions: Sequence[str]) -> str:
    answer = "He has 48/2 = <<48/2=24>>24 and 24+4 = <<24+4=28>>28.\n#### 28"
    path.write_text("".join(json.dumps({"question": question, "answer": answer}) + "\n" for question in questions))
    return str(path)


def gsm8k_config(tmp_path: Path, train: int = 6, test: int = 2, **changes: Any) -> RunConfig:
    files = {
        "train_file": gsm8k_file(tmp_path / "train.jsonl", [f"train {i}?" for i in range(train)]),
        "test_file": gsm8k_file(tmp_path / "test.jsonl", [f"test {i}?" for i in range(test)]),
    }
    options = PalOptions(**{**files, **changes})
    return replace(CONFIG, task=TaskConfig(warmup=1, train=3, validation=2, test=2, options=options))


def load_splits(config: RunConfig) -> Problems:
    return load_problems(open_task(config, len))


def test_words_come_in_the_sizes_asked_for_and_share_nothing() -> None:
    """Oracle: the numbers of the configuration; ids are questions."""
    splits = load_splits(replace(CONFIG, task=TaskConfig(warmup=3, train=5, validation=2, test=4, held_out=6)))
    assert {split: len(rows) for split, rows in splits.items()} == {
        "warmup": 3, "train": 5, "validation": 2, "test": 4, "held_out": 6
    }  # fmt: skip
    ids = [example.id for rows in splits.values() for example in rows]
    assert len(set(ids)) == len(ids) == 20
    assert load_splits(replace(CONFIG, seed=1))["test"] != load_splits(CONFIG)["test"]


def test_gsm8k_is_cut_in_file_order_with_its_annotations_as_steps(tmp_path: Path) -> None:
    """Oracle: by hand."""
    splits = load_splits(gsm8k_config(tmp_path))
    questions = {split: [example.fields["question"] for example in rows] for split, rows in splits.items()}
    assert questions == {
        "warmup": ["train 0?"],
        "train": ["train 1?", "train 2?", "train 3?"],
        "validation": ["train 4?", "train 5?"],
        "test": ["test 0?", "test 1?"],
        "held_out": [],
    }
    assert splits["warmup"][0].fields["steps"] == ["What is 48/2?", "What is 24+4?"]
    assert splits["test"][0].fields["answer"] == 28


def test_the_gold_warm_up_takes_annotated_rows_and_leaves_the_others(tmp_path: Path) -> None:
    """Oracle: by hand, for a file whose first row has no calculator annotations, as some of GSM8K's have not."""
    config, path = gsm8k_config(tmp_path), tmp_path / "train.jsonl"
    plain = json.dumps({"question": "train 0?", "answer": "Thirty less two.\n#### 28"})
    path.write_text("\n".join([plain, *path.read_text().splitlines()[1:]]) + "\n")
    names = {split: [e.fields["question"] for e in rows] for split, rows in load_splits(config).items()}
    assert names["warmup"] == ["train 1?"]
    assert names["train"] == ["train 0?", "train 2?", "train 3?"] and names["validation"] == ["train 4?", "train 5?"]
    from_file = replace(config, warmup=WarmupConfig(source="file", data="x"))
    assert [e.fields["question"] for e in load_splits(from_file)["warmup"]] == ["train 0?"]
    path.write_text((plain + "\n") * 6)
    with pytest.raises(ValueError, match="has 0 annotated problems but the warm-up takes 1"):
        load_splits(config)


def test_gsm8k_files_that_cannot_serve(tmp_path: Path) -> None:
    """Oracle: each message by hand."""
    with pytest.raises(ValueError, match=r"train_file .*train\.jsonl has 5 problems but the configuration takes 6"):
        load_splits(gsm8k_config(tmp_path, train=5))
    with pytest.raises(ValueError, match="test_file is empty; give the path"):
        load_splits(gsm8k_config(tmp_path, test_file=""))
    both = gsm8k_file(tmp_path / "both.jsonl", [f"train {i}?" for i in range(6)])
    with pytest.raises(ValueError, match="2 questions stand in both train_file and test_file"):
        load_splits(gsm8k_config(tmp_path, test_file=both))
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        load_splits(gsm8k_config(tmp_path, test_file=str(tmp_path / "absent.jsonl")))


def test_what_fits_is_decided_for_all_conditions_at_once(tmp_path: Path) -> None:
    """Oracle: a tokenizer of one token a letter of the question; exactly the context fits, one token less does not."""

    def letters(prompt: Messages) -> int:
        return len(prompt[-1].content)

    config = gsm8k_config(tmp_path, test_file=gsm8k_file(tmp_path / "other.jsonl", ["short?", "much longer?"]))
    config = replace(config, rollout=replace(config.rollout, guidance_tokens=10))
    task = open_task(config, letters)
    splits = load_problems(task)
    kept, left_out = fitting_problems(config, task, splits, 12 + 10)
    assert left_out == {} and kept == splits and len(kept["test"]) == 2
    with pytest.raises(ValueError, match=r"test: 1 of 2 prompts \(the longest has 12 tokens\) .* context of 21; lower"):
        fitting_problems(config, task, splits, 21)
    skipping = replace(config, overlong="skip")
    kept, left_out = fitting_problems(skipping, task, splits, 21)
    assert left_out == {"test": 1} and [e.fields["question"] for e in kept["test"]] == ["short?"]
    with pytest.raises(ValueError, match=r"\[task\] warmup: 1 of 1 prompts"):
        fitting_problems(skipping, task, splits, 17)


SOUND = [Example("1", {"question": "q", "answer": "a"})]


class Odd(Task):
    """A task of a user whose examples and prompt are `found` and `prompt`."""

    def __init__(self, found: Any, prompt: Any = ()) -> None:
        super().__init__(None, TaskSetting({}))
        self.found, self.prompt = found, prompt

    def examples(self, split: str) -> Any:
        return self.found if split == "train" else []

    def first_prompt(self, example: Example) -> Any:
        return self.prompt

    async def rollout(self, *_: object) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"train: `examples` returned None; expected a list of Example"),
        ((example for example in SOUND), r"train: `examples` returned <generator .*; expected a list of Example"),
        ([{"question": "q"}], r"train: `examples` returned \[\{.*; expected a list of Example"),
        ([Example(1, {})], r"train: `examples` returned .*the id a text"),  # type: ignore[arg-type]
        ([Example("1", {"question": "q", "gold": "a"})], "example '1' has no field 'answer'; it has question, gold"),
        (SOUND * 2, "the id '1' stands in train, too; each problem needs an id of its own"),
    ],
)
def test_examples_of_another_form_are_said(found: Any, message: str) -> None:
    """Oracle: each message by hand; it names task and split."""
    with pytest.raises(ValueError, match=f"task Odd, {message}" if message.startswith("train") else message):
        load_problems(Odd(found))


@pytest.mark.parametrize("prompt", [None, "Hint?", (), [Message("user", "q")], Message("user", "q"), ("user", "q")])
def test_a_first_prompt_of_another_form_is_said(prompt: Any) -> None:
    """Oracle: the message says what a prompt is; a forgotten comma and a list are the commonest mistakes."""
    task = Odd(SOUND, prompt)
    with pytest.raises(ValueError, match=r"task Odd: `first_prompt` returned .*; expected a tuple of Message\(role"):
        fitting_problems(CONFIG, task, load_problems(task), 1000)


def test_sizes_that_make_no_sense_are_refused() -> None:
    """Oracle: by hand; an accuracy needs problems, a run without held-out families does not."""
    for name in ("train", "validation", "test"):
        none: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"task: {name} 0 must be at least 1"):
            TaskConfig(**none)
    with pytest.raises(ValueError, match="task: held_out -1 must not be negative"):
        TaskConfig(held_out=-1)
    with pytest.raises(ValueError, match="rounds -1 must not be negative"):
        replace(CONFIG, rounds=-1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_is_read_and_written_back(path: Path, tmp_path: Path) -> None:
    """Oracle: the round trip; the paper's recipe by its numbers."""
    config = load_toml(RunConfig, path)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_toml(RunConfig, tmp_path / "again.toml") == config
    if path.name == "gsm8k_llama3.toml":
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
        assert (config.warmup.train.epochs, config.warmup.train.learning_rate) == (3, 2e-5)
        assert (config.dpo.objective.beta, config.dpo.objective.label_smoothing) == (0.1, 0.1)
        assert (config.dpo.train.learning_rate, config.rounds, config.rollout.samples) == (5e-6, 2, 10)
