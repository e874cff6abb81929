"""dpo/pairs.py: pairs of small trajectory sets worked out by hand, and invariants over drawn ones."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.core.records import (
    EpisodeInfo,
    Message,
    Messages,
    PairRule,
    Preference,
    Sample,
    Trajectory,
    Turn,
    Verdict,
)
from matryoshka.dpo.pairs import make_pairs, winners

BINARY = PairRule("binary", cap=4)


def prompt(text: str) -> Messages:
    return (Message("user", text),)


def turn(text: str, question: str = "q", finish_reason: str = "stop") -> Turn:
    ids = tuple(text.encode())
    return Turn(prompt(question), tuple(question.encode()), Sample(text, finish_reason, ids, (-1.0,) * len(ids)))


def episode(
    example: str, reward: float, *turns: Turn, verdict: Verdict | None = None, controller: str = "c", **info: Any
) -> Trajectory:
    verdict = verdict or ("right" if reward else "wrong")
    return Trajectory("t", example, turns, reward, EpisodeInfo(verdict, "label_free", controller, "g", **info))


def texts(pairs: Sequence[Preference]) -> list[tuple[str, str, str]]:
    return [(pair.example_id, pair.chosen.text, pair.rejected.text) for pair in pairs]


def test_one_pair_is_what_the_controller_said_token_for_token() -> None:
    """Oracle: every field by hand."""
    won, lost = episode("e", 1.0, turn("good"), controller="c", draw=0), episode("e", 0.0, turn("bad"), draw=1)
    (pair,), counts = make_pairs([won, lost], BINARY, 0)
    assert pair == Preference(
        prompt("q"), (ord("q"),), won.turns[0].action, lost.turns[0].action, 1.0, 0.0, "e",
        {"chosen": [{"controller": "c", "draw": 0}], "rejected": [{"controller": "c", "draw": 1}]},
    )  # fmt: skip
    assert counts.as_dict() == {
        "failed": 0, "left_out": 0, "samples": 2, "distinct": 2, "cut_by_length": 0, "prompts": 1,
        "prompts_with_both": 1, "pairs": 1,
    }  # fmt: skip


def test_rounds_are_joined_by_example_and_prompt() -> None:
    """Oracle: by hand; the win of round 2 meets the loss of round 1, another prompt or example never does."""
    rounds = [
        episode("e1", 0.0, turn("r1")),
        episode("e2", 0.0, turn("r1")),
        episode("e1", 1.0, turn("r2")),
        episode("e1", 1.0, turn("elsewhere", "q2")),
        episode("e3", 1.0, turn("alone")),
    ]
    pairs, counts = make_pairs(rounds, BINARY, 0)
    assert texts(pairs) == [("e1", "r2", "r1")]
    assert (counts.prompts, counts.prompts_with_both, counts.samples) == (4, 1, 5)


def test_equal_texts_are_one_candidate_with_their_mean_reward() -> None:
    """Oracle: means by hand; 2/3 wins, 1/3 loses, 1/2 is neither."""
    def said(text: str, *rewards: float) -> list[Trajectory]:
        return [episode("e", reward, turn(text)) for reward in rewards]

    pairs, counts = make_pairs([*said("a", 1, 1, 0), *said("b", 0, 1, 0), *said("c", 0, 1)], BINARY, 0)
    (pair,) = pairs
    assert (pair.chosen.text, pair.rejected.text) == ("a", "b")
    assert pair.chosen_reward == pytest.approx(2 / 3) and pair.rejected_reward == pytest.approx(1 / 3)
    assert len(pair.provenance["chosen"]) == 3
    assert (counts.samples, counts.distinct, counts.pairs) == (8, 3, 1)


def test_a_cut_text_is_never_chosen_but_may_be_rejected() -> None:
    """Oracle: by hand; a text that one sample finished is whole, and its whole tokens are taken."""
    cut, whole = turn("x", finish_reason="length"), turn("y")
    assert make_pairs([episode("e", 1.0, cut), episode("e", 0.0, whole)], BINARY, 0)[0] == []
    pairs, counts = make_pairs([episode("e", 0.0, cut), episode("e", 1.0, whole)], BINARY, 0)
    assert texts(pairs) == [("e", "y", "x")] and counts.cut_by_length == 1
    ranked = PairRule("ranked", 4)
    assert make_pairs([episode("e", 1.0, cut), episode("e", 0.0, whole)], ranked, 0)[0] == []
    finished = turn("x")
    pairs, _ = make_pairs([episode("e", 1.0, cut), episode("e", 1.0, finished), episode("e", 0.0, whole)], BINARY, 0)
    assert pairs[0].chosen == finished.action


def test_only_the_last_guidance_of_an_episode_has_its_reward() -> None:
    """Oracle: by hand; the plan that was given up lost, although the episode was won in the end."""
    won = episode("e", 1.0, turn("first"), turn("second", "again"))
    others = [episode("e", 1.0, turn("better")), episode("e", 0.0, turn("worse", "again"))]
    pairs, _ = make_pairs([won, *others], BINARY, 0)
    assert sorted(texts(pairs)) == [("e", "better", "first"), ("e", "second", "worse")]


def test_an_episode_whose_call_failed_says_nothing() -> None:
    """Oracle: by hand; a connection that broke is no loss of the guidance."""
    failed = [episode("e", 0.0, turn("unlucky"), verdict="failed"), episode("e", 0.0, verdict="failed")]
    pairs, counts = make_pairs([episode("f", 1.0, turn("good")), *failed], BINARY, 0)
    assert pairs == [] and (counts.failed, counts.left_out, counts.samples) == (2, 0, 1)


def test_a_group_that_an_outage_thinned_out_makes_no_pairs() -> None:
    """Oracle: by hand. Of eight draws the last four failed: what is left of the group is no fair sample of it, whatever
    its rewards; the same example's draws of another round (seed) or policy, and other examples, stay.
    """
    thinned = [episode("e", float(i % 2), turn(f"t{i}"), seed=1, draw=i) for i in range(4)]
    thinned += [episode("e", 0.0, seed=1, draw=i, verdict="failed") for i in range(4, 8)]
    whole = [episode("f", float(i), turn(f"f{i}"), seed=1, draw=i) for i in range(2)]
    later = [episode("e", float(i), turn(f"l{i}"), seed=2, draw=i) for i in range(2)]
    other = [episode("e", float(i), turn(f"o{i}", "q2"), seed=1, draw=i, controller="d") for i in range(2)]
    pairs, counts = make_pairs([*thinned, *whole, *later, *other], BINARY, 0)
    assert sorted(texts(pairs)) == [("e", "l1", "l0"), ("e", "o1", "o0"), ("f", "f1", "f0")]
    assert (counts.failed, counts.left_out, counts.samples) == (4, 4, 6)
    complete = [replace(row, info=replace(row.info, verdict="wrong")) for row in thinned]
    assert len(make_pairs(complete, BINARY, 0)[0]) == 4


@pytest.mark.parametrize(
    ("num_good", "num_bad", "cap", "expected"), [(3, 2, 4, 4), (2, 3, 9, 6), (1, 1, 4, 1), (4, 1, 2, 2)]
)
def test_the_cap_and_the_use_of_different_texts(num_good: int, num_bad: int, cap: int, expected: int) -> None:
    """Oracle: min(cap, good x bad) pairs, and every text is used before one is used twice more than another."""
    rows = [episode("e", 1.0, turn(f"good{i}")) for i in range(num_good)]
    rows += [episode("e", 0.0, turn(f"bad{i}")) for i in range(num_bad)]
    pairs, _ = make_pairs(rows, PairRule("binary", cap), 3)
    assert len(pairs) == len(set(texts(pairs))) == expected
    for side, available in (("chosen", num_good), ("rejected", num_bad)):
        used = Counter(getattr(pair, side).text for pair in pairs)
        assert len(used) == min(available, expected)
        assert max(used.values()) - min(used.values()) <= 1


def test_the_cap_is_per_example_over_all_its_prompts() -> None:
    """Oracle: by hand; two prompts with three losses each would give six pairs."""
    rows = [episode("e", 1.0, turn("good", q)) for q in ("q1", "q2")]
    rows += [episode("e", 0.0, turn(f"bad{i}", q)) for q in ("q1", "q2") for i in range(3)]
    assert len(make_pairs(rows, PairRule("binary", 4), 0)[0]) == 4
    assert len(make_pairs(rows, PairRule("binary", 9), 0)[0]) == 6


def test_the_seed_decides_which_pairs_are_kept() -> None:
    """Invariant: the same seed gives the same pairs; over twenty seeds every loss is met."""
    rows = [episode("e", 1.0, turn("good")), *(episode("e", 0.0, turn(f"bad{i}")) for i in range(5))]
    one = PairRule("binary", 1)
    drawn = [texts(make_pairs(rows, one, seed)[0]) for seed in range(20)]
    assert drawn == [texts(make_pairs(rows, one, seed)[0]) for seed in range(20)]
    assert {rejected for ((_, _, rejected),) in drawn} == {f"bad{i}" for i in range(5)}


def test_ranked_pairs_have_a_gap_above_the_margin_and_the_widest_come_first() -> None:
    """Oracle: by hand over rewards 1/8, 3/8, 7/8; the gap of 1/4 is not above a margin of 1/4."""
    rows = [episode("e", reward, turn(str(reward))) for reward in (0.125, 0.375, 0.875)]
    ranked = make_pairs(rows, PairRule("ranked", cap=9, margin=0.25), 0)[0]
    assert texts(ranked) == [("e", "0.875", "0.125"), ("e", "0.875", "0.375")]
    assert len(make_pairs(rows, PairRule("ranked", cap=9), 0)[0]) == 3
    assert texts(make_pairs(rows, PairRule("ranked", cap=1), 0)[0]) == [("e", "0.875", "0.125")]
    measured = PairRule("ranked", scores=("rouge",))
    with pytest.raises(ValueError, match=r"example 'e' has no measure 'rouge', by which .* it has \['bleu'\]"):
        make_pairs([episode("e", 1.0, turn("a"), measures={"bleu": 1.0})], measured, 0)
    with pytest.raises(ValueError, match="rule 'best' is unknown; choose 'binary' or 'ranked'"):
        make_pairs(rows, PairRule("best"), 0)


EPISODES = st.lists(
    st.builds(
        lambda example, reward, spoken, failed, seed: episode(
            example,
            reward,
            *(turn(text, question, reason) for text, question, reason in spoken),
            verdict="failed" if failed else None,
            seed=seed,
        ),
        st.sampled_from("ef"),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.lists(
            st.tuples(st.sampled_from("abcd"), st.sampled_from("qr"), st.sampled_from(["stop", "length"])), max_size=3
        ),
        st.sampled_from([False, False, False, True]),
        st.integers(0, 9),
    ),
    max_size=24,
)


@given(EPISODES, st.sampled_from(["binary", "ranked"]), st.integers(1, 5), st.integers(0, 3))
def test_invariants(rows: list[Trajectory], kind: str, cap: int, seed: int) -> None:
    """Invariants of any set: better over worse, whole, two different texts of one prompt, each once, within the cap;
    and the episodes' order changes nothing but the order of an example's prompts."""
    rule = PairRule(kind, cap)
    pairs, counts = make_pairs(rows, rule, seed)
    assert all(p.chosen_reward > p.rejected_reward and p.chosen.text != p.rejected.text for p in pairs)
    assert all(p.chosen.finish_reason == "stop" for p in pairs)
    if kind == "binary":
        assert all(p.chosen_reward > 0.5 > p.rejected_reward for p in pairs)
    identities = [(p.example_id, p.prompt, p.chosen.text, p.rejected.text) for p in pairs]
    assert len(set(identities)) == len(pairs) == counts.pairs
    assert all(n <= cap for n in Counter(p.example_id for p in pairs).values())
    spoken = {(r.example_id, t.prompt, t.action.text) for r in rows for t in r.turns if r.info.verdict != "failed"}
    assert {(e, q, text) for e, q, *both in identities for text in both} <= spoken
    assert make_pairs(rows, rule, seed) == (pairs, counts)
    if len({t.prompt for r in rows for t in r.turns}) < 2:
        shuffled = random.Random(seed).sample(rows, len(rows))
        again = make_pairs(shuffled, rule, seed)[0]
        assert [(p.example_id, p.prompt, p.chosen.text, p.rejected.text) for p in again] == identities


def test_winners_are_distinct_whole_and_won() -> None:
    """Oracle: by hand; of an episode with two plans the last one won."""
    rows = [
        episode("e", 1.0, turn("a")),
        episode("e", 1.0, turn("a")),
        episode("f", 1.0, turn("a")),
        episode("e", 1.0, turn("lost"), turn("b", "again")),
        episode("e", 1.0, turn("cut", finish_reason="length")),
        episode("e", 0.0, turn("c")),
        episode("e", 0.0),
    ]
    found = winners(rows)
    assert sorted((example, sample.text) for _, _, sample, example in found) == [("e", "a"), ("e", "b"), ("f", "a")]
    assert all(ids == tuple(q[0].content.encode()) for ids, q, _, _ in found)
    assert winners(rows[::-1]) == found
