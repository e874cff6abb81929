"""llama.cpp's OpenAI-compatible server over a GGUF file, from the prebuilt wheel `xllamacpp` (the extra `llama`).

The server runs in threads of the process that opens it and ends with that process, which `matryoshka serve --engine
llama.cpp` starts. It is a black box to the rest of the package: text in, text out, usage as the server counts it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matryoshka.core.config import check_least

if TYPE_CHECKING:
    from xllamacpp import Server

MAGIC = b"GGUF"


@dataclass(frozen=True)
class LlamaConfig:
    """How llama.cpp serves a model."""

    slots: int = 4
    """Requests that are decoded together; each slot keeps the prompt of its last request, so that a request with the
    same beginning computes only the rest."""
    context: int = 8192
    """Tokens of prompts and answers that all slots hold together."""
    prompt_cache_mib: int = 1024
    """Host memory for prompts that have left their slots, in MiB; 0 keeps none."""

    def __post_init__(self) -> None:
        check_least(self, "llama: ", slots=1, context=1, prompt_cache_mib=0)


def check_gguf(path: Path) -> None:
    """Return if `path` is a GGUF file. Raises FileNotFoundError or ValueError, which name the expected file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; engine llama.cpp serves a model's .gguf file")
    with path.open("rb") as handle:
        if (start := handle.read(len(MAGIC))) != MAGIC:
            raise ValueError(f"{path}: begins with {start!r} but a GGUF file begins with {MAGIC!r}; give a .gguf file")


def start_llama(
    model: Path, name: str, host: str, port: int, threads: int, api_key: str | None, config: LlamaConfig
) -> "Server":
    """Return a llama.cpp server that is ready; its `listening_address` is its URL without "/v1".

    name: what the model is served as. port: 0 takes any free one. threads: for prompts and for answers. api_key: what
    callers must send, None asks for none. The caller keeps the returned object as long as the server is to run. Raises
    FileNotFoundError, ValueError for a file that is no GGUF, and ValueError where the extra is missing or llama.cpp
    refuses the model.
    """
    check_gguf(model)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve other processes on the same cores
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as err:
        raise ValueError(
            "serve: engine llama.cpp needs the package xllamacpp; `pip install 'matryoshka-pilot[llama]'` installs it"
        ) from err
    params = CommonParams()
    params.model.path = str(model)
    params.model_alias = {name}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = config.slots
    params.n_ctx = config.context
    params.kv_unified = True
    params.cache_ram_mib = config.prompt_cache_mib
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # as above: threads that wait must sleep
    params.ui = False
    if api_key is not None:
        params.api_keys = [api_key]
    try:
        return Server(params)
    except RuntimeError as err:
        raise ValueError(f"{model}: llama.cpp cannot serve it: {err}; its own messages are above") from err
