"""tasks/lamp/rewards.py: what answers are worth by hand, and that with hand-made scores the better one is chosen."""

import random
from collections.abc import Sequence

import pytest

from matryoshka.core.records import EpisodeInfo, Judgement, Message, PairRule, Preference, Sample, Trajectory, Turn
from matryoshka.dpo.pairs import make_pairs
from matryoshka.tasks.lamp.rewards import judge, pair_rule
from matryoshka.tasks.lamp.task_specs import KINDS

PROMPT = (Message("user", "history"),)


def episode(name: str, text: str, reply: str, gold: str, example: str = "e", end: str = "stop") -> Trajectory:
    judged = judge(KINDS[name], reply, gold)
    turn = Turn(PROMPT, (1,), Sample(text, end, (2,)))
    info = EpisodeInfo(judged.verdict, "label_free", "c", "g", score=judged.score, measures=judged.measures)
    return Trajectory("lamp", example, (turn,), judged.reward, info)


def measured(example: str, text: str, rouge_l: float, bleu: float) -> Trajectory:
    info = EpisodeInfo("wrong", "label_free", "c", "g", measures={"rouge_l": rouge_l, "bleu": bleu})
    return Trajectory("lamp", example, (Turn(PROMPT, (1,), Sample(text, "stop", (2,))),), 0.0, info)


def chosen_and_rejected(name: str, episodes: Sequence[Trajectory]) -> list[tuple[str, str]]:
    pairs, _ = make_pairs(episodes, pair_rule(KINDS[name]), 0)
    return [(pair.chosen.text, pair.rejected.text) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "reply", "gold", "expected"),
    [
        ("1", "[2]", "[2]", Judgement("[2]", "right", 1.0)),
        ("1", "the first", "[2]", Judgement(None, "error", 0.0)),
        ("2N", "Politics.", "politics", Judgement("politics", "right", 1.0)),
        ("2M", "comedy", "dark comedy", Judgement("comedy", "wrong", 0.0)),
        ("3", "4", "4", Judgement(4.0, "right", 1.0, 1.0)),
        ("3", "2", "5", Judgement(2.0, "wrong", 0.25, 0.25)),
        ("3", "no idea", "4", Judgement(None, "error", 0.25, 0.25)),  # as far as 1
        ("3", "9", "1", Judgement(9.0, "wrong", 0.0, -1.0)),
    ],
)
def test_an_answer_is_worth(name: str, reply: str, gold: str, expected: Judgement) -> None:
    """Oracle: by hand."""
    assert judge(KINDS[name], reply, gold) == expected


def test_a_headline_is_worth_its_overlap() -> None:
    """Oracle: ROUGE-L 2 * 2 / (3 + 3) by hand; equal but for case is right, nothing is an error worth 0."""
    pytest.importorskip("rouge_score")
    judged = judge(KINDS["4"], "rain in may", "rain in june")
    assert judged.measures["rouge_l"] == judged.score == pytest.approx(2 / 3)
    assert judged.reward == (judged.measures["rouge_l"] + judged.measures["bleu"]) / 2 and judged.verdict == "wrong"
    assert judge(KINDS["4"], "Rain In May", "rain in may").verdict == "right"
    empty = judge(KINDS["4"], "", "rain")
    assert (empty.verdict, empty.reward, empty.score) == ("error", 0.0, 0.0)
    assert empty.measures == {"rouge_l": 0.0, "bleu": 0.0}


def test_labels_pair_right_over_wrong_at_most_two() -> None:
    """Oracle: by hand; true negatives stand on the losing side, never on the winning one."""
    replies = {"a": "sports", "b": "crime", "c": "sports", "d": "nothing", "e": "travel"}
    pairs = chosen_and_rejected("2N", [episode("2N", text, reply, "sports") for text, reply in replies.items()])
    assert len(pairs) == 2
    assert all(better in "ac" and worse in "bde" for better, worse in pairs)
    assert len({better for better, _ in pairs}) == len({worse for _, worse in pairs}) == 2


def test_scores_pair_the_smallest_error_with_the_largest() -> None:
    """Oracle: errors 0, 1, 3, 3 (unparsed) by hand: best against the two worst, equal errors are no pair."""
    episodes = [episode("3", text, reply, "4") for text, reply in {"a": "3", "b": "4", "c": "1", "d": "?"}.items()]
    assert sorted(chosen_and_rejected("3", episodes)) == [("b", "c"), ("b", "d")]
    assert chosen_and_rejected("3", episodes[2:]) == []


def test_headlines_pair_by_mean_rank_in_rouge_and_bleu() -> None:
    """Oracle: ranks by hand from made-up scores: a is first in both, d last in both; b beats c in one each, a tie."""
    scores = {"a": (0.9, 0.8), "b": (0.5, 0.2), "c": (0.4, 0.3), "d": (0.1, 0.0)}
    episodes = [
        measured("e", text, r, b)
        for text, (r, b) in scores.items()
    ]
    pairs, counts = make_pairs(episodes, pair_rule(KINDS["4"]), 0)
    assert (pairs[0].chosen.text, pairs[0].rejected.text) == ("a", "d")
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (1.0, 0.0)
    assert (pairs[1].chosen.text, pairs[1].rejected.text) in {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}
    assert counts.pairs == 2
    every, _ = make_pairs(episodes, PairRule("ranked", 9, scores=("rouge_l", "bleu")), 0)
    found = {(pair.chosen.text, pair.rejected.text): (pair.chosen_reward, pair.rejected_reward) for pair in every}
    assert found.keys() == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert found["b", "d"] == (0.5, 0.0)


def test_ranks_are_among_the_samples_of_one_question() -> None:
    """Oracle: the other question's scores are all higher; ranks there are of its own samples."""
    rows = [("e", "a", 0.1), ("e", "b", 0.2), ("f", "c", 0.8), ("f", "d", 0.9)]
    episodes = [
        measured(example, text, v, v)
        for example, text, v in rows
    ]
    pairs, _ = make_pairs(episodes, pair_rule(KINDS["4"]), 0)
    assert {(p.example_id, p.chosen.text, p.chosen_reward, p.rejected_reward) for p in pairs} == {
        ("e", "b", 1.0, 0.0),
        ("f", "d", 1.0, 0.0),
    }


@pytest.mark.parametrize("name", KINDS)
def test_the_chosen_one_is_the_better_one(name: str) -> None:
    """Oracle: the answers' own worth, on random replies: never a tie, never the same text, never one that was cut."""
    pytest.importorskip("rouge_score")
    draws = random.Random(name)
    kind = KINDS[name]
    answers = kind.labels[:2] or ("rain in may", "rain in june", "snow in may", "a dry june")
    episodes = [
        episode(name, f"s{draws.randrange(5)}", draws.choice([*answers, "?"]), answers[0], f"e{i}", end)
        for i in range(40)
        for end in ("stop", "stop", "stop", "length")
    ]

    def better(pair: Preference) -> bool:
        return pair.chosen_reward > pair.rejected_reward

    pairs, counts = make_pairs(episodes, pair_rule(kind), 0)
    assert counts.pairs == len(pairs) > 20
    assert all(better(pair) and pair.chosen.text != pair.rejected.text for pair in pairs)
    assert all(pair.chosen.finish_reason == "stop" for pair in pairs)
    assert max(sum(pair.example_id == f"e{i}" for pair in pairs) for i in range(40)) == 2


def test_a_question_without_a_positive_makes_no_pair_and_stays_counted() -> None:
    """Oracle: by hand; a later positive, of a stronger summariser for one, pairs with the old negatives."""
    negatives = [episode("2N", text, "crime", "sports") for text in "ab"]
    pairs, counts = make_pairs(negatives, pair_rule(KINDS["2N"]), 0)
    assert pairs == [] and (counts.samples, counts.prompts, counts.prompts_with_both) == (2, 1, 0)
    assert len(chosen_and_rejected("2N", [*negatives, episode("2N", "c", "sports", "sports")])) == 2
