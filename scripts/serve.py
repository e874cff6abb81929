"""`matryoshka serve`: a model and its adapters behind an OpenAI-compatible HTTP server."""

import asyncio
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from matryoshka.core.machine import usable_cores
from matryoshka.core.redaction import read_secret
from matryoshka.core.signals import stop_event, watch_signals
from matryoshka.core.terminal import EscapingFormatter
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference import server
from matryoshka.inference.http_client import HttpClient
from matryoshka.inference.llama_cpp import LlamaConfig, start_llama
from matryoshka.inference.vllm_adapter import check_adapter
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import read_config
from matryoshka.pilot.progress import StatusLine


@dataclass(frozen=True)
class ServeCommand:
    """Serve a model and its adapters through an OpenAI-compatible HTTP API."""

    model: Path
    """Hugging Face folder of a model; for engine llama.cpp a GGUF file."""
    engine: Literal["local", "vllm", "llama.cpp"] = "local"
    """The engine: "local" is the pure-PyTorch sampler; "vllm" starts vLLM, which has no threads, max_rows or
    deterministic; "llama.cpp" serves a GGUF file (the extra `llama`) and has no adapters or max_rows."""
    adapter: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Adapters as NAME=FOLDER, served under NAME; several after one flag, or a flag for each."""
    name: str = ""
    """Name under which the base model is served; default: its folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes any free one. The first line printed is the address."""
    threads: int = 0
    """CPU threads, 0 for as many as there are cores."""
    max_rows: int = 64
    """Rows decoded together."""
    api_key_env: str = ""
    """Environment variable with the key that callers must send; "" asks for none."""
    allow_anonymous: bool = False
    """Let other machines use the model without a key, where host is not loopback."""
    deterministic: bool = False
    """Run one request at a time, so that answers are repeatable bit for bit."""
    with_parent: bool = False
    """End when standard input closes, as it does when the parent process dies."""
    lora_rank: int = 0
    """For engine vllm: the rank of adapters that will be loaded while it runs, as a pilot's are; 0 for that of the
    adapters given here."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM is started; its output goes to standard error."""
    llama: LlamaConfig = LlamaConfig()
    """How llama.cpp serves; its output goes to standard error."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapters, however many flags they came by."""
        return tuple(pair for pairs in self.adapter for pair in pairs)


def serve(config: ServeCommand) -> None:
    """Serve until SIGTERM or SIGINT; the address is printed when requests are answered."""
    if config.with_parent:
        threading.Thread(target=_end_with_input, daemon=True).start()
    server.check_exposure(config.host, config.api_key_env or None, config.allow_anonymous)
    if config.engine == "llama.cpp":
        if config.adapters or config.lora_rank or config.max_rows != 64:
            raise ValueError("serve: engine llama.cpp has no adapter, lora_rank or max_rows; its limit is llama.slots")
        _serve_llama(config)
    elif config.engine == "vllm":
        if config.threads or config.max_rows != 64 or config.deterministic or config.vllm.base_url:
            raise ValueError("serve: threads, max_rows and deterministic are of engine local, and base_url starts none")
        asyncio.run(_serve_vllm(config))
    else:
        if config.lora_rank:
            raise ValueError("serve: lora_rank is of engine vllm; engine local serves the adapters given, of any rank")
        _serve_local(config)


def _serve_local(config: ServeCommand) -> None:
    import torch

    from matryoshka.core.models.load import load_model
    from matryoshka.inference.local_controller import LocalEngine
    from matryoshka.inference.sampler import Sampler
    from matryoshka.lora.files import load_adapter

    log_requests()
    count = config.threads or usable_cores()
    torch.set_num_threads(count)
    key = callers_key(config.api_key_env)
    network = load_model(config.model)
    names: dict[str, str | None] = {config.name or config.model.name: None}
    loaded: dict[Path, str] = {}  # one copy of each folder, under a name without the dots that modules do not take
    for pair in config.adapters:
        label, equals, folder = pair.partition("=")
        if not equals or label in names:
            raise ValueError(f"serve: adapter {pair!r}; expected NAME=FOLDER with a name that is not taken")
        place = Path(folder).resolve()
        if place not in loaded:
            load_adapter(network, f"adapter{len(loaded)}", Path(folder), base=config.model)
            loaded[place] = f"adapter{len(loaded)}"
        names[label] = loaded[place]

    def ready(port: int) -> None:
        print(f"http://{config.host}:{port}/v1", flush=True)

    with Sampler(network, Tokenizer.load(config.model), config.max_rows, config.deterministic, count) as sampler:
        engine = LocalEngine(sampler, names)
        asyncio.run(server.serve(engine, config.host, config.port, key, ready, config.allow_anonymous))


def log_requests() -> None:
    """Let the log go to standard error, escaped, since requests put text of their own into it."""
    log = logging.StreamHandler()
    log.setFormatter(EscapingFormatter("%(asctime)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])


def callers_key(name: str) -> str | None:
    """Return the key in the environment variable `name`, None for "". Raises ValueError for an empty variable."""
    key = read_secret(name) if name else None
    if key == "":
        raise ValueError(f"serve: environment variable {name} is empty; set the key that callers must send")
    return key


def _serve_llama(config: ServeCommand) -> None:
    """Run llama.cpp until SIGTERM or SIGINT; print its address when it answers."""
    llama = replace(config.llama, slots=1 if config.deterministic else config.llama.slots)
    key, count = callers_key(config.api_key_env), config.threads or usable_cores()
    with stop_event() as stop:
        running = start_llama(
            config.model, config.name or config.model.stem, config.host, config.port, count, key, llama
        )
        print(f"{running.listening_address}/v1", flush=True)
        stop.wait()


async def _serve_vllm(config: ServeCommand) -> None:
    """Run vLLM until SIGTERM or SIGINT; print its address when it answers."""
    name, pairs = config.name or config.model.name, [pair.partition("=") for pair in config.adapters]
    labels = [name, *(label for label, _, _ in pairs)]
    if not all(equals for _, equals, _ in pairs) or len(set(labels)) < len(labels):
        what = ", ".join(config.adapters)
        raise ValueError(f"serve: adapters {what}; expected NAME=FOLDER with names that are not taken")
    rank = max((config.lora_rank, *(read_config(Path(folder)).rank for _, _, folder in pairs)))
    for _, _, folder in pairs:
        check_adapter(Path(folder), rank)
    modules = [f"{label}={Path(folder).absolute()}" for label, _, folder in pairs]
    flags = (*config.vllm.flags, "--host", config.host, *(("--lora-modules", *modules) if modules else ()))
    vllm = replace(config.vllm, port=config.port, api_key_env=config.api_key_env, flags=flags)
    running = VllmServer(vllm, config.model, name, "auto", rank, None)
    client, stop, loop = HttpClient(), asyncio.Event(), asyncio.get_running_loop()
    with StatusLine() as line, watch_signals(lambda: loop.call_soon_threadsafe(stop.set)):
        starting = asyncio.create_task(running.start(client, line.show))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                print(f"{running.url}/v1", flush=True)
                while not stop.is_set():
                    if not running.is_running:
                        raise ValueError("serve: vLLM ended by itself; its last output is above")
                    await asyncio.wait((stopping,), timeout=0.5)
        finally:
            for task in (starting, stopping):
                task.cancel()
            await client.aclose()
            await running.stop()


def _end_with_input() -> None:
    # Not through sys.stdin: a thread that waits in there holds its lock, and Python aborts at exit for want of it.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
