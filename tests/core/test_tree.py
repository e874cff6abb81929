"""core/tree.py: the oracle is the same model on one padded sequence at a time, in float64; layouts are by hand."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka.core.attention import Masked
from matryoshka.core.models.llama import Config, Model
from matryoshka.core.tree import Tokens, build_tree, tree_size
from matryoshka.dpo.head import token_logps
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters

VOCAB = 11


def tiny_model() -> Model:
    """Return a float64 Llama with a random adapter on every projection."""
    config = Config.from_dict(
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


@settings(max_examples=60, deadline=None)
@given(forests())
@example([Tokens((1, 2, 3), (0, 1, 1))] * 3)  # identical siblings
@example([Tokens((1, 2), (0, 1)), Tokens((3, 2), (0, 1))])  # two roots
@example([Tokens((1, 2, 3), (0, 0, 1)), Tokens((1, 2), (0, 1)), Tokens((1, 2, 4), (0, 0, 1))])  # one inside another
@example([Tokens((5,), (0,)), Tokens((1, 5), (0, 1))])  # nothing to read
def test_log_probs_and_gradients_are_those_of_single_sequences(sequences: list[Tokens]) -> None:
    """Oracle: `one_at_a_time`; sequences weighted unequally, so that a gradient that went astray shows. 1e-10."""
    tree = build_tree(sequences)
    assert len(tree.ids_T) == tree_size(sequences)
    expected = one_at_a_time(sequences)
    weights = torch.linspace(0.5, 1.5, len(sequences), dtype=torch.float64)
    values = [logps.sum() * weight for logps, weight in zip(expected, weights, strict=True)]
    if not len(tree.source_S):
        assert all(len(logps) == 0 for logps in expected)
        return
    wanted = torch.autograd.grad(torch.stack(values).sum(), list(PARAMETERS.values()))

    hidden_TD = MODEL(tree.ids_T[None], tree.positions_T[None], Masked(tree.attention_mask()))[0]
    logps_S = token_logps(hidden_TD[tree.source_S], MODEL.head_weight, tree.target_S)
    torch.testing.assert_close(logps_S, torch.cat(expected), rtol=0, atol=1e-10)
    sums = tree.sum_by_sequence(logps_S)
    torch.testing.assert_close(sums, torch.stack([logps.sum() for logps in expected]), rtol=0, atol=1e-10)
    got = torch.autograd.grad((sums * weights).sum(), list(PARAMETERS.values()))
    assert sum(float(gradient.abs().sum()) for gradient in wanted) > 0
    for name, ours, theirs in zip(PARAMETERS, got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=f"gradient of {name}")


def test_layout_by_hand() -> None:
    """Oracle: by hand. Header 7 8 9, then branches 1 2 and 1 3 4; last tokens 2 and 4 are predicted, never read."""
    sequences = [Tokens((7, 8, 9, 1, 2), (0, 0, 0, 1, 1)), Tokens((7, 8, 9, 1, 3, 4), (0, 0, 0, 1, 0, 1))]
    tree = build_tree(sequences)
    assert tree.ids_T.tolist() == [7, 8, 9, 1, 3]
    assert tree.positions_T.tolist() == [0, 1, 2, 3, 4]
    assert tree.parent_T.tolist() == [-1, 0, 1, 2, 3]
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
    """Oracle: invariance; shuffled sequences give the same log-probs, shuffled."""
    draws = random.Random(0)
    sequences = []
    for _ in range(6):
        ids = tuple(draws.choice((1, 2)) for _ in range(7))
        sequences.append(Tokens(ids, (0, 1, 1, 1, 1, 1, 1)))
    order = draws.sample(range(6), 6)

    def sums(of: list[Tokens]) -> Tensor:
        tree = build_tree(of)
        with torch.no_grad():
            hidden_TD = MODEL(tree.ids_T[None], tree.positions_T[None], Masked(tree.attention_mask()))[0]
            return tree.sum_by_sequence(token_logps(hidden_TD[tree.source_S], MODEL.head_weight, tree.target_S))

    torch.testing.assert_close(sums([sequences[i] for i in order]), sums(sequences)[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ((1, 2), (0,), "2 ids but 1 mask entries"),
        ((1, 2), (1, 1), "the first token cannot be scored"),
    ],
)
def test_errors(ids: tuple[int, ...], mask: tuple[int, ...], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=message):
        Tokens(ids, mask)
