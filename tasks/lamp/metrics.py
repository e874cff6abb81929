"""LaMP's metrics over parsed predictions, each with a 95% interval: all those of the official evaluation.

A missing prediction stays in the denominator. It counts as a wrong label, as an empty headline, or as the end of the
scale (1 or 5) that is farther from the gold score. macro-F1 is over the full list of labels, whether they occur or not.
Text goes through rouge-score, sacrebleu and nltk; none of them is imported before it is needed.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from matryoshka.core.intervals import bootstrap, bootstrap_mean, wilson
from matryoshka.core.records import Metric
from matryoshka.tasks.lamp.answer_parsing import Prediction
from matryoshka.tasks.lamp.task_specs import Kind

WORST = (1.0, 5.0)  # the ends of LaMP-3's scale


def metrics(kind: Kind, predictions: Sequence[Prediction], golds: Sequence[str]) -> dict[str, Metric]:
    """Return every metric of the task, the main one first, and "unparsed", the share without a prediction.

    Labels: accuracy, macro_f1. LaMP-3: closeness (1 - MAE / 4), mae, rmse, accuracy. LaMP-4: rouge_l, rouge_1, rouge_2
    (F1, 0 to 1, no stemming), bleu (corpus, 0 to 100).
    Raises ValueError for lists of different lengths or none, and without a package that the task needs.
    """
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"metrics: {len(predictions)} predictions for {len(golds)} golds; expected as many, > 0")
    unparsed = {"unparsed": wilson(sum(prediction is None for prediction in predictions), len(golds))}
    if kind.name == "3":
        return _scores(predictions, golds) | unparsed
    if kind.labels:
        return _labels(kind, predictions, golds) | unparsed
    return _texts([str(prediction or "") for prediction in predictions], golds) | unparsed


def _labels(kind: Kind, predictions: Sequence[Prediction], golds: Sequence[str]) -> dict[str, Metric]:
    index: dict[Prediction, int] = {label: i for i, label in enumerate(kind.labels)}
    said = np.array([index.get(prediction, -1) for prediction in predictions])
    gold = np.array([index[answer] for answer in golds])
    return {
        "accuracy": wilson(int((said == gold).sum()), len(golds)),
        "macro_f1": bootstrap(len(golds), lambda i: macro_f1(gold[i], said[i], len(kind.labels))),
    }


def macro_f1(gold: Any, said: Any, labels: int) -> float:
    """Return macro-F1 of arrays of label numbers, -1 being none. scikit-learn gives the same, more slowly."""
    hits, expected, predicted = (
        np.bincount(part[part >= 0], minlength=labels) for part in (gold[gold == said], gold, said)
    )
    return float((2 * hits / np.maximum(1, expected + predicted)).mean())


def error(prediction: Prediction, gold: str) -> float:
    """Return LaMP-3's absolute error; without a number it is that of the farther end of the scale."""
    truth = float(gold)
    said = max(WORST, key=lambda end: abs(end - truth)) if prediction is None else float(prediction)
    return abs(said - truth)


def _scores(predictions: Sequence[Prediction], golds: Sequence[str]) -> dict[str, Metric]:
    errors = np.array([error(*pair) for pair in zip(predictions, golds, strict=True)])
    mae = bootstrap_mean(errors.tolist())
    return {
        "closeness": Metric(1 - mae.value / 4, 1 - mae.high / 4, 1 - mae.low / 4, mae.n),
        "mae": mae,
        "rmse": bootstrap(len(errors), lambda i: math.sqrt(float((errors[i] ** 2).mean()))),
        "accuracy": wilson(int((errors == 0).sum()), len(errors)),
    }


def _texts(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, Metric]:
    pairs = list(zip(predictions, golds, strict=True))
    scored = [rouge(*pair) for pair in pairs]
    counts = np.array([_bleu_counts(*pair) for pair in pairs])
    found = {name: bootstrap_mean([row[name] for row in scored]) for name in ("rouge_l", "rouge_1", "rouge_2")}
    return found | {"bleu": bootstrap(len(pairs), lambda i: _bleu(counts[i].sum(axis=0).tolist(), False))}


def rouge(prediction: str, gold: str) -> dict[str, float]:
    """Return rouge_1, rouge_2 and rouge_l of one text: F1 between 0 and 1, without stemming."""
    scored = _rouge_scorer().score(gold, prediction)
    return {f"rouge_{name.removeprefix('rouge').lower()}": score.fmeasure for name, score in scored.items()}


def sentence_bleu(prediction: str, gold: str) -> float:
    """Return the BLEU of one text, 0 to 100, of as many n-gram orders as it has ("effective order")."""
    return _bleu(_bleu_counts(prediction, gold), True)


def meteor(predictions: Sequence[str], golds: Sequence[str], wordnet: Any = None) -> Metric:
    """Return the mean METEOR of texts, 0 to 1, in the words of nltk's tokenizer (a text counts as one sentence).

    wordnet: an object with `synsets(word)`, by default nltk's corpus. Raises ValueError if nltk or its corpus is
    missing.
    """
    try:
        from nltk import corpus
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.translate.meteor_score import single_meteor_score

        if wordnet is None:
            wordnet = corpus.wordnet
            wordnet.ensure_loaded()
    except ImportError as err:
        raise ValueError(_needs("nltk")) from err
    except LookupError as err:
        raise ValueError("METEOR needs WordNet: python -m nltk.downloader wordnet") from err
    words = NLTKWordTokenizer().tokenize
    pairs = [(words(gold), words(said)) for said, gold in zip(predictions, golds, strict=True)]
    return bootstrap_mean([single_meteor_score(*pair, wordnet=wordnet) for pair in pairs])


def _bleu_counts(prediction: str, gold: str) -> list[int]:
    """Return words said, words expected, matching 1- to 4-grams, possible 1- to 4-grams."""
    scored = _bleu_scorer().corpus_score([prediction], [[gold]])
    return [scored.sys_len, scored.ref_len, *scored.counts, *scored.totals]


def _bleu(counts: Sequence[int], effective_order: bool) -> float:
    scored = _bleu_scorer().compute_bleu(counts[2:6], counts[6:], counts[0], counts[1], "exp", None, effective_order)
    return float(scored.score)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as err:
        raise ValueError(_needs("rouge-score")) from err
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


@cache
def _bleu_scorer() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as err:
        raise ValueError(_needs("sacrebleu")) from err
    return BLEU()


def _needs(package: str) -> str:
    return f"this metric needs {package}: pip install 'matryoshka-pilot[lamp]'"
