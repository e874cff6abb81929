"""The PAL loop: the controller splits a word problem into sub-questions, the generator writes a program, we run it.

The inner loop lets the generator correct its program against the real error, the outer loop lets the controller write
new guidance. Under protocol "label_free" neither loop sees the gold answer: the only thing that causes a retry is a
program that did not run. Under "oracle" a wrong answer causes one as well. The reward reads gold once, at the end.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matryoshka.core.intervals import wilson
from matryoshka.core.protocols import ContextError, Controller, Generator, GeneratorError
from matryoshka.core.records import (
    Call,
    Example,
    Messages,
    Metric,
    PairRule,
    RolloutSettings,
    Sample,
    Trajectory,
    Turn,
)
from matryoshka.tasks.pal.answers import same_answer
from matryoshka.tasks.pal.prompts import PromptStyle
from matryoshka.tasks.sandbox import Outcome, extract_code, run_solution
from matryoshka.tasks.sandbox_backends import Sandbox

PAIR_RULE = PairRule("binary", cap=4)


def guidance_text(sample: Sample) -> str:
    """Return what of the controller's completion goes into the generator's prompt: its text without outer blanks."""
    return sample.text.strip()


class PALTask:
    """Word problems with numeric answers, solved by programs; examples have the fields "question" and "answer".

    splits: the problems by split name. style: the prompts, also part of the task's name, since other prompts are
    other episodes. timeout_s, memory_bytes: limits of one program. version: raised when the loop or its prompts change.
    sandbox: where programs run, by default this machine's sandbox with isolation "auto".
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Example]],
        style: PromptStyle,
        timeout_s: float = 5.0,
        memory_bytes: int = 512 * 2**20,
        pair_rule: PairRule = PAIR_RULE,
        version: int = 1,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.name = f"pal-{style.name}"
        self.version = version
        self.pair_rule = pair_rule
        self.main_metric = "accuracy"
        self.style = style
        self._splits = splits
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._sandbox = sandbox

    def examples(self, split: str) -> Sequence[Example]:
        """Return the problems of `split`. Raises ValueError listing the splits when it is unknown."""
        if split not in self._splits:
            raise ValueError(f"{self.name}: split {split!r} is unknown; choose from {sorted(self._splits)}")
        return self._splits[split]

    def first_prompt(self, example: Example) -> Messages:
        """Return the request for sub-questions."""
        return self.style.guidance(example.fields["question"])

    def gold_guidance(self, example: Example) -> str | None:
        """Return the example's own steps, one a line; None if it has no field "steps"."""
        steps = example.fields.get("steps")
        return None if steps is None else "\n".join(steps)

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`; reward 1.0 if the value of its last program is the gold answer, else 0.0.

        A black-box call that fails for good ends the episode with reward 0 and verdict "failed"; it is never raised.
        info: protocol; attempts (programs run); outer_turns (guidances asked for); overlong (a re-plan did not fit the
        context, so none was made); cut (guidances cut at max_tokens: they run, but are not for training); prediction
        (the last value, or None); error (of the last program, or of the failed call); verdict ("right", "wrong",
        "error": the last program did not run, "failed"); controller, generator (names); calls, prompt_tokens,
        completion_tokens (of the black box); draw.
        """
        question = example.fields["question"]
        turns: list[Turn] = []
        outcome: Outcome | None = None
        failure: str | None = None
        overlong = False  # a re-plan did not fit the context
        prompt = self.first_prompt(example)
        try:
            for turn in range(settings.outer_turns):
                try:
                    (sample,) = await controller.propose(prompt, 1, settings.controller.again(turn, 0))
                except ContextError:
                    if turn == 0 or settings.overlong == "error":
                        raise
                    overlong = True
                    break
                turns.append(Turn(prompt, controller.prompt_ids(prompt), sample))
                guidance = guidance_text(sample)
                request = self.style.code(question, guidance)
                complaint = ""
                for attempt in range(settings.inner_attempts):
                    reply = await generator.complete(request, settings.generator.again(turn, attempt))
                    code = extract_code(reply.text)
                    outcome = await run_solution(
                        code, self._timeout_s, self._memory_bytes, sandbox=self._sandbox
                    )
                    complaint = _complaint(outcome, example, settings.protocol)
                    call = Call(request, reply, outcome.error or f"value {outcome.value}")
                    turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, call), feedback=complaint)
                    if not complaint:
                        break
                    request = self.style.retry(question, guidance, code, complaint)
                if not complaint:
                    break
                prompt = self.style.replan(question, guidance, complaint)
        except GeneratorError as err:
            failure = str(err)

        prediction = outcome.value if outcome else None
        right = same_answer(prediction, example.fields["answer"])
        calls = [call for turn_taken in turns for call in turn_taken.calls]
        info = {
            "protocol": settings.protocol,
            "attempts": len(calls),
            "outer_turns": len(turns),
            "overlong": overlong,
            "cut": sum(turn_taken.action.finish_reason == "length" for turn_taken in turns),
            "prediction": prediction,
            "error": outcome.error if failure is None and outcome else failure,
            "verdict": _verdict(failure, prediction, right),
            "controller": controller.name,
            "generator": generator.name,
            "calls": len(calls),
            "prompt_tokens": sum(call.sample.usage.prompt_tokens for call in calls),
            "completion_tokens": sum(call.sample.usage.completion_tokens for call in calls),
            "draw": settings.controller.draw,
        }
        return Trajectory(self.name, example.id, tuple(turns), float(right), info)

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return "accuracy", "executable" (the last program ran) and "failed" (a call failed for good), as shares.

        A failed episode counts as not right in accuracy, and its share is shown. Raises ValueError for no trajectories.
        """
        verdicts = Counter(trajectory.info["verdict"] for trajectory in trajectories)
        n = len(trajectories)
        return {
            "accuracy": wilson(verdicts["right"], n),
            "executable": wilson(verdicts["right"] + verdicts["wrong"], n),
            "failed": wilson(verdicts["failed"], n),
        }


def _complaint(outcome: Outcome, example: Example, protocol: str) -> str:
    """Return why to try again, or "" to stop. Only the oracle protocol looks at the gold answer."""
    if outcome.error is not None:
        return outcome.error
    if protocol == "oracle" and not same_answer(outcome.value, example.fields["answer"]):
        return f"It ran and returned {outcome.value}, but the answer is not correct."
    return ""


def _verdict(failure: str | None, prediction: float | int | None, right: bool) -> str:
    if failure is not None:
        return "failed"
    if prediction is None:
        return "error"
    return "right" if right else "wrong"
