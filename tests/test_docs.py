"""README and docs: every command is understood by its parser, and every block runs or says why it cannot.

A comment stands before each block of commands or Python: `<!-- run: KIND -->`, KIND naming the files that it finds, or
`<!-- not run: REASON -->`. Blocks run in an empty folder, with a tiny random model in the place of the real one.
"""

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from matryoshka.scripts import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
DIRECTIVE = re.compile(r"<!-- (run|not run): (.+?) -->")
COMMAND = re.compile(r"^(?:torchrun .*?-m matryoshka\.scripts\.cli|matryoshka) (?P<rest>.*)$")
PAIRS = [{"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea."} for n in range(4)]
CHATS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


OWN_TASK = """
name = "own"
rounds = 1
star = false
[controller]
path = "models/smollm2-135m-instruct"
[generator]
base_url = "http://127.0.0.1:1/v1"
model = "none"
api_key_env = ""
[serve]
scripted = "parrot.py:Parrot"
[task]
name = "examples/own_task.py:ShortAnswers"
warmup = 2
train = 2
validation = 2
test = 2
[warmup.train]
epochs = 1
[rollout]
samples = 2
guidance_tokens = 8
"""
PARROT = """
from matryoshka.core.records import Sample, Usage
class Parrot:
    name = "parrot-1"
    async def complete(self, prompt, sampling):
        return Sample(prompt[-1].content.split()[-1], usage=Usage(5, 1))
"""
QUESTIONS = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "hint": f"Say {n + 1}."} for n in range(8)]


@dataclass(frozen=True)
class Block:
    """A fenced block. directive: "run" or "not run", "" where none stands before it; detail: its kind or reason."""

    where: str
    language: str
    text: str
    directive: str
    detail: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, with the comment that stands directly before each."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, language = None, ""
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened, language = number, line.removeprefix("```").strip()
            continue
        found = DIRECTIVE.fullmatch(lines[opened - 1].strip()) if opened else None
        text = "\n".join(lines[opened + 1 : number])
        where = f"{page.relative_to(ROOT)}:{opened + 1}"
        yield Block(where, language, text, found[1] if found else "", found[2] if found else "")
        opened = None
    assert opened is None, f"{page}: a block is not closed"


BLOCKS = [block for page in PAGES for block in blocks(page)]
EXECUTABLE = [block for block in BLOCKS if block.language in ("bash", "python")]


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every `matryoshka` command in a block, comments and line continuations removed."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if match := COMMAND.match(line.strip()):
            found.append(shlex.split(match["rest"], comments=True))
    return found


def test_every_block_says_whether_it_runs() -> None:
    """Oracle: the rule of this module. A reason is a sentence, not a word."""
    silent = [block.where for block in EXECUTABLE if not block.directive]
    short = [b.where for b in EXECUTABLE if b.directive == "not run" and len(b.detail.split()) < 3]
    assert (silent, short) == ([], [])


def test_commands_stand_in_fenced_blocks() -> None:
    """Oracle: the rule of this module; an indented command would escape the other tests."""
    indented = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        if re.match(r" {4,}(matryoshka|torchrun|bash|python|pip) ", line)
    ]
    assert indented == []


def test_the_walks_of_the_architecture_page_exist_and_are_short() -> None:
    """Oracle: the source: each stop's file defines its function; 27 stops are half of the 55 that one walk once had."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    walks = re.findall(r"^## The (?:walk|life) of a (\w+).*?\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in walks] == ["configuration", "preference"]
    for _, walk in walks:
        lines = re.findall(r"^\d+\. .*", walk, re.MULTILINE)
        stops = re.findall(r"^\d+\. `([\w/]+\.py): (\w+)`", walk, re.MULTILINE)
        assert len(lines) == len(stops) <= 27
        for file, name in stops:
            assert re.search(rf"^\s*(?:async )?(?:def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), file


def test_the_troubleshooting_page_quotes_messages_that_exist() -> None:
    """Oracle: the source: every part of a message between "..." stands in it, long texts being joined."""
    folders = ("core", "lora", "dpo", "inference", "tasks", "eval", "pilot", "scripts")
    source = "\n".join(path.read_text(encoding="utf-8") for top in folders for path in (ROOT / top).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall("`(.*?)`", cell)]
    absent = [part for message in messages for part in message.split("...") if part.strip() not in source]
    assert len(messages) > 30 and absent == []


def test_the_map_in_the_readme_has_every_file() -> None:
    """Oracle: the files on disk, no more and no fewer. scripts/ and benchmarks/ have one line each."""
    chart = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The files")[2]
    folder, named = "", set()
    for line in chart.splitlines():
        folder = line.rstrip("/") if re.fullmatch(r"[a-z/]+/", line) else folder
        if found := re.match(r"  (\w+\.py) +", line):
            named.add(f"{folder}/{found[1]}")
    folders = ("core", "lora", "dpo", "inference", "tasks", "eval", "pilot", "examples")
    paths = [path for top in folders for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"]
    assert named - {"scripts/cli.py", "benchmarks/command.py"} == {str(path.relative_to(ROOT)) for path in paths}


def parse_bench(arguments: Sequence[str], read_config: Callable[[Any, Sequence[str], str], Any]) -> None:
    """Read the configuration of a benchmark as `benchmarks.command.bench` does, and run nothing."""
    name, *flags = arguments
    module = importlib.import_module(f"matryoshka.benchmarks.{name}")
    read_config(module.Config, [flag for flag in flags if flag != "--json"], name)


@pytest.mark.parametrize("block", [b for b in BLOCKS if commands(b.text)], ids=lambda block: block.where)
def test_every_command_is_understood(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parser of the command itself, given a configuration that exists. Nothing is executed."""
    load = cli.load_command

    def load_parser(name: str) -> Callable[..., None]:
        """Return a function with the flags of the command that does nothing."""
        return parse_bench if name == "bench" else functools.wraps(load(name))(lambda *_, **__: None)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "load_command", load_parser)
    for arguments in commands(block.text):
        known = [a if not a.endswith(".toml") or Path(a).exists() else "configs/demo.toml" for a in arguments]
        try:
            status = cli.main(known)
        except SystemExit as err:  # a flag that the parser does not know
            status = 0 if err.code in (None, 0) else 2
        assert status == 0, f"{block.where}: matryoshka {' '.join(arguments)}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in EXECUTABLE if b.directive == "run"], ids=lambda block: block.where)
def test_blocks_run(block: Block, tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the exit status."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m-instruct").symlink_to(tiny_dir)
    (tmp_path / "own.toml").write_text(OWN_TASK)
    (tmp_path / "parrot.py").write_text(PARROT)
    for name, rows in (("pairs", PAIRS), ("chats", CHATS), ("qa", QUESTIONS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if block.language == "python":
        script = [sys.executable, "-c", block.text]
    else:
        start = f'matryoshka() {{ "{sys.executable}" -m matryoshka.scripts.cli "$@"; }}\nset -euo pipefail'
        script = ["bash", "-c", f"{start}\n{block.text}"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.where}: {done.stderr[-2000:]}"
