"""The three interfaces that meet in a rollout: white-box controller, black-box generator, task."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from matryoshka.core.intervals import wilson
from matryoshka.core.records import (
    Example,
    Judgement,
    Messages,
    Metric,
    PairRule,
    RolloutSettings,
    Sample,
    Sampling,
    Trajectory,
)

T = TypeVar("T")


class Controller(Protocol):
    """White-box policy: writes guidance. A subclass without a tokenizer of its own writes `propose` alone."""

    name: str

    async def propose(self, prompt: Messages, n: int, sampling: Sampling) -> list[Sample]:
        """Return n completions of `prompt`; completion i is draw `sampling.draw + i` of `sampling.seed`."""
        ...

    def prompt_ids(self, prompt: Messages) -> tuple[int, ...] | None:
        """Return the ids that `propose` is conditioned on, or None where the model is not ours to see."""
        return None

    def count_tokens(self, prompt: Messages) -> int:
        """Return how many tokens `prompt` takes in this controller's context; 0 where no context of ours holds it."""
        return 0


class Generator(Protocol):
    """Black box: text in, text out, nothing else."""

    name: str

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Return one completion. Raises GeneratorError when retries are exhausted, RunStopped when the budget is."""
        ...


class GeneratorError(RuntimeError):
    """A black-box call that failed for good: it fails its episode, which is recorded with the reason, never the run."""


class RunStopped(RuntimeError):
    """The run ends here by intent, a spent budget or the user's wish; its records are kept and it can be continued."""


class ContextError(ValueError):
    """A prompt and its completion that do not fit the model's context together."""


@dataclass(frozen=True)
class TaskSetting:
    """The facts that a run gives to its task.

    sizes: how many problems of each split ("warmup", "train", "validation", "test", "held_out") the run takes.
    seed: the run's. count_tokens: of a prompt in the controller's context. gold_warmup: the warm-up teaches gold
    guidance, so each of its problems needs some.
    """

    sizes: Mapping[str, int]
    seed: int = 0
    count_tokens: Callable[[Messages], int] = lambda prompt: 0
    gold_warmup: bool = True

    def part(self, rows: Sequence[T], split: str) -> Sequence[T]:
        """Return those of all `rows` that belong to `split`, the splits taking their sizes one after the other.

        Raises ValueError if there are fewer rows than the splits need together.
        """
        if len(rows) < (needed := sum(self.sizes.values())):
            counts = ", ".join(f"{name} {count}" for name, count in self.sizes.items() if count)
            what = f"the splits take {needed} problems ({counts}), but there are {len(rows)}"
            raise ValueError(f"[task] {what}; take fewer, or give it more")
        names = list(self.sizes)
        start = sum(self.sizes[name] for name in names[: names.index(split)])
        return rows[start : start + self.sizes[split]]


@dataclass(frozen=True)
class Baseline:
    """Guidance that a task knows without any controller. label: the condition's name in the report."""

    name: str
    label: str
    guidance: str


class Task(Protocol):
    """A benchmark: its problems, its loop, its scores. A subclass writes `examples`, `first_prompt` and `rollout`.

    options: the task's own settings, [task.options]; a subclass that has some annotates the attribute with their
    dataclass. name: part of every episode's key, so tasks with other prompts have other names; by default the
    class's. version: raised when the loop or its prompts change. label: what a summary calls the task. main_metric: the
    name in `score` that choices are made by, higher being better. compares_own_guidance: the report has a condition in
    which the generator guides itself. free_options: options that a run may be continued with other values of.
    headline: keys of a run's summary that are printed once more, alone, as its last line.
    Every example has the fields "question" and "answer", which the report shows.
    """

    options: object
    setting: TaskSetting
    name: str = ""
    version: int = 1
    label: str = ""
    pair_rule: PairRule = PairRule()
    main_metric: str = "accuracy"
    compares_own_guidance: bool = False
    free_options: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()

    def __init__(self, options: Any, setting: TaskSetting) -> None:
        """options: of the type that the class annotates. Raises ValueError for options that cannot work together."""
        self.options, self.setting = options, setting
        self.name = self.name or type(self).__name__
        self.label = self.label or self.name

    def examples(self, split: str) -> Sequence[Example]:
        """Return the problems of `split`, as many as the setting says. No id occurs in two splits.

        Raises ValueError, FileNotFoundError for problems that are missing, malformed or too few.
        """
        ...

    def first_prompt(self, example: Example) -> Messages:
        """Return the first prompt of the controller; its size decides whether the example fits the context."""
        ...

    async def rollout(
        self, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> Trajectory:
        """Return one episode; `matryoshka.tasks.episode.Episode` asks the models and makes the record."""
        ...

    def gold_guidance(self, example: Example) -> str | None:
        """Return guidance known to be right, for warm-up and as the ceiling of the report; None where none is known."""
        return None

    def baselines(self, example: Example) -> Sequence[Baseline]:
        """Return what else the generator is to be compared with on this example, by the same names on every example."""
        return ()

    def group(self, example: Example) -> str:
        """Return the kind of problem that the report counts apart, "" for none."""
        return ""

    def facts(self) -> dict[str, str]:
        """Return facts about the place where the task runs, by name, for a reader of the report."""
        return {}

    def check(self, settings: RolloutSettings) -> None:
        """Raise ValueError for settings that the loop does not have; it is called before anything is run."""
        return None

    def judge(self, example: Example, prediction: Any) -> Judgement:
        """Return what an answer that was made elsewhere is worth.

        By default it is right if it is the field "answer" as a text, apart from capitals, outer blanks and a last full
        stop. None stands for no answer. Raises ValueError for a prediction of a form that the task does not read.
        """
        if prediction is None:
            return Judgement(None, "error", 0.0)
        said, gold = (str(text).strip().casefold().removesuffix(".") for text in (prediction, example.fields["answer"]))
        right = said == gold
        return Judgement(str(prediction), "right" if right else "wrong", float(right))

    def score(self, trajectories: Sequence[Trajectory]) -> dict[str, Metric]:
        """Return the metrics of episodes. By default these are shares: "accuracy", "executable" (the last attempt gave
        an answer) and "failed" (a call failed for good).

        A failed episode counts as one that is not right. Raises ValueError for no trajectories.
        """
        counts = Counter(trajectory.info.verdict for trajectory in trajectories)
        n = len(trajectories)
        shares = {"accuracy": counts["right"], "executable": counts["right"] + counts["wrong"]}
        return {name: wilson(count, n) for name, count in (shares | {"failed": counts["failed"]}).items()}

    @classmethod
    def scripted_generator(cls, name: str) -> Generator:
        """Return the generator of this task that is a script, not a model. Raises ValueError for an unknown `name`."""
        raise ValueError(f"[serve] scripted {name!r}: {cls.__name__} has no such generator; your own is FILE.py:CLASS")
