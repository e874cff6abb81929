"""tree.py: the oracle is the same model on one padded sequence at a time, in float64; layouts are by hand."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka.core.models import attention
from matryoshka.core.models.attention import Branches, Masked
from matryoshka.core.models.layer_attention import Attend
from matryoshka.core.models.llama import Model, read_config
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree, padded_size, tree_size
from matryoshka.core.training.train import Totals
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters

VOCAB = 11


def tiny_model() -> Model:
    """Return a float64 Llama with a random adapter on every projection."""
    config = read_config(
        {
            "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        }  # fmt: skip
    )
    model = Model(config).double()
    add_adapter(model, "policy", LoraConfig(rank=2, alpha=4.0), seed=0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    set_active(model, "policy")
    return model


MODEL = tiny_model()
PARAMETERS = trainable_parameters(MODEL, "policy")


def one_at_a_time(sequences: list[Tokens]) -> list[Tensor]:
    """Return the log-probs of each sequence's scored tokens from an own causal pass over it, padded to the longest.

    log softmax is spelled out here, so that nothing is shared with the tree's path but the model's equations.
    """
    width = max(len(sequence.ids) for sequence in sequences)
    out = []
    for sequence in sequences:
        padded = torch.tensor([[*sequence.ids, *(0,) * (width - len(sequence.ids))]])
        logits = MODEL.logits(MODEL(padded))[0]
        logps = logits - logits.exp().sum(-1, keepdim=True).log()
        scored = [at for at, is_scored in enumerate(sequence.mask) if is_scored]
        out.append(torch.stack([logps[at - 1, sequence.ids[at]] for at in scored]) if scored else logits.new_zeros(0))
    return out


def logps_of(tree: TokenTree, attend: Attend) -> Tensor:
    """Return the log-probs of the tree's scored tokens."""
    hidden_TD = MODEL(tree.ids_T[None], tree.positions_T[None], attend)[0]
    return token_logps(hidden_TD[tree.source_S], MODEL.head_weight, tree.target_S)


@st.composite
def forests(draw: st.DrawFn) -> list[Tokens]:
    """Branching conversations: depth to 5, single tokens to several, identical siblings, with and without a header.

    Two-token alphabets make accidental sharing common; every cut of a path may be a sequence of its own.
    """
    alphabet = draw(st.sampled_from([2, 3, VOCAB]))
    header = draw(st.lists(st.integers(0, alphabet - 1), max_size=4))
    segment = st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=3)
    pool = draw(st.lists(segment, min_size=1, max_size=4))
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        depth = draw(st.integers(1, 5))
        ids = list(header) if draw(st.integers(0, 9)) else []
        for _ in range(depth):
            ids += draw(st.sampled_from(pool))
        mask = [0, *draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        sequences.append(Tokens(tuple(ids), tuple(mask)))
    return sequences


def branches(tree: TokenTree, call: int) -> Attend:
    """Return the blockwise attention that a block's cost beside its scores leads to: 0 splits all that can be split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL", call)
        patch.setattr(attention, "PIECE", 2)
        return Branches(tree)


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from([None, 0, 10, 2048]))
@example([Tokens((1, 2, 3), (0, 1, 1))] * 3, 0)  # identical siblings
@example([Tokens((1, 2), (0, 1)), Tokens((3, 2), (0, 1))], 0)  # two roots
@example([Tokens((1, 2, 3), (0, 0, 1)), Tokens((1, 2), (0, 1)), Tokens((1, 2, 4), (0, 0, 1))], 0)  # one inside another
@example([Tokens((5,), (0,)), Tokens((1, 5), (0, 1))], 0)  # nothing to read
def test_log_probs_and_gradients_are_those_of_single_sequences(sequences: list[Tokens], call: int | None) -> None:
    """Oracle: `one_at_a_time`; sequences weighted unequally, so that a gradient that went astray shows. 1e-10.

    With the dense mask (call None) and block by block.
    """
    tree = build_tree(sequences)
    assert len(tree.ids_T) == tree_size(sequences)
    expected = one_at_a_time(sequences)
    weights = torch.linspace(0.5, 1.5, len(sequences), dtype=torch.float64)
    values = [logps.sum() * weight for logps, weight in zip(expected, weights, strict=True)]
    if not len(tree.source_S):
        assert all(len(logps) == 0 for logps in expected)
        return
    wanted = torch.autograd.grad(torch.stack(values).sum(), list(PARAMETERS.values()))

    logps_S = logps_of(tree, Masked(tree) if call is None else branches(tree, call))
    torch.testing.assert_close(logps_S, torch.cat(expected), rtol=0, atol=1e-10)
    sums = tree.sum_by_sequence(logps_S)
    torch.testing.assert_close(sums, torch.stack([logps.sum() for logps in expected]), rtol=0, atol=1e-10)
    got = torch.autograd.grad((sums * weights).sum(), list(PARAMETERS.values()))
    assert sum(float(gradient.abs().sum()) for gradient in wanted) > 0
    for name, ours, theirs in zip(PARAMETERS, got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=f"gradient of {name}")


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[Tokens]]:
    """Training data: pairs; groups of K answers to a question; dialogues in which every second turn is scored."""
    kind = draw(st.sampled_from(["pairs", "groups", "dialogues"]))
    turn = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3)
    header = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
    questions = draw(st.lists(turn, min_size=1, max_size=3))
    sequences = []
    for question in questions:
        for _ in range({"pairs": 2, "groups": draw(st.integers(2, 4)), "dialogues": 2}[kind]):
            ids, mask = [*header, *question], [0] * (len(header) + len(question))
            for number in range(4 if kind == "dialogues" else 1):
                said = draw(turn)
                ids += said
                mask += [1 - number % 2] * len(said)
            sequences.append(Tokens(tuple(ids), tuple(mask)))
    return kind, sequences


@settings(max_examples=25, deadline=None)
@given(batches(), st.sampled_from([0, 2048]))
def test_the_loss_of_every_kind_of_batch(batch: tuple[str, list[Tokens]], call: int) -> None:
    """Oracle: the objective by hand on `one_at_a_time`: DPO's -log sigmoid; the mean over tokens; for groups -log
    softmax of the first of K over summed log-probs. Loss and every adapter gradient, 1e-10.
    """
    kind, sequences = batch
    tree, singles = build_tree(sequences), one_at_a_time(sequences)
    logps_S = logps_of(tree, branches(tree, call))
    sums, wanted_sums = tree.sum_by_sequence(logps_S), torch.stack([logps.sum() for logps in singles])
    pairs, tokens = len(sequences) // 2, sum(len(logps) for logps in singles)
    if kind == "pairs":
        reference_S = torch.linspace(-3, -1, len(logps_S), dtype=torch.float64)
        loss, _ = Preference(beta=0.3)(logps_S, reference_S, tree, Totals(pairs, tokens))
        reference = torch.stack([part.sum() for part in torch.split(reference_S, [len(x) for x in singles])])
        margins = (wanted_sums - reference).view(-1, 2)
        wanted = -torch.sigmoid(0.3 * (margins[:, 0] - margins[:, 1])).log().mean()
    elif kind == "dialogues":
        loss, _ = SFT()(logps_S, None, tree, Totals(len(sequences), tokens))
        wanted = -torch.cat(singles).mean()
    else:
        loss, wanted = (-x.log_softmax(0)[0] for x in (sums, wanted_sums))
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x, list(PARAMETERS.values())) for x in (loss, wanted)]
    for name, ours, theirs in zip(PARAMETERS, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=f"gradient of {name}")


def test_layout_by_hand() -> None:
    """Oracle: by hand. Header 7 8 9, then branches 1 2 and 1 3 4; last tokens 2 and 4 are predicted, never read."""
    sequences = [Tokens((7, 8, 9, 1, 2), (0, 0, 0, 1, 1)), Tokens((7, 8, 9, 1, 3, 4), (0, 0, 0, 1, 0, 1))]
    tree = build_tree(sequences)
    assert tree.ids_T.tolist() == [7, 8, 9, 1, 3]
    assert tree.positions_T.tolist() == [0, 1, 2, 3, 4]
    assert tree.parent_T.tolist() == [-1, 0, 1, 2, 3]
    assert tree.end_T.tolist() == [5, 5, 5, 5, 5]
    assert tree.source_S.tolist() == [2, 3, 2, 4]
    assert tree.target_S.tolist() == [1, 2, 1, 4]
    assert tree.sequence_S.tolist() == [0, 0, 1, 1]
    assert (tree.num_sequences, tree.num_padded, tree_size(sequences)) == (2, 12, 5)
    assert tree.sum_by_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == [3.0, 12.0]


def test_branches_do_not_see_each_other() -> None:
    """Oracle: the ancestors by hand. 1 -> 2 -> 3, 1 -> 4, and a second root 4."""
    tree = build_tree([Tokens((1, 2, 3, 9), (0, 0, 0, 1)), Tokens((1, 4, 9), (0, 0, 1)), Tokens((4, 9), (0, 1))])
    assert tree.ids_T.tolist() == [1, 2, 3, 4, 4]
    assert tree.positions_T.tolist() == [0, 1, 2, 1, 0]
    assert tree.end_T.tolist() == [4, 3, 3, 4, 5]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert tree.attention_mask().int().tolist() == expected


def test_numbers_of_tokens() -> None:
    """Oracle: by hand. 16 answers of 10 own tokens to a header of 100: 100 + 16 x 9 nodes stand for 16 x 110."""
    header = tuple(range(100))
    sequences = [
        Tokens((*header, *(1000 + 10 * k + i for i in range(10))), (0,) * 100 + (1,) * 10) for k in range(16)
    ]
    tree = build_tree(sequences)
    assert (len(tree.ids_T), tree.num_padded, len(tree.target_S)) == (100 + 16 * 9, 16 * 110, 160)
    assert tree_size(sequences[:1]) == 109
    assert tree_size([]) == len(build_tree([]).ids_T) == 0


def test_the_last_token_is_never_read() -> None:
    """Oracle: an id that the model does not have, in last place, changes the tree's targets only."""
    known, unknown = (build_tree([Tokens((1, 2, last), (0, 1, 0))]) for last in (3, 10**6))
    assert torch.equal(known.ids_T, unknown.ids_T)
    assert build_tree([Tokens((1, 2, 10**6), (0, 1, 1))]).target_S.tolist() == [2, 10**6]
    assert build_tree([Tokens((3,), (0,))]).ids_T.tolist() == []


def test_order_of_sequences_does_not_matter() -> None:
    """Oracle: invariance; shuffled sequences give the same nodes, and the same log-probs to the bit, shuffled."""
    draws = random.Random(0)
    sequences = []
    for _ in range(6):
        ids = tuple(draws.choice((1, 2)) for _ in range(7))
        sequences.append(Tokens(ids, (0, 1, 1, 1, 1, 1, 1)))
    order = draws.sample(range(6), 6)
    one, two = build_tree(sequences), build_tree([sequences[i] for i in order])
    for name in ("ids_T", "positions_T", "parent_T", "end_T"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    with torch.no_grad():
        sums = [tree.sum_by_sequence(logps_of(tree, Masked(tree))) for tree in (one, two)]
    torch.testing.assert_close(sums[1], sums[0][order], rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(forests())
def test_nodes_lie_in_preorder(sequences: list[Tokens]) -> None:
    """Oracle: the forest as a set of prefixes, one node each; ancestors by walking up, subtrees by counting."""
    tree = build_tree(sequences)
    prefixes = {tuple(s.ids[:end]) for s in sequences for end in range(1, len(s.ids))}
    names: list[tuple[int, ...]] = []
    for node, (id, parent) in enumerate(zip(tree.ids_T.tolist(), tree.parent_T.tolist(), strict=True)):
        assert parent < node
        names.append((*(names[parent] if parent >= 0 else ()), id))
    assert names == sorted(prefixes)  # sorted prefixes are a preorder
    assert tree.positions_T.tolist() == [len(name) - 1 for name in names]
    mask = tree.attention_mask()
    for node, name in enumerate(names):
        below = [n for n, other in enumerate(names) if other[: len(name)] == name]
        assert below == list(range(node, int(tree.end_T[node])))
        assert torch.nonzero(mask[:, node]).flatten().tolist() == below
    assert tree.num_padded == padded_size(sequences)


def test_padding_changes_nothing() -> None:
    """Oracle: the tree without it; padding sees itself alone."""
    tree = build_tree([Tokens((1, 2, 3, 9), (0, 0, 1, 1)), Tokens((1, 4, 9), (0, 0, 1))])
    padded = tree.padded(7)
    assert padded.attention_mask()[:4, :4].equal(tree.attention_mask())
    assert padded.attention_mask()[4:].int().tolist() == torch.eye(7, dtype=torch.int32)[4:].tolist()
    with torch.no_grad():
        one, two = (logps_of(x, Masked(x)) for x in (tree, padded))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
    assert tree.padded(4).ids_T.equal(tree.ids_T)
    with pytest.raises(ValueError, match="4 tokens cannot be padded to 3"):
        tree.padded(3)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ((1, 2), (0,), "2 ids but 1 mask entries"),
        ((1, 2), (1, 1), "the first token cannot be scored"),
        ((1, 2), (0, 2), "the mask has 2; expected 1 where a token is trained on"),
    ],
)
def test_errors(ids: tuple[int, ...], mask: tuple[int, ...], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=message):
        Tokens(ids, mask)
