"""matryoshka bench sandbox: a tiny run of every way, and of the soak."""

import json
from pathlib import Path

import pytest

from matryoshka.benchmarks.sandbox import Config
from matryoshka.scripts import cli
from matryoshka.tasks.sandbox_backends import SCRIPT, LocalSandbox


@pytest.mark.slow
def test_every_way_has_a_rate_a_start_and_a_cost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Oracle: the rows' names and signs, and that ten programs leave no descriptor and no process behind."""
    sandbox = LocalSandbox("auto")
    holds = sandbox.start(SCRIPT)
    sandbox.close()
    if not (holds["landlock"] and holds["seccomp"]):
        pytest.skip(f"no boundary here: {holds['problems']}")
    flags = ["--runs", "5", "--repeats", "1", "--soak", "10", "--samples", "5", "--plot", str(tmp_path / "soak.png")]
    assert cli.main(["bench", "sandbox", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row["value"] for row in result["rows"]}
    for way in ("bounded", "bounded, no namespaces", "limits alone", "fresh interpreter"):
        assert rows[way] > 0 and rows[f"{way}, start p99"] > 0 and rows[f"{way}, CPU"] >= 0
    # Below 0 where a descriptor of an earlier test is collected in between.
    assert max(rows["soak, growth of descriptors"], rows["soak, growth of processes"]) <= 0
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_what_makes_no_sense_is_refused() -> None:
    """Oracle: the message names the field."""
    with pytest.raises(ValueError, match="runs, repeats and samples must be at least 1"):
        Config(runs=0)
    with pytest.raises(ValueError, match="--plot shows the soak; give --soak"):
        Config(plot="x.png")
