"""Servers of our own that belong to a run: of the generator, in a process of its own, and vLLM for the controller."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from matryoshka.core.machine import usable_cores
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.llama_cpp import check_gguf
from matryoshka.inference.vllm import Vllm
from matryoshka.inference.vllm_adapter import check_config
from matryoshka.inference.vllm_server import VllmServer
from matryoshka.pilot.config import RunConfig, ServeConfig


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
    server = VllmServer(controller.vllm, controller.folder, "controller", controller.dtype, rank, log)
    return Vllm(server, tokenizer, rank, show)


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
