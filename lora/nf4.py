"""NF4: a frozen weight in four bits a number, as QLoRA stores it, quantised and made dense again by bitsandbytes.

A number is one of 16 levels (`LEVELS`, the quantiles of a normal distribution) times the scale of its block of 64
numbers, counted along the rows of the matrix. Scales are quantised again (double quantisation): to 8 bits, less their
mean, in blocks of 256, `code` being the 256 values that 8 bits stand for. A number takes 4 + 8/64 + 32/(64 * 256)
= 4.127 bits. The bytes are a plain uint8 matrix, which torch can shard, gather and copy like any other; the scales stay
apart in a tuple. `dense_twin` is the specification in plain torch, and bitsandbytes computes the same bits (held by a
test). Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3 and appendix E.

Shapes: O outputs, I inputs; N = O I / 64 blocks, K = N / 256 blocks of blocks, both rounded up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.core.training.optimizer import bitsandbytes

BLOCK, SCALES = 64, 256  # numbers that share a scale, scales that share one
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes makes dense
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """The scales of a packed weight: scale of block n = code[absmax[n]] * nested[n // 256] + offset."""

    absmax: Tensor  # uint8 [N]
    nested: Tensor  # fp32 [K]
    offset: Tensor  # fp32 []
    code: Tensor  # fp32 [256]


def quantize(weight_OI: Tensor) -> tuple[Tensor, NF4]:
    """Return the uint8 [O, I / 2] bytes, two numbers each, and the scales, on the weight's device.

    A function of the values alone: in fp32, bf16 or fp16 they give the same. Raises ValueError for an odd I and where
    bitsandbytes is missing.
    """
    outputs, inputs = weight_OI.shape
    if inputs % 2:
        raise ValueError(f"nf4: a weight of {outputs} x {inputs} has an odd number of inputs; two share a byte")
    functional = bitsandbytes("quantization = 'nf4'").functional
    packed, state = functional.quantize_4bit(
        weight_OI.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    nested = state.state2
    return packed.view(outputs, inputs // 2), NF4(state.absmax, nested.absmax, state.offset, nested.code)


def dense(weight: Tensor, scales: NF4 | None, dtype: torch.dtype) -> Tensor:
    """Return the [O, I] weight that `quantize` packed, in `dtype`; a weight without scales comes back as it is.

    The product of level and scale is rounded from fp32 to dtype; float64 holds it exactly.
    """
    if scales is None:
        return weight
    functional = bitsandbytes("quantization = 'nf4'").functional
    outputs, half = weight.shape
    nested = functional.QuantState(scales.nested, code=scales.code, blocksize=SCALES, dtype=torch.float32)
    state = functional.QuantState(
        scales.absmax,
        # One flat row: with rows that are not a multiple of 64 numbers long, the AVX-512 path of bitsandbytes 0.50.2
        # on CPUs makes a matrix dense wrongly (errors as large as the weights).
        shape=(1, 2 * half * outputs),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype if dtype in COMPUTED else torch.float32,
        offset=scales.offset,
        state2=nested,
    )
    weight_OI: Tensor = functional.dequantize_4bit(weight.view(-1, 1), state)
    return weight_OI.view(outputs, 2 * half).to(dtype)


def dense_twin(packed: Tensor, scales: NF4, dtype: torch.dtype) -> Tensor:
    """Return what `dense` returns: the specification. The high half of a byte comes first."""
    levels = torch.tensor(LEVELS, device=packed.device)
    bytes_N = packed.reshape(-1).long()
    values = levels[torch.stack((bytes_N >> 4, bytes_N & 15), dim=1)].view(-1)
    each = scales.nested.repeat_interleave(SCALES)[: len(scales.absmax)]
    scale_N = scales.code[scales.absmax.long()] * each + scales.offset
    values *= scale_N.repeat_interleave(BLOCK)[: len(values)]
    return values.view(len(packed), -1).to(dtype)
