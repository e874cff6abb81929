"""The client of vLLM and the keeper of its process, against a stand-in that speaks its protocol and misbehaves.

tests/pilot/test_vllm.py has the real vLLM.
"""

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from matryoshka.core.models.load import load_model
from matryoshka.core.protocols import ContextError
from matryoshka.core.records import Sample, Sampling, stable_seed
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference import vllm as client
from matryoshka.inference import vllm_server
from matryoshka.inference.http_client import HttpClient
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_adapter import check_adapter, check_config
from matryoshka.inference.vllm_server import VllmConfig, VllmServer, free_port, max_lora_rank, server_command
from matryoshka.lora.files import CONFIG, WEIGHTS, adapter_hash, save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.tests.core.models.controller_contract import Architecture, architectures
from matryoshka.tests.processes import alive

FAKE = Path(__file__).parent / "fake_vllm.py"
COMMAND = f"{sys.executable} {FAKE}"
PROMPT = (40, 41, 42)
SAMPLING = Sampling(temperature=1.0, max_tokens=5, seed=3)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 120
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets the faults of the next requests for a completion; retries do not wait."""
    path = tmp_path / "faults"
    monkeypatch.setenv("FAKE_FAULTS", str(path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.jsonl"))
    monkeypatch.setattr(client, "BACKOFF_S", 0.0)

    def say(*names: str) -> None:
        path.write_text("".join(f"{name}\n" for name in names))

    return say


def adapter(tiny_dir: Path, folder: Path, seed: int = 0, **changes: Any) -> Path:
    model = load_model(tiny_dir)
    add_adapter(model, "a", replace(LoraConfig(rank=4, targets=("q_proj", "down_proj")), **changes), seed)
    save_adapter(model, "a", folder, str(tiny_dir))
    return folder


def requests(tmp_path: Path, path: str = "/v1/completions") -> list[dict[str, Any]]:
    return [body for asked, _, body in (row["row"] for row in _rows(tmp_path)) if asked == path]


def _rows(tmp_path: Path) -> list[dict[str, Any]]:
    log = tmp_path / "log.jsonl"
    return [{"row": json.loads(line)} for line in log.read_text().splitlines()] if log.exists() else []


def with_server(
    tiny_dir: Path, tmp_path: Path, use: Callable[[Vllm], Awaitable[None]], config: VllmConfig | None = None
) -> None:
    """Run `use` with a client whose server has not been started yet; both end with it."""

    async def run() -> None:
        server = VllmServer(config or VllmConfig(COMMAND), tiny_dir, "base", "float32", 4, tmp_path / "vllm.log")
        vllm = Vllm(server, Tokenizer.load(tiny_dir), 4, lambda text: None)
        try:
            await use(vllm)
        finally:
            await vllm.aclose()

    asyncio.run(run())


def test_a_request_is_what_vllm_takes(tiny_dir: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    """Oracle: the request, written by hand; the sample is the stand-in's draw, and its text the ids' bytes."""
    folder = adapter(tiny_dir, tmp_path / "adapter")

    async def use(vllm: Vllm) -> None:
        sample = await vllm.generate(PROMPT, SAMPLING, name := vllm.register(folder))
        assert name == f"adapter-{adapter_hash(folder)}"
        seed = stable_seed("sampler", 3, 0, PROMPT)
        ids = tuple(32 + (sum(PROMPT) + seed + len(name) + i) % 90 for i in range(5))
        text = Tokenizer.load(tiny_dir).decode(ids)
        assert sample == Sample(text, "length", ids, (-0.5,) * 5, None, sample.usage)
        assert (sample.usage.prompt_tokens, sample.usage.completion_tokens) == (3, 5)
        (loaded,) = requests(tmp_path, "/v1/load_lora_adapter")
        assert loaded == {"lora_name": name, "lora_path": str(folder)}
        (asked,) = requests(tmp_path)
        assert asked == {
            "model": name, "prompt": [40, 41, 42], "return_token_ids": True, "max_tokens": 5, "temperature": 1.0,
            "top_p": 1.0, "seed": seed, "stop": [], "stop_token_ids": [257], "logprobs": 0, "n": 1, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        with pytest.raises(ContextError, match="prompt of 3 tokens . max_tokens 62 exceed the context of 64"):
            await vllm.generate(PROMPT, Sampling(max_tokens=62))

    with_server(tiny_dir, tmp_path, use)


MENDED = ("500", "503", "429", "drop", "truncated", "garbage", "no choices", "abort", "prompt as a number",
          "forget")  # fmt: skip
REFUSED = {
    "400": "refuses the request: 400 as you wish",
    "401": "refuses the request: 401 as you wish",
    "wrong model": "'another' answered",
    "wrong prompt": "read another prompt than was sent",
    "no ids": "no log-prob for each token",
    "ids as text": "no log-prob for each token",
    "no log-probs": "no log-prob for each token",
    "log-probs as a list": "no log-prob for each token",
    "log-probs of 400 digits": "sent log-probs that are not finite",
    "nan": "sent log-probs that are not finite",
}


def test_what_each_fault_leads_to(tiny_dir: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    """Oracle: the answer to the same request without a fault, after one more attempt; or the error, at once."""
    folder = adapter(tiny_dir, tmp_path / "adapter")

    async def use(vllm: Vllm) -> None:
        name = vllm.register(folder)
        whole = await vllm.generate(PROMPT, SAMPLING, name)
        for fault in MENDED:
            before = len(requests(tmp_path))
            faults(fault)
            assert await vllm.generate(PROMPT, SAMPLING, name) == whole, fault
            assert len(requests(tmp_path)) == before + 2, fault
        assert len(requests(tmp_path, "/v1/load_lora_adapter")) == 2  # the second after "forget"
        for fault, says in REFUSED.items():
            before = len(requests(tmp_path))
            faults(fault)
            with pytest.raises(ValueError, match=re.escape(says)):
                await vllm.generate(PROMPT, SAMPLING, name)
            assert len(requests(tmp_path)) == before + 1, fault
        assert vllm.num_restarts == 0

    with_server(tiny_dir, tmp_path, use)


@pytest.mark.parametrize("models", [5, "base", [1], [{}], [{"id": "base", "max_model_len": "64"}], [{"id": ["a"]}]])
def test_a_malformed_list_of_models_is_one_clear_error(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: object
) -> None:
    """Oracle: the error that names the address, for lists that other servers, or none, would send."""
    monkeypatch.setenv("FAKE_MODELS", json.dumps(models))

    async def use(vllm: Vllm) -> None:
        with pytest.raises(ValueError, match=r"/v1/models answers 200 .*; expected vLLM's list of models"):
            await vllm.generate(PROMPT, SAMPLING)

    with_server(tiny_dir, tmp_path, use)


def test_attempts_are_bounded(tiny_dir: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    """Oracle: the stand-in's own count of requests."""
    async def use(vllm: Vllm) -> None:
        faults(*["500"] * 20)
        with pytest.raises(ConnectionError, match="after 6 attempts: 500 as you wish"):
            await vllm.generate(PROMPT, SAMPLING)
        assert len(requests(tmp_path)) == 6

    with_server(tiny_dir, tmp_path, use)


def test_a_server_that_dies_is_started_again(tiny_dir: Path, tmp_path: Path, faults: Callable[..., None]) -> None:
    """Oracle: the samples before. Eight requests in flight lose their server; it comes back once, with its adapters."""
    first, second = (adapter(tiny_dir, tmp_path / str(seed), seed) for seed in (1, 2))

    async def use(vllm: Vllm) -> None:
        names = [vllm.register(first), vllm.register(second)]

        async def draw() -> list[Sample]:
            draws = [Sampling(temperature=1.0, max_tokens=5, seed=3, draw=draw) for draw in range(4)]
            return await asyncio.gather(*(vllm.generate(PROMPT, draw, name) for draw in draws for name in names))

        before, pid = await draw(), vllm.server.pid
        faults(*["sleep20"] * 7, "die")
        assert await draw() == before
        assert vllm.num_restarts == 1 and vllm.server.pid != pid
        assert len(requests(tmp_path, "/v1/load_lora_adapter")) == 4
        wait_for_end(pid)
        faults(*["die"] * 9)
        with pytest.raises(ValueError, match=r"died after 2 restarts(.|\n)*ends:\n(.|\n)*a line of the log"):
            await vllm.generate(PROMPT, SAMPLING)

    with_server(tiny_dir, tmp_path, use, VllmConfig(COMMAND, max_restarts=2))


def test_an_old_adapter_goes_when_its_requests_have_ended(
    tiny_dir: Path, tmp_path: Path, faults: Callable[..., None]
) -> None:
    """Oracle: the order of the stand-in's requests."""
    folders = [adapter(tiny_dir, tmp_path / str(seed), seed) for seed in (1, 2)]

    async def use(vllm: Vllm) -> None:
        faults(f"until {tmp_path / 'answer'}")
        old = vllm.use(folders[0])
        running = asyncio.create_task(vllm.generate(PROMPT, SAMPLING, old))
        while not requests(tmp_path):
            await asyncio.sleep(0.01)
        new = vllm.use(folders[1])
        assert new != old
        with pytest.raises(ValueError, match="not registered, or retired"):
            await vllm.generate(PROMPT, SAMPLING, old)
        await vllm.generate(PROMPT, SAMPLING, new)
        assert requests(tmp_path, "/v1/unload_lora_adapter") == [] and not running.done()
        (tmp_path / "answer").touch()
        await running
        assert requests(tmp_path, "/v1/unload_lora_adapter") == [{"lora_name": old}]
        assert vllm.use(folders[0]) == old  # it may come back: equal content, equal name
        await vllm.generate(PROMPT, SAMPLING, old)
        assert requests(tmp_path, "/v1/unload_lora_adapter") == [{"lora_name": old}, {"lora_name": new}]

    with_server(tiny_dir, tmp_path, use)


def test_attaching_to_a_running_server(
    tiny_dir: Path, tmp_path: Path, faults: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the stand-in's log: it runs on without our adapter, and saw the key. Errors name a missing key and show
    none.
    """
    folder = adapter(tiny_dir, tmp_path / "adapter")
    monkeypatch.setenv("SERVER_KEY", "planted")

    async def use(vllm: Vllm) -> None:
        await vllm.generate(PROMPT, SAMPLING)
        url = vllm.server.url
        config = VllmConfig(base_url=f"{url}/v1", api_key_env="SERVER_KEY", start_timeout_s=0.5)
        other = Vllm(VllmServer(config, tiny_dir, "x", "float32", 4, None), vllm.tokenizer, 4)
        name = other.register(folder)
        await other.generate(PROMPT, SAMPLING, name)
        assert other.base == "base" and vllm.server.is_running
        faults("400")
        with pytest.raises(ValueError, match=r"refuses the request: 400 as you wish, Bearer \[key\]"):
            await other.generate(PROMPT, SAMPLING, name)
        await other.aclose()
        assert requests(tmp_path, "/v1/unload_lora_adapter") == [{"lora_name": name}]
        assert {row["row"][1] for row in _rows(tmp_path)} == {None, "Bearer planted"}
        await vllm.generate(PROMPT, SAMPLING)
        await vllm.server.stop()
        gone = Vllm(VllmServer(config, tiny_dir, "x", "float32", 4, None), vllm.tokenizer, 4)
        with pytest.raises(ValueError, match="did not answer within start_timeout_s .* is base_url right"):
            await gone.generate(PROMPT, SAMPLING)
        await gone.aclose()

    with_server(tiny_dir, tmp_path, use)
    monkeypatch.setenv("SERVER_KEY", "")
    with pytest.raises(ValueError, match="environment variable SERVER_KEY is empty"):
        VllmServer(VllmConfig(base_url="http://x", api_key_env="SERVER_KEY"), tiny_dir, "x", "float32", 4, None)


@pytest.mark.parametrize(
    ("start", "timeout_s", "says"),
    [("fail", 60.0, "ended before it was ready"), ("hang", 1.0, "did not answer within start_timeout_s")],
)
def test_a_failed_start_shows_the_end_of_the_log(
    tiny_dir: Path, tmp_path: Path, start: str, timeout_s: float, says: str
) -> None:
    """Oracle: the log's last lines, which the stand-in wrote, are in the message."""
    shown: list[str] = []

    async def run() -> None:
        config = VllmConfig(COMMAND, environment=(f"FAKE_START={start}",), start_timeout_s=timeout_s)
        server = VllmServer(config, tiny_dir, "base", "float32", 0, tmp_path / "vllm.log")
        with pytest.raises(ValueError, match=says) as caught:
            await server.start(HttpClient(), shown.append)
        assert f"{tmp_path / 'vllm.log'} ends:" in str(caught.value)
        if start == "fail":  # the other one may not have come to writing anything, on a busy machine
            assert "a line of the log\nno memory for the cache" in str(caught.value)
        assert not server.is_running

    asyncio.run(run())
    assert all(re.match(r"waiting for vLLM at http://127.0.0.1:\d+: \d+ s", line) for line in shown)


def test_nothing_of_the_server_outlives_whoever_started_it(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: after kill -9 of its parent, which could stop nothing, the server's process ends by itself."""
    code = (
        "import asyncio, sys, time\nfrom pathlib import Path\n"
        "from matryoshka.inference.http_client import HttpClient\n"
        "from matryoshka.inference.vllm_server import VllmConfig, VllmServer\n"
        f"server = VllmServer(VllmConfig({COMMAND!r}), Path('.'), 'base', 'float32', 0, Path('vllm.log'))\n"
        "asyncio.run(server.start(HttpClient(), print))\nprint('pid', server.pid, flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
    os.kill(pid, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_for_end(pid)


def test_a_free_port_is_none_that_a_connection_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's own range of them, and an error where the only port is taken."""
    assert free_port() < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(vllm_server, "PORTS", range(port, port + 1))
        with pytest.raises(ValueError, match="no port from .* is free; set port"):
            free_port()


def test_the_command_line() -> None:
    """Oracle: written by hand from vLLM's documentation."""
    config = VllmConfig(
        tensor_parallel=2, data_parallel=4, context=2048, max_loras=3, dtype="bfloat16", flags=("--enforce-eager",)
    )
    common = ["--served-model-name", "base", "--host", "127.0.0.1", "--port", "9", "--generation-config", "vllm"]
    assert server_command(config, Path("/m"), "base", "float32", 12, 9) == [
        *("vllm", "serve", "/m"), *common, *("--dtype", "bfloat16", "--tensor-parallel-size", "2"),
        *("--data-parallel-size", "4", "--api-server-count", "1", "--max-model-len", "2048"),
        *("--enable-lora", "--max-lora-rank", "16", "--max-loras", "3", "--enforce-eager"),
    ]  # fmt: skip
    module = VllmConfig("'/my env/python' -m vllm.entrypoints.openai.api_server")
    assert server_command(module, Path("/m"), "base", "float32", 0, 9) == [
        *("/my env/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/m"), *common,
        *("--dtype", "float32"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no program 'no-such-vllm'; set command"):
        VllmServer(VllmConfig("no-such-vllm serve"), Path("/m"), "base", "float32", 0, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_url": "localhost:8000"}, "must start with http"),
        ({"command": " "}, "command is empty"),
        ({"tensor_parallel": 0}, "tensor_parallel 0"),
        ({"start_timeout_s": 0.0}, "must be positive"),
        ({"environment": ("A",)}, "expected NAME=VALUE"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, Any], says: str) -> None:
    """Oracle: the message for each setting, by hand."""
    with pytest.raises(ValueError, match=says):
        VllmConfig(**changes)


def test_ranks() -> None:
    """Oracle: vLLM's list of what --max-lora-rank takes."""
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ValueError, match="LoRA rank 513 is more than vLLM serves"):
        max_lora_rank(513)


def test_adapters_that_vllm_would_not_serve_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the message, with each rule broken once; a good adapter passes."""
    good = adapter(tiny_dir, tmp_path / "good")
    assert check_adapter(good, 8).rank == 4
    with pytest.raises(ValueError, match="rank 16, but the server takes up to 8"):
        check_adapter(adapter(tiny_dir, tmp_path / "rank", rank=16), 4)
    with pytest.raises(ValueError, match="vLLM serves no DoRA"):
        check_adapter(adapter(tiny_dir, tmp_path / "dora", dora=True), 8)
    with pytest.raises(ValueError, match="target 'lm_head' is not served"):
        check_config(LoraConfig(targets=("q_proj", "lm_head")))
    config = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(ValueError, match=r"has shape \(\d+, \d+\), but r is 2 in adapter_config.json"):
        check_adapter(good, 8)
    (good / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match="modules_to_save"):
        check_adapter(good, 8)
    (good / CONFIG).write_text(json.dumps(config))
    weights = load_file(good / WEIGHTS)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, good / WEIGHTS)
    with pytest.raises(ValueError, match="has numbers that are not finite; its training diverged"):
        check_adapter(good, 8)
    (good / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        check_adapter(good, 8)


@pytest.mark.parametrize("architecture", architectures(None), ids=lambda one: one.model_type)
def test_adapters_of_every_family_pass(architecture: Architecture, tmp_path: Path) -> None:
    """Oracle: the names of vLLM's own modules, which are the checkpoint's, fused projections included, under PEFT's
    prefix; all of the family's linear layers are trained."""
    model = architecture.cases[0].save(tmp_path / "model")
    folder = adapter(model, tmp_path / "adapter", targets=())
    assert set(check_adapter(folder, 8).targets) == set(architecture.module.LORA_TARGETS)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = {key.split(".layers.0.")[1] for key in file.keys() if ".layers.0." in key}
    modules = {f"{'mlp' if one.startswith(('gate', 'up', 'down')) else 'self_attn'}.{one}" for one in
               architecture.module.LORA_TARGETS}
    assert names == {f"{one}.{part}.weight" for one in modules for part in ("lora_A", "lora_B")}
