"""`matryoshka bench rollout` in miniature: its counts equal the server's own."""

import asyncio
import json
from pathlib import Path

import pytest

from matryoshka.benchmarks import rollout
from matryoshka.benchmarks.loopback import Loopback, running, stats
from matryoshka.benchmarks.rollout import Config, run
from matryoshka.scripts.cli import main


def test_episodes_overlap_and_survive_faults() -> None:
    """Oracle: 3 waves of 24 take 3 latencies if they overlap, 72 if not; the server's counts of faults and repeats."""
    config = Config(
        concurrency=24, latency_s=0.5, waves=3, fault_waves=3, error_share=0.1, hang_share=0.05, burst_every=60,
        burst=5, hang_timeout_s=2.0, clients=("ours",), rate_requests=64, rate_concurrency=8,
    )  # fmt: skip
    result = run(config)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "episodes a second",
        "peak memory of the process",
        "episodes a second with faults",
        "client openai over aiohttp (ours)",
    ]
    clean, faulty = rows["episodes a second"].details, rows["episodes a second with faults"].details
    assert clean["right"] == clean["episodes"] == clean["server: requests"] == 72
    assert clean["ideal"] == 48 and 0.3 < (result.ratio or 0) <= 1.0
    assert faulty["holds"] and faulty["right"] == 72 and faulty["asked again"] == faulty["asked on resume"] == 0
    troubles = [faulty.get(f"server: {name}", 0) for name in ("errors", "hangs", "429")]
    assert all(troubles) and faulty["retries"] == sum(troubles) == faulty["server: requests"] - 72
    assert rows["client openai over aiohttp (ours)"].value
    assert json.loads(result.to_json())["target"] == 0.95


def test_a_repeated_request_is_noticed() -> None:
    """Oracle: the same request sent twice to a server that answers it: one was asked again."""
    with running(Loopback()) as url:
        config = Config(rate_requests=2, rate_concurrency=1)

        async def ask() -> None:
            async with rollout._client("aiohttp", url, {"messages": [{"content": "What is 2 + 3?"}]}) as once:
                for _ in range(config.rate_requests):
                    await once()

        asyncio.run(ask())
        assert stats(url) == {"requests": 2, "asked again": 1, "answers": 2}


def test_unknown_clients_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the message names the client; the list of benchmarks has this one."""
    with pytest.raises(ValueError, match="client 'curl' is unknown; choose from ours"):
        Config(clients=("curl",))
    assert main(["bench"]) == 0
    assert "rollout" in capsys.readouterr().out
