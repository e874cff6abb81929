"""core/models/attention.py: the oracle is the dense mask, in float64; flex attention runs uncompiled on CPU."""

import random
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka.core.models import attention
from matryoshka.core.models.attention import (
    BLOCK,
    GRAPHS,
    Branches,
    Causal,
    Flex,
    Masked,
    block_mask,
    blocks,
    bucket,
    tree_attention,
)
from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.core.models.llama import Model, read_config
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree
from matryoshka.dpo.head import token_logps
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters
from matryoshka.tests.random_weights import randomise, randomise_adapter

LAYER = LayerAttention(0, 0.5)
LAYERS = [LAYER, LayerAttention(0, 0.3, window=1), LayerAttention(0, 0.7, softcap=0.9, window=4),
          LayerAttention(0, 0.5, softcap=2.0)]  # fmt: skip


def random_tree(seed: int, header: int, questions: int, answers: int, most: int) -> TokenTree:
    """Return the tree of a header, then questions, each with answers; lengths from 1 to `most`."""
    draws = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(50) for _ in range(count))

    start, sequences = ids(header), []
    for _ in range(questions):
        question = ids(draws.randint(1, most))
        for _ in range(answers):
            answer = ids(draws.randint(1, most))
            read = (*start, *question, *answer, 0)
            sequences.append(Tokens(read, (0,) * (len(read) - len(answer)) + (1,) * len(answer)))
    return build_tree(sequences)


trees = st.builds(
    random_tree, st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)
)


@pytest.fixture(params=[(0, 2), (0, 256), (30, 3), (2048, 256)], ids=str)
def costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Set a block's cost beside its scores, and where chains are cut: from a block for each branch to one in all."""
    monkeypatch.setattr(attention, "CALL", request.param[0])
    monkeypatch.setattr(attention, "PIECE", request.param[1])
    yield request.param


def inputs(tokens: int, dtype: torch.dtype = torch.float64, rows: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Return q [B, 6, T, 4], k and v [B, 2, T, 4], transposed in memory as a model hands them over."""
    draws = torch.Generator().manual_seed(seed)
    shapes = ((rows, tokens, heads, 4) for heads in (6, 2, 2))
    return tuple(torch.randn(s, generator=draws, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes)


@settings(max_examples=40, deadline=None)
@given(trees, st.sampled_from([0, 30, 2048]))
def test_blocks_cover_what_is_seen(tree: TokenTree, call: int) -> None:
    """Oracle: the dense mask: each query in one block, with all keys that it sees and those that it does not, named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL", call)
        patch.setattr(attention, "PIECE", 3)
        found = blocks(tree)
    assert [q for block in found for q in range(block.start, block.stop)] == list(range(len(tree.ids_T)))
    seen = torch.zeros_like(tree.attention_mask())
    for block in found:
        visible = torch.ones(block.stop - block.start, len(block.keys_K), dtype=torch.bool)
        visible[:, len(block.keys_K) - len(visible) :] = ~block.hidden_QL
        seen[block.start : block.stop, block.keys_K] = visible
    assert seen.equal(tree.attention_mask())


@settings(max_examples=40, deadline=None)
@given(trees, st.integers(0, 60))
def test_blocks_cost_the_least(tree: TokenTree, call: int) -> None:
    """Oracle: every choice of subtrees to keep whole, tried out on the chains of the tree found by hand."""
    parents, ends = tree.parent_T.tolist(), tree.end_T.tolist()
    children: dict[int, list[int]] = {node: [] for node in range(-1, len(parents))}
    for node, parent in enumerate(parents):
        children[parent].append(node)

    def least(start: int) -> int:
        depth, stop = int(tree.positions_T[start]), start
        while len(children[stop]) == 1:
            stop = children[stop][0]
        whole, alone = int(ends[start]) - start, stop + 1 - start
        apart = call + alone * (depth + alone) + sum(least(child) for child in children[stop])
        together: int = call + whole * (depth + whole)
        return min(apart, together)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL", call)
        cost = sum(call + (b.stop - b.start) * len(b.keys_K) for b in blocks(tree))
    assert cost == min(sum(least(root) for root in children[-1]), call + len(parents) ** 2)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_branches_are_the_dense_mask(costs: tuple[int, int], rows: int, layer: LayerAttention) -> None:
    """Oracle: `Masked`, output and gradients, float64 1e-12; grouped heads, one or two rows, windows and soft-caps."""
    for seed in range(4):
        tree = random_tree(seed, header=7, questions=3, answers=3, most=6)
        leaves = [x.requires_grad_() for x in inputs(len(tree.ids_T), rows=rows, seed=seed)]
        outs = [attend(layer, *leaves) for attend in (Branches(tree), Masked(tree))]
        grad = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        ours, theirs = ((out, *torch.autograd.grad(out, leaves, grad)) for out in outs)
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        with torch.no_grad():  # the reference pass has the same bits
            assert Branches(tree)(layer, *leaves).equal(outs[0])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradients_of_branches(layer: LayerAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: finite differences in float64."""
    monkeypatch.setattr(attention, "CALL", 0)
    tree = random_tree(0, header=2, questions=2, answers=2, most=2)
    attend = Branches(tree)
    assert len(attend.blocks(None)) > 3
    leaves = [x.requires_grad_() for x in inputs(len(tree.ids_T))]
    assert torch.autograd.gradcheck(lambda *x: attend(layer, *x), leaves)


def test_the_specification_by_hand() -> None:
    """Oracle: softmax over each token's ancestors within the window, written out token by token."""
    tree = random_tree(3, header=5, questions=2, answers=2, most=3)
    q, k, v = inputs(len(tree.ids_T))
    parent = tree.parent_T.tolist()
    for layer in LAYERS:
        out = Masked(tree)(layer, q, k, v)
        for token in range(len(parent)):
            path: list[int] = []
            at = token
            while at >= 0 and len(path) < (layer.window or len(parent)):
                path.append(at)
                at = parent[at]
            for head in range(6):
                scores = k[0, head // 3, path] @ q[0, head, token] * layer.scale
                if layer.softcap is not None:
                    scores = layer.softcap * torch.tanh(scores / layer.softcap)
                expected = scores.softmax(0) @ v[0, head // 3, path]
                torch.testing.assert_close(out[0, head, token], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"causal": False}, "layer 3 sees later tokens; .* must be causal"),
        ({"window": 0}, "window of layer 3 is 0, expected a positive number"),
        ({"softcap": -1.0}, "softcap of layer 3 is -1.0"),
        ({"scale": 0.0}, "scale of layer 3 is 0.0"),
    ],
)
def test_attention_that_no_controller_has(settings: dict[str, Any], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=message):
        LayerAttention(3, **{"scale": 0.5, **settings})


def test_a_window_leaves_out_keys() -> None:
    """Oracle: by hand. A header of 300 and 4 answers of 100 under a window of 51: 50 keys before each answer's own."""
    header = tuple(range(300))
    sequences = [Tokens((*header, *(1000 + 100 * a + i for i in range(101))), (0,) * 400 + (1,)) for a in range(4)]
    found = blocks(build_tree(sequences), window=51)
    assert [(b.stop - b.start, len(b.keys_K)) for b in found[-4:]] == [(100, 150)] * 4


def adapted_model(dtype: torch.dtype) -> Model:
    """Return a small Llama whose base is rounded to bf16, then cast to `dtype`, with an adapter in at least fp32."""
    config = read_config(
        {
            "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        }  # fmt: skip
    )
    model = Model(config)
    randomise(model, 0.3)
    model = model.to(torch.bfloat16).to(dtype)
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    trainable_parameters(model, "policy")
    randomise_adapter(model, "policy", 0.1, seed=1)
    set_active(model, "policy")
    return model


def rms(values: list[Tensor]) -> float:
    return torch.cat([value.double().flatten() for value in values]).square().mean().sqrt().item()


def bf16_errors(seed: int) -> list[tuple[float, float, float]]:
    """Return the errors of the padded and of the tree's bf16 pass against float64, by log-probs, loss and gradient."""
    draws = random.Random(seed)
    header = [draws.randrange(50) for _ in range(12)]
    sequences = []
    for _ in range(4):
        question = [draws.randrange(50) for _ in range(draws.randint(1, 8))]
        for _ in range(4):
            answer = [draws.randrange(50) for _ in range(draws.randint(1, 8))]
            ids = (*header, *question, *answer)
            sequences.append(Tokens(ids, (0,) * (len(ids) - len(answer)) + (1,) * len(answer)))
    tree = build_tree(sequences)

    def padded(model: Model) -> Tensor:
        width = max(len(s.ids) for s in sequences)
        ids = torch.tensor([[*s.ids, *(0,) * (width - len(s.ids))] for s in sequences])
        rows, at = torch.tensor([[*s.mask, *(0,) * (width - len(s.mask))] for s in sequences]).nonzero(as_tuple=True)
        return token_logps(model(ids, attend=Causal())[rows, at - 1], model.head_weight, ids[rows, at])

    def packed(model: Model) -> Tensor:
        attend = tree_attention(tree, torch.device("cpu"))
        assert isinstance(attend, Branches)
        hidden_TD = model(tree.ids_T[None], tree.positions_T[None], attend)[0]
        return token_logps(hidden_TD[tree.source_S], model.head_weight, tree.target_S)

    found = []
    for path, dtype in ((padded, torch.float64), (padded, torch.bfloat16), (packed, torch.bfloat16)):
        model = adapted_model(dtype)
        logps_S = path(model)
        loss = -logps_S.mean()
        gradients = torch.autograd.grad(loss, list(trainable_parameters(model, "policy").values()))
        found.append((logps_S.detach(), loss.detach(), gradients))
    truth = found[0]
    errors = []
    for logps_S, loss, gradients in found[1:]:
        size = rms(list(truth[2]))
        gradient = rms([a.double() - b for a, b in zip(gradients, truth[2], strict=True)]) / size
        errors.append((rms([logps_S.double() - truth[0]]), abs(loss.item() - truth[1].item()), gradient))
    return errors


@pytest.mark.parametrize("call", [0, 2048])
def test_bf16_errs_no_more_than_the_padded_batch(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64 on the same bf16 weights. Error of the tree at most 1.5 times the padded path's plus 1e-3, root
    mean square over the batches: log-probs, loss, and adapter gradients (there in units of their own size). A batch has
    one loss, whose error may be near 0 by luck; over eight of them it is a measure.
    """
    monkeypatch.setattr(attention, "CALL", call)
    theirs, ours = torch.tensor([bf16_errors(seed) for seed in range(8)]).square().mean(0).sqrt()
    assert theirs[0] > 1e-3  # bf16 does round
    assert (ours <= 1.5 * theirs + 1e-3).all(), (ours, theirs)


def test_branches_leave_out_what_is_not_seen() -> None:
    """Oracle: by hand. Header 300, 4 x 10 answers of 100: per answer 100 x 400 scores, not 100 x 4,300."""
    header = tuple(range(300))
    sequences = [Tokens((*header, *(1000 + 100 * a + i for i in range(101))), (0,) * 400 + (1,)) for a in range(40)]
    tree = build_tree(sequences)
    found = blocks(tree)
    assert [(b.stop - b.start, len(b.keys_K)) for b in found] == [(256, 256), (44, 300), *[(100, 400)] * 40]
    assert tree_attention(tree, torch.device("cpu")).__class__ is Branches
    small = build_tree([Tokens((1, 2, 3), (0, 0, 1)), Tokens((1, 4, 5), (0, 0, 1))])
    assert [(b.stop - b.start, len(b.keys_K)) for b in blocks(small)] == [(3, 3)]
    assert blocks(build_tree([])) == []


flex_trees = st.builds(
    random_tree, st.integers(0, 10**6), st.sampled_from([0, 100, 300]), st.integers(1, 3), st.integers(1, 5),
    st.sampled_from([10, 150]),
)  # fmt: skip


def padded_tree(tree: TokenTree) -> TokenTree:
    return tree.padded(-(-len(tree.ids_T) // BLOCK) * BLOCK)


@settings(max_examples=25, deadline=None)
@given(flex_trees.map(padded_tree))
def test_block_mask_is_the_dense_mask(tree: TokenTree) -> None:
    """Oracle: the dense mask cut into blocks: which hold a visible score, which nothing else; seen from the queries
    (the forward pass) and from the keys (the backward pass). The mask function on every pair of tokens.
    """
    dense = tree.attention_mask()
    num = len(dense) // BLOCK
    cut = dense.view(num, BLOCK, num, BLOCK)
    whole_QK, some_QK = cut.all(dim=3).all(dim=1), cut.any(dim=3).any(dim=1)
    mask = block_mask(tree, torch.device("cpu"))

    def listed(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None and indices is not None
        out = torch.zeros(num, num, dtype=torch.bool)
        for row in range(num):
            out[row, indices[0, 0, row, : int(counts[0, 0, row])].long()] = True
        return out

    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices).equal(whole_QK)
    assert listed(mask.kv_num_blocks, mask.kv_indices).equal(some_QK & ~whole_QK)
    assert listed(mask.full_q_num_blocks, mask.full_q_indices).equal(whole_QK.T)
    assert listed(mask.q_num_blocks, mask.q_indices).equal((some_QK & ~whole_QK).T)
    every = torch.arange(len(dense))
    zero = torch.zeros((), dtype=torch.int64)
    assert mask.mask_mod(zero, zero, every[:, None], every[None]).equal(dense)


@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_is_the_dense_mask(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `Masked` in float64, 1e-12; torch's flex attention runs uncompiled (its backward is for GPUs alone)."""
    monkeypatch.setattr(attention, "_compiled", lambda *_: attention.attend_flex)
    tree = padded_tree(random_tree(seed, header=200, questions=2, answers=3, most=100))
    q, k, v = inputs(len(tree.ids_T), seed=seed)
    for layer in (LAYER, LayerAttention(0, 0.7, softcap=0.9, window=40), LayerAttention(0, 0.7, window=170)):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", UserWarning)  # that it is slow uncompiled
            out = Flex(tree, torch.device("cpu"))(layer, q, k, v)
        torch.testing.assert_close(out, Masked(tree)(layer, q, k, v), rtol=0, atol=1e-12)


def test_one_compilation_a_length() -> None:
    """Oracle: the count: new trees of a known length compile nothing, and nine lengths are not too many (dynamo gives
    up a function at eight). What compiles is torch's tracer without code generation; it does so inside of what is kept
    out of compiled blocks, too.
    """
    GRAPHS.clear()
    outside: Any = torch.compiler.disable(lambda attend, *x: attend(LAYER, *x))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for seed, length in product(range(2), range(1, 10)):
            tree = random_tree(seed, header=0, questions=1, answers=3, most=30).padded(length * BLOCK)
            q, k, v = inputs(len(tree.ids_T), torch.float32)
            out = outside(Flex(tree, torch.device("cpu"), backend="eager"), q, k, v)
            torch.testing.assert_close(out, Masked(tree)(LAYER, q, k, v), rtol=0, atol=1e-5)
    assert GRAPHS == {(length * BLOCK, False): 1 for length in range(1, 10)}


@pytest.mark.parametrize("max_tokens", [1, 128, 129, 1000, 1600, 8192, 16384])
def test_buckets(max_tokens: int) -> None:
    """Oracle: invariants: at most eight lengths, multiples of BLOCK, at most an eighth (or a block) too long."""
    lengths = {tokens: bucket(tokens, max_tokens) for tokens in range(1, max_tokens + 1)}
    assert len(set(lengths.values())) <= 8
    for tokens, length in lengths.items():
        assert length % BLOCK == 0 and 0 <= length - tokens < max(BLOCK, max_tokens / 8 + BLOCK)


def test_errors() -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match="a tree of 2 tokens; pad it to a multiple of 128"):
        block_mask(build_tree([Tokens((1, 2, 3), (0, 0, 1))]), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_a_gpu(dtype: torch.dtype) -> None:
    """Oracle: `Masked` in float64, output and gradients; each error at most 1.5 times that of `Masked` in `dtype`, plus
    1e-3 (root mean square). One compilation each with and without gradients, for two trees of one length.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    GRAPHS.clear()
    for seed in range(2):
        tree = random_tree(seed, header=200, questions=3, answers=4, most=60).padded(1024)
        draws = torch.Generator().manual_seed(seed)
        shapes = ((1, heads, 1024, 64) for heads in (8, 2, 2))
        values = [torch.randn(shape, generator=draws).to(dtype) for shape in shapes]
        grad = torch.randn(1, 8, 1024, 64, generator=draws).to(device)

        dense, flex = Masked(tree, device), Flex(tree, device)
        found = []
        for attend, of in ((dense, torch.float64), (dense, dtype), (flex, dtype)):
            leaves = [x.to(device, of).requires_grad_() for x in values]
            out = attend(LAYER, *leaves)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(of))])
        truth, theirs, ours = found
        for exact, one, two in zip(truth, theirs, ours, strict=True):
            assert rms([two - exact]) <= 1.5 * rms([one - exact]) + 1e-3
        with torch.no_grad():
            out = flex(LAYER, *(x.to(device) for x in values))
            torch.testing.assert_close(out, ours[0])
    assert GRAPHS == {(1024, True): 1, (1024, False): 1}
