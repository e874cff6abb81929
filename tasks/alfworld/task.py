"""The ALFWorld loop: the controller plans, the generator writes a program that acts, the household answers.

The inner loop lets the generator correct its program against the failed assertion and what the household said, going on
from the step that failed or afresh; the outer loop lets the controller plan anew. Under "label_free" only what goes
wrong by itself causes a retry: a program that raises or meets a limit. Under "oracle" one that ends without the task
done causes one too. Whether the task is done the household alone decides, and it ends the game.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from matryoshka.core.intervals import bootstrap, wilson
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
from matryoshka.tasks.alfworld import prompts, react
from matryoshka.tasks.alfworld.plan_language import Step, merged
from matryoshka.tasks.alfworld.playthrough import Environment, Session, transcript
from matryoshka.tasks.alfworld.program import AskRefusedError, Limits, ProgramOutcome, run_program
from matryoshka.tasks.alfworld.prompts import Scene, Style
from matryoshka.tasks.sandbox import extract_code

PAIR_RULE = PairRule("binary", cap=4)
LIMITS = Limits()
Mode = Literal["program", "react"]
# A corrected program goes on in the same household only if it has this share of the actions left to do so.
RESUME_SHARE = 0.2


@dataclass
class _Work:
    """What the attempts under one plan led to so far; a call that fails for good loses none of it."""

    calls: list[Call] = field(default_factory=list)
    attempts: int = 0
    steps: int = 0
    won: bool = False
    error: str = ""  # what stopped the last attempt; "" if it ended by itself
    complaint: str = ""  # why there should be another one


class ALFWorldTask:
    """Household games; examples have "question" (the first screen), "answer" (commands that win) and "task_type".

    splits: the games by split name. style: the prompts. environment: makes the household of an example. mode: how the
    generator acts. max_steps: commands in one household, also over attempts that go on in it. verbs: those that
    `environment` understands. limits: of one program. gold: an example's steps that are known to win, None where
    unknown. The task's name tells style and mode apart, since other prompts are other episodes.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Example]],
        style: Style,
        environment: Callable[[Example], Environment],
        mode: Mode = "program",
        max_steps: int = 50,
        verbs: str = "current",
        limits: Limits = LIMITS,
        pair_rule: PairRule = PAIR_RULE,
        version: int = 1,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"alfworld: max_steps {max_steps} must be at least 1")
        self.name = f"alfworld-{style.name}-{mode}"
        self.version = version
        self.pair_rule = pair_rule
        self.main_metric = "success"
        self.style = style
        self._splits = splits
        self._alike: dict[Messages, list[Example]] = {}
        for example in (example for examples in splits.values() for example in examples):
            if example.fields.get("gold"):
                self._alike.setdefault(self.first_prompt(example), []).append(example)
        self._environment = environment
        self._mode = mode
        self._max_steps = max_steps
        self._verbs = verbs
        self._limits = limits

    def examples(self, split: str) -> Sequence[Example]:
        """Return the games of `split`. Raises ValueError listing the splits when it is unknown."""
        if split not in self._splits:
            raise ValueError(f"{self.name}: split {split!r} is unknown; choose from {sorted(self._splits)}")
        return self._splits[split]

    def first_prompt(self, example: Example) -> Messages:
        """Return the request for a plan."""
        return self.style.plan(_scene(example))

    def gold_guidance(self, example: Example) -> str | None:
        """Return a plan that wins, from the field "gold"; None if the example has none.

        Games that look the same to the controller have one plan, which wins in each of them.
        """
        if not example.fields.get("gold"):
            return None
        alike = self._alike.get(self.first_prompt(example), [example])
        return self.style.write(merged([gold_steps(other) for other in alike]))

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`; reward 1.0 if its task was done, else 0.0.

        A black-box call that fails for good ends the episode with reward 0 and verdict "failed"; it is never raised.
        info: protocol; mode; task_type; attempts (programs, or households begun by direct action); outer_turns (plans
        asked for); steps (commands in all); overlong (a re-plan did not fit the context, so none was made); cut (plans
        cut at max_tokens); prediction ("done" or "not done"); error
        (what ended the last attempt, or the failed call); verdict ("right"; "wrong": the last attempt ended by itself
        without the task done; "error"; "failed"); controller, generator (names); calls, prompt_tokens,
        completion_tokens (of the black box); draw.
        """
        scene = _scene(example)
        turns: list[Turn] = []
        works: list[_Work] = []
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
                plan = sample.text.strip()
                works.append(_Work())
                turns.append(Turn(prompt, controller.prompt_ids(prompt), sample))
                follow = self._by_program if self._mode == "program" else self._by_actions
                await follow(example, plan, generator, settings, turn, works[-1])
                if works[-1].won or not works[-1].complaint:
                    break
                prompt = self.style.replan(scene, plan, works[-1].complaint)
        except GeneratorError as err:
            failure = str(err)
        turns = [
            replace(taken, calls=tuple(work.calls), feedback=work.complaint)
            for taken, work in zip(turns, works, strict=True)
        ]
        won = bool(works) and works[-1].won
        calls = [call for work in works for call in work.calls]
        error = works[-1].error if works else ""
        info = {
            "protocol": settings.protocol,
            "mode": self._mode,
            "task_type": example.fields["task_type"],
            "attempts": sum(work.attempts for work in works),
            "outer_turns": len(turns),
            "steps": sum(work.steps for work in works),
            "overlong": overlong,
            "cut": sum(taken.action.finish_reason == "length" for taken in turns),
            "prediction": "done" if won else "not done",
            "error": failure or error or None,
            "verdict": _verdict(failure, won, error),
            "controller": controller.name,
            "generator": generator.name,
            "calls": len(calls),
            "prompt_tokens": sum(call.sample.usage.prompt_tokens for call in calls),
            "completion_tokens": sum(call.sample.usage.completion_tokens for call in calls),
            "draw": settings.controller.draw,
        }
        return Trajectory(self.name, example.id, tuple(turns), float(won), info)

    async def _by_program(
        self, example: Example, plan: str, generator: Generator, settings: RolloutSettings, turn: int, work: _Work
    ) -> None:
        """Let the generator write programs from `plan` until one ends by itself or the attempts are used up."""
        scene = _scene(example)
        request = self.style.solve(scene, plan)
        session, first, memory = self._begin(example), 1, "{}"
        for attempt in range(settings.inner_attempts):
            reply = await generator.complete(request, settings.generator.again(turn, attempt))
            code = extract_code(reply.text)
            place, begun = len(work.calls), len(session.history)
            work.calls.append(Call(request, reply))
            work.attempts += 1
            ask = partial(self._ask, generator, settings, work, turn)
            outcome = await run_program(code, session, ask, self._limits, first, memory)
            played = session.history[begun:]
            work.steps += len(played)
            work.won, work.error = session.won, outcome.error
            work.complaint = _complaint(outcome, session, settings.protocol)
            work.calls[place] = Call(request, reply, _story(outcome, session, begun))
            if work.won or not work.complaint:
                return
            first, memory = 1, "{}"
            what = "Your corrected program starts at step 1, in the household as it was at first."
            # In the first half of the attempts a mistake is mended where it was made, in the second all begins anew.
            mending = attempt + 1 < settings.inner_attempts / 2
            if outcome.error and outcome.step > 1 and mending and session.steps_left >= RESUME_SHARE * self._max_steps:
                first, memory = outcome.step, outcome.memory
                what = f"Your corrected program goes on at step {first}, in the household as it is now, with memory = "
                what += f"{memory[:500]}."
            else:
                session = self._begin(example)
            request = self.style.retry(scene, plan, code, f"{work.complaint}\n\n{what}")

    async def _by_actions(
        self, example: Example, plan: str, generator: Generator, settings: RolloutSettings, turn: int, work: _Work
    ) -> None:
        """Let the generator act by itself, with `plan` before its eyes, in a fresh household each attempt."""
        prompt = self.style.act(_scene(example), plan)
        for attempt in range(settings.inner_attempts):
            session = self._begin(example)
            work.attempts += 1

            async def complete(messages: Messages, number: int, attempt: int = attempt) -> Sample:
                return await generator.complete(messages, settings.generator.again(turn, attempt, number))

            try:
                await react.play(prompt, session, complete, work.calls)
            finally:
                work.steps += len(session.history)
            work.won = session.won
            work.error = "" if work.won else f"All {self._max_steps} actions in this household are used up."
            work.complaint = f"{work.error}\n{session.report()}" if work.error else ""
            if work.won:
                return

    def _begin(self, example: Example) -> Session:
        return Session(self._environment(example), self._max_steps, self._verbs)

    async def _ask(self, generator: Generator, settings: RolloutSettings, work: _Work, turn: int, question: str) -> str:
        """Return the generator's answer to a question that its program asks."""
        if not question.strip():
            raise AskRefusedError("the question is empty")
        prompt = prompts.ask(question)
        sampling = replace(settings.generator.again(turn, len(work.calls)), max_tokens=self._limits.ask_tokens)
        sample = await generator.complete(prompt, sampling)
        work.calls.append(Call(prompt, sample, "asked by the program"))
        return sample.text.strip()

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return shares with Wilson intervals and means of costs, over all games.

        Shares: "success", "success <type>" for each type that occurs, "executable" (the last attempt ended by itself),
        "failed" (a call failed for good; not a success). Means with bootstrap intervals: "attempts", "steps",
        "calls", over the episodes that did not fail. Raises ValueError for no trajectories.
        """
        verdicts = Counter(trajectory.info["verdict"] for trajectory in trajectories)
        n = len(trajectories)
        scores = {"success": wilson(verdicts["right"], n)}
        of_type: dict[str, list[bool]] = {}
        for trajectory in trajectories:
            kind = trajectory.info.get("task_type", "unknown")  # the driver's own record of a failed episode has none
            of_type.setdefault(kind, []).append(trajectory.info["verdict"] == "right")
        scores |= {f"success {kind}": wilson(sum(of_type[kind]), len(of_type[kind])) for kind in sorted(of_type)}
        scores["executable"] = wilson(verdicts["right"] + verdicts["wrong"], n)
        scores["failed"] = wilson(verdicts["failed"], n)
        for name in ("attempts", "steps", "calls"):
            counts = np.array([t.info[name] for t in trajectories if t.info["verdict"] != "failed"])
            if len(counts):
                scores[name] = bootstrap(len(counts), partial(_mean, counts))
        return scores


def _mean(values: np.ndarray[Any, Any], indices: Any) -> float:
    return float(values[indices].mean())


def gold_steps(example: Example) -> list[Step]:
    """Return the steps of an example's field "gold"."""
    return [Step(verb, thing, tuple(places)) for verb, thing, places in example.fields["gold"]]


def _scene(example: Example) -> Scene:
    return Scene(example.fields["question"], example.fields["task_type"])


def _complaint(outcome: ProgramOutcome, session: Session, protocol: str) -> str:
    """Return why to try again, or "" to stop. Only the oracle protocol counts a task that is not done as a reason."""
    if session.won or (not outcome.error and protocol == "label_free"):
        return ""
    if outcome.error:
        where = f"in step {outcome.step}" if outcome.step else "before its first step"
        return f"The program failed {where}.\n{outcome.error}\n{session.report()}"
    return f"The program ran to its end, but the task is not done.\n{session.report()}"


def _story(outcome: ProgramOutcome, session: Session, begun: int) -> str:
    """Return what one program did, to be read in the report: its actions, the answers, what it printed, its end."""
    printed = outcome.stdout.strip()
    parts = [transcript(session.history[begun:]), f"printed: {printed}" if printed else ""]
    end = "the task is done" if session.won else outcome.error or "the program ended; the task is not done"
    return "\n".join([*filter(None, parts), f"[{end}]"])


def _verdict(failure: str | None, won: bool, error: str) -> str:
    if failure is not None:
        return "failed"
    if won:
        return "right"
    return "error" if error else "wrong"
