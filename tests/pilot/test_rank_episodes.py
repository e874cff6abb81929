"""Episodes over ranks: shares, journals, budget and limits, with torchrun on gloo against one process.

The oracle is nearly always the same run in one process, and the scripted server's log of its requests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from matryoshka.core.distributed import ALONE
from matryoshka.core.files import Journal, SharedJournal, read_jsonl
from matryoshka.inference.generator_config import EndpointConfig, GeneratorConfig
from matryoshka.inference.vllm_server import free_port
from matryoshka.lora.files import WEIGHTS
from matryoshka.pilot import stages
from matryoshka.pilot.config import RunConfig, WarmupConfig
from matryoshka.pilot.ranks import Ranks, deal
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import Generator, environment
from matryoshka.tests.pilot.test_pilot import Runs, num_lines, small
from matryoshka.tests.processes import alive, children

PATIENCE_S = 1500.0  # a launch takes seconds, on a busy machine minutes
USD = (7 * 0.01 + 5 * 20) / 1e6  # of an answer of the scripted server


class RankRuns(Runs):
    """Runs that torchrun starts, each launcher in a session of its own; `end` leaves none behind."""

    def __init__(self, root: Path, generator: Generator) -> None:
        super().__init__(root, generator)
        self.started: list[subprocess.Popen[str]] = []

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its ranks
                process.communicate(timeout=PATIENCE_S)

    def torchrun(self, ranks: int, command: str, config: RunConfig, *place: str) -> "subprocess.Popen[str]":
        launcher = [sys.executable, "-m", "torch.distributed.run", *(place or ["--standalone"])]
        process = subprocess.Popen(
            [*launcher, "--nproc-per-node", str(ranks), "-m", "matryoshka.scripts.cli", command]
            + ["--config", str(self.write(config))],
            cwd=self.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def on_two_machines(self, ranks: int, command: str, config: RunConfig) -> list[tuple[int, str, str]]:
        """Start two launchers, as two machines would, and return the status, output and errors of each."""
        place = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank")
        processes = [self.torchrun(ranks, command, config, *place, str(node)) for node in range(2)]
        ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
        return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]

    def finish_on(self, ranks: int, command: str, config: RunConfig) -> list[Any]:
        output, errors = (process := self.torchrun(ranks, command, config)).communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors[-4000:]
        return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def runs(tmp_path: Path, generator: Generator) -> Iterator[RankRuns]:
    runs = RankRuns(tmp_path, generator)
    yield runs
    runs.end()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all journals, sorted by key."""
    found = [row for path in folder.glob("trajectories*.jsonl") if num_lines(path) for row in read_jsonl(path)]
    return sorted(found, key=lambda row: str(row["key"]))


def test_examples_are_dealt_whole_and_in_turn() -> None:
    """Oracle: by hand: a, b and c take turns in the order they come; every item is dealt once."""
    assert deal([1, 2, 3, 4, 5], ["a", "a", "b", "c", "a"], 2) == [[1, 2, 4, 5], [3]]
    assert deal([1, 2, 3], ["a", "b", "c"], 4) == [[1], [2], [3], []]
    assert deal([], [], 2) == [[], []]


def test_a_journal_knows_what_the_others_recorded(tmp_path: Path) -> None:
    """Oracle: the rows written; a line that is being written is taken when it is whole, an own one is cut off."""
    first, second = (SharedJournal(tmp_path / f"j.rank-{rank}.jsonl", "j*.jsonl") for rank in range(2))
    first.append("a", {"n": 1})
    (tmp_path / "j.jsonl").write_bytes(b'{"key": "c", "n": 3}\n{"key": "d"')
    assert set(second.rows) == set()
    second.refresh()
    assert {key: row["n"] for key, row in second.rows.items()} == {"a": 1, "c": 3}
    with pytest.raises(ValueError, match="key a is recorded already"):
        second.append("a", {"n": 2})
    with (tmp_path / "j.jsonl").open("ab") as handle:
        handle.write(b', "n": 4}\nno row\n')
    with pytest.raises(ValueError, match=r"j\.jsonl:3: not a journal row"):
        second.refresh()
    assert set(Journal(tmp_path / "j.rank-0.jsonl").rows) == {"a"}
    first.close()
    second.close()


def test_limits_are_shared_by_processes() -> None:
    """Oracle: sums by hand; 0 stays without limit; a number smaller than that of processes is refused."""
    config = GeneratorConfig("http://h/v1", "m", "", concurrency=7, requests_per_minute=100)
    config = replace(config, endpoints=(EndpointConfig(tokens_per_minute=11),))
    parts = [config.part(index, 3) for index in range(3)]
    assert [part.concurrency for part in parts] == [3, 2, 2]
    assert [part.requests_per_minute for part in parts] == [34, 33, 33]
    assert [part.endpoints[0].tokens_per_minute for part in parts] == [4, 4, 3]
    assert {part.tokens_per_minute for part in parts} == {0} and len({part.where for part in parts}) == 1
    assert config.part(0, 1) == config
    with pytest.raises(ValueError, match="concurrency 7 cannot be shared by 8 processes"):
        config.part(0, 8)


def test_alone_every_collective_is_the_identity() -> None:
    """Oracle: by definition; and a user's error passes through."""
    ranks = Ranks()
    assert ranks.sums([1, 2]) == [1, 2] and ranks.texts("\u00e9") == ["\u00e9"] and ranks.texts("") == [""]
    ranks.agree("x", "words")
    with pytest.raises(ValueError, match="mine"), ranks.all_or_none():
        raise ValueError("mine")


@pytest.mark.slow
def test_no_world_size_repeats_anything(runs: RankRuns, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the same run in one process. Budgets stop it on two machines of two ranks, each with a cache of its own,
    and then in one process; two ranks go on to the end.

    Sampling is deterministic and nothing is trained, so the journals' rows are the same, bit for bit.
    """
    prices = (tmp_path := runs.root) / "prices.toml"
    prices.write_text("scripted = { input = 0.01, output = 20 }\n")

    def config(name: str) -> RunConfig:
        config = small(name, controller_dir, generator.url(name))
        client = replace(config.generator, prices=str(prices))
        return replace(config, generator=client, warmup=WarmupConfig("none"))

    one, many = config("one"), config("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for stage in ("collect", "evaluate"):
            assert cli.main([stage, "--config", str(runs.write(one))]) == 0
    ours, theirs = runs.folder(many), runs.folder(one)
    budget = 8 * USD + 17 * 20 / 1e6  # eight answers and what one request may cost at most
    ends = runs.on_two_machines(2, "collect", replace(many, budget_usd=budget))
    assert all(status for status, *_ in ends), ends
    assert any("could cross the budget of" in errors for _, _, errors in ends), ends
    first = len(generator.asked("many"))
    assert 0 < first == len(set(generator.asked("many"))) and first * USD <= budget
    assert (ours / "cache.node-1.sqlite").exists() and 0 < runs.num_kept(many) < first
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        path = runs.write(replace(many, budget_usd=budget + 3 * USD))
        assert cli.main(["collect", "--config", str(path)]) == cli.STOPPED
    assert first < runs.num_kept(many) < len(set(generator.asked("one")))
    assert runs.num_kept(many) * USD <= budget + 3 * USD and runs.num_kept(many) == len(generator.asked("many"))
    assert not (ours / "cache.node-1.sqlite").exists()
    assert runs.finish_on(2, "collect", many) == [{"episodes": 16}]
    summary = runs.finish_on(2, "evaluate", many)[-1]

    assert rows(ours) == rows(theirs) and len({row["key"] for row in rows(ours)}) == len(rows(ours))
    assert {path.name for path in ours.glob("trajectories*")} == {
        "trajectories.jsonl",
        *(f"trajectories.rank-{rank}.jsonl" for rank in range(4)),
    }
    assert all(num_lines(ours / f"trajectories.rank-{rank}.jsonl") > 4 for rank in range(2))
    asked = generator.asked("many")
    assert len(asked) == len(set(asked)) and set(asked) == set(generator.asked("one"))
    expected = json.loads((theirs / "summary.json").read_text())
    changing = {"seconds": 0, "report": ""}
    assert {**summary, **changing} == {**expected, **changing}
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ours, theirs)]
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    assert reports[0]["counts"]["metrics"] == reports[1]["counts"]["metrics"]

    # What has to be mended is told by one rank; the other ends with it.
    process = runs.torchrun(2, "collect", replace(many, seed=1))
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0 and errors.count("error: ") == 1  # torchrun's report has the text once more
    assert "error: runs/many: was started with another configuration: seed: 0 ->" in errors

    # One process reads it all back, asks nothing and makes the same pairs.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for folder in (ours, theirs):
            assert cli.main(["pairs", "--in", str(folder), "--out", str(folder / "preferences.jsonl")]) == 0
    assert (ours / "preferences.jsonl").read_bytes() == (theirs / "preferences.jsonl").read_bytes()
    assert generator.asked("many") == asked


def test_an_adapter_is_taken_for_the_warm_up_when_every_rank_has_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the order of events. A rank that came late would find the folder and leave out the second barrier."""
    events: list[str] = []
    config = replace(small("taken", Path("m"), "http://x/v1"), warmup=WarmupConfig("none"))
    config = replace(config, controller=replace(config.controller, adapter="a"), warmup=WarmupConfig("adapter"))
    policies = SimpleNamespace(folder=lambda stage: tmp_path / stage)
    barrier = SimpleNamespace(barrier=lambda: events.append("barrier"))
    run: Any = SimpleNamespace(config=config, policies=policies, ranks=barrier, world=ALONE)
    monkeypatch.setattr(stages, "copy_folder", lambda source, target: events.append(f"{source} to {target.name}"))
    assert stages.warm_up(run) == "warmup" and events == ["barrier", "a to warmup", "barrier"]


@pytest.mark.slow
def test_a_pilot_on_two_ranks_outlives_one_of_them(runs: RankRuns, controller_dir: Path, generator: Generator) -> None:
    """Oracle: the pilot of one process. SIGKILL to one rank in collection ends all; the same command goes on.

    Ranks add gradients in another order, so adapters differ in the last bits, their hashes and keys altogether.
    """
    one, two = (small(name, controller_dir, generator.url(name)) for name in ("alone", "pair"))
    summary = runs.finish(one)
    folder, expected = runs.folder(two), runs.folder(one)
    process = runs.torchrun(2, "pilot", two)
    deadline = time.monotonic() + PATIENCE_S
    while sum(num_lines(path) for path in folder.glob("trajectories*")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.01)
    ranks = children(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0 and not any(map(alive, ranks))
    assert 3 <= len(rows(folder)) < 16 and not (folder / "preferences.jsonl").exists()
    found = runs.finish_on(2, "pilot", two)[-1]

    keys = [row["key"] for row in rows(folder)]
    assert len(set(keys)) == len(keys) == len(rows(expected))
    lost = len(generator.asked("pair")) - len(set(generator.asked("pair")))
    assert lost <= 2  # what the killed rank, and the one that was ended with it, had in flight
    for stage in ("warmup", "round-1", "star"):
        a, b = (load_file(path / stage / "adapter" / WEIGHTS) for path in (folder, expected))
        assert a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-4 for key in b)
    pairs = [read_jsonl(path / "preferences.jsonl") for path in (folder, expected)]
    assert [_ids(pair) for pair in pairs[0]] == [_ids(pair) for pair in pairs[1]]
    reports = [json.loads((path / "report.json").read_text()) for path in (folder, expected)]
    assert reports[0]["verdicts"] == reports[1]["verdicts"]
    changing = {"seconds": 0, "report": ""}
    assert {**found, **changing} == {**summary, **changing}


def _ids(pair: dict[str, Any]) -> Sequence[Any]:
    return [pair["example_id"], *(pair[side]["token_ids"] for side in ("chosen", "rejected"))]
