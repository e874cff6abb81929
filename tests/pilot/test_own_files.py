"""A task, a control scheme and a generator of the user's own: one new file each, and the whole pilot runs on them."""

import ast
import inspect
import json
import pickle
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from matryoshka.core.config import diff, load_toml, to_toml
from matryoshka.core.files import read_jsonl
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.generator import scripted_generator
from matryoshka.scripts.cli import main, read_config
from matryoshka.tasks.find import check_named, options_class, task_class, task_names

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIG = """
name = "own"
rounds = 1
star = false
[controller]
path = "{path}"
threads = 1
[generator]
base_url = "http://127.0.0.1:1/v1"
model = "none"
api_key_env = ""
[serve]
scripted = "parrot.py:Parrot"
[task]
name = "{task}"
warmup = 4
train = 4
validation = 2
test = 4
[task.options]
{options}
[warmup.train]
epochs = 1
[rollout]
samples = 3
guidance_tokens = 8
[dpo.train]
epochs = 1
"""
PARROT = '''
from matryoshka.core.records import Sample, Usage
class Parrot:
    """Answers with the last word of the hint, or "none" without one."""
    name = "parrot-1"
    async def complete(self, prompt, sampling):
        hint = prompt[-1].content.partition("Hint: ")[2].partition("\\nAnswer in")[0].split()
        return Sample(hint[-1] if hint else "none", usage=Usage(5, 1))
'''
# The whole of a task in a file: one guess, right or wrong.
GUESS = """
from dataclasses import dataclass
from matryoshka.core.protocols import Task
from matryoshka.core.records import Example, Message
from matryoshka.tasks.episode import Episode

@dataclass(frozen=True)
class GuessOptions:
    letters: str = "ab"
    '''Letters that may be right.'''

class Guess(Task):
    options: GuessOptions
    label = "guessing"

    def examples(self, split):
        letters = self.options.letters
        rows = [Example(str(i), {"question": f"Problem {i}?", "answer": letters[i % len(letters)]}) for i in range(99)]
        return self.setting.part(rows, split)

    def first_prompt(self, example):
        return (Message("user", example.fields["question"]),)

    def gold_guidance(self, example):
        return f"Say {example.fields['answer']}"

    async def rollout(self, example, controller, generator, settings):
        episode, said = Episode(self.name, example, controller, generator, settings), ""
        with episode:
            hint = await episode.propose(self.first_prompt(example))
            said = (await episode.complete((Message("user", f"Hint: {hint.text}\\nAnswer in one word"),))).text
        right = said == example.fields["answer"]
        return episode.trajectory(float(right), "right" if right else "wrong", said)
"""
LOUDER = """
from dataclasses import replace
class Louder:
    def __init__(self, policy):
        self.policy, self.name = policy, f"louder-{policy.name}"
    async def propose(self, prompt, n, sampling):
        return [replace(sample, text=sample.text + "!") for sample in await self.policy.propose(prompt, n, sampling)]
    def prompt_ids(self, prompt):
        return self.policy.prompt_ids(prompt)
    def count_tokens(self, prompt):
        return self.policy.count_tokens(prompt)
"""
Pilot = Callable[..., dict[str, Any]]


@pytest.fixture
def pilot(
    controller_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pilot:
    """Runs `matryoshka pilot` in a folder of its own, where the user's files lie, and returns its last line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parrot.py").write_text(PARROT)

    def run(task: str, options: str, *flags: str) -> dict[str, Any]:
        (tmp_path / "run.toml").write_text(CONFIG.format(path=controller_dir, task=task, options=options))
        assert main(["pilot", "--config", "run.toml", *flags]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return run


def infos(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "runs" / "own" / "trajectories.jsonl")
    return [row["trajectory"]["info"] for row in rows]


def test_the_examples_run_end_to_end(pilot: Pilot, tmp_path: Path) -> None:
    """Oracle: the parrot: every gold hint ends with its answer, without a hint nothing is right. Every policy speaks
    through the scheme, and fixed guidance does not. The README's promise of a task in under 60 lines.
    """
    rows = [{"question": f"What is thing {i}?", "answer": f"t{i}", "hint": f"It is t{i}"} for i in range(14)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, scheme = (f"{EXAMPLES / name}" for name in ("own_task.py:ShortAnswers", "own_scheme.py:ShortestOfThree"))
    last = pilot(task, 'data = "qa.jsonl"', "--controller.scheme", scheme)
    assert (last["task"], last["examples"], last["gold_guidance"], last["no_guidance"]) == ("ShortAnswers", 4, 1.0, 0.0)
    assert {"untrained", "warmup", "round_1"} <= last.keys()
    names = {info["controller"] for info in infos(tmp_path)}
    policies = {name for name in names if "tiny" in name}
    assert len(policies) >= 2 and all(name.startswith("shortest-of-three-tiny") for name in policies)
    assert {info["generator"] for info in infos(tmp_path)} == {"parrot-1"}
    assert len((EXAMPLES / "own_task.py").read_text().splitlines()) < 60


def test_the_example_s_configuration_is_whole(
    controller_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `matryoshka check`, with as many rows as the file says and with one less; nothing but the model and the
    place of the task is given by flag.
    """
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is thing {i}?", "answer": f"t{i}", "hint": f"It is t{i}"} for i in range(280)]
    flags = ["--controller.path", str(controller_dir), "--task.name", f"{EXAMPLES / 'own_task.py'}:ShortAnswers"]
    for found in (rows, rows[1:]):
        (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        assert main(["check", "--config", str(EXAMPLES / "own_task.toml"), *flags]) == (0 if found == rows else 2)
    assert "take 280 problems (warmup 40, train 100, validation 40, test 100), but there are 279" in (
        capsys.readouterr().err
    )


def test_new_files_alone_add_a_task_and_a_scheme(pilot: Pilot, tmp_path: Path) -> None:
    """Oracle: two files in a temporary folder, which nothing of the package knows; an option of the task's own by flag.
    """
    (tmp_path / "guess.py").write_text(GUESS)
    (tmp_path / "louder.py").write_text(LOUDER)
    flags = ("--controller.scheme", "louder.py:Louder", "--task.options.letters", "xyz")
    last = pilot("guess.py:Guess", "", *flags)
    assert (last["task"], last["gold_guidance"], last["untrained"]) == ("guessing", 1.0, 0.0)
    assert any(info["controller"].startswith("louder-tiny+") for info in infos(tmp_path))
    saved = load_toml(RunConfig, tmp_path / "runs" / "own" / "config.toml")
    assert getattr(saved.task.options, "letters") == "xyz"  # noqa: B009


def test_the_options_of_the_chosen_task_are_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: flags and file name the task; its own options alone are known, the nearest one is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guess.py").write_text(GUESS)
    needed = ["--name", "n", "--controller.path", "m", "--generator.base-url", "http://x/v1", "--generator.model", "m"]
    for named in (["--task.name", "lamp"], ["--task.name=lamp"]):
        config = read_config(RunConfig, [*needed, *named, "--task.options.task", "3"], "matryoshka pilot")
        assert (config.task.name, config.task.options.task, type(config).__name__) == ("lamp", "3", "RunConfig")
    own = read_config(RunConfig, [*needed, "--task.name", "guess.py:Guess", "--task.options.letters", "q"], "p")
    assert own.task.options.letters == "q"
    (tmp_path / "run.toml").write_text(to_toml(own))
    assert load_toml(RunConfig, tmp_path / "run.toml") == own
    pickled = pickle.dumps(own)
    monkeypatch.chdir("/")  # as another process may: it has the same options from the file
    assert diff(own, pickle.loads(pickled)) == [f'task.name: "guess.py:Guess" -> "{tmp_path}/guess.py:Guess"']
    monkeypatch.chdir(tmp_path)
    again = read_config(RunConfig, ["--config", "run.toml", "--task.options.letters", "r"], "p")
    assert diff(own, again) == ['task.options.letters: "q" -> "r"']
    with pytest.raises(ValueError, match=r"run\.toml: task\.options\.letters: unknown key; known here: prompts, "):
        read_config(RunConfig, ["--config", "run.toml", "--task.name", "pal"], "p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.options.lettres": "a"}, r"override: task\.options\.lettres: unknown key; did you mean 'letters'\?"),
        ({"task.options.letters": 3}, r"override: task\.options\.letters: expected a string, got int \(3\)"),
        ({"task.name": "words"}, "the task 'words' is unknown; expected one of alfworld, lamp, pal, FILE.py:CLASS or"),
        ({"task.name": "absent.py:Guess"}, "absent.py: no such file in /.*, where the command runs; expected a Python"),
        ({"task.name": "guess.py:Gues"}, r"'guess.py:Gues': guess.py has no class 'Gues'; did you mean 'Guess'\?"),
        ({"task.name": "no.such.module:Guess"}, "'no.such.module:Guess': no.such.module cannot .* in PYTHONPATH"),
        ({"task.name": "guess.py:GuessOptions"}, "does not extend matryoshka.core.protocols.Task"),
        ({"task.name": "guess.py:"}, "'guess.py:': guess.py has no class ''; choose from GuessOptions, Guess$"),
        ({"task.name": ":Guess"}, "':Guess': '' is no module; expected FILE.py:CLASS or PACKAGE.MODULE:CLASS"),
        ({"task.name": ".guess:Guess"}, "'.guess:Guess': '.guess' is no module; expected FILE.py:CLASS"),
        ({"task.name": "my guess:Guess"}, "'my guess:Guess': 'my guess' is no module"),
        ({"task.name": "bare.py:Bare"}, "'bare.py:Bare' has no method 'examples'; docs/own_task.md says what"),
        ({"task.name": "plain.py:Guess"}, "'plain.py:Guess': `rollout` is no coroutine; begin it with `async def`"),
        ({"task.name": "lost.py:Guess"}, "task Guess: its annotations cannot be read: name 'LostOptions'"),
        ({"task.name": "torn.py:Guess"}, r"the task 'torn.py:Guess': /.*/torn.py, line \d+: '\(' was never closed"),
        ({"task.name": "free.py:Guess", "task.options.letters": "a"}, "'free.py:Guess' has no options; a task of"),
        ({"controller.scheme": "guess.py:Loud"}, "scheme 'guess.py:Loud': guess.py has no class 'Loud'"),
        ({"controller.scheme": "guess.py:Guess"}, "scheme 'guess.py:Guess': it has no 'propose'; expected propose, "),
        ({"controller.scheme": "parrot.py:Parrot"}, "scheme 'parrot.py:Parrot': it has no 'propose'"),
        ({"controller.scheme": "two.py:Louder"}, "it is made with 1 arguments, and that fails"),
        ({"serve.scripted": "guess.py:Guess"}, "scripted 'guess.py:Guess': it has no 'complete'"),
        ({"rollout.samples": 0}, "rollout: samples 0 must be at least 1"),
        ({"rollout.guidance_tokens": 0}, "guidance_tokens 0 must be at least 1"),
        ({"evaluate.inner_attempts": 0}, "evaluate: inner_attempts 0 must be at least 1"),
        ({"budget_usd": -1.0}, "budget_usd -1.0 must not be negative"),
        ({"name": "../own"}, "name '../own' must name a folder below runs/"),
        ({"name": ""}, "name '' must name a folder below runs/"),
        ({"warmup.source": "file"}, "source = 'file', but data names no file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: each message by hand."""
    monkeypatch.chdir(tmp_path)
    two = LOUDER.replace("self, policy)", "self, policy, volume)")
    bare = "from matryoshka.core.protocols import Task\nclass Bare(Task): pass\n"
    plain = GUESS.replace("async def rollout", "def rollout").replace("await ", "")
    lost = GUESS.replace("options: GuessOptions", "options: 'LostOptions'")
    torn, free = GUESS + "\nprint(\n", GUESS.replace("    options: GuessOptions\n", "")
    files = {"guess": GUESS, "parrot": PARROT, "two": two, "bare": bare, "plain": plain, "lost": lost}
    files |= {"torn": torn, "free": free}
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "run.toml").write_text(CONFIG.format(path="m", task="guess.py:Guess", options=""))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_toml(RunConfig, tmp_path / "run.toml", changes)


BROKEN: dict[str, tuple[str, str, str]] = {
    "a class that takes no options": (
        "    label = 'guessing'", "    def __init__(self): pass", "options, setting\\)` and takes two"
    ),
    "a class that forgets its options": (
        "    label = 'guessing'", "    def __init__(self, options, setting): pass", "calls super\\(\\).__init__"
    ),
    "a question that is a number": ('f"Problem {i}?"', "i", "`first_prompt` returned .*expected a tuple of Message"),
    "a field that is a set": ('"question":', '"seen": {1}, "question":', "fields of example '0' cannot be JSON: .*set"),
    "guidance that is a number": ('return f"Say {example', "return 3 or f\"{example", "`gold_guidance` returned 3"),
    "a prompt that is a text": ('(Message("user", f"Hint', '(("user", f"Hint', "the prompt given to `complete` is"),
    "no trajectory": ("return episode.trajectory", "episode.trajectory", "rollout returned None"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_check_finds_what_is_wrong_with_a_task(
    old: str, new: str, message: str, controller_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: each message by hand, in place of a traceback from within the package."""
    monkeypatch.chdir(tmp_path)
    source = GUESS.replace('"guessing"', "'guessing'")
    assert old in source
    (tmp_path / "guess.py").write_text(source.replace(old, new))
    (tmp_path / "parrot.py").write_text(PARROT)
    (tmp_path / "run.toml").write_text(CONFIG.format(path=controller_dir, task="guess.py:Guess", options=""))
    assert main(["check", "--config", "run.toml"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_controllers_and_generators_need_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message names the setting and the attribute. A module beside a file is found, as by a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside.py").write_text("NAME = 'parrot-2'\n")
    for name, changed in (("mute", ""), ("named", "    from beside import NAME as name\n")):
        (tmp_path / f"{name}.py").write_text(PARROT.replace('    name = "parrot-1"\n', changed))
    (tmp_path / "run.toml").write_text(CONFIG.format(path="m", task="pal", options=""))
    config = load_toml(RunConfig, tmp_path / "run.toml", {"serve.scripted": "named.py:Parrot"})
    assert scripted_generator(config).name == "parrot-2"
    config = load_toml(RunConfig, tmp_path / "run.toml", {"serve.scripted": "mute.py:Parrot"})
    with pytest.raises(ValueError, match=r"scripted 'mute.py:Parrot': it has no attribute `name`; expected a text"):
        scripted_generator(config)
    with pytest.raises(ValueError, match="scheme 'x': its attribute `name` is ''; expected a text"):
        check_named(SimpleNamespace(name=""), "scheme 'x'")


@pytest.mark.parametrize("name", task_names())
def test_every_option_of_every_task_has_its_help(name: str) -> None:
    """Oracle: the source, from which tyro takes a flag's help: a sentence under each field of the options."""
    (tree,) = ast.parse(inspect.getsource(options_class(task_class(name)))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(below, ast.Expr) and len(str(ast.literal_eval(below.value)).split()) > 2, field.target
    assert any(isinstance(node, ast.AnnAssign) for node in tree.body)
