"""A task of your own in one file: questions with short answers, for which the controller writes a hint.

    matryoshka pilot --config FILE --task.name examples/own_task.py:ShortAnswers --task.options.data qa.jsonl
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka.core.files import read_jsonl
from matryoshka.core.protocols import Controller, Generator, Task
from matryoshka.core.records import Example, Message, Messages, RolloutSettings, Trajectory
from matryoshka.tasks.episode import Episode


@dataclass(frozen=True)
class Options:
    """The keys of [task.options]."""

    data: str = "qa.jsonl"
    """JSONL file of {"question": ..., "answer": ...}, and "hint" where [warmup] source = "gold"."""


class ShortAnswers(Task):
    """An answer is right if it is the expected one, apart from capitals and the full stop."""

    options: Options

    def examples(self, split: str) -> Sequence[Example]:
        """Return the lines of the file that belong to `split`."""
        rows = [Example(f"line {i}", row) for i, row in enumerate(read_jsonl(Path(self.options.data)), start=1)]
        return self.setting.part(rows, split)

    def first_prompt(self, example: Example) -> Messages:
        """Return what the controller sees."""
        return (Message("system", "Write one short hint."), Message("user", example.fields["question"]))

    def gold_guidance(self, example: Example) -> str | None:
        """Return a hint that is known to help, for the warm-up and as the ceiling of the report."""
        return example.fields.get("hint")

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode: a hint, an answer, a reward."""
        episode, answer = Episode(self.name, example, controller, generator, settings), ""
        with episode:
            hint = await episode.propose(self.first_prompt(example))
            request = f"{example.fields['question']}\nHint: {hint.text}\nAnswer in one or two words."
            answer = (await episode.complete((Message("user", request),))).text.strip()
        judged = self.judge(example, answer)  # by the field "answer"
        return episode.trajectory(judged.reward, judged.verdict, answer)
