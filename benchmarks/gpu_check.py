"""All that needs a GPU, in one go: kernel tests, then every benchmark on CUDA against the peers that are here.

Each benchmark is a process of its own, so that a failure leaves the memory and the results of the others alone. Ours
and the peers are measured inside the same process. The project's promises are checked on the numbers and written with
hardware, versions and commit to `benchmarks/results/`. A dry run takes the same path on a CPU at tiny sizes. It shows
that nothing is missing; its numbers are dropped and every row says "not measured". Run it by `scripts/gpu_check.sh`.
"""

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from matryoshka.core.files import write_json
from matryoshka.dpo.parity import BOUNDS
from matryoshka.pilot.environment import ROOT, environment

NOT_MEASURED = "not measured"
# In order of worth; a GPU that is lent for a short time is best used in two calls.
CALLS = (("tests", "compute", "step"), ("head", "sft", "padded", "qlora", "ranks", "load"))
PARTS = CALLS[0] + CALLS[1]
Benches = Mapping[str, Mapping[str, Any]]  # name of the run -> the object that the bench printed
# Import name -> what --against calls it.
HEAD_PEERS = {"liger_kernel": "liger", "cut_cross_entropy": "cce", "trl": "trl"}


@dataclass(frozen=True)
class Config:
    """Kernel tests and all benchmarks on this machine's GPU."""

    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder, for its tokenizer and for `bench load`."""
    data: Path | None = None
    """Rows for `bench step`; default: the embedded word problems."""
    out: Path = Path("benchmarks/results")
    """Folder of the results."""
    only: tuple[str, ...] = ()
    """Parts to run, of tests, compute, step, head, sft, padded, qlora, ranks and load; default: all."""
    call: int = 0
    """1 or 2: the parts of the first or the second of two calls; 0: those of `only`."""
    limit_s: float = 0.0
    """Seconds for all parts together; a part beyond them is ended or not begun, and counts as failed. 0: no limit."""
    dry_run: bool = False
    """Run tiny sizes on the CPU and write nothing."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(PARTS)):
            raise ValueError(f"gpu_check: --only {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
        if self.call not in (0, 1, 2) or (self.call and self.only):
            raise ValueError(f"gpu_check: --call {self.call}; expected 1 or 2, without --only")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to run, in order."""
        return CALLS[self.call - 1] if self.call else self.only or PARTS


@dataclass(frozen=True)
class Check:
    """A promise: what is read from the benches, and the limit it must keep (at_least, else at most)."""

    name: str
    unit: str
    limit: float
    at_least: bool
    read: Callable[[Benches], float | None]

    def row(self, benches: Benches) -> dict[str, Any]:
        """Return name, value, unit, limit, holds; value and holds are None where a row or its peer is missing."""
        value = self.read(benches)
        holds = None if value is None else value >= self.limit if self.at_least else value <= self.limit
        kind = "at least" if self.at_least else "at most"
        return {"name": self.name, "value": value, "unit": self.unit, kind: self.limit, "holds": holds}


def commands(config: Config, peers: Sequence[str], chart: Path) -> dict[str, list[str]]:
    """Return the arguments of each `matryoshka bench`; peers: import names of those that are installed."""
    head = ["--against", "eager", *(name for module, name in HEAD_PEERS.items() if module in peers)]
    model = ["--model", str(config.model)]
    data = [] if config.data is None else ["--data", str(config.data)]
    trl = [] if "trl" not in peers else ["trl-liger"] if "liger_kernel" in peers and not config.dry_run else ["trl"]
    compare = ["--compare-losses", "50", "--compare-pairs", "12"] if trl else []
    load = ["load", *model, "--against", *(["transformers"] if "transformers" in peers else [])]
    if config.dry_run:
        on_cpu = [name for name in head if name not in ("liger", "cce")]
        tiny = "--questions 1 --pairs 1 --steps 1 --repeats 1 --trl-pairs 1".split()
        short = "--objective sft --questions 1 --steps 1 --repeats 1 --sequence-length 32".split()
        shorter = ["--compare-losses", "2", "--compare-pairs", "1"] if trl else []
        return {
            "compute": ["compute", *model, "--draws", "2", "--tokens", "4"],
            "head": ["head", *on_cpu, *"--tokens 8 --hidden 16 --vocabulary 64 --repeats 1".split()],
            "step": ["step", *model, *data, *tiny, *shorter, "--against", "padded", "packed", *trl],
            "sft": ["step", *model, *short, "--against"],
            **({"qlora": ["qlora", *model, *data, *tiny[:-2]]} if "bitsandbytes" in peers else {}),
            "load": [*load, "--repeats", "1"],
            "ranks": ["ranks", *model, "--ranks", "1", "--tokens", "32"],
        }
    cuda = ["--device", "cuda"]
    large = [*cuda, "--shape", "llama3-8b", "--compile-blocks", *model]
    pal = "--questions 24 --pairs 5 --steps 2 --repeats 2 --trl-pairs 8 12 --micro-batch-tokens 16384".split()
    plain = "--objective sft --questions 4 --steps 3 --sequence-length 4096 --micro-batch-tokens 16384".split()
    four_bits = [*cuda, "--shape", "llama3-8b", *model, *data, "--micro-batch-tokens", "4096", "--activations", "full"]
    return {
        "compute": ["compute", *cuda, *model, "--compile-blocks"],
        "head": ["head", *cuda, *head],
        "step": ["step", *large, *data, *pal, *compare, "--profile", str(chart), "--against", "packed", *trl],
        "padded": ["step", *large, *data, *pal, "--padded-pairs", "12", "--against", "padded"],
        "sft": ["step", *large, *plain, "--against"],
        **({"qlora": ["qlora", *four_bits]} if "bitsandbytes" in peers else {}),
        "load": [*load, *cuda],
        "ranks": ["ranks", *model, *cuda, *"--dtype bfloat16 --ranks 1 --tokens 4096".split()],
    }


CHECKS = (
    Check("first loss of DPO under compilation, distance from ln 2", "nats", 1e-5, False, lambda b: _first_loss(b)),
    Check("sampler against trainer", "nats", BOUNDS["bfloat16"], False, lambda b: _value(b, "compute", "sampler")),
    Check("flash head, 8192 tokens", "ms", 26.0, False, lambda b: _head(b, "flash head", "value")),
    Check("flash head over two vocabulary products", "", 1.1, False, lambda b: _over_floor(b)),
    Check("flash head, extra memory", "MiB", 400.0, False, lambda b: _head(b, "flash head", "extra_mib")),
    Check("flash head, gradient error over eager's", "", 1.5, False, lambda b: _error_ratio(b)),
    Check("DPO over TRL's best configuration", "", 12.0, True, lambda b: _over_trl(b)),
    Check("DPO peak memory over that TRL configuration's", "", 1.0, False, lambda b: _peak_ratio(b)),
    Check("largest difference of losses over 50 steps", "nats", 0.05, False, lambda b: _value(b, "step", "over 50")),
    Check("graphs compiled after the first epoch", "", 0.0, False, lambda b: _value(b, "step", "epochs after")),
    Check("peak memory of a step against the prediction", "", 0.1, False, lambda b: _prediction_error(b)),
    Check("QLoRA peak memory of a step, weights included, over bf16's", "", 0.6, False, lambda b: _four_bits(b)),
    Check("SFT, sequences of 4096 tokens", "tokens/s", 15000.0, True, lambda b: _value(b, "sft", "token tree")),
)


def main(config: Config) -> int:
    """Run it all and print one JSON object; return 1 where a test, a bench or a check failed, else 0.

    Raises ValueError without a GPU, unless it is a dry run.
    """
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("gpu_check: torch finds no GPU here; --dry-run goes through all of it on the CPU")
    if not (config.model / "config.json").is_file():
        raise ValueError(f"gpu_check: {config.model}: no model folder; `matryoshka convert` makes one, or set --model")
    hardware = environment()
    gpu = hardware["gpus"][0]["name"].replace(" ", "-").lower() if hardware["gpus"] else "cpu"
    which = [f"call{config.call}"] if config.call else config.only
    stem = "_".join([gpu, (hardware["commit"] or "unknown")[:12], *which])
    modules = ("liger_kernel", "cut_cross_entropy", "trl", "transformers", "bitsandbytes")
    peers = [name for name in modules if importlib.util.find_spec(name)]
    ends = time.monotonic() + (config.limit_s or math.inf)
    tests = _tests(config.dry_run) if "tests" in config.parts else {"status": 0, "summary": NOT_MEASURED}
    benches: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    known = commands(config, peers, config.out / f"{stem}.png")
    for name in (part for part in config.parts if part in known):
        print(f"bench {' '.join(known[name])}", file=sys.stderr)
        left = ends - time.monotonic()
        done = None if left <= 0 else _run("matryoshka.scripts.cli", "bench", *known[name], "--json", limit_s=left)
        if done is None or done.returncode:
            last = "" if done is None else done.stderr.strip()
            failures[name] = "out of time" if done is None else (last.splitlines() or ["no message"])[-1]
            print(f"failed: {failures[name]}", file=sys.stderr)
        else:
            benches[name] = json.loads(done.stdout.splitlines()[-1])
    checks = [check.row({} if config.dry_run else benches) for check in CHECKS]
    if config.dry_run:
        benches = {name: unmeasured(bench) for name, bench in benches.items()}
    result = {"hardware": hardware, "tests": tests, "checks": checks, "failures": failures, "benches": benches}
    if not config.dry_run:
        write_json(config.out / f"{stem}.json", result)
    print(json.dumps(result))
    failed = failures or tests["status"] or any(check["holds"] is False for check in checks)
    return 1 if failed else 0


def unmeasured(bench: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bench's object with the names of its rows and none of its numbers."""
    rows = [{"name": row["name"], "value": None, "unit": row["unit"], "note": NOT_MEASURED} for row in bench["rows"]]
    return {**bench, "rows": rows, "ratio": None, "holds": None}


def _tests(dry_run: bool) -> dict[str, Any]:
    """Return pytest's status (0: passed) and its last line over the tests that need a GPU; a dry run collects them."""
    only = ["--collect-only"] if dry_run else []
    done = _run("pytest", "-m", "gpu", "-q", *only, *(str(ROOT / "tests" / name) for name in ("core", "lora", "dpo")))
    assert done is not None  # it has no limit
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return {"status": done.returncode, "summary": last[0] if last else ""}


def _run(module: str, *arguments: str, limit_s: float = math.inf) -> subprocess.CompletedProcess[str] | None:
    """Return the finished process, None if it was ended after `limit_s`."""
    limit = None if math.isinf(limit_s) else limit_s
    try:
        return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None


def _row(benches: Benches, bench: str, part: str) -> Mapping[str, Any]:
    rows: list[Mapping[str, Any]] = benches.get(bench, {}).get("rows", [])
    return next((row for row in rows if part in row["name"]), {})


def _value(benches: Benches, bench: str, part: str) -> float | None:
    value: float | None = _row(benches, bench, part).get("value")
    return value


def _head(benches: Benches, implementation: str, key: str) -> float | None:
    value: float | None = _row(benches, "head", f"{implementation}, 8192 tokens").get(key)
    return value


def _first_loss(benches: Benches) -> float | None:
    return _value(benches, "compute", "one step of dpo: first loss less")


def _over_floor(benches: Benches) -> float | None:
    ours, floor = (_head(benches, name, "value") for name in ("flash head", "two vocabulary products"))
    return ours / floor if ours and floor else None


def _error_ratio(benches: Benches) -> float | None:
    ours, eager = (_head(benches, name, "gradient_error") for name in ("flash head", "eager"))
    return ours / eager if ours is not None and eager else None


def _best_trl(benches: Benches) -> Mapping[str, Any] | None:
    rows: list[Mapping[str, Any]] = benches.get("step", {}).get("rows", [])
    trl = [row for row in rows if row["name"].startswith("trl") and row["value"] is not None]
    return max(trl, key=lambda row: float(row["value"]), default=None)


def _over_trl(benches: Benches) -> float | None:
    best, ours = _best_trl(benches), _value(benches, "step", "token tree")
    return float(ours / best["value"]) if best and ours else None


def _peak_ratio(benches: Benches) -> float | None:
    best, ours = _best_trl(benches), _row(benches, "step", "token tree").get("peak_gib")
    return float(ours / best["peak_gib"]) if best and ours else None


def _four_bits(benches: Benches) -> float | None:
    ours, plain = (_value(benches, "qlora", f"peak of a step with the weights, {n}") for n in ("nf4", "bfloat16"))
    return ours / plain if ours and plain else None


def _prediction_error(benches: Benches) -> float | None:
    over = _row(benches, "step", "peak memory of a step").get("over_predicted")
    return None if over is None else abs(float(over) - 1)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config)))
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
