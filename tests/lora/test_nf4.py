"""lora/nf4.py: oracles are the paper's construction of the levels, the twin in plain torch, and bitsandbytes' layer."""

import sys

import pytest
import torch
from torch import Tensor

from matryoshka.lora.nf4 import BLOCK, LEVELS, NF4, SCALES, dense, dense_twin, quantize

bitsandbytes = pytest.importorskip("bitsandbytes")

# One block that is not full; two rows a block; blocks across rows; more than one block of scales, not full.
SHAPES = [(5, 6), (6, 32), (16, 96), (301, 130)]


def nf4_bytes(numbers: int) -> int:
    """Return the bytes of a weight of so many numbers, its scales included."""
    blocks = -(-numbers // BLOCK)
    return numbers // 2 + blocks + 4 * (-(-blocks // SCALES) + 1 + 256)


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(shape, generator=draws)).to(device, dtype)


def test_levels_are_the_papers() -> None:
    """Oracle: the construction of section 3 in float64, to the 1e-6 with which the authors evaluated the quantiles.

    Quantiles of N(0, 1) from the probability 1 - (1/32 + 1/30) / 2 inwards, 8 steps above zero and 7 below, scaled to
    [-1, 1].
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, steps, dtype=torch.float64))[:-1] for steps in (9, 8)
    )
    levels = torch.cat((-below, torch.zeros(1, dtype=torch.float64), above.flip(0))) / above.max()
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), levels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_takes_the_nearest_level_and_scale(shape: tuple[int, int]) -> None:
    """Oracle: argmin by definition; 1e-6 beyond the least distance is allowed, as the quotient is rounded to fp32."""
    weight_OI = weights(shape)
    packed, scales = quantize(weight_OI)
    blocks = torch.nn.functional.pad(weight_OI.reshape(-1), (0, -weight_OI.numel() % BLOCK)).view(-1, BLOCK).double()
    largest_N = blocks.abs().max(1).values
    quotients = (blocks / largest_N[:, None]).view(-1)[: weight_OI.numel()]
    far = (quotients[:, None] - torch.tensor(LEVELS, dtype=torch.float64)).abs()
    flat = packed.reshape(-1).long()
    taken = torch.stack((flat >> 4, flat & 15), dim=1).view(-1)
    assert (far.gather(1, taken[:, None])[:, 0] - far.min(1).values).max() <= 1e-6

    assert scales.offset.item() == pytest.approx(largest_N.mean().item(), rel=1e-6)
    rest = torch.nn.functional.pad(largest_N - scales.offset.double(), (0, -len(largest_N) % SCALES)).view(-1, SCALES)
    torch.testing.assert_close(scales.nested.double(), rest.abs().max(1).values, rtol=1e-5, atol=1e-9)
    far = (rest[:, :, None] - scales.code.double() * scales.nested[:, None, None].double()).abs().flatten(0, 1)
    far = far[: len(largest_N)] / largest_N.max()
    assert (far.gather(1, scales.absmax.long()[:, None])[:, 0] - far.min(1).values).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_is_the_twin_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Oracle: the specification. The result is also as close to the quantised weight as half the widest gap of levels
    (0.152) allows.
    """
    weight_OI = weights(shape)
    packed, scales = quantize(weight_OI)
    got = dense(packed, scales, dtype)
    assert got.dtype == dtype and got.shape == shape
    assert torch.equal(got, dense_twin(packed, scales, dtype))
    assert (got.float() - weight_OI).abs().max() <= 0.16 * weight_OI.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_every_length_are_dense_as_the_twin_says(dtype: torch.dtype) -> None:
    """Oracle: the twin, over row lengths of every even residue modulo the block and numbers of rows of every parity.

    bitsandbytes takes another path on each kind of CPU, and that of 0.50.2 for AVX-512 was wrong for most of these.
    """
    wrong = []
    for inputs in range(2, 2 * BLOCK + 4, 2):
        for outputs in (1, 2, 3, 16):
            packed, scales = quantize(weights((outputs, inputs)))
            if not torch.equal(dense(packed, scales, dtype), dense_twin(packed, scales, dtype)):
                wrong.append((outputs, inputs))
    assert wrong == []


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_bitsandbytes_layer(shape: tuple[int, int]) -> None:
    """Oracle: bitsandbytes' Params4bit of the same weight: equal bytes and state; and a second time, and from bf16."""
    weight_OI = weights(shape, torch.bfloat16)
    packed, scales = quantize(weight_OI)
    theirs = bitsandbytes.nn.Params4bit(weight_OI.float(), quant_type="nf4", compress_statistics=True).to("cpu")
    state = theirs.quant_state
    assert torch.equal(packed.view(-1), theirs.data.view(-1)) and packed.dtype == torch.uint8
    expected = (state.absmax, state.state2.absmax, state.offset, state.state2.code)
    assert all(map(torch.equal, scales, expected))
    again, others = quantize(weight_OI.float())
    assert torch.equal(packed, again) and all(map(torch.equal, scales, others))


def test_bytes_by_hand() -> None:
    """Oracle: a weight of 64 x 512 has 512 blocks and two blocks of blocks: 16384 + 512 + 8 bytes, offset and code."""
    packed, scales = quantize(weights((64, 512)))
    assert nf4_bytes(64 * 512) == 16384 + 512 + 8 + 4 + 1024
    assert packed.nbytes + sum(tensor.nbytes for tensor in scales) == nf4_bytes(64 * 512)


def test_zeros_stay_zero() -> None:
    """Oracle: by definition; a block without a scale must not become 0 / 0."""
    weight_OI = weights((4, 128))
    weight_OI[1] = 0
    packed, scales = quantize(weight_OI)
    assert torch.equal(dense(packed, scales, torch.float32)[1], torch.zeros(128))


def test_what_cannot_be_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the messages: an odd number of inputs, and the extra to install where bitsandbytes is missing."""
    with pytest.raises(ValueError, match="a weight of 4 x 5 has an odd number of inputs"):
        quantize(torch.ones(4, 5))
    packed, scales = quantize(weights((4, 6)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for call in (lambda: quantize(torch.ones(4, 6)), lambda: dense(packed, scales, torch.float32)):
        with pytest.raises(ValueError, match=r"quantization = 'nf4' needs bitsandbytes: pip install 'matryoshka-"):
            call()


def test_a_weight_without_scales_is_itself() -> None:
    """Oracle: identity; the unquantised path copies nothing."""
    weight_OI = weights((4, 6))
    assert dense(weight_OI, None, torch.float64) is weight_OI


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Oracle: the twin on the CPU from the same bytes: one unit in the last place, as a GPU may fuse multiply and add.

    Bytes quantised on the GPU are the CPU's but where a quotient lies within rounding of the middle of two levels.
    """
    packed, scales = quantize(weights(shape, device="cuda"))
    on_cpu = NF4(*(tensor.cpu() for tensor in scales))
    expected = dense_twin(packed.cpu(), on_cpu, dtype)
    torch.testing.assert_close(dense(packed, scales, dtype).cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    other, _ = quantize(weights(shape))
    assert (packed.cpu() != other).float().mean() <= 1e-3
