"""dpo/kernels.py: the Triton fold against the eager computation in float64, on a GPU or in Triton's interpreter.

Without a GPU, `test_in_the_interpreter` runs this file again in a process where TRITON_INTERPRET=1 (Triton decides at
its import), and another test compiles the kernel for an H100, which needs no GPU.
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.dpo import head, kernels
from matryoshka.dpo.head import eager_logps, token_logps

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels themselves are tested in this process")
def test_in_the_interpreter() -> None:
    """Oracle: the tests below, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("mass", ["*bf16", "*fp32"])
def test_compiles_for_an_h100(mass: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the compiler: no error, nothing spilled, and 16 bytes at a time from and to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    sizes = ("row_start", "num_tokens", "column_start", "num_columns", "vocabulary", "store")
    signature = {"logits": "*fp32", "mass": mass, "targets": "*i64", "state": "*fp32", **dict.fromkeys(sizes, "i32")}
    signature["softcap"] = "fp32"
    constants = {"SAFE": kernels.SAFE, "LOWEST": LOWEST, "BLOCK": kernels.BLOCK}
    unknown = ("row_start", "num_tokens", "store", "softcap")  # what the launch does not specialise on
    multiples = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unknown}
    source = compiler.ASTSource(
        kernels.fold_kernel(), signature | dict.fromkeys(constants, "constexpr"), constants, multiples
    )
    code = compiler.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    assert ".local" not in code


def case(rows: int, size: int, vocabulary: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Return hidden states, head and targets; a third of the rows has an almost certain target, ends included."""
    draws = torch.Generator().manual_seed(0)
    hidden_SD = scale * torch.randn(rows, size, generator=draws)
    head_VD = torch.randn(vocabulary, size, generator=draws)
    target_S = torch.randint(0, vocabulary, (rows,), generator=draws)
    target_S[0], target_S[-1] = 0, vocabulary - 1
    hidden_SD[: rows // 3] = 3 * scale * head_VD[target_S[: rows // 3]]
    return hidden_SD.to(DEVICE, dtype), head_VD.to(DEVICE, dtype), target_S.to(DEVICE)


def set_tiles(patch: pytest.MonkeyPatch, rows: int, columns: int, block: int) -> None:
    """Make tiles of these sizes, whatever the vocabulary."""
    patch.setattr(kernels, "PROBS_BYTES", 1)
    patch.setattr(kernels, "LOGITS_BYTES", 1)
    patch.setattr(kernels, "ROW_BLOCK", rows)
    patch.setattr(kernels, "COLUMN_BLOCK", columns)
    patch.setattr(kernels, "BLOCK", block)


def truth(
    hidden: Tensor, weights: Tensor, target: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probs and their gradients in the hidden states, eager in float64 on the same numbers."""
    leaf = hidden.detach().double().requires_grad_()
    logps = eager_logps(leaf, weights.detach().double(), target, softcap)
    return logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]


class TestKernels:
    """Collected where the kernels can run: compiled on a GPU, else interpreted."""

    __test__ = INTERPRETED or DEVICE == "cuda"

    @pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (7, 5, 83), (5, 8, 64)])
    @pytest.mark.parametrize("tiles", [(3, 24, 16), (128, 256, 128)])
    @pytest.mark.parametrize("softcap", [None, 4.0, 30.0])
    def test_equals_eager(
        self,
        rows: int,
        size: int,
        vocabulary: int,
        tiles: tuple[int, int, int],
        softcap: float | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Oracle: eager in float64; fp32 operands, so 1e-5 of the largest logit (about 10) and of a head's row."""
        set_tiles(monkeypatch, *tiles)
        hidden, weights, target = case(rows, size, vocabulary, torch.float32)
        logps, direction = truth(hidden, weights, target, softcap)
        scored = kernels.score_tiles(hidden, weights, target, softcap, with_direction=True)
        torch.testing.assert_close(scored.logps_S.double(), logps, rtol=1e-5, atol=1e-5)
        assert scored.direction_SD is not None
        torch.testing.assert_close(scored.direction_SD.double(), direction, rtol=1e-4, atol=1e-5)

    def test_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: float64 on the same bf16 numbers; root mean squares. Log-probs: 1.5 times eager's error at most.

        Gradients: twice eager's, which rounds to bf16 once; here e^(z - reference), direction and gradient each are.
        """
        set_tiles(monkeypatch, 16, 128, 128)
        hidden, weights, target = case(24, 32, 251, torch.bfloat16, scale=0.5)
        logps, direction = truth(hidden, weights, target)
        hidden.requires_grad_()
        errors = []
        for function in (eager_logps, token_logps):
            got = function(hidden, weights, target)
            (grad,) = torch.autograd.grad(got.sum(), hidden)
            assert got.dtype == torch.float32 and grad.dtype == torch.bfloat16
            pairs = ((got.detach(), logps), (grad, direction))
            errors.append([(x.double() - exact).square().mean().sqrt().item() for x, exact in pairs])
        (eager, eager_grad), (ours, our_grad) = errors
        assert ours <= 1.5 * eager + 2**-24 * logps.abs().max().item()
        assert our_grad <= 2 * eager_grad

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_pass_has_the_same_bits(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: the pass with gradients, bit by bit, through the public function: without them."""
        set_tiles(monkeypatch, 4, 40, 32)
        hidden, weights, target = case(6, 8, 101, dtype)
        trained = token_logps(hidden.requires_grad_(), weights, target)
        assert trained.requires_grad
        with torch.no_grad():
            assert torch.equal(token_logps(hidden, weights, target), trained)

    @pytest.mark.parametrize("course", ["climbing", "falling", "late"])
    def test_logits_that_grow(self, course: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: eager in float64. Sums and stored values must be scaled again, or not.

        Climbing: by 90 a tile, to e^540, which fp32's exponent does not hold. Falling: nothing moves. Late: 59 above
        the first block, which is let pass, and above 60 in the second block of the last tile, where it all moves.
        """
        set_tiles(monkeypatch, 4, 16, 8)
        column = torch.arange(96.0)
        slope = {
            "climbing": 90 / 16 * column,
            "falling": 90 / 16 * (95 - column),
            "late": torch.where(column < 8, 0.0, torch.where(column < 88, 57.0, 62.0)),
        }[course]
        hidden = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, -0.5]], device=DEVICE)
        noise = torch.randn(96, generator=torch.Generator().manual_seed(0))
        weights = torch.stack((slope, noise), dim=1).to(DEVICE)
        target = torch.tensor([0, 50, 95], device=DEVICE)
        logps, direction = truth(hidden, weights, target)
        scored = kernels.score_tiles(hidden, weights, target, None, with_direction=True)
        assert scored.direction_SD is not None
        torch.testing.assert_close(scored.logps_S.double(), logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scored.direction_SD.double(), direction, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("gap", [20.0, 80.0])
    def test_relative_accuracy_near_one(self, gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: float64, logp = -log1p(sum e^(z_j - z_y)), down to 1 - p = e^-80; relative 1e-4."""
        set_tiles(monkeypatch, 4, 6, 4)
        hidden, weights, _ = case(3, 4, 11, torch.float32, scale=0.1)
        hidden[:, 0], weights[:, 0] = 1.0, 0.0
        weights[2, 0] = gap
        leaf = hidden.double().requires_grad_()
        z = leaf @ weights.double().T
        others = [i for i in range(11) if i != 2]
        exact = -torch.log1p((z[:, others] - z[:, 2:3]).exp().sum(1))
        (direction,) = torch.autograd.grad(exact.sum(), leaf)
        scored = kernels.score_tiles(hidden, weights, torch.full((3,), 2, device=DEVICE), None, with_direction=True)
        torch.testing.assert_close(scored.logps_S.double(), exact, rtol=1e-4, atol=0)
        assert scored.direction_SD is not None
        assert (scored.direction_SD.double() - direction).norm() <= 1e-4 * direction.norm()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_shows_in_its_row_alone(self, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: the clean rows' bits; NaN in the spoiled one, log-prob and gradient."""
        set_tiles(monkeypatch, 4, 24, 16)
        hidden, weights, target = case(5, 4, 53, torch.float32)
        clean = kernels.score_tiles(hidden, weights, target, None, with_direction=True)
        hidden[2, 1] = bad
        spoiled = kernels.score_tiles(hidden, weights, target, None, with_direction=True)
        rest = torch.arange(5, device=DEVICE) != 2
        assert clean.direction_SD is not None and spoiled.direction_SD is not None
        assert spoiled.logps_S[2].isnan() and spoiled.direction_SD[2].isnan().any()
        assert torch.equal(spoiled.logps_S[rest], clean.logps_S[rest])
        assert torch.equal(spoiled.direction_SD[rest], clean.direction_SD[rest])

    def test_a_target_outside_the_vocabulary_is_not_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: by definition: a GPU is not asked to look, so the log-prob must show it."""
        set_tiles(monkeypatch, 4, 24, 16)
        hidden, weights, target = case(3, 4, 53, torch.float32)
        target[1] = 53
        assert kernels.score_tiles(hidden, weights, target, None, True).logps_S.isnan().tolist() == [False, True, False]

    def test_the_head_takes_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: eager's autograd for both inputs of a trainable head, with the torch tiles out of reach."""
        set_tiles(monkeypatch, 4, 24, 16)
        hidden, weights, target = case(6, 4, 53, torch.float32)
        inputs = hidden.requires_grad_(), weights.requires_grad_()
        expected = torch.autograd.grad(eager_logps(*inputs, target).sum(), inputs)

        def refuse(*args: Any) -> None:
            raise AssertionError("the torch path was taken")

        monkeypatch.setattr(head, "score_tiles", refuse)
        got = torch.autograd.grad(token_logps(*inputs, target).sum(), inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tiles_of_llama_3() -> None:
    """Oracle: by hand: 1024 rows of bf16 over 128256 tokens fit into 256 MiB, 8192 columns of fp32 into 32 MiB."""
    assert kernels.tile_shape(8192, 128256, torch.bfloat16) == (1024, 8192)
    assert kernels.tile_shape(8192, 128256, torch.float32) == (512, 16384)
    assert kernels.tile_shape(100, 128256, torch.bfloat16) == (100, 83712)
    assert kernels.tile_shape(0, 500, torch.bfloat16) == (0, 500)
    assert kernels.tile_shape(8192, 49152, torch.bfloat16) == (2688, 3072)
