"""Models of ours behind an HTTP server: the `serve` command, and a server started beside a run that ends with it."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from matryoshka.core.machine import usable_cores
from matryoshka.core.redaction import read_secret
from matryoshka.core.terminal import EscapingFormatter
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference import server
from matryoshka.inference.http_client import HttpClient
from matryoshka.inference.llama_cpp import LlamaConfig, check_gguf, start_llama
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_adapter import check_adapter, check_config
from matryoshka.inference.vllm_server import VllmConfig, VllmServer
from matryoshka.lora.files import read_config
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.progress import StatusLine


def serve(
    model: Path,
    engine: Literal["local", "vllm", "llama.cpp"] = "local",
    adapter: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = (),
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int = 0,
    max_rows: int = 64,
    api_key_env: str = "",
    allow_anonymous: bool = False,
    deterministic: bool = False,
    with_parent: bool = False,
    lora_rank: int = 0,
    vllm: VllmConfig = VllmConfig(),  # noqa: B008  it is frozen
    llama: LlamaConfig = LlamaConfig(),  # noqa: B008  it is frozen
) -> None:
    """Serve a model and its adapters through an OpenAI-compatible HTTP API.

    Args:
        model: Hugging Face folder of a Llama-architecture model; for engine llama.cpp a GGUF file.
        engine: What computes: "local" is the pure-PyTorch sampler; "vllm" starts vLLM, which has no threads,
            max_rows or deterministic; "llama.cpp" serves a GGUF file (the extra `llama`) and has no adapters or
            max_rows.
        adapter: Adapters as NAME=FOLDER, served under NAME; several after one flag, or a flag for each.
        name: What the base model is served as; default its folder's name.
        host: Address to listen on.
        port: 0 takes any free port; the first line printed says which.
        threads: CPU threads, 0 for as many as there are cores.
        max_rows: Rows decoded together.
        api_key_env: Environment variable with the key that callers must send; empty asks for none.
        allow_anonymous: Let other machines use the model without a key, where host is not loopback.
        deterministic: One request at a time, answers repeatable bit for bit.
        with_parent: End when standard input closes, as it does when the parent process dies.
        lora_rank: Engine vllm alone: of adapters to be loaded while it runs, as a pilot's are; 0 is that of the ones
            given here.
        vllm: How vLLM is started; its output goes to standard error.
        llama: How llama.cpp serves; its output goes to standard error.
    """
    if with_parent:
        threading.Thread(target=_end_with_input, daemon=True).start()
    server.check_exposure(host, api_key_env or None, allow_anonymous)
    adapters = tuple(pair for pairs in adapter for pair in pairs)
    if engine == "llama.cpp":
        if adapters or lora_rank or max_rows != 64:
            raise ValueError("serve: engine llama.cpp has no adapter, lora_rank or max_rows; its limit is llama.slots")
        slots = 1 if deterministic else llama.slots
        _serve_llama(model, name or model.stem, host, port, threads, api_key_env, replace(llama, slots=slots))
        return
    if engine == "vllm":
        if threads or max_rows != 64 or deterministic or vllm.base_url:
            raise ValueError("serve: threads, max_rows and deterministic are of engine local, and base_url starts none")
        vllm = replace(vllm, port=port, api_key_env=api_key_env, flags=(*vllm.flags, "--host", host))
        asyncio.run(_serve_vllm(model, adapters, name or model.name, vllm, lora_rank))
        return
    if lora_rank:
        raise ValueError("serve: lora_rank is of engine vllm; engine local serves the adapters given, of any rank")
    import torch

    from matryoshka.core.models.load import load_model
    from matryoshka.inference.local_controller import LocalEngine
    from matryoshka.inference.sampler import Sampler
    from matryoshka.lora.files import load_adapter

    log = logging.StreamHandler()
    log.setFormatter(EscapingFormatter("%(asctime)s %(name)s %(message)s"))  # requests put text of their own in there
    logging.basicConfig(level=logging.INFO, handlers=[log])
    count = threads or usable_cores()
    torch.set_num_threads(count)
    key = _callers_key(api_key_env)
    network = load_model(model)
    names: dict[str, str | None] = {name or model.name: None}
    loaded: dict[Path, str] = {}  # one copy of each folder, under a name without the dots that modules do not take
    for pair in adapters:
        label, equals, folder = pair.partition("=")
        if not equals or label in names:
            raise ValueError(f"serve: adapter {pair!r}; expected NAME=FOLDER with a name that is not taken")
        place = Path(folder).resolve()
        if place not in loaded:
            load_adapter(network, f"adapter{len(loaded)}", Path(folder))
            loaded[place] = f"adapter{len(loaded)}"
        names[label] = loaded[place]

    def ready(real: int) -> None:
        print(f"http://{host}:{real}/v1", flush=True)

    with Sampler(network, Tokenizer.load(model), max_rows, deterministic, count) as sampler:
        asyncio.run(server.serve(LocalEngine(sampler, names), host, port, key, ready, allow_anonymous))


def _callers_key(name: str) -> str | None:
    """Return the key in the environment variable `name`, None for "". Raises ValueError for an empty variable."""
    key = read_secret(name) if name else None
    if key == "":
        raise ValueError(f"serve: environment variable {name} is empty; set the key that callers must send")
    return key


def _serve_llama(
    model: Path, name: str, host: str, port: int, threads: int, api_key_env: str, config: LlamaConfig
) -> None:
    """Run llama.cpp until SIGTERM or SIGINT; print its URL when it answers."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    key, count = _callers_key(api_key_env), threads or usable_cores()
    server = start_llama(model, name, host, port, count, key, config)
    print(f"{server.listening_address}/v1", flush=True)
    stop.wait()


async def _serve_vllm(model: Path, adapters: tuple[str, ...], name: str, config: VllmConfig, rank: int) -> None:
    """Run vLLM until SIGTERM or SIGINT; print its URL when it answers."""
    pairs = [pair.partition("=") for pair in adapters]
    labels = [name, *(label for label, _, _ in pairs)]
    if not all(equals for _, equals, _ in pairs) or len(set(labels)) < len(labels):
        raise ValueError(f"serve: adapters {', '.join(adapters)}; expected NAME=FOLDER with names that are not taken")
    rank = max((rank, *(read_config(Path(folder)).rank for _, _, folder in pairs)))
    for _, _, folder in pairs:
        check_adapter(Path(folder), rank)
    modules = [f"{label}={Path(folder).absolute()}" for label, _, folder in pairs]
    config = replace(config, flags=(*config.flags, *(("--lora-modules", *modules) if modules else ())))
    server = VllmServer(config, model, name, "auto", rank, None)
    client, stop, loop = HttpClient(), asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with StatusLine() as line:
        starting = asyncio.create_task(server.start(client, line.show))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                print(f"{server.url}/v1", flush=True)
                while not stop.is_set():
                    if not server.is_running:
                        raise ValueError("serve: vLLM ended by itself; its last words are above")
                    await asyncio.wait((stopping,), timeout=0.5)
        finally:
            for task in (starting, stopping):
                task.cancel()
            await client.aclose()
            await server.stop()


def open_vllm(
    config: RunConfig, tokenizer: Tokenizer, log: Path, num_ranks: int, show: Callable[[str], None] = lambda _: None
) -> Vllm:
    """Return vLLM as the controller's sampler; its server starts with the first request that there is for it.

    show: is called with a text about the server's start, for the terminal.

    Raises ValueError for adapters that vLLM does not serve, where its command is missing, and for a server of our own
    that several processes would have to share.
    """
    controller, rank = config.controller, 0
    if (num_ranks > 1 or config.executor == "ray") and not controller.vllm.base_url:
        what = "[controller] engine = 'vllm' over several processes"
        if controller.tune == "full":
            raise ValueError(
                f"{what}: with tune = 'full' the server is started again for every policy, which a single process can "
                "do; start one, or take engine = 'local'"
            )
        raise ValueError(
            f"{what}: they share one server; start it with `matryoshka serve --engine vllm --lora-rank "
            f"{config.lora.rank}` and give its address as controller.vllm.base_url"
        )
    if controller.tune == "adapter":
        check_config(config.lora, "[lora] with [controller] engine = 'vllm'")
        rank = config.lora.rank
    server = VllmServer(controller.vllm, Path(controller.path), "controller", controller.dtype, rank, log)
    return Vllm(server, tokenizer, rank, show)


def _end_with_input() -> None:
    # Not through sys.stdin: a thread that waits in there holds its lock, and Python aborts at exit for want of it.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def running_server(config: ServeConfig, deterministic: bool, log: Path) -> Iterator[str]:
    """Start a server for `config` in a process of its own and yield its base URL; it ends with the block.

    Raises ValueError with the end of its log when it does not come up.
    """
    command = [sys.executable, "-m", "matryoshka.scripts.cli", "serve", "--model", config.model, "--port", "0"]
    command += ["--threads", str(config.threads), "--with-parent", "--engine", config.engine]
    command += ["--deterministic"] if deterministic else []
    folder = config.adapter_folder
    command += ["--adapter", f"{config.name}={folder}"] if folder else ["--name", config.name]
    if config.engine == "llama.cpp":
        check_gguf(Path(config.model))
        for field in fields(config.llama):
            command += [f"--llama.{field.name.replace('_', '-')}", str(getattr(config.llama, field.name))]
    else:
        command += ["--max-rows", str(config.max_rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads or usable_cores())}
    environment["OMP_WAIT_POLICY"] = "passive"  # spinning threads starve the other processes of this machine
    log.parent.mkdir(parents=True, exist_ok=True)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A session of its own: a terminal's Ctrl-C asks the run to stop, and its requests still have to be answered.
    with (
        log.open("ab") as errors,
        subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True, **pipes) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                process.wait()
                tail = log.read_text(errors="replace").splitlines()[-8:]
                what = f"serve: the generator's server ended with status {process.returncode} before it was ready"
                raise ValueError("\n".join([f"{what}; [serve] describes it, and {log} ends:", *tail]))
            yield url
        finally:
            process.terminate()
