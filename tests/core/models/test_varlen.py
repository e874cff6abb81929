"""core/models/varlen.py: the twin against the dense mask in float64; on a GPU the kernel against the twin."""

import random

import pytest
import torch
from torch import Tensor

from matryoshka.core.models.attention import Masked, tree_attention
from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree, packed_sequences
from matryoshka.core.models.varlen import TORCH, Varlen, calls_of, check_flash

CPU = torch.device("cpu")
KINDS = [LayerAttention(0, 0.5), LayerAttention(0, 0.3, window=3), LayerAttention(0, 0.7, softcap=0.9, window=9)]


def some_sequences(seed: int = 0) -> list[Tokens]:
    """Return sequences that share a header and, by threes, a question, then go apart; one stands alone."""
    draws = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(50) for _ in range(count))

    header, found = ids(7), [Tokens(ids(6), (0, 0, 1, 1, 1, 1))]
    for _ in range(2):
        question = (*header, *ids(draws.randint(1, 4)))
        for _ in range(3):
            answer = ids(draws.randint(1, 5))
            found.append(Tokens((*question, *answer, 0), (0,) * len(question) + (1,) * (len(answer) + 1)))
    return found


TREES = pytest.mark.parametrize(
    "tree", [build_tree(some_sequences()), packed_sequences(some_sequences())], ids=["tree", "packed"]
)


def inputs(tokens: int, dtype: torch.dtype = torch.float64, size: int = 4) -> list[Tensor]:
    """Return q [1, 6, T, H], k and v [1, 2, T, H], leaves, transposed in memory as a model hands them over."""
    draws = torch.Generator().manual_seed(0)
    shapes = ((1, tokens, heads, size) for heads in (6, 2, 2))
    made = (torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in made]


@TREES
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_twin_is_the_dense_mask(tree: TokenTree, kind: LayerAttention) -> None:
    """Oracle: `Masked`, output and gradients, float64 1e-12, on a tree of three levels and on packed sequences."""
    leaves = inputs(len(tree.ids_T))
    outs = [attend(kind, *leaves) for attend in (tree_attention(tree, CPU, "varlen"), Masked(tree))]
    grad = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours, theirs = ((out, *torch.autograd.grad(out, leaves, grad)) for out in outs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def listed(rows: Tensor | slice) -> list[int]:
    assert isinstance(rows, Tensor)
    return list(map(int, rows))


def test_calls_by_hand() -> None:
    """Oracle: by hand. Chains: the root 1 2, its branches 3 and 4 5, below which are 6 and 7, and another root."""
    rows = ((1, 2, 3, 0), (1, 2, 4, 5, 6, 0), (1, 2, 4, 5, 7, 0), (9, 0))
    tree = build_tree([Tokens(ids, (*(0,) * (len(ids) - 1), 1)) for ids in rows])
    first, second = calls_of(tree, CPU)
    assert first.causal and first.queries_Q == slice(0, 8) and first.starts_q.tolist() == [0, 2, 3, 5, 6, 7, 8]
    assert listed(first.keys_K) == [0, 1, 2, 3, 4, 3, 4, 5, 3, 4, 6, 7]
    assert first.starts_k.tolist() == [0, 2, 3, 5, 8, 11, 12] and (first.longest_q, first.longest_k) == (2, 3)
    assert not second.causal and (second.queries_Q, second.keys_K) == (slice(2, 7), slice(0, 2))
    assert second.starts_q.tolist() == [0, 5] and second.starts_k.tolist() == [0, 2]
    (windowed,) = calls_of(tree, CPU, window=2)
    assert listed(windowed.keys_K) == [0, 1, 1, 2, 1, 3, 4, 4, 5, 4, 6, 7]


def test_nothing_is_copied_in_trees_of_two_levels_and_packed_sequences() -> None:
    """Oracle: slices are read in place; the branches' common prefix is the keys of the second call."""
    tree = build_tree([Tokens((1, 2, 3, answer, answer, 0), (0, 0, 0, 1, 1, 1)) for answer in (4, 5, 6)])
    first, second = calls_of(tree, CPU)
    assert first.queries_Q == first.keys_K == slice(0, 9) and first.starts_k.equal(first.starts_q)
    assert (second.queries_Q, second.keys_K) == (slice(3, 9), slice(0, 3))
    (packed,) = calls_of(packed_sequences(some_sequences()), CPU)
    assert packed.queries_Q == packed.keys_K == slice(0, packed.starts_q[-1].item())
    assert packed.starts_q.equal(packed.starts_k)


def test_packed_sequences_are_the_tree_without_sharing() -> None:
    """Oracle: the tree of the same sequences, each made to differ in its first token."""
    sequences = some_sequences()
    apart = [Tokens((100 + index, *s.ids[1:]), s.mask) for index, s in enumerate(sequences)]
    one, two = packed_sequences(apart), build_tree(apart)
    for name in vars(two):
        left, right = getattr(one, name), getattr(two, name)
        assert left.equal(right) if isinstance(left, Tensor) else left == right, name
    assert len(packed_sequences([]).ids_T) == 0


def test_errors() -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match="backend 'flash' is unknown; choose from"):
        tree_attention(build_tree([]), CPU, "flash")
    check_flash(torch.bfloat16, 64)
    with pytest.raises(ValueError, match="bf16 or fp16, not torch.float32; use backend auto"):
        check_flash(torch.float32, 64)
    for size in (100, 264):
        with pytest.raises(ValueError, match=f"multiples of 8, not {size}"):
            check_flash(torch.float16, size)
    tree = build_tree(some_sequences())
    with pytest.raises(ValueError, match="2 rows; a token tree lies in one row"):
        Varlen(tree, CPU)(KINDS[0], *(x.expand(2, -1, -1, -1) for x in inputs(len(tree.ids_T))))


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_torchs_kernel_takes_these_arguments(kind: LayerAttention) -> None:
    """Oracle: torch's own rules for shapes, on the meta device: output [T, N, H], log-sum-exps [N, T], gradients."""
    q, k, v = (torch.empty(20, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2))
    for call in calls_of(build_tree(some_sequences()), torch.device("meta"), kind.window):
        out, lse = TORCH.forward(call, kind, (q, k, v))
        assert out.shape == q.shape and lse.shape == (6, 20) and lse.dtype == torch.float32
        grads = TORCH.backward(call, kind, (q, k, v), out, lse, out)
        assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    with pytest.raises(ValueError, match="has no soft-cap; install flash-attn"):
        TORCH.forward(call, KINDS[2], (q, k, v))


@pytest.mark.gpu
@TREES
@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_the_kernel_is_the_twin(tree: TokenTree, kind: LayerAttention) -> None:
    """Oracle: the twin in float64; errors in bf16 at most 1.5 times those of the twin in bf16, plus 1e-3."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = []
    for device, dtype in ((CPU, torch.float64), (CPU, torch.bfloat16), (torch.device("cuda"), torch.bfloat16)):
        leaves = [x.detach().bfloat16().to(device, dtype).requires_grad_() for x in inputs(len(tree.ids_T), size=64)]
        out = Varlen(tree, device)(kind, *leaves)
        found.append([x.cpu().double() for x in (out, *torch.autograd.grad(out.sum(), leaves))])
    for exact, twin, kernel in zip(*found, strict=True):
        errors = [(x - exact).square().mean().sqrt() for x in (twin, kernel)]
        assert errors[1] <= 1.5 * errors[0] + 1e-3
