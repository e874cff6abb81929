"""`matryoshka bench lamp`: LaMP's files into prompts on one core, and how much memory a large file takes.

The first rows are CPU seconds of one thread over a questions file: reading and checking, retrieval (BM25), and the
controller's prompt within its token budget, so they say where the time goes. With --megabytes a file of that size, of
random words in LaMP's format, is written to a temporary folder and read in a process of its own, whose peak counts.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.core.records import Messages
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.tasks.lamp.data import outputs_beside, read_items
from matryoshka.tasks.lamp.prompt_style import summarise
from matryoshka.tasks.lamp.retrieval import bm25
from matryoshka.tasks.lamp.splits import make_example
from matryoshka.tasks.lamp.task_specs import KINDS, kind_of

WORDS_PER_ENTRY, ENTRIES = 40, 300  # about the published means of news histories
MIB = 2**20
# Read in a process that has nothing else: entries, CPU seconds, peak in KiB (getrusage's begins with its parent's).
READ = """
import json, sys, time
from pathlib import Path
from matryoshka.tasks.lamp.data import read_items
from matryoshka.tasks.lamp.task_specs import KINDS
start = time.process_time()
entries = sum(len(item.profile) for item in read_items(Path(sys.argv[1]), KINDS["2N"]))
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps([entries, time.process_time() - start, int(peak)]))
"""


@dataclass(frozen=True)
class Config:
    """LaMP's files into prompts on one core, and the memory that a large file takes."""

    questions: Path
    """A LaMP questions file, with its outputs beside it."""
    task: str = "1"
    """The LaMP task."""
    model: Path = Path("models/smollm2-135m-instruct")
    """The Hugging Face folder whose tokenizer counts."""
    prompt_tokens: int = 4000
    """Tokens of the controller's prompt."""
    megabytes: int = 0
    """Size of a generated file to stream, 0 for none."""


def run(config: Config) -> BenchResult:
    """Return profile entries a second for each step and for all together, and the memory of a generated file."""
    kind = kind_of(config.task)
    tokenizer = Tokenizer.load(config.model)

    def count(prompt: Messages) -> int:
        return len(tokenizer.render(prompt, add_generation_prompt=True).ids)

    items, reading = _timed(lambda: list(read_items(config.questions, kind)))
    entries = sum(len(item.profile) for item in items)
    examples, retrieval = _timed(lambda: [make_example(kind, item, bm25) for item in items])
    prompts, building = _timed(
        lambda: [summarise(kind, e.fields["entries"], count, config.prompt_tokens) for e in examples]
    )
    steps = {"reading": reading, "retrieval": retrieval, "prompts": building, "all": reading + retrieval + building}
    details = {"items": len(items), "entries": entries, "dropped": sum(prompt.dropped for prompt in prompts)}
    rows = [
        Row(name, entries / seconds, "entries/s", {"cpu_s": seconds, **details}) for name, seconds in steps.items()
    ]
    if config.megabytes:
        rows += _stream(config.megabytes)
    return BenchResult("lamp", rows, None, None, ("rank-bm25", "ijson"))


def _timed(step: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = step()
    return found, time.process_time() - start


def _stream(megabytes: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_questions.json"
        _write(path, megabytes * 10**6)
        # The package may run in place, through a link that only this process's path knows.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", READ, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ValueError(f"bench lamp: the reading process failed: {done.stderr.strip()[-500:]}")
        entries, seconds, peak = json.loads(done.stdout)
        size = path.stat().st_size
    details = {"file_mib": size / MIB, "entries": entries, "cpu_s": seconds}
    return [
        Row("peak of streaming", peak / 1024, "MiB", details),
        Row("streaming", size / 10**6 / seconds, "MB/s", details),
    ]


def _write(path: Path, size: int) -> None:
    """Write about `size` bytes of questions and their gold answers."""
    kind, draws = KINDS["2N"], random.Random(0)
    golds: list[dict[str, str]] = []
    words = ["".join(draws.choices("abcdefghijklmno", k=draws.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as handle:
        handle.write("[")
        while handle.tell() < size:
            texts = [" ".join(draws.choices(words, k=WORDS_PER_ENTRY)) for _ in range(ENTRIES)]
            profile = [{"id": text[:9], "title": text[:40], "text": text, "category": "sports"} for text in texts]
            row = {"id": str(len(golds)), "input": kind.ask(texts[0]), "profile": profile}
            handle.write(("," if golds else "") + json.dumps(row))
            golds.append({"id": str(len(golds)), "output": "sports"})
        handle.write("]")
    outputs_beside(path).write_text(json.dumps({"task": "LaMP_2", "golds": golds}))
