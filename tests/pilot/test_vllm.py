"""The real vLLM, on CPU: its draws, two adapters at once, hot swaps, parity, a pilot, a kill in mid-collection.

One server serves the module, since it takes most of a minute to start. MATRYOSHKA_VLLM is the command that starts it;
by default that of scripts/setup_vllm_cpu.sh. The model is tiny: vLLM is what is tested.
"""

import asyncio
import json
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from matryoshka.core.files import read_jsonl
from matryoshka.core.models.llama import Model, read_config
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.models.weights import save_weights
from matryoshka.core.protocols import ContextError
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.parity import BOUNDS, difference, trainer_logps
from matryoshka.inference.http_client import HttpClient
from matryoshka.inference.sampler import Sampler
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import load_adapter, save_adapter
from matryoshka.lora.linear import LoraConfig, active, add_adapter, layers_with
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.stages import check_parity, collect, is_trained, policy_before, train_round, warm_up, write_pairs
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import small

pytestmark = pytest.mark.slow

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 1024
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
# One core for the engine if there are two, little memory, no compilation: the settings that docs/vllm.md gives.
FLAGS = ("--enforce-eager", "--max-model-len", str(CONTEXT))
ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", "VLLM_CPU_OMP_THREADS_BIND=nobind")


def vllm_command() -> str:
    found = os.environ.get("MATRYOSHKA_VLLM")
    python = Path(os.environ.get("VLLM_ENV") or ROOT / ".venv-vllm") / "bin" / "python"
    if not found and python.exists():
        found = f"{python} -m vllm.entrypoints.openai.api_server"
    if not found or shutil.which(shlex.split(found)[0]) is None:
        pytest.skip("no vLLM here: run scripts/setup_vllm_cpu.sh, or set MATRYOSHKA_VLLM to the command that starts it")
    return found


@pytest.fixture(scope="module")
def model_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with heads of 32, the smallest that vLLM takes, and a context that holds the prompts in bytes.

    The end of turn's embedding is longer, so that a good part of its texts ends by itself within a few tokens.
    """
    folder = tmp_path_factory.mktemp("wide") / "tiny"
    shutil.copytree(tiny_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    model = Model(read_config(config))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draws)
            weight.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.3 * noise)
        model.get_parameter("model.embed_tokens.weight")[config["eos_token_id"]] *= 2
    save_weights(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that move log-probs a lot, and one that moves nothing."""
    folders = []
    for seed in (1, 2, 3):
        model = load_model(model_dir)
        add_adapter(model, "a", LORA, seed)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in layers_with(model, "a"):
                weight = layer.parts("a")["lora_B"]["a"]
                weight.copy_((seed < 3) * torch.randn(weight.shape, generator=draws))
        folders.append(tmp_path_factory.mktemp("adapter") / str(seed))
        save_adapter(model, "a", folders[-1], str(model_dir))
    return folders


class Shared(VllmServer):
    """The module's server: a client that closes does not end it."""

    async def stop(self) -> None:
        if not self.is_running:
            await super().stop()

    async def end(self) -> None:
        await super().stop()


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    config = VllmConfig(vllm_command(), max_loras=3, flags=FLAGS, environment=ENVIRONMENT, start_timeout_s=900.0)
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    server = Shared(config, model_dir, "controller", "float32", LORA.rank, log)

    async def start() -> None:
        client = HttpClient()
        await server.start(client, lambda text: None)
        await client.aclose()

    asyncio.run(start())
    yield server
    asyncio.run(server.end())


def run(vllm: Vllm, work: Coroutine[Any, Any, T]) -> T:
    async def whole() -> T:
        try:
            return await work
        finally:
            await vllm.aclose()

    return asyncio.run(whole())


@pytest.fixture
def vllm(server: Shared, model_dir: Path) -> Vllm:
    return Vllm(server, Tokenizer.load(model_dir), LORA.rank)


def prompt(tokenizer: Tokenizer, text: str = "What is two plus two?") -> tuple[int, ...]:
    return tokenizer.render((Message("user", text),), add_generation_prompt=True).ids


def trained(model_dir: Path, ids: Sequence[int], sample: Sample, adapter: Path | None) -> tuple[float, ...]:
    """Return the sample's log-probs as training computes them."""
    model = load_model(model_dir)
    if adapter is not None:
        load_adapter(model, "a", adapter)
    assert sample.token_ids is not None
    mask = (*(0,) * len(ids), *(1,) * len(sample.token_ids))
    with active(model, None if adapter is None else "a"):
        return trainer_logps(model, Tokens((*ids, *sample.token_ids), mask))


async def listed(server: VllmServer) -> set[str]:
    client = HttpClient()
    reply = await client.request("GET", f"{server.url}/v1/models", {}, None, 30.0)
    await client.aclose()
    return {row["id"] for row in json.loads(reply.text)["data"]}


def test_greedy_and_sampled(vllm: Vllm, model_dir: Path) -> None:
    """Oracles: our sampler's greedy text, ids and log-probs; equal seeds draw equal tokens, other draws others."""
    ids = prompt(vllm.tokenizer)
    greedy = [Sampling(max_tokens=40), Sampling(max_tokens=40, stop=("a", "e"))]
    hot = Sampling(temperature=1.0, top_p=0.9, max_tokens=40, seed=5)

    async def draw() -> list[Sample]:
        draws = [*greedy, hot, hot, replace(hot, draw=1), replace(hot, seed=6)]
        samples = await asyncio.gather(*(vllm.generate(ids, sampling) for sampling in draws))
        with pytest.raises(ContextError):
            await vllm.generate(ids, Sampling(max_tokens=CONTEXT))
        return list(samples)

    *theirs, first, again, other, another = run(vllm, draw())

    async def ours() -> list[Sample]:
        with Sampler(load_model(model_dir), vllm.tokenizer) as sampler:
            return list(await asyncio.gather(*(sampler.generate(ids, sampling) for sampling in greedy)))

    for sample, expected in zip(theirs, asyncio.run(ours()), strict=True):
        assert (sample.text, sample.token_ids, sample.usage) == (expected.text, expected.token_ids, expected.usage)
        assert sample.finish_reason == expected.finish_reason
        assert sample.logprobs == pytest.approx(expected.logprobs, abs=1e-4)  # fp32, other kernels: 2e-5 is usual
    assert first == again
    assert len({first.token_ids, other.token_ids, another.token_ids}) == 3


def test_adapters_at_once(vllm: Vllm, model_dir: Path, adapters: list[Path]) -> None:
    """Oracle: the trainer's log-probs under each adapter; under another one they are far away.

    Sampled ids come with the log-probs that they were drawn with, and prompt_logprobs of the same ids agree.
    """
    ids = prompt(vllm.tokenizer)
    places = [*adapters[:2], None]  # the third is the base model

    async def draw() -> tuple[list[Sample], list[tuple[float, ...]]]:
        names = [vllm.register(folder) for folder in adapters]
        draws = [(name, Sampling(temperature=1.0, max_tokens=30, draw=draw)) for draw in range(3) for name in names]
        samples = list(await asyncio.gather(*(vllm.generate(ids, sampling, name) for name, sampling in draws)))
        scores = [vllm.score(ids, sample.token_ids or (), names[i % 3]) for i, sample in enumerate(samples)]
        return samples, list(await asyncio.gather(*scores))

    samples, scores = run(vllm, draw())
    for i, (sample, scored) in enumerate(zip(samples, scores, strict=True)):
        assert sample.logprobs is not None
        right, wrong = (trained(model_dir, ids, sample, places[j % 3]) for j in (i, i + 1))
        # Adapters as strong as these amplify rounding: our own fp32 and float64 are up to 1.1e-4 apart.
        assert difference(right, sample.logprobs).largest < 1e-3
        assert difference(right, scored).largest < 1e-3
        assert difference(wrong, sample.logprobs).rms > 100 * BOUNDS["float32"]


def test_a_hot_swap(vllm: Vllm, server: Shared, adapters: list[Path]) -> None:
    """Oracle: vLLM's list of its loaded adapters; the old adapter goes once its last request has ended."""
    ids = prompt(vllm.tokenizer)

    async def swap() -> None:
        old = vllm.use(adapters[0])
        sampling = Sampling(temperature=1.0, max_tokens=400)
        long = asyncio.create_task(vllm.generate(ids, sampling, old))
        while old not in await listed(server):
            await asyncio.sleep(0.02)
        new = vllm.use(adapters[1])
        await vllm.generate(ids, Sampling(max_tokens=1), new)
        served = await listed(server)
        assert new in served and (old in served or long.done())
        sample = await long
        assert sample.token_ids is not None
        assert old not in await listed(server)

    run(vllm, swap())


def pilot_config(name: str, model_dir: Path, url: str, server: Shared, rounds: int) -> RunConfig:
    config = small(name, model_dir, url, rounds)
    vllm = VllmConfig(base_url=server.url, context=CONTEXT)
    controller = replace(config.controller, deterministic=False, engine="vllm", vllm=vllm)
    return replace(config, controller=controller, rollout=replace(config.rollout, guidance_tokens=60))


def test_a_pilot_of_two_rounds(
    server: Shared, model_dir: Path, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: the samples' own log-probs against the trainer's under the adapter of each round, all of them.

    Then the wrong adapter is served under the right name: training refuses.
    """
    config = pilot_config("swap", model_dir, generator.url("vllm-swap"), server, rounds=2)
    stages = []
    before = asyncio.run(listed(server))
    with open_run(config, tmp_path) as run:
        warm_up(run)
        trajectories = []
        for round in (1, 2):
            done = collect(run, round)
            trajectories += done
            stage = policy_before(run.config, round)
            stages.append(run.policies.folder(stage))
            for turn in (turn for trajectory in done for turn in trajectory.turns):
                assert turn.prompt_ids is not None and turn.action.logprobs is not None
                expected = trained(model_dir, turn.prompt_ids, turn.action, stages[-1])
                assert difference(expected, turn.action.logprobs).largest < 5e-4
            train_round(run, round, write_pairs(run, trajectories)[0], trajectories)
        # The base model, beside loaded adapters.
        for trajectory in run_episodes(run, policy_scheme(run, ""), ["validation"]):
            (turn,) = trajectory.turns
            assert turn.prompt_ids is not None and turn.action.logprobs is not None
            expected = trained(model_dir, turn.prompt_ids, turn.action, None)
            assert difference(expected, turn.action.logprobs).largest < 5e-4
        assert is_trained(run, "round-2") and run.vllm is not None and run.vllm.num_restarts == 0
        other, use = stages[0], run.vllm.use
        monkeypatch.setattr(run.vllm, "use", lambda folder: use(other))
        wrong = run_episodes(run, policy_scheme(run, "round-2"), ["test"])  # not recorded yet
        with pytest.raises(ValueError, match=r"parity: .* example .* the trainer computes .*another adapter"):
            check_parity(run, wrong, "round-2")
    assert asyncio.run(listed(server)) == before  # what a run has loaded on a server of others goes with it


def test_kill_9_in_mid_collection(
    server: Shared, model_dir: Path, generator: Generator, tmp_path: Path
) -> None:
    """Oracles: all episodes are there, their log-probs are the trainer's, and no answer was asked for twice."""
    tenant = "vllm-kill"
    config = pilot_config("kill", model_dir, generator.url(tenant), server, rounds=1)
    # Few at a time, so that there are requests in flight, and others to come, when the server dies.
    config = replace(config, rollout=replace(config.rollout, samples=8, guidance_tokens=100, limit=4))
    with open_run(config, tmp_path) as run:
        warm_up(run)
        own = Vllm(server, run.tokenizer, LORA.rank)  # the server is ours here, to be started again
        run = replace(run, vllm=own)
        killed = []

        def kill() -> None:
            while len(run.journal.rows) < 6:
                time.sleep(0.001)
            killed.append((server.pid, len(run.journal.rows)))
            os.kill(server.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        done = collect(run, 1)
        killer.join()
        run.runner.run(own.aclose())
        ((pid, recorded),) = killed
        assert recorded < len(done) == 4 * 8 and own.num_restarts == 1 and server.pid != pid
        for turn in (turn for trajectory in done for turn in trajectory.turns):
            assert turn.prompt_ids is not None and turn.action.logprobs is not None
            expected = trained(model_dir, turn.prompt_ids, turn.action, run.policies.folder("warmup"))
            assert difference(expected, turn.action.logprobs).largest < 5e-4
    rows = read_jsonl(tmp_path / "kill" / "trajectories.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == 4 * 8
    asked = generator.asked(tenant)
    assert len(asked) == len(set(asked)) > 0
