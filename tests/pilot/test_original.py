"""examples/original/commands.sh: all seventeen commands, each a process, at tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka.core.config import to_toml
from matryoshka.core.files import read_jsonl, write_jsonl
from matryoshka.inference.vllm_server import free_port
from matryoshka.tasks.pal import synthetic_problems as words
from matryoshka.tests.pilot.conftest import ROOT, Generator, environment, with_context
from matryoshka.tests.pilot.test_pilot import small

OTHERS = """
name = "{name}"
seed = 42
star = false
overlong = "skip"
[controller]
path = "not given"
threads = 1
[generator]
base_url = "http://127.0.0.1:1/v1"
model = "none"
api_key_env = ""
[serve]
scripted = "{scripted}"
[task]
name = "{task}"
warmup = 0
train = 4
validation = 1
test = 3
[task.options]
{options}
[warmup]
source = "none"
[rollout]
samples = 2
guidance_tokens = 12
bootstrap = 4
"""


@pytest.mark.slow
def test_the_published_commands_run(controller_dir: Path, generator: Generator, tmp_path: Path) -> None:
    """Oracles: every command's status; the records of the collections and evaluations, protocol by protocol; and the
    metrics of the files of predictions, which are those of the evaluations that made them.
    """
    controller = with_context(controller_dir, tmp_path / "tiny", 4096)
    config = small("gsm", controller, generator.url("original"))
    gsm = to_toml(config).replace("held_out = 2", "held_out = 0")
    for name in ("train", "test"):
        gsm = gsm.replace(f'{name}_file = ""', f'{name}_file = "{name}.jsonl"')
    (tmp_path / "gsm.toml").write_text(gsm)
    options = 'prompts = "compact"\nsize = "small"'
    households = OTHERS.format(name="h", task="alfworld", scripted="literal", options=options)
    (tmp_path / "households.toml").write_text(households)
    lamp = OTHERS.format(name="lamp", task="lamp", scripted="careful", options='task = "2N"\nprompt_tokens = 500')
    (tmp_path / "lamp.toml").write_text(lamp)
    train, test = words.load("train", 20, 0), words.load("test", 8, 0)
    gsm8k = [
        {"question": e.fields["question"], "answer": f"<<1+1=2>> #### {e.fields['answer']:g}"} for e in (*train, *test)
    ]
    write_jsonl(tmp_path / "train.jsonl", gsm8k[:20])
    write_jsonl(tmp_path / "test.jsonl", gsm8k[20:])
    hard = [{"input": e.fields["question"], "code": "", "target": e.fields["answer"]} for e in test]
    write_jsonl(tmp_path / "hard.jsonl", hard)
    rows = [
        {"prompt": [{"role": "user", "content": e.fields["question"]}],
         "response": [{"role": "assistant", "content": "What is it?"}]}
        for e in train
    ]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "matryoshka"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m matryoshka.scripts.cli "$@"\n')
    program.chmod(0o755)
    given = {
        "CONTROLLER": str(controller), "ENGINE": "local", "PORT": str(free_port()), "GSM": "gsm.toml",
        "HOUSEHOLDS": "households.toml", "LAMP": "lamp.toml", "ROWS": "rows.jsonl", "GSM8K_TEST": "test.jsonl",
        "GSM_HARD": "hard.jsonl", "LAMP_DATA": "", "HARDWARE": "--threads 1",
        "OTHER": f"--generator.base-url {generator.url('other')} --generator.identity other",
    }  # fmt: skip
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "original" / "commands.sh")], cwd=tmp_path,
        env={**environment(), **given, "PATH": path}, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in done.stderr.splitlines() if line.startswith("== ")]
    assert steps == [f"== {number}" for number in range(1, 18)]
    runs = tmp_path / "runs" / "original"
    for name, protocol in (("gsm-episodes", "label_free"), ("gsm8k", "oracle"), ("gsm-hard-other", "oracle"),
                           ("households-episodes", "label_free"), ("households", "oracle"), ("lamp-4", "label_free")):
        episodes = [row["trajectory"]["info"] for row in read_jsonl(runs / name / "trajectories.jsonl")]
        assert {info["protocol"] for info in episodes} == {protocol}, name
    attempts = [row["trajectory"]["info"]["attempts"] for row in read_jsonl(runs / "gsm8k" / "trajectories.jsonl")]
    assert max(attempts) == 6 and len(generator.asked("other")) > 0
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    scored, evaluated = printed[-5:], printed[-10:-5]
    for made, score in zip(evaluated, scored, strict=True):
        assert made["metrics"] == {name: score[name] for name in made["metrics"]}
