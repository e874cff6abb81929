"""vLLM's OpenAI server as a process beside ours: started, waited for, ended with us; or one that runs already.

vLLM is never imported: it may live in another virtual environment. The server's whole output goes to a log file, whose
last lines are in the error when it does not come up. `inference/vllm.py` sends the requests.
"""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matryoshka.core.redaction import read_secret, redact
from matryoshka.core.terminal import printable
from matryoshka.inference import vllm_guard
from matryoshka.inference.http_client import HttpClient, TransportError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
# The kernel gives the ports from 32768 on to any connection, also between our look at one and the server's start.
PORTS = range(20_000, 32_000)
POLL_S = 0.25
HEALTH_TIMEOUT_S = 30.0  # a machine may be busy; a server that is gone refuses at once
TAIL_LINES, TAIL_WIDTH = 15, 300
# The values of vLLM's --max-lora-rank (vllm/config/lora.py); an adapter may have any rank up to it.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class VllmConfig:
    """How vLLM is started and asked, or where a server is that runs already."""

    command: str = "vllm serve"
    """The command that starts the server, split as a shell would: "vllm serve", or
    "PYTHON -m vllm.entrypoints.openai.api_server" with the interpreter of another virtual environment."""
    base_url: str = ""
    """A server that runs already, which is then neither started nor stopped."""
    api_key_env: str = ""
    """Environment variable that holds the key of the server at base_url."""
    port: int = 0
    """Port to listen on, 0 for any free one."""
    gpus: str = ""
    """CUDA_VISIBLE_DEVICES of the server; "" leaves the variable as it is."""
    tensor_parallel: int = 1
    """GPUs that share one replica."""
    data_parallel: int = 1
    """Replicas."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Data type of the weights; "" is the controller's."""
    context: int = 0
    """Longest sequence in tokens, 0 for the model's own context."""
    max_loras: int = 2
    """Adapters in one batch."""
    flags: tuple[str, ...] = ()
    """Further flags of the server."""
    environment: tuple[str, ...] = ()
    """Further environment variables of the server, as NAME=VALUE."""
    start_timeout_s: float = 900.0
    """Seconds until the server must answer."""
    timeout_s: float = 1800.0
    """Seconds for one request, including the wait for its turn."""
    max_restarts: int = 3
    """How often a server that died is started again before the run stops."""

    def __post_init__(self) -> None:
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"vllm: base_url {self.base_url!r} must start with http:// or https://")
        if not self.base_url and not shlex.split(self.command):
            raise ValueError("vllm: command is empty; give what starts the server, or the base_url of one that runs")
        if min(self.tensor_parallel, self.data_parallel, self.max_loras) < 1 or min(self.port, self.context) < 0:
            raise ValueError(
                f"vllm: tensor_parallel {self.tensor_parallel}, data_parallel {self.data_parallel} and max_loras "
                f"{self.max_loras} must be at least 1, port {self.port} and context {self.context} not negative"
            )
        if min(self.start_timeout_s, self.timeout_s) <= 0 or self.max_restarts < 0:
            raise ValueError(
                f"vllm: start_timeout_s {self.start_timeout_s} and timeout_s {self.timeout_s} must be positive, "
                f"max_restarts {self.max_restarts} not negative"
            )
        if wrong := [pair for pair in self.environment if not pair.partition("=")[0] or "=" not in pair]:
            raise ValueError(f"vllm: environment {wrong[0]!r}; expected NAME=VALUE")


def max_lora_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that takes adapters of `rank`. Raises ValueError beyond the largest."""
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"vllm: LoRA rank {rank} is more than vLLM serves ({LORA_RANKS[-1]}); train a smaller one")


def server_command(config: VllmConfig, model: Path, name: str, dtype: str, rank: int, port: int) -> list[str]:
    """Return the command line that serves `model` as `name`; rank: of the adapters to come, 0 for none."""
    command = shlex.split(config.command)
    # `vllm serve` takes the model as an argument and refuses the option; the module takes the option.
    command += [str(model)] if command[-1] == "serve" else ["--model", str(model)]
    # Without the last, the folder's generation_config.json would change how tokens are drawn.
    command += ["--served-model-name", name, "--host", HOST, "--port", str(port), "--generation-config", "vllm"]
    command += ["--dtype", config.dtype or dtype]
    command += ["--tensor-parallel-size", str(config.tensor_parallel)] if config.tensor_parallel > 1 else []
    if config.data_parallel > 1:  # one API server: an adapter that is loaded at run time reaches only the one asked
        command += ["--data-parallel-size", str(config.data_parallel), "--api-server-count", "1"]
    command += ["--max-model-len", str(config.context)] if config.context else []
    if rank:
        command += ["--enable-lora", "--max-lora-rank", str(max_lora_rank(rank)), "--max-loras", str(config.max_loras)]
    return [*command, *config.flags]


class VllmServer:
    """One server: ours, in a process that ends with us, or the one at config.base_url.

    url: without /v1, "" before the first start. pid: of vLLM's API server while ours runs.
    """

    def __init__(self, config: VllmConfig, model: Path, name: str, dtype: str, rank: int, log: Path | None) -> None:
        """rank: of the adapters to come, 0 for none. log: where its output is appended, None for our standard error.

        Raises ValueError when there is no such command, or no key.
        """
        self.config = config
        self.is_ours = not config.base_url
        self.url = config.base_url.rstrip("/").removesuffix("/v1")
        self.pid = 0
        self.log = log
        self.headers = {"Content-Type": "application/json"}
        if config.api_key_env:
            if not (key := read_secret(config.api_key_env)):
                raise ValueError(f"vllm: environment variable {config.api_key_env} is empty; set the server's key")
            self.headers["Authorization"] = f"Bearer {key}"
        self._arguments = self._launched = (model.absolute(), name, dtype, rank)
        self._process: subprocess.Popen[str] | None = None
        if self.is_ours:
            server_command(config, *self._arguments, 0)
            program = shlex.split(config.command)[0]
            if shutil.which(program) is None:
                raise ValueError(f"vllm: no program {program!r}; set command to what starts vLLM here (docs/vllm.md)")

    def take(self, model: Path) -> bool:
        """Serve another model folder from the next start on; return whether it is another one."""
        self._arguments = (model.absolute(), *self._arguments[1:])
        return self._arguments != self._launched

    async def start(self, client: HttpClient, show: Callable[[str], None]) -> None:
        """Return when the server answers; one of ours that does not, or that serves another model than the one that was
        taken last, is ended and started. `show` gets progress lines.

        Raises ValueError with the end of its log when it ends or does not answer in time.
        """
        where = self.log.stat().st_size if self.log is not None and self.log.exists() else 0
        if self.is_ours and (self._arguments != self._launched or not await self.is_healthy(client)):
            await self.stop()
            self._launch()
        began = time.monotonic()
        while not await self.is_healthy(client):
            seconds = time.monotonic() - began
            what = ""
            if self.is_ours and not self.is_running:
                what = "ended before it was ready"
            if seconds > self.config.start_timeout_s:
                what = f"did not answer within start_timeout_s ({self.config.start_timeout_s:g} s)"
            if what:
                await self.stop()
                raise ValueError(self._failure(what, where))
            show(f"waiting for vLLM at {self.url}: {seconds:.0f} s {self._last_line(where)}")
            await asyncio.sleep(POLL_S)
        show(f"vLLM answers at {self.url} after {time.monotonic() - began:.0f} s")

    @property
    def is_running(self) -> bool:
        """Whether the process of a server of ours is there."""
        return self._process is not None and self._process.poll() is None

    async def is_healthy(self, client: HttpClient) -> bool:
        """Return whether server and engine answer."""
        if self.is_ours and not self.is_running:
            return False
        try:
            reply = await client.request("GET", f"{self.url}/health", self.headers, None, HEALTH_TIMEOUT_S)
        except TransportError:
            return False
        return reply.status == 200

    async def stop(self) -> None:
        """End the server if it is ours and runs; return when nothing of it is left."""
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        await asyncio.to_thread(self._process.wait)
        self._process.stdout.close()
        self._process, self.pid = None, 0

    def hide(self, text: str) -> str:
        """Return `text` without the key, which servers repeat in their errors, however short it is."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return redact(text.replace(key, "[key]") if key else text)

    def tail(self, where: int = 0) -> list[str]:
        """Return the last lines of the log after byte `where`."""
        if self.log is None or not self.log.exists():
            return []
        lines = self.log.read_bytes()[where:].decode("utf-8", "replace").splitlines()
        return [printable(line[:TAIL_WIDTH]) for line in lines[-TAIL_LINES:]]

    def _launch(self) -> None:
        port = self.config.port or free_port()
        self.url = f"http://{HOST}:{port}"
        command = server_command(self.config, *self._arguments, port)
        self._launched = self._arguments
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
        if "Authorization" in self.headers:  # not on the command line, which every process of the machine can read
            environment["VLLM_API_KEY"] = self.headers["Authorization"].removeprefix("Bearer ")
        if self.config.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.config.gpus
        environment |= dict(pair.split("=", 1) for pair in self.config.environment)
        logger.info("starting %s", shlex.join(command))
        with ExitStack() as stack:
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
            errors = None if self.log is None else stack.enter_context(self.log.open("ab"))
            # A session of its own: Ctrl-C ends the run in order, which then ends the server.
            self._process = subprocess.Popen(
                [sys.executable, vllm_guard.__file__, *command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline() or 0)

    def _last_line(self, where: int) -> str:
        lines = self.tail(where)
        return f"({lines[-1][:80]})" if lines else ""

    def _failure(self, what: str, where: int) -> str:
        if not self.is_ours:
            return f"vllm: the server at {self.url} {what}; is it running, and is base_url right?"
        if self.log is None:
            return f"vllm: the server {what}; its last words are above"
        return "\n".join([f"vllm: the server {what}; {self.log} ends:", *self.tail(where)])


def free_port() -> int:
    """Return a port of PORTS that is free now. Raises ValueError where a hundred of them are taken."""
    for port in secrets.SystemRandom().sample(PORTS, min(100, len(PORTS))):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ValueError("vllm: no port from 20000 to 31999 is free; set port")
