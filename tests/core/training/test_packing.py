"""core/training/packing.py: oracles are the trees themselves, every way to cut tried out, and layouts by hand."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.core.models.tree import Tokens, build_tree, padded_size
from matryoshka.core.training.packing import MICRO_BATCH, Item, Plan, batch_at, check_budget, plan, split


def tokens(ids: tuple[int, ...]) -> Tokens:
    return Tokens(ids, (0, *(1,) * (len(ids) - 1)))


@st.composite
def batches(draw: st.DrawFn) -> list[Item]:
    """Items of one to three sequences over two ids, so that accidental sharing is common."""
    ids = st.lists(st.integers(0, 1), min_size=2, max_size=7).map(tuple)
    items = draw(st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=6))
    return [Item(tuple(map(tokens, sequences)), f"group {number // 2}") for number, sequences in enumerate(items)]


def size(items: tuple[Item, ...] | list[Item]) -> int:
    return len(build_tree([sequence for item in items for sequence in item.sequences]).ids_T)


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 30))
def test_plans_cost_the_least(batch: list[Item], more: int) -> None:
    """Oracle: every way to cut the sorted items whose parts fit the budget; sizes from the trees themselves."""
    budget = max(size([item]) for item in batch) + more
    found = plan(batch, budget)
    assert sorted(id(item) for micro in found.micro_batches for item in micro) == sorted(map(id, batch))
    assert all(size(micro) <= budget for micro in found.micro_batches)
    assert found.tree_tokens == sum(map(size, found.micro_batches))
    rows = [[sequence for item in micro for sequence in item.sequences] for micro in found.micro_batches]
    assert found.padded_tokens == sum(map(padded_size, rows)) == found.saved + found.tree_tokens

    items = sorted(batch, key=lambda item: [sequence.ids for sequence in item.sequences])
    costs = []
    for count in range(len(items)):
        for cuts in combinations(range(1, len(items)), count):
            edges = (0, *cuts, len(items))
            parts = [size(items[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
            if max(parts) <= budget:
                costs.append(sum(parts) + MICRO_BATCH * len(parts))
    assert found.tree_tokens + MICRO_BATCH * len(found.micro_batches) == min(costs)


def prompts(questions: int, answers: int, seed: int = 0) -> list[Item]:
    """Return pairs: a header of 50, questions of 20 with `answers` pairs each, answers of 10; shuffled."""
    draws = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(10**6) for _ in range(count))

    header, items = ids(50), []
    for question in range(questions):
        prompt = header + ids(20)
        for _ in range(answers):
            sides = (prompt + ids(10), prompt + ids(10))
            items.append(Item(tuple(Tokens(s, (0,) * 70 + (1,) * 10) for s in sides), f"question {question}"))
    draws.shuffle(items)
    return items


def test_what_is_shared_meets() -> None:
    """Oracle: by hand. A pair has 18 tokens of its own, a question 20 + 3 x 18 = 74, the header 50: in a budget of 200
    two questions (198) stand together, and no question is torn apart although three more pairs of another would fit in
    a budget of 260."""
    batch = prompts(6, 3)
    for budget in (200, 260):
        found = plan(batch, budget)
        assert [len({item.group for item in micro}) for micro in found.micro_batches] == [2, 2, 2]
        assert [size(micro) for micro in found.micro_batches] == [50 + 2 * 74] * 3
        assert (found.tree_tokens, found.padded_tokens, found.saved) == (594, 36 * 80, 36 * 80 - 594)
    whole = plan(batch, 50 + 6 * 74)
    assert len(whole.micro_batches) == 1 and whole.tree_tokens == 494
    assert len(plan(batch, 493).micro_batches) == 2
    assert plan([], 10) == Plan((), 0, 0)


def test_the_order_of_the_batch_does_not_matter() -> None:
    """Oracle: invariance under shuffling."""
    batch = prompts(5, 3)
    for seed in range(3):
        shuffled = random.Random(seed).sample(batch, len(batch))
        assert plan(shuffled, 300) == plan(batch, 300)


def test_an_item_beyond_the_budget_is_named() -> None:
    """Oracle: by hand: 50 + 20 + 2 x 9 tokens. Sharing counts: 88 hold two answers to one prompt, 160 ids in all."""
    items = prompts(2, 1)
    check_budget(items, 88)
    assert len(plan(items, 88).micro_batches) == 2
    message = (
        rf"item 1 \(example {items[0].group!r}\): its 2 sequences take 88 tree tokens, micro_batch_tokens is 87; "
        "raise micro_batch_tokens, shorten the example or leave it out"
    )
    for refuse in (check_budget, plan):
        with pytest.raises(ValueError, match=message):
            refuse(items, 87)


def test_an_item_needs_something_to_train_on() -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match="item of group 'g': a sequence of 2 tokens has no scored token"):
        Item((Tokens((1, 2), (0, 1)), Tokens((1, 2), (0, 0))), "g")


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    """Oracle: invariants: an epoch is a permutation, groups stay together, and nothing but seed and epoch decides."""
    items = [Item((tokens((index, 1)),), f"group {index // 2}") for index in range(30)]
    orders = []
    for epoch in range(3):
        batches = [batch_at(items, 8 * epoch + step, 4, 1) for step in range(8)]
        assert {number for number, _ in batches} == {epoch}
        assert [len(batch) for _, batch in batches] == [4] * 7 + [2]
        order = [item.sequences[0].ids[0] for _, batch in batches for item in batch]
        assert sorted(order) == list(range(30))
        assert all(order[i] // 2 == order[i + 1] // 2 for i in range(0, 30, 2))
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3
    again = [item.sequences[0].ids[0] for step in range(8, 16) for item in batch_at(items, step, 4, 1)[1]]
    assert again == orders[1]
    assert [item.sequences[0].ids[0] for item in batch_at(items, 0, 30, 2)[1]] != orders[0]
    assert [item.sequences[0].ids[0] for item in batch_at(items, 0, 30, 1)[1]] == orders[0]  # the size only cuts


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 20])
def test_a_batch_is_split_evenly(ranks: int) -> None:
    """Oracle: invariants: every item once, within the budget, none idle while there is an item for each.

    No rank has more than its share of the work and one item's: the cut falls between items. One rank: `plan`.
    """
    items = prompts(5, 4)
    budget = max(size([item]) for item in items) + 30
    parts = split(items, budget, ranks)
    held = [item for part in parts for micro in part.micro_batches for item in micro]
    assert len(parts) == ranks and sorted(map(id, held)) == sorted(map(id, items))
    assert all(size(micro) <= budget for part in parts for micro in part.micro_batches)
    assert sum(not part.micro_batches for part in parts) == max(0, ranks - len(items))
    work = [part.tree_tokens + MICRO_BATCH * len(part.micro_batches) for part in parts]
    assert max(work) <= sum(work) / ranks + max(size([item]) for item in items) + MICRO_BATCH
    if ranks == 1:
        assert parts == [plan(items, budget)]


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 30), st.integers(2, 4))
def test_the_costliest_part_costs_the_least(batch: list[Item], more: int, ranks: int) -> None:
    """Oracle: every way to cut the sorted items into that many parts, each planned on its own."""
    budget = max(size([item]) for item in batch) + more
    items = sorted(batch, key=lambda item: [sequence.ids for sequence in item.sequences])

    def cost(part: list[Item]) -> int:
        found = plan(part, budget)
        return found.tree_tokens + MICRO_BATCH * len(found.micro_batches)

    every = []
    for count in range(min(ranks, len(items))):
        for cuts in combinations(range(1, len(items)), count):
            edges = (0, *cuts, len(items))
            every.append(max(cost(items[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)))
    parts = split(batch, budget, ranks)
    assert max(p.tree_tokens + MICRO_BATCH * len(p.micro_batches) for p in parts) == min(every)
