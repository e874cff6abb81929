"""Parts for the pilot's tests: a controller folder, a scripted generator in another process, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from matryoshka.core.models.load import load_model
from matryoshka.lora.files import save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.tasks.pal import synthetic_problems as words

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Generator:
    """The scripted server; a run of its own tenant has its own lines in the log."""

    port: int
    log: Path

    def url(self, tenant: str) -> str:
        return f"http://127.0.0.1:{self.port}/{tenant}/v1"

    def asked(self, tenant: str) -> list[str]:
        """Return the body hashes of the tenant's requests, in order of arrival."""
        rows = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [digest for name, digest in rows if name == tenant]


def environment() -> dict[str, str]:
    """Return the variables of a process with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "matryoshka.scripts.cli", *arguments]


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """Real HTTP to a process that knows the answers to the word problems of seed 0."""
    folder = tmp_path_factory.mktemp("generator")
    examples = [example for split in words.SPLITS for example in words.load(split, 30, 0)]
    answers = {example.fields["question"]: example.fields["answer"] for example in examples}
    (folder / "answers.json").write_text(json.dumps(answers))
    script = Path(__file__).parent / "scripted_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "answers.json"), str(folder / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    yield Generator(int(process.stdout.readline()), folder / "log")
    process.stdin.close()
    assert process.wait(120) == 0
    process.stdout.close()


def with_context(source: Path, folder: Path, context: int, **changes: Any) -> Path:
    """Copy a model folder with another context length and other changes of config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context, **changes}))
    return folder


@pytest.fixture(scope="session")
def controller_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 1024, since a compact prompt in bytes has about 550.

    The end of turn's embedding is longer, so that a good part of its texts ends by itself within a few tokens.
    """
    folder = with_context(tiny_dir, tmp_path_factory.mktemp("controller") / "tiny", 1024)
    weights = load_file(folder / "model.safetensors")
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    weights["model.embed_tokens.weight"][end] *= 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def adapter_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is far from the identity."""
    folder = tmp_path_factory.mktemp("serving") / "adapter"
    model = load_model(tiny_dir)
    add_adapter(model, "loud", LoraConfig(rank=2, targets=("o_proj", "down_proj")), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.5
    save_adapter(model, "loud", folder, "tiny")
    return folder
