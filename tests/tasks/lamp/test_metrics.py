"""tasks/lamp/metrics.py against independent implementations, written out here, on 1,000 random predictions.

The implementations follow the definitions: confusion counts, ROUGE (Lin 2004), BLEU (Papineni et al. 2002, exponential
smoothing as sacrebleu's default), METEOR (Banerjee and Lavie 2005). Where a library of the official evaluation has a
whole-corpus function of its own, that is asked as well.
"""

import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from matryoshka.tasks.lamp.answer_parsing import Prediction, parse
from matryoshka.tasks.lamp.metrics import (
    _bleu_scorer,
    _rouge_scorer,
    error,
    macro_f1,
    meteor,
    metrics,
    rouge,
    sentence_bleu,
)
from matryoshka.tasks.lamp.task_specs import KINDS

pytest.importorskip("sklearn")
pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")
N = 1000


def random_labels(name: str) -> tuple[list[Prediction], list[str]]:
    draws = random.Random(name)
    labels = KINDS[name].labels
    golds = draws.choices(labels[: len(labels) - 1], k=N)  # one label never occurs
    said: list[Prediction] = [draws.choice([gold, gold, draws.choice(labels), None]) for gold in golds]
    return said, golds


@pytest.mark.parametrize("name", ["1", "2N", "2M"])
def test_labels(name: str) -> None:
    """Oracle: accuracy and macro-F1 counted by hand; a label that neither occurs nor is said has F1 0."""
    said, golds = random_labels(name)
    pairs = list(zip(said, golds, strict=True))
    found = metrics(KINDS[name], said, golds)
    assert found["accuracy"].value == sum(a == b for a, b in pairs) / N
    f1 = []
    for label in KINDS[name].labels:
        both = sum(a == b == label for a, b in pairs)
        either = sum(a == label for a, _ in pairs) + sum(b == label for _, b in pairs)
        f1.append(2 * both / either if either else 0.0)
    assert found["macro_f1"].value == pytest.approx(sum(f1) / len(f1), rel=1e-12)
    assert found["unparsed"].value == sum(a is None for a in said) / N
    assert list(found)[0] == "accuracy" and found["macro_f1"].low < found["macro_f1"].value < found["macro_f1"].high


def test_the_resamples_macro_f1_is_scikit_learn_s() -> None:
    """Oracle: sklearn.metrics.f1_score on random label numbers, with missing ones, of small and of many labels."""
    from sklearn.metrics import f1_score

    draws = np.random.default_rng(0)
    for labels, n in ((2, 3), (2, 40), (15, 20), (15, 500)):
        for _ in range(5):
            gold, said = draws.integers(0, labels, n), draws.integers(-1, labels, n)
            expected = f1_score(gold, said, labels=range(labels), average="macro", zero_division=0)
            assert macro_f1(gold, said, labels) == pytest.approx(expected, rel=1e-12)


def official_score(reply: str, gold: str) -> tuple[float, float]:
    """LaMP's evaluation of one score: the number, or the end of the scale that is farther from gold."""
    truth = float(gold)
    try:
        return float(reply), truth
    except ValueError:
        return (1.0 if abs(1 - truth) > abs(5 - truth) else 5.0), truth


def test_scores() -> None:
    """Oracle: LaMP's own rule on the replies, and the definitions of MAE and RMSE."""
    draws = random.Random(3)
    golds = [str(draws.randint(1, 5)) for _ in range(N)]
    replies = [draws.choice([gold, str(draws.randint(1, 5)), f"{draws.uniform(0, 6):.1f}", "good"]) for gold in golds]
    errors = [abs(a - b) for a, b in map(official_score, replies, golds)]
    found = metrics(KINDS["3"], [parse(KINDS["3"], reply) for reply in replies], golds)
    assert found["mae"].value == pytest.approx(sum(errors) / N, rel=1e-12)
    assert found["rmse"].value == pytest.approx(math.sqrt(sum(e * e for e in errors) / N), rel=1e-12)
    closeness, mae = found["closeness"], found["mae"]
    assert (closeness.value, closeness.low, closeness.high) == (1 - mae.value / 4, 1 - mae.high / 4, 1 - mae.low / 4)
    assert found["accuracy"].value == errors.count(0.0) / N
    assert found["unparsed"].value == replies.count("good") / N
    assert [error(None, gold) for gold in "12345"] == [4, 3, 2, 3, 4]


def headlines() -> tuple[list[Prediction], list[str]]:
    """Words without punctuation, so that every tokenizer splits them alike; some predictions are missing."""
    draws = random.Random(4)
    words = "rain sun hill road tree bird lake snow".split()
    golds = [" ".join(draws.choices(words, k=draws.randint(1, 9))) for _ in range(N)]
    said: list[Prediction] = []
    for gold in golds:
        mixed = [word if draws.random() < 0.6 else draws.choice(words) for word in gold.split()]
        said.append(draws.choice([" ".join(mixed), " ".join(draws.choices(words, k=draws.randint(1, 9))), gold, None]))
    return said, golds


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def f1(matches: int, said: int, gold: int) -> float:
    return 2 * matches / (said + gold) if matches else 0.0


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[j], before[j + 1]))
    return row[-1]


def bleu(pairs: Sequence[tuple[str, str]], orders: int = 4) -> float:
    """BLEU, 0 to 100, over the pairs together; an order without a match counts as half of one, then a quarter, ..."""
    length, reference = (sum(len(text.split()) for text in side) for side in zip(*pairs, strict=True))
    logs, halvings = 0.0, 0
    for n in range(1, orders + 1):
        possible = sum(grams(said, n).total() for said, _ in pairs)
        matches = sum((grams(said, n) & grams(gold, n)).total() for said, gold in pairs)
        if not possible:
            return 0.0
        halvings += matches == 0
        logs += math.log((matches or 0.5**halvings) / possible)
    return 100 * min(1.0, math.exp(1 - reference / length)) * math.exp(logs / orders)


def test_headlines() -> None:
    """Oracle: ROUGE and BLEU written out above; a missing headline is an empty one."""
    said, golds = headlines()
    pairs = [(str(a or ""), b) for a, b in zip(said, golds, strict=True)]
    found = metrics(KINDS["4"], said, golds)
    for n in (1, 2):
        scores = [f1((grams(a, n) & grams(b, n)).total(), grams(a, n).total(), grams(b, n).total()) for a, b in pairs]
        assert found[f"rouge_{n}"].value == pytest.approx(sum(scores) / N, rel=1e-12)
    scores = [f1(lcs(a.split(), b.split()), len(a.split()), len(b.split())) for a, b in pairs]
    assert found["rouge_l"].value == pytest.approx(sum(scores) / N, rel=1e-12)
    assert [rouge(a, b)["rouge_l"] for a, b in pairs] == pytest.approx(scores, rel=1e-12)
    assert found["bleu"].value == pytest.approx(bleu(pairs), rel=1e-12)
    assert list(found)[0] == "rouge_l" and found["bleu"].low < found["bleu"].value < found["bleu"].high
    assert found["unparsed"].value == said.count(None) / N
    for a, b in pairs[:200]:
        orders = min(4, len(a.split()))  # BLEU of one text is over the orders that it has
        expected = bleu([(a, b)], orders) if orders and grams(a, 1) & grams(b, 1) else 0.0
        assert sentence_bleu(a, b) == pytest.approx(expected, rel=1e-12)


def test_bleu_of_real_text_is_sacrebleu_s() -> None:
    """Oracle: sacrebleu's corpus function, with punctuation, in one call."""
    import sacrebleu

    said = ["Why \"it\" matters, now", "5.5% up?", "It's over -- again"]
    golds = ["Why \"it\" matters now", "Up 5.5% again", "It's all over, again"]
    assert metrics(KINDS["4"], said, golds)["bleu"].value == sacrebleu.corpus_bleu(said, [golds]).score


class NoSynonyms:
    """A WordNet without words: METEOR then matches words and stems alone."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor_by_hand(said: list[str], gold: list[str]) -> float:
    """Exact matches from the last word to the first; F = 10PR / (R + 9P); penalty half the cube of chunks / matches."""
    left = list(enumerate(gold))
    matches = []
    for i, word in reversed(list(enumerate(said))):
        for place, (j, other) in reversed(list(enumerate(left))):
            if word == other:
                matches.append((i, j))
                del left[place]
                break
    if not matches:
        return 0.0
    matches.sort()
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in zip(matches, matches[1:], strict=False))
    precision, recall = len(matches) / len(said), len(matches) / len(gold)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def test_meteor() -> None:
    """Oracle: METEOR written out above, without synonyms; these words have different stems."""
    pytest.importorskip("nltk")
    said, golds = headlines()
    texts = [str(a or "") for a in said]
    expected = [meteor_by_hand(a.split(), b.split()) for a, b in zip(texts, golds, strict=True)]
    assert meteor(texts, golds, NoSynonyms()).value == pytest.approx(sum(expected) / N, rel=1e-12)


def test_nothing_to_score_is_an_error() -> None:
    """Oracle: the message names both numbers."""
    with pytest.raises(ValueError, match="1 predictions for 2 golds"):
        metrics(KINDS["3"], [1.0], ["1", "2"])
    with pytest.raises(ValueError, match="0 predictions for 0 golds"):
        metrics(KINDS["3"], [], [])


@pytest.mark.parametrize(
    ("name", "package"), [("4", "rouge_score.rouge_scorer"), ("4", "sacrebleu.metrics.bleu")]
)
def test_a_missing_package_is_named_with_its_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the package taken away; the message says what to install."""
    for cached in (_rouge_scorer, _bleu_scorer):
        cached.cache_clear()
    monkeypatch.setitem(cast(Any, sys.modules), package, None)
    with pytest.raises(ValueError, match="pip install 'matryoshka-pilot\\[lamp\\]'"):
        metrics(KINDS[name], ["sports"], ["sports"])


def test_meteor_without_wordnet_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nltk looks for its corpora in folders that hold none."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match="python -m nltk.downloader wordnet"):
        meteor(["a"], ["a"])
