"""Households: the controller plans, the generator writes a program that acts, the household answers (ALFWorld).

The inner loop lets the generator correct its program against the failed assertion and what the household said, going on
from the step that failed or afresh; the outer loop lets the controller plan anew. Under "label_free" only what goes
wrong by itself causes a retry: a program that raises or meets a limit. Under "oracle" one that ends without the task
done causes one too. The household alone decides whether the task is done, and then the game ends.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from matryoshka.core.intervals import bootstrap_mean, wilson
from matryoshka.core.protocols import Controller, Generator, Task, TaskSetting
from matryoshka.core.records import Example, Judgement, Messages, Metric, RolloutSettings, Trajectory, Verdict
from matryoshka.tasks.alfworld import react
from matryoshka.tasks.alfworld.options import AlfworldOptions
from matryoshka.tasks.alfworld.plan_language import Step, merged, steps_of
from matryoshka.tasks.alfworld.playthrough import Environment, Session, transcript
from matryoshka.tasks.alfworld.program import CHILD, AskRefusedError, Limits, ProgramOutcome, run_program
from matryoshka.tasks.alfworld.prompt_style import Failure, Scene, Style
from matryoshka.tasks.alfworld.scripted_generator import LiteralGenerator
from matryoshka.tasks.alfworld.splits import household_of, load_splits
from matryoshka.tasks.episode import Episode, Guidance, Reply
from matryoshka.tasks.sandbox import extract_code
from matryoshka.tasks.sandbox_backends import in_words

# A corrected program goes on in the same household only if it has this share of the actions left to do so.
RESUME_SHARE = 0.2


@dataclass
class _Progress:
    """What the attempts of an episode led to so far. error: what stopped the last one, "" if it ended by itself."""

    attempts: int = 0
    steps: int = 0
    won: bool = False
    error: str = ""


class ALFWorldTask(Task):
    """The task "alfworld": household games; examples have "question" (the first screen), "answer" (commands that win),
    "task_type" and, where steps that win are known, "gold".

    The task's name tells style and mode apart, since other prompts are other episodes.
    """

    options: AlfworldOptions
    version = 2
    label = "alfworld"
    main_metric = "success"
    free_options = ("sandbox.isolation", "sandbox.command")

    def __init__(self, options: AlfworldOptions, setting: TaskSetting) -> None:
        self.style = Style(options.prompts, options.max_steps, options.verbs)
        self.name = f"alfworld-{self.style.name}-{options.mode}"
        self.sandbox = options.sandbox.sandbox()
        limits = options.sandbox
        self.limits = Limits(limits.timeout_s, limits.memory_bytes, options.asks, sandbox=self.sandbox)
        self.household: Callable[[Example], Environment] = partial(household_of, options)
        super().__init__(options, setting)

    def examples(self, split: str) -> Sequence[Example]:
        """Return the games of `split`."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> Mapping[str, Sequence[Example]]:
        return load_splits(self.options, self.setting.sizes, self.setting.seed)

    @cached_property
    def _alike(self) -> Mapping[Messages, Sequence[Example]]:
        """First prompt -> the games that it may stand for and whose winning steps are known."""
        alike: dict[Messages, list[Example]] = {}
        for example in (example for examples in self._splits.values() for example in examples):
            if example.fields.get("gold"):
                alike.setdefault(self.first_prompt(example), []).append(example)
        return alike

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

    def group(self, example: Example) -> str:
        """Return which of the six types of household tasks this is."""
        kind: str = example.fields["task_type"]
        return kind

    def check(self, settings: RolloutSettings) -> None:
        """Raise ValueError if programs cannot be kept behind the boundary that was asked for."""
        if self.options.mode == "program":
            self.sandbox.start(CHILD)

    def facts(self) -> dict[str, str]:
        """Return the boundary that generated programs run behind."""
        if self.options.mode != "program":
            return {}
        return {"generated programs": in_words(self.sandbox.start(CHILD))}

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode on `example`; reward 1.0 if its task was done, else 0.0.

        The prediction is "done" or "not done"; the verdict "wrong" means that the last attempt ended by itself without
        the task done. attempts: programs, or households begun by direct action. measures: steps, the commands in all.
        """
        scene, progress = _scene(example), _Progress()
        episode = Episode(self.name, example, controller, generator, settings)
        follow = self._by_program if self.options.mode == "program" else self._by_actions
        prompt = self.first_prompt(example)
        with episode:
            for _ in range(settings.outer_turns):
                guidance = await episode.propose(prompt)
                await follow(example, guidance, episode, settings, progress)
                if progress.won or not guidance.feedback:
                    break
                prompt = self.style.replan(scene, guidance.text, guidance.feedback)
        verdict: Verdict = "right" if progress.won else "error" if progress.error else "wrong"
        return episode.trajectory(
            float(progress.won),
            verdict,
            "done" if progress.won else "not done",
            progress.error or None,
            measures={"steps": progress.steps},
            attempts=progress.attempts,
        )

    async def _by_program(
        self, example: Example, plan: Guidance, episode: Episode, settings: RolloutSettings, progress: _Progress
    ) -> None:
        """Let the generator write programs from `plan` until one ends by itself or the attempts are used up."""
        scene = _scene(example)
        request = self.style.solve(scene, plan.text)
        session, first, memory, searched = self._begin(example), 1, "{}", list[str]()
        for attempt in range(settings.inner_attempts):
            reply = await episode.complete(request, attempt)
            code, begun = extract_code(reply.text), len(session.history)
            progress.attempts += 1
            outcome = await run_program(code, session, partial(self._ask, episode, plan), self.limits, first, memory)
            progress.steps += len(session.history) - begun
            progress.won, progress.error = session.won, outcome.error
            plan.feedback = _complaint(outcome, session, settings.protocol)
            reply.outcome = _story(outcome, session, begun)
            if progress.won or not plan.feedback:
                return
            first, memory = 1, "{}"
            searched = list(dict.fromkeys([*searched, *session.searched()]))
            what = "Your corrected program starts at step 1, in the household as it was at first."
            # In the first half of the attempts a mistake is mended where it was made, in the second all begins anew.
            mending = attempt + 1 < settings.inner_attempts / 2
            enough_left = session.steps_left >= RESUME_SHARE * self.options.max_steps
            if outcome.error and outcome.step > 1 and mending and enough_left:
                first, memory = outcome.step, outcome.memory
                what = f"Your corrected program goes on at step {first}, in the household as it is now, with memory = "
                what += f"{memory[:500]}."
            else:
                session = self._begin(example)
            failure = Failure(f"{plan.feedback}\n\n{what}", outcome.error.strip().rpartition("\n")[2], searched)
            request = self.style.retry(scene, plan.text, code, failure)

    async def _by_actions(
        self, example: Example, plan: Guidance, episode: Episode, settings: RolloutSettings, progress: _Progress
    ) -> None:
        """Let the generator act by itself, with `plan` before its eyes, in a fresh household each attempt."""
        prompt = self.style.act(_scene(example), plan.text)
        for attempt in range(settings.inner_attempts):
            session = self._begin(example)
            progress.attempts += 1

            async def complete(messages: Messages, number: int, attempt: int = attempt) -> Reply:
                return await episode.complete(messages, attempt, number)

            try:
                await react.play(prompt, session, complete)
            finally:
                progress.steps += len(session.history)
            progress.won = session.won
            progress.error = "" if session.won else f"All {session.max_steps} actions in this household are used up."
            plan.feedback = f"{progress.error}\n{session.report()}" if progress.error else ""
            if progress.won:
                return

    def _begin(self, example: Example) -> Session:
        return Session(self.household(example), self.options.max_steps, self.options.verbs)

    async def _ask(self, episode: Episode, plan: Guidance, question: str) -> str:
        """Return the generator's answer to a question that its program asks."""
        if not question.strip():
            raise AskRefusedError("the question is empty")
        request, number = self.style.ask(question), len(plan.replies)
        reply = await episode.complete(request, number, max_tokens=self.limits.ask_tokens)
        reply.outcome = "asked by the program"
        return reply.text.strip()

    def judge(self, example: Example, prediction: Any) -> Judgement:
        """Return whether a transcript wins, having played its commands; what it says of observations is not believed.

        prediction: a list of commands, or a text in which a command is a line behind ">" or, where no line has one,
        every line. A transcript that goes on behind the last command that the household takes has the verdict "error".
        """
        if prediction in ("done", "not done"):
            raise ValueError("that is how an episode of ours ended; expected a transcript, which can be played")
        if isinstance(prediction, str):
            lines = [line.strip() for line in prediction.splitlines() if line.strip()]
            marked = [line[1:].strip() for line in lines if line.startswith(">")]
            commands = marked or lines
        elif isinstance(prediction, list) and all(isinstance(command, str) for command in prediction):
            commands = prediction
        elif prediction is None:
            commands = []
        else:
            raise ValueError("expected a list of commands, or a transcript as text")
        session = self._begin(example)
        verdict: Verdict = "wrong" if commands else "error"
        for command in commands:
            if session.steps_left <= 0:
                break
            session.act(command)
        if session.won:
            verdict = "right"
        elif len(commands) > len(session.history):
            verdict = "error"
        done = "done" if session.won else "not done"
        return Judgement(done, verdict, float(session.won), measures={"steps": len(session.history)})

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return shares with Wilson intervals and means of costs, over all games.

        Shares: "success", "success <type>" for each type that occurs, "executable" (the last attempt ended by itself),
        "failed" (a call failed for good; not a success). Means with bootstrap intervals: "attempts", "steps",
        "calls", over the episodes that did not fail. Raises ValueError for no trajectories.
        """
        counts = Counter(trajectory.info.verdict for trajectory in trajectories)
        n = len(trajectories)
        scores = {"success": wilson(counts["right"], n)}
        of_type: dict[str, list[bool]] = {}
        for trajectory in trajectories:
            of_type.setdefault(self._types[trajectory.example_id], []).append(trajectory.info.verdict == "right")
        scores |= {f"success {kind}": wilson(sum(of_type[kind]), len(of_type[kind])) for kind in sorted(of_type)}
        scores["executable"] = wilson(counts["right"] + counts["wrong"], n)
        scores["failed"] = wilson(counts["failed"], n)
        if ended := [trajectory.info for trajectory in trajectories if trajectory.info.verdict != "failed"]:
            costs: dict[str, Sequence[float]] = {
                "attempts": [info.attempts for info in ended],
                "steps": [info.measures["steps"] for info in ended],
                "calls": [info.calls for info in ended],
            }
            scores |= {key: bootstrap_mean(row) for key, row in costs.items()}
        return scores

    @cached_property
    def _types(self) -> Mapping[str, str]:
        return {example.id: self.group(example) for rows in self._splits.values() for example in rows}

    @classmethod
    def scripted_generator(cls, name: str) -> Generator:
        """Return the generator that takes plans at their word. Raises ValueError for another name than "literal"."""
        if name != "literal":
            raise ValueError(f"[serve] scripted {name!r}: ALFWorld has one scripted generator, 'literal'")
        return LiteralGenerator()


def gold_steps(example: Example) -> Sequence[Step]:
    """Return the steps of an example's field "gold"."""
    return steps_of(example.fields["gold"])


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
