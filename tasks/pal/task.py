"""Word problems with numeric answers: the controller splits one into questions, the generator writes a program (PAL).

The inner loop lets the generator correct its program against the real error, the outer loop lets the controller write
new guidance. Under protocol "label_free" neither loop sees the gold answer: the only thing that causes a retry is a
program that did not run. Under "oracle" a wrong answer causes one as well. The reward reads gold once, at the end.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from matryoshka.core.protocols import Controller, Generator, Task, TaskSetting
from matryoshka.core.records import Example, Judgement, Messages, RolloutSettings, Trajectory
from matryoshka.tasks.episode import Episode
from matryoshka.tasks.pal import gsm8k, synthetic_problems
from matryoshka.tasks.pal.answers import read_answer, same_answer
from matryoshka.tasks.pal.options import PalOptions
from matryoshka.tasks.prompt_files import PromptFile
from matryoshka.tasks.sandbox import Outcome, extract_code, run_solution
from matryoshka.tasks.sandbox_backends import SCRIPT, in_words


def open_prompts(prompts: str) -> PromptFile:
    """Return a shipped style of prompts or a user's own file; docs/prompts.md has its requests and their values.

    A retry and a new plan of the shipped styles insert the conversation so far, so that the model sees what it wrote
    and what really happened. The text "written" makes guidance of known sub-questions, by default one a line.
    """
    requests, one_a_line = ("guidance", "code", "retry", "replan"), "{{ steps | join('\n') }}"
    return PromptFile(prompts, Path(__file__).with_name("prompts"), requests, {"written": one_a_line})


class PALTask(Task):
    """The task "pal": problems made from the seed ("words") or read from GSM8K files ("gsm8k"), solved by programs.

    The prompt style is part of the task's name, since other prompts are other episodes.
    """

    options: PalOptions
    version = 3
    free_options = ("sandbox.isolation", "sandbox.command")

    def __init__(self, options: PalOptions, setting: TaskSetting) -> None:
        self.prompts = open_prompts(options.prompts)
        self.sandbox = options.sandbox.sandbox()
        self.name = f"pal-{self.prompts.name}"
        self.label = "gsm8k" if options.train_file or options.test_file or options.held_out_file else "words"
        super().__init__(options, setting)

    def examples(self, split: str) -> Sequence[Example]:
        """Return the problems of `split`, with the fields "question", "answer" and, where they are known, "steps"."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> Mapping[str, Sequence[Example]]:
        if self.label == "gsm8k":
            return gsm8k.load_splits(self.options, self.setting)
        return synthetic_problems.load_splits(self.setting.sizes, self.setting.seed)

    def first_prompt(self, example: Example) -> Messages:
        """Return the request for sub-questions."""
        return self.prompts.render("guidance", question=example.fields["question"])

    def gold_guidance(self, example: Example) -> str | None:
        """Return the example's own steps in the form that the prompts ask for; None if it has no field "steps"."""
        steps = example.fields.get("steps")
        return None if steps is None else self.prompts.text("written", steps=steps)

    def check(self, settings: RolloutSettings) -> None:
        """Raise ValueError if programs cannot be kept behind the boundary that was asked for."""
        self.sandbox.start(SCRIPT)

    def facts(self) -> dict[str, str]:
        """Return the boundary that generated programs run behind."""
        return {"generated programs": in_words(self.sandbox.start(SCRIPT))}

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`; reward 1.0 if the value of its last program is the gold answer, else 0.0.

        Its prediction is that value. The verdict "error" means that the last program did not run. Guidance that was cut
        at max_tokens is used, but is not for training.
        """
        question, limits = example.fields["question"], self.options.sandbox
        episode = Episode(self.name, example, controller, generator, settings)
        outcome: Outcome | None = None
        first = prompt = self.first_prompt(example)
        with episode:
            for _ in range(settings.outer_turns):
                guidance = await episode.propose(prompt)
                said = {"question": question, "guidance": guidance.text}
                asked = request = self.prompts.render("code", **said)
                for attempt in range(settings.inner_attempts):
                    reply = await episode.complete(request, attempt)
                    code = extract_code(reply.text)
                    outcome = await run_solution(code, limits.timeout_s, limits.memory_bytes, sandbox=self.sandbox)
                    reply.outcome = outcome.error or f"value {outcome.value}"
                    guidance.feedback = _complaint(outcome, example, settings.protocol)
                    if not guidance.feedback:
                        break
                    shown = {"code": code, "error": guidance.feedback}
                    request = self.prompts.render("retry", conversation=asked, **said, **shown)
                if not guidance.feedback:
                    break
                prompt = self.prompts.render("replan", conversation=first, **said, feedback=guidance.feedback)
        prediction, error = (outcome.value, outcome.error) if outcome else (None, None)
        judged = self.judge(example, prediction)
        return episode.trajectory(judged.reward, judged.verdict, prediction, error)

    def judge(self, example: Example, prediction: Any) -> Judgement:
        """Return whether the number that `prediction` gives is the answer (see `answers.read_answer`)."""
        if not isinstance(prediction, str | int | float | None):
            raise ValueError(f"expected a number or a text with a number, got {type(prediction).__name__}")
        value = read_answer(prediction)
        right = same_answer(value, example.fields["answer"])
        return Judgement(value, "error" if value is None else "right" if right else "wrong", float(right))


def _complaint(outcome: Outcome, example: Example, protocol: str) -> str:
    """Return why to try again, or "" to stop. Only the oracle protocol looks at the gold answer."""
    if outcome.error is not None:
        return outcome.error
    if protocol == "oracle" and not same_answer(outcome.value, example.fields["answer"]):
        return f"It ran and returned {outcome.value}, but the answer is not correct."
    return ""
