"""The LaMP loop: the controller sums up a user's history, the generator answers the user's question from the summary.

One turn, one call. The controller sees what was retrieved from the history and, as published, not the question itself.
The gold answer is read once, at the end, so both protocols are the same here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matryoshka.core.intervals import wilson
from matryoshka.core.protocols import Controller, Generator, GeneratorError
from matryoshka.core.records import Call, Example, Messages, Metric, RolloutSettings, Trajectory, Turn, content_key
from matryoshka.tasks.lamp.answer_parsing import Prediction
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.metrics import meteor, metrics
from matryoshka.tasks.lamp.prompts import Fitted, answer, joined, line, summarise
from matryoshka.tasks.lamp.retrieval import Retriever
from matryoshka.tasks.lamp.rewards import PAIRS_PER_QUESTION, judge, pair_rule
from matryoshka.tasks.lamp.task_specs import Kind

MAIN_METRIC = {"1": "accuracy", "2N": "accuracy", "2M": "accuracy", "3": "closeness", "4": "rouge_l"}
RAG = (1, 4)  # entries that the retrieval baselines show the generator


@dataclass(frozen=True)
class Options:
    """How prompts are built. prompt_tokens: of the controller's whole prompt. show_question: put the question into it.

    retrieved: entries that the generator sees besides the summary.
    """

    prompt_tokens: int = 4000
    show_question: bool = False
    retrieved: int = 0


def make_example(kind: Kind, item: Item, retriever: Retriever, limit: int = 0, entry_characters: int = 2000) -> Example:
    """Return the example of `item`, its history ranked for the question and cut to `limit` entries.

    limit 0 is the published one. An entry's text is cut to entry_characters. fields: question; answer; entries: lines
    best first; profile: entries that there were; cut: entries kept that were cut; baselines: name -> guidance.
    """
    documents = [" ".join(entry[name] for name in kind.texts) for entry in item.profile]
    dates = [entry.get("date", "") for entry in item.profile]
    ranking = retriever(kind.query(item.question), documents, dates)[: limit or kind.limit]
    shown = [line(kind, item.profile[index], entry_characters) for index in ranking]
    entries = [entry for entry, _ in shown]
    fields = {
        "question": item.question,
        "answer": item.gold,
        "entries": entries,
        "profile": len(item.profile),
        "cut": sum(cut for _, cut in shown),
        "baselines": {f"rag_{k}": joined(entries[:k]) for k in RAG},
    }
    return Example(item.id, fields)


class LampTask:
    """One LaMP task over the examples of `splits`, which `make_example` made.

    count_tokens: of a prompt in the controller's context. The options are part of the task's name, since other prompts
    are other episodes. version: raised when the loop or its prompts change. with_meteor: score headlines by METEOR too.
    """

    def __init__(
        self,
        kind: Kind,
        splits: Mapping[str, Sequence[Example]],
        count_tokens: Callable[[Messages], int],
        options: Options = Options(),
        pairs_per_question: int = PAIRS_PER_QUESTION,
        version: int = 1,
        with_meteor: bool = False,
    ) -> None:
        self.name = f"lamp-{kind.name}-{content_key(options)[:8]}"
        self.version = version
        self.pair_rule = pair_rule(kind, pairs_per_question)
        self.main_metric = MAIN_METRIC[kind.name]
        self._kind = kind
        self._splits = splits
        self._count_tokens = count_tokens
        self._options = options
        self._meteor = with_meteor and kind.name == "4"
        self._fitted: dict[str, Fitted] = {}
        self._golds = {example.id: example.fields["answer"] for rows in splits.values() for example in rows}

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of `split`. Raises ValueError listing the splits when it is unknown."""
        if split not in self._splits:
            raise ValueError(f"{self.name}: split {split!r} is unknown; choose from {sorted(self._splits)}")
        return self._splits[split]

    def first_prompt(self, example: Example) -> Messages:
        """Return the request for a summary. Raises ValueError if prompt_tokens are too few for it without history."""
        return self._fit(example).prompt

    def gold_guidance(self, example: Example) -> str | None:
        """Return the example's own summary; None if it has no field "summary": real users come without one."""
        summary: str | None = example.fields.get("summary")
        return summary

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`, worth what `rewards.judge` says.

        A black-box call that fails for good ends it with reward 0 and verdict "failed"; it is never raised. info:
        protocol; prediction (label, number or headline, None where there is none); error (of the failed call); verdict;
        score, rouge_l, bleu (see `Judgement`); entries, dropped_entries, cut_entries (of the history, in the
        controller's prompt); cut (1: the summary was cut at max_tokens: it is used, but not for training); controller,
        generator (names); calls, prompt_tokens, completion_tokens (of the black box); draw.
        """
        fitted = self._fit(example)
        question, entries = example.fields["question"], example.fields["entries"]
        turns: tuple[Turn, ...] = ()
        failure, reply = None, ""
        try:
            (sample,) = await controller.propose(fitted.prompt, 1, settings.controller)
            turns = (Turn(fitted.prompt, controller.prompt_ids(fitted.prompt), sample),)
            request = answer(self._kind, question, sample.text.strip(), entries[: self._options.retrieved])
            completion = await generator.complete(request, settings.generator)
            reply = completion.text
            turns = (replace(turns[0], calls=(Call(request, completion),)),)
        except GeneratorError as err:  # the generator may be the controller too
            failure = str(err)
        judgement = judge(self._kind, reply, example.fields["answer"])
        calls = [call for turn in turns for call in turn.calls]
        info = {
            "protocol": settings.protocol,
            "prediction": judgement.prediction,
            "error": failure,
            "verdict": judgement.verdict if failure is None else "failed",
            **judgement.scores,
            "entries": len(entries) - fitted.dropped,
            "dropped_entries": fitted.dropped,
            "cut_entries": example.fields["cut"] + fitted.cut,
            "cut": sum(turn.action.finish_reason == "length" for turn in turns),
            "controller": controller.name,
            "generator": generator.name,
            "calls": len(calls),
            "prompt_tokens": sum(call.sample.usage.prompt_tokens for call in calls),
            "completion_tokens": sum(call.sample.usage.completion_tokens for call in calls),
            "draw": settings.controller.draw,
        }
        reward = judgement.reward if failure is None else 0.0
        return Trajectory(self.name, example.id, turns, reward, info)

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return the task's metrics (see `metrics.metrics`) and "failed", the share whose call failed for good.

        A failed episode counts as one without an answer. Raises ValueError for no trajectories.
        """
        predictions: list[Prediction] = [trajectory.info.get("prediction") for trajectory in trajectories]
        golds = [self._golds[trajectory.example_id] for trajectory in trajectories]
        found = metrics(self._kind, predictions, golds)
        if self._meteor:
            found["meteor"] = meteor([str(prediction or "") for prediction in predictions], golds)
        failed = sum(trajectory.info["verdict"] == "failed" for trajectory in trajectories)
        return {**found, "failed": wilson(failed, len(golds))}

    def _fit(self, example: Example) -> Fitted:
        if example.id not in self._fitted:
            question = example.fields["question"] if self._options.show_question else ""
            lines, budget = example.fields["entries"], self._options.prompt_tokens
            self._fitted[example.id] = summarise(self._kind, lines, self._count_tokens, budget, question)
        return self._fitted[example.id]
