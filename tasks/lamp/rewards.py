"""The reward of an answer, and the rule by which pairs are made, for each LaMP task.

LaMP-1, 2N, 2M: 1 for the gold label, else 0; a summary with a right answer is preferred to one with a wrong answer.
LaMP-3: 1 - |error| / 4; an answer without a number counts as the farther end of the scale; the smaller error is
preferred. LaMP-4: the mean of ROUGE-L and BLEU; the better mean rank in the two, among the samples of the same
question, is preferred. In every case the best is paired with the worst, at most two pairs a question. Ties, and
summaries of equal text, make no pair.
"""

from matryoshka.core.records import Judgement, PairRule, Verdict
from matryoshka.tasks.lamp.answer_parsing import Prediction, parse
from matryoshka.tasks.lamp.metrics import error, rouge, sentence_bleu
from matryoshka.tasks.lamp.task_specs import Kind

PAIRS_PER_QUESTION = 2  # at most


def judge(kind: Kind, reply: str, gold: str) -> Judgement:
    """Return what `reply` is worth against `gold`.

    score: the main metric on this question, where answers are graded. measures: in LaMP-4 "rouge_l" and "bleu" (0 to
    1), which the pair rule reads.
    """
    prediction = parse(kind, reply)
    verdict: Verdict = "error" if prediction is None else "right" if _same(kind, prediction, gold) else "wrong"
    if kind.name == "3":
        closeness = 1 - error(prediction, gold) / 4
        return Judgement(prediction, verdict, max(0.0, closeness), closeness)
    if kind.labels:
        return Judgement(prediction, verdict, float(verdict == "right"))
    text = str(prediction or "")
    rouge_l, bleu = rouge(text, gold)["rouge_l"], sentence_bleu(text, gold) / 100
    return Judgement(prediction, verdict, (rouge_l + bleu) / 2, rouge_l, {"rouge_l": rouge_l, "bleu": bleu})


def pair_rule(kind: Kind) -> PairRule:
    """Return how pairs of this task are made."""
    scores = () if kind.labels else ("rouge_l", "bleu")
    return PairRule("binary" if kind.labels and kind.name != "3" else "ranked", PAIRS_PER_QUESTION, scores=scores)


def _same(kind: Kind, prediction: Prediction, gold: str) -> bool:
    if kind.name == "3":
        return prediction == float(gold)
    return prediction == gold or (not kind.labels and str(prediction).casefold() == gold.casefold())
