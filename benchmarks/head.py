"""`matryoshka bench head`: log-probs of chosen tokens from hidden states and a frozen head, forward and backward.

Every implementation gets the same bf16 (CPU: fp32) tensors and the same task: the sum of -log p, whose gradient with
respect to the hidden states alone is wanted. Errors are taken against float64 on the first rows, which is fair since
rows do not depend on each other. The floor is two plain vocabulary products, h W^T and its result times W: no exact
method with a frozen head does with less. It is no competitor: it computes no log-prob.

Shapes: S scored tokens, D hidden, V vocabulary.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from matryoshka.benchmarks.measure import (
    MIB,
    alternate,
    check_peers,
    dtype_of,
    peak_bytes,
    peer,
    prepare,
    require,
    timed,
)
from matryoshka.benchmarks.result import BenchResult, Row, speed_up
from matryoshka.dpo.head import eager_logps, token_logps

PEERS = ("eager", "liger", "cce", "trl")
ERROR_ROWS = 256
OURS, FLOOR = "flash head", "two vocabulary products"
# Sizes of SmolLM2-135M and of Llama-3-8B.
SHAPES = {"cpu": (576, 49152), "cuda": (4096, 128256)}
TOKENS = {"cpu": (256, 1024), "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)}

Implementation = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden_SD, head_VD, target_S) -> -log p, [S] or its sum


@dataclass(frozen=True)
class Config:
    """Log-probs with a frozen head: time forward and backward, extra memory, error against float64."""

    device: str = "cpu"
    """Where to compute: "cpu" or "cuda"."""
    against: tuple[str, ...] = ("eager",)
    """Peers to measure: any of eager, liger, cce, trl."""
    tokens: tuple[int, ...] = ()
    """Numbers of tokens; default: those of the device."""
    hidden: int = 0
    """Hidden size, 0 for SmolLM2-135M's on a CPU and Llama-3-8B's on a GPU."""
    vocabulary: int = 0
    """Vocabulary size, 0 as for `hidden`."""
    dtype: str = ""
    """Data type; "" is float32 on a CPU, bfloat16 on a GPU."""
    repeats: int = 5
    """Measurements; their median counts."""
    warmup: int = 2
    """Passes before the first measurement."""
    threads: int = 0
    """CPU threads, 0 for as many as there are cores."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_peers("head", self.against, PEERS)
        if min(self.tokens, default=1) < 1 or self.repeats < 1:
            raise ValueError("bench head: tokens and repeats must be at least 1")


def run(config: Config) -> BenchResult:
    """Return rows for every implementation and number of tokens; the ratio is the worst over the numbers of tokens."""
    packages = require(config.against)
    prepare(config.device, config.threads)
    kind = torch.device(config.device).type
    implementations = {OURS: _ours, **{name: _peers_own(name, kind) for name in config.against}}
    default_hidden, default_vocabulary = SHAPES[kind]
    sizes = (config.hidden or default_hidden, config.vocabulary or default_vocabulary)
    rows: list[Row] = []
    for tokens in config.tokens or TOKENS[kind]:
        rows += _rows(config, implementations, tokens, *sizes)
    return BenchResult("head", rows, worst_ratio(rows), None, packages)


def worst_ratio(rows: list[Row]) -> float | None:
    """Return the smallest speed-up of ours over the best other implementation of the same number of tokens."""
    ratios = []
    for ours in rows:
        if ours.details["implementation"] != OURS or ours.value is None:
            continue
        others = [
            row.value
            for row in rows
            if row.details["tokens"] == ours.details["tokens"]
            and row.details["implementation"] not in (OURS, FLOOR)
            and row.value is not None
        ]
        if (ratio := speed_up(ours.value, others, higher_is_better=False)) is not None:
            ratios.append(ratio)
    return min(ratios, default=None)


def _rows(
    config: Config, implementations: Mapping[str, Implementation], tokens: int, hidden: int, vocabulary: int
) -> list[Row]:
    hidden_SD, head_VD, target_S = _inputs(config, tokens, hidden, vocabulary)
    works: dict[str, Callable[[], object]] = {
        name: partial(_forward_backward, implementation, hidden_SD, head_VD, target_S)
        for name, implementation in implementations.items()
    }
    works[FLOOR] = partial(_floor, hidden_SD, head_VD)
    errors = _errors(implementations, hidden_SD, head_VD, target_S)
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, work in works.items():
        try:
            for _ in range(config.warmup):
                work()
            peaks[name] = peak_bytes(work, config.device)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
    seconds = alternate({name: timed(works[name], config.device) for name in peaks}, config.repeats)
    rows = []
    for name in works:
        details: dict[str, object] = {"tokens": tokens, "implementation": name, "hidden": hidden}
        details |= {"vocabulary": vocabulary, "dtype": str(head_VD.dtype).removeprefix("torch.")}
        if name in failed:
            details["note"] = failed[name]
        else:
            details |= {"extra_mib": round(peaks[name] / MIB, 1), "min_ms": 1e3 * min(seconds[name])}
            details |= {"max_ms": 1e3 * max(seconds[name]), "repeats": config.repeats, **errors.get(name, {})}
        value = None if name in failed else 1e3 * statistics.median(seconds[name])
        rows.append(Row(f"{name}, {tokens} tokens", value, "ms", details))
    return rows


def _inputs(config: Config, tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the head have length about 1, and a hidden state leans by 0 to 20 towards its target's: p from 0 to 1."""
    device, dtype = torch.device(config.device), dtype_of(config.dtype, config.device)
    draws = torch.Generator(device).manual_seed(config.seed)
    head_VD = torch.randn(vocabulary, hidden, generator=draws, device=device).div_(hidden**0.5).to(dtype)
    target_S = torch.randint(vocabulary, (tokens,), generator=draws, device=device)
    lean_S1 = 20 * torch.rand(tokens, 1, generator=draws, device=device)
    noise_SD = torch.randn(tokens, hidden, generator=draws, device=device)
    hidden_SD = (noise_SD + lean_S1 * head_VD[target_S].float()).to(dtype)
    return hidden_SD.requires_grad_(), head_VD, target_S


def _forward_backward(
    implementation: Implementation, hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (sum of -log p, its gradient with respect to hidden_SD)."""
    total = implementation(hidden_SD, head_VD, target_S).sum()
    (gradient_SD,) = torch.autograd.grad(total, hidden_SD)
    return total.detach(), gradient_SD


def _floor(hidden_SD: Tensor, head_VD: Tensor) -> Tensor:
    with torch.no_grad():
        return (hidden_SD @ head_VD.T) @ head_VD


def _errors(
    implementations: Mapping[str, Implementation], hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor
) -> dict[str, dict[str, float]]:
    """Return, of the first rows, the error of the mean -log p in nats and the gradient's relative error."""
    hidden_SD, target_S = hidden_SD[:ERROR_ROWS].detach().requires_grad_(), target_S[:ERROR_ROWS]
    truth_SD = hidden_SD.detach().double().requires_grad_()
    total, gradient_SD = _forward_backward(_eager, truth_SD, head_VD.double(), target_S)
    errors = {}
    for name, implementation in implementations.items():
        ours, ours_SD = _forward_backward(implementation, hidden_SD, head_VD, target_S)
        errors[name] = {
            "mean_logp_error": ((ours.double() - total).abs() / len(target_S)).item(),
            "gradient_error": ((ours_SD.double() - gradient_SD).norm() / gradient_SD.norm()).item(),
        }
    return errors


def _ours(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> Tensor:
    return -token_logps(hidden_SD, head_VD, target_S)


def _eager(hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> Tensor:
    return -eager_logps(hidden_SD, head_VD, target_S)


def _peers_own(name: str, kind: str) -> Implementation:
    """Return the implementation of a peer in its fastest exact setting for this task."""
    if name == "eager":
        return _eager
    if name == "liger":
        if kind != "cuda":
            raise ValueError("bench head: liger runs on GPUs only; leave it out of --against on a CPU")
        # Summed: its fast path, which forms the gradient in the forward pass; per token it computes everything twice.
        liger = peer("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden_SD, head_VD, target_S: liger(head_VD, hidden_SD, target_S)
    if name == "cce":
        cce = peer("cut_cross_entropy").linear_cross_entropy
        # No filter: the one that skips small gradients is not exact, and no faster where probabilities are spread.
        settings = {"impl": "cce", "filter_eps": None} if kind == "cuda" else {"impl": "torch_compile"}
        return lambda hidden_SD, head_VD, target_S: cce(hidden_SD, head_VD, target_S, reduction="none", **settings)
    chunked = peer("trl.kernels").ChunkedLogProbFunction
    # The width and the outputs that its DPO trainer asks for, but for the statistics that only feed its log.
    return lambda hidden_SD, head_VD, target_S: -chunked.apply(
        hidden_SD, head_VD, None, target_S, 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]
