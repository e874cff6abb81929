"""A run's money, from the command line: an estimate, a stop by hand, a stop by the budget, the end; and its key.

One configuration goes through all of it. The oracle is the scripted server's log of its requests.
"""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.tests.pilot.conftest import Generator, command, environment
from matryoshka.tests.pilot.test_pilot import Runs, lines, small

KEY = "sk-planted-4f9a7c21d8e6b350"
PER_ANSWER = 12  # 7 + 5 tokens, says the scripted server
USD = (7 * 0.01 + 5 * 20) / 1e6


@pytest.fixture
def runs(tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("PLANTED_KEY", KEY)
    return Runs(tmp_path, generator)


@pytest.mark.slow
def test_a_run_is_estimated_stopped_budgeted_and_finished(
    runs: Runs, controller_dir: Path, generator: Generator
) -> None:
    """Oracle: episodes and costs counted by hand, and the scripted server's log."""
    config = small("thrift", controller_dir, generator.url("thrift"))
    prices = runs.root / "prices.toml"
    prices.write_text("scripted = { input = 0.01, output = 20 }\n")
    config = replace(config, generator=replace(config.generator, api_key_env="PLANTED_KEY", prices=str(prices)))

    # The cost is that of 4 x 4 sampled episodes; 2 validation problems for one rate and for the start; 6 held-out
    # problems under no, wrong and gold guidance, untrained, warm-up, round 1 and STaR. Each call has 12 tokens.
    ended = subprocess.run(
        command("estimate", "--config", str(runs.write(config))),
        cwd=runs.root, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    none = {"warm-up": 0, "re-plan, at most": 0, "bootstrap, at most": 0}
    assert found["episodes"] == {**none, "collect": 16, "choose": 4, "evaluate": 42}
    assert found["sampled"] == 4 and found["tokens"] == pytest.approx(found["calls"] * PER_ANSWER)
    assert found["usd"] == pytest.approx(found["calls"] * USD)
    estimated = len(set(generator.asked("thrift")))
    assert 1 <= estimated == runs.num_kept(config) and not (runs.folder(config) / "config.toml").exists()

    # Ctrl-C: what is in flight ends, so nothing that was sent is lost.
    folder = runs.folder(config)
    assert runs.stop_when(config, lines(folder / "trajectories.jsonl", 2), signal.SIGINT) == 143
    assert runs.num_lost == 0 and "the same command continues" in (runs.root / "thrift.err").read_text()
    kept = runs.num_kept(config)

    # A budget for about five more answers: the run stops before the line. At most 16 tokens are written to an answer.
    budget = (kept + 5) * USD + 16 * 20 / 1e6
    process = runs.start(replace(config, budget_usd=budget))
    process.communicate(timeout=300)
    assert process.returncode == 3
    text = (runs.root / "thrift.err").read_text()
    assert f"could cross the budget of {budget:g} USD" in text and "run the same command to go on" in text
    assert kept < runs.num_kept(config) and runs.num_kept(config) * USD <= budget
    assert len(set(generator.asked("thrift"))) == runs.num_kept(config)

    # Without one it goes on to its end, and nothing was ever asked twice.
    runs.finish(config)
    runs.assert_nothing_asked_twice(config)
    spent = json.loads((folder / "report.json").read_text())["counts"]["generator"]
    assert spent["answers"] == runs.num_kept(config) == len(generator.asked("thrift"))
    assert spent["usd_at_most"] == pytest.approx(spent["answers"] * USD)

    # The key was sent, was told back by the server, and is nowhere.
    assert "PLANTED_KEY" in (folder / "config.toml").read_text()
    leaks = [path for path in runs.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert leaks == [] and KEY not in ended.stdout + ended.stderr
