"""The flash head on a GPU: cuBLAS multiplies, one Triton kernel folds each tile of fp32 logits.

For a tile of rows, vocabulary tile after vocabulary tile: logits = h W^T in fp32, small enough to stay in the cache;
`fold` turns them into e^(z - reference) in the head's dtype and keeps each row's sums. At the end one product with the
whole head gives the gradient's direction, with no accumulator that travels through memory. One program folds one row
from left to right: no atomics, the same bits every time, and nothing that the host would have to wait for. A pass
without gradients runs the same binary and writes nothing. `head.score_tiles` is the same in torch, and the reference.

Triton is imported where this module is used; its interpreter (TRITON_INTERPRET=1) runs the kernel on a CPU.
"""

from __future__ import annotations  # the kernel's annotations name triton, which need not be installed

import functools
from typing import Any

import torch
from torch import Tensor

from matryoshka.core.models.language_model import product
from matryoshka.dpo.head_state import Scored, new_state, summary, to_direction

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PROBS_BYTES = 256 * 2**20  # e^(z - reference) of a tile of rows over the whole vocabulary: bf16, 1024 rows of 128256
ROW_BLOCK, COLUMN_BLOCK = 128, 256  # tiles are made of whole blocks of a matrix product
LOGITS_BYTES = 32 * 2**20  # fp32 logits at a time: within an H100's 50 MB of cache
BLOCK = 4096
# The reference moves only when a logit exceeds it by this much: e^60 summed over a vocabulary is far from fp32's and
# bf16's limit of e^88, so that what is stored need not be scaled again whenever the maximum grows a little.
SAFE = 60.0


def score_tiles(
    hidden_SD: Tensor, head_VD: Tensor, target_S: Tensor, softcap: float | None, with_direction: bool
) -> Scored:
    """Return the results of `head.score_tiles` for bf16 or fp32 operands of one dtype.

    The direction comes in their dtype. Error, bf16: e^(z - reference) is rounded to bf16 for the second product and the
    direction once more, log-probs are not. Error, soft-cap c: tanh is 1 - 2 / (e^2x + 1), within 1.2e-7 c of a logit.
    """
    num_tokens, vocabulary = len(hidden_SD), len(head_VD)
    rows, columns = tile_shape(num_tokens, vocabulary, head_VD.dtype)
    logits = hidden_SD.new_empty(rows * columns, dtype=torch.float32)
    mass = head_VD.new_empty(rows if with_direction else 0, vocabulary)
    state_3S = new_state(hidden_SD, torch.float32)
    direction_SD = torch.empty_like(hidden_SD) if with_direction else None
    target_S = target_S.contiguous()
    for start in range(0, num_tokens, rows):
        hidden = hidden_SD[start : start + rows]
        for first in range(0, vocabulary, columns):
            weight = head_VD[first : first + columns]
            num_rows, num_columns = len(hidden), len(weight)
            tile = product(hidden, weight.T, out=logits[: num_rows * num_columns].view(num_rows, num_columns))
            fold_kernel()[(num_rows,)](
                tile, mass, target_S, state_3S, start, num_tokens, first, num_columns, vocabulary,
                int(with_direction), softcap or 0.0, SAFE=SAFE, LOWEST=torch.finfo(torch.float32).min, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip
        if direction_SD is not None:
            here = slice(start, start + rows)
            sums = product(mass[: len(hidden)], head_VD)
            to_direction(sums, head_VD, target_S[here], state_3S[:, here], softcap)
            direction_SD[here] = sums
    return summary(state_3S, direction_SD)


def tile_shape(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return rows and columns of a tile of logits, within the bytes set above."""
    row_blocks = PROBS_BYTES // (vocabulary * dtype.itemsize) // ROW_BLOCK
    rows = min(max(1, row_blocks) * ROW_BLOCK, num_tokens)
    column_blocks = LOGITS_BYTES // (4 * max(1, rows)) // COLUMN_BLOCK
    return rows, min(max(1, column_blocks) * COLUMN_BLOCK, vocabulary)


@functools.cache
def fold_kernel() -> Any:
    """Return the compiled (or interpreted) kernel. Raises ImportError, naming the extra, where Triton is missing."""
    if triton is None:
        raise ImportError("the head on a GPU needs Triton: pip install 'matryoshka-pilot[cuda]'")
    # Specialised on 0 or 1, passes with and without gradients would be two binaries.
    return triton.jit(_fold, do_not_specialize=["row_start", "num_tokens", "store", "softcap"])


def _fold(  # type: ignore[no-untyped-def]  # Triton reads annotations: it knows its own names alone
    logits, mass, targets, state, row_start, num_tokens, column_start, num_columns, vocabulary, store,
    softcap, SAFE: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold row `program_id` of a [rows, num_columns] tile of logits into `state`, [3, num_tokens], and `mass`.

    softcap: of the logits, 0 for none; `mass` then holds e^(z - reference) times the slope of the cap.
    """
    row = tl.program_id(0).to(tl.int64)
    at = state + row_start + row
    reference = tl.load(at)
    rest = tl.load(at + num_tokens)
    own = tl.load(at + 2 * num_tokens)
    target = tl.load(targets + row_start + row) - column_start
    num_stored = num_columns * store  # as a bound, unlike a condition, it lets the compiler see that stores are aligned
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        z = tl.load(logits + row * num_columns + column, mask=inside, other=LOWEST)
        slope = tl.full([BLOCK], 1.0, tl.float32)
        if softcap > 0:
            z = 1 - 2 / (tl.exp(tl.minimum(2 * z / softcap, 80.0)) + 1)
            slope = 1 - z * z
            z = tl.where(inside, softcap * z, LOWEST)
        if (target >= start) & (target < start + BLOCK) & (target < num_columns):
            own = tl.load(logits + row * num_columns + target)
            if softcap > 0:
                own = softcap * (1 - 2 / (tl.exp(tl.minimum(2 * own / softcap, 80.0)) + 1))
        z = tl.where(column == target, LOWEST, z)
        highest = tl.max(z, axis=0)
        if highest - reference > SAFE:
            keep = tl.exp(reference - highest)
            rest = rest * keep
            reference = highest
            if store > 0:
                tl.debug_barrier()  # other threads of this program wrote the values that are read here
                for before in range(0, column_start + start, BLOCK):
                    earlier = before + tl.arange(0, BLOCK)
                    written = earlier < column_start + start
                    value = tl.load(mass + row * vocabulary + earlier, mask=written, other=0.0)
                    value = (value.to(tl.float32) * keep).to(mass.dtype.element_ty)
                    tl.store(mass + row * vocabulary + earlier, value, mask=written)
                tl.debug_barrier()
        e = tl.exp(z - reference)
        rest += tl.sum(e, axis=0)
        to = mass + row * vocabulary + column_start + column
        tl.store(to, (e * slope).to(mass.dtype.element_ty), mask=column < num_stored)
    tl.store(at, reference)
    tl.store(at + num_tokens, rest)
    tl.store(at + 2 * num_tokens, own)
