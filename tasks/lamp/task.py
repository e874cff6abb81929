"""Personalisation: the controller sums up a user's history, the generator answers a question from the summary (LaMP).

There is one turn with one call. The controller sees what was retrieved from the history and, as published, not the
question itself. The gold answer is read once, at the end, so both protocols are the same here.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from matryoshka.core.intervals import wilson
from matryoshka.core.protocols import Baseline, Controller, Generator, Task, TaskSetting
from matryoshka.core.records import Example, Judgement, Messages, Metric, RolloutSettings, Trajectory, content_key
from matryoshka.tasks.episode import Episode
from matryoshka.tasks.lamp.metrics import meteor, metrics
from matryoshka.tasks.lamp.options import LampOptions
from matryoshka.tasks.lamp.prompt_style import Fitted, answer, open_prompts, summarise
from matryoshka.tasks.lamp.rewards import judge, pair_rule
from matryoshka.tasks.lamp.scripted_generator import ScriptedReader
from matryoshka.tasks.lamp.splits import load_splits
from matryoshka.tasks.lamp.task_specs import kind_of

MAIN_METRIC = {"1": "accuracy", "2N": "accuracy", "2M": "accuracy", "3": "closeness", "4": "rouge_l"}
BASELINES = {
    "rag_1": "one retrieved entry (RAG)",
    "rag_4": "four retrieved entries (RAG)",
    "other_4": "four entries of another user",
}


class LampTask(Task):
    """The task "lamp": one of the five LaMP tasks, over made-up users or LaMP's own files.

    The options that shape the prompts are part of the task's name, since other prompts are other episodes.
    """

    options: LampOptions
    version = 2
    compares_own_guidance = True
    free_options = ("embeddings_cache",)
    headline = ("task", "examples", "untrained", "trained", "p", "seconds")

    def __init__(self, options: LampOptions, setting: TaskSetting) -> None:
        kind = self.kind = kind_of(options.task)
        shape = {name: getattr(options, name) for name in ("prompt_tokens", "show_question", "retrieved")}
        self.prompts = open_prompts(options.prompts)
        other = "" if self.prompts.name == "plain" else f"-{self.prompts.name}"
        self.name = f"lamp-{kind.name}-{content_key(shape)[:8]}{other}"
        self.label = f"LaMP-{kind.name}"
        self.pair_rule = pair_rule(kind)
        self.main_metric = MAIN_METRIC[kind.name]
        self._fitted: dict[str, Fitted] = {}
        super().__init__(options, setting)

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of `split`, with the fields that `splits.make_example` describes."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> Mapping[str, Sequence[Example]]:
        return load_splits(self.options, self.setting.sizes, self.setting.seed)

    @cached_property
    def _golds(self) -> Mapping[str, str]:
        return {example.id: example.fields["answer"] for rows in self._splits.values() for example in rows}

    def first_prompt(self, example: Example) -> Messages:
        """Return the request for a summary. Raises ValueError if prompt_tokens are too few for it without history."""
        return self._fit(example).prompt

    def gold_guidance(self, example: Example) -> str | None:
        """Return the example's own summary; None if it has no field "summary": real users come without one."""
        summary: str | None = example.fields.get("summary")
        return summary

    def baselines(self, example: Example) -> Sequence[Baseline]:
        """Return what the generator may be shown of the history without any controller."""
        return [Baseline(name, BASELINES[name], text) for name, text in example.fields["baselines"].items()]

    def check(self, settings: RolloutSettings) -> None:
        """Raise ValueError for a loop that LaMP does not have."""
        given = (settings.inner_attempts, settings.outer_turns, settings.protocol)
        if given != (1, 1, "label_free"):
            raise ValueError(
                "[rollout] LaMP has one turn and one answer; expected inner_attempts 1, outer_turns 1 and protocol "
                f"'label_free', got {given[0]}, {given[1]} and {given[2]!r}"
            )

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`, whose reward `rewards.judge` gives.

        Its prediction is a label, a number or a headline. measures: entries, dropped_entries and cut_entries of the
        history, in the controller's prompt; for headlines rouge_l and bleu. A summary that was cut at max_tokens is
        used, but is not for training.
        """
        fitted = self._fit(example)
        question, entries = example.fields["question"], example.fields["entries"]
        episode = Episode(self.name, example, controller, generator, settings)
        reply = ""
        with episode:
            guidance = await episode.propose(fitted.prompt)
            shown = entries[: self.options.retrieved]
            request = answer(self.kind, question, guidance.text, shown, self.prompts)
            reply = (await episode.complete(request)).text
        judged = judge(self.kind, reply, example.fields["answer"])
        measures = {
            **judged.measures,
            "entries": len(entries) - fitted.dropped,
            "dropped_entries": fitted.dropped,
            "cut_entries": example.fields["cut"] + fitted.cut,
        }
        return episode.trajectory(
            judged.reward, judged.verdict, judged.prediction, score=judged.score, measures=measures
        )

    def judge(self, example: Example, prediction: Any) -> Judgement:
        """Return what a label, a score or a headline is worth; it is read as a reply of the generator is."""
        if not isinstance(prediction, str | int | float | None) or isinstance(prediction, bool):
            raise ValueError(f"expected a text or a number, got {type(prediction).__name__}")
        return judge(self.kind, "" if prediction is None else str(prediction), example.fields["answer"])

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return the task's metrics (see `metrics.metrics`) and "failed", the share whose call failed for good.

        A failed episode counts as one without an answer. Raises ValueError for no trajectories.
        """
        predictions = [trajectory.info.prediction for trajectory in trajectories]
        golds = [self._golds[trajectory.example_id] for trajectory in trajectories]
        found = metrics(self.kind, predictions, golds)
        if self.options.meteor and self.kind.name == "4":
            found["meteor"] = meteor([str(prediction or "") for prediction in predictions], golds)
        failed = sum(trajectory.info.verdict == "failed" for trajectory in trajectories)
        return {**found, "failed": wilson(failed, len(golds))}

    @classmethod
    def scripted_generator(cls, name: str) -> Generator:
        """Return the scripted reader `name`."""
        return ScriptedReader(name)

    def _fit(self, example: Example) -> Fitted:
        if example.id not in self._fitted:
            question = example.fields["question"] if self.options.show_question else ""
            lines, budget = example.fields["entries"], self.options.prompt_tokens
            count = self.setting.count_tokens
            self._fitted[example.id] = summarise(self.kind, lines, count, budget, question, self.prompts)
        return self._fitted[example.id]
