"""One episode while it runs: it asks controller and generator, keeps what they said, and makes the record of it.

A task's `rollout` uses it for every question that it asks. So seeds, costs, prompts that outgrew the context and calls
that failed are treated alike in all tasks, and `Trajectory` and `EpisodeInfo` are made in this one place.
"""

import math
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

from matryoshka.core.protocols import ContextError, Controller, Generator, GeneratorError
from matryoshka.core.records import (
    VERDICTS,
    Call,
    EpisodeInfo,
    Example,
    Message,
    Messages,
    RolloutSettings,
    Sample,
    Trajectory,
    Turn,
    Verdict,
)
from matryoshka.core.text.reasoning import without_reasoning


@dataclass
class Reply:
    """An answer of the generator. The task sets `outcome`: what the environment made of it, for the report."""

    prompt: Messages
    sample: Sample
    outcome: str = ""

    @property
    def text(self) -> str:
        """The answer without reasoning blocks."""
        return without_reasoning(self.sample.text)


@dataclass
class Guidance:
    """What the controller said, and the replies that it led to. The task sets `feedback`: why there is a next turn."""

    prompt: Messages
    prompt_ids: tuple[int, ...] | None
    sample: Sample
    replies: list[Reply] = field(default_factory=list)
    feedback: str = ""

    @property
    def text(self) -> str:
        """What goes into the generator's prompt: the words without reasoning blocks and outer blanks."""
        return without_reasoning(self.sample.text).strip()

    def turn(self) -> Turn:
        """Return the finished turn."""
        calls = tuple(Call(reply.prompt, reply.sample, reply.outcome) for reply in self.replies)
        return Turn(self.prompt, self.prompt_ids, self.sample, calls, self.feedback)


class Episode:
    """An episode on one example. Its block `with episode:` ends early, without an error, in two cases: a call failed
    for good, or a later prompt outgrew the controller's context and the settings say "skip".

    turns: what was said so far. overlong: a later prompt did not fit the context. failure: the call that failed.
    """

    def __init__(
        self, task: str, example: Example, controller: Controller, generator: Generator, settings: RolloutSettings
    ) -> None:
        self._task, self._example, self._settings = task, example, settings
        self._controller, self._generator = controller, generator
        self.turns: list[Guidance] = []
        self.overlong = False
        self.failure: str | None = None

    def __enter__(self) -> "Episode":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, GeneratorError):
            self.failure = str(error)
            return True
        return isinstance(error, ContextError) and self.overlong

    async def propose(self, prompt: Messages) -> Guidance:
        """Return the controller's guidance, which begins a turn. Raises ContextError for a prompt that does not fit."""
        check_prompt(prompt, f"task {self._task}: the prompt given to `propose` is")
        turn = len(self.turns)
        try:
            asked = self._controller.propose(prompt, 1, self._settings.controller.again(turn, 0))
            found = await _awaitable(asked, f"controller {self._controller.name}: propose")
        except ContextError:
            self.overlong = turn > 0 and self._settings.overlong == "skip"
            raise
        if not isinstance(found, list | tuple) or len(found) != 1 or not isinstance(found[0], Sample):
            expected = "expected a list of as many Samples as were asked for, one"
            raise ValueError(f"controller {self._controller.name}: propose returned {found!r:.60}; {expected}")
        self.turns.append(Guidance(prompt, self._controller.prompt_ids(prompt), found[0]))
        return self.turns[-1]

    async def complete(self, prompt: Messages, *numbers: int, max_tokens: int = 0) -> Reply:
        """Return the generator's reply in the present turn. numbers: they tell repeated questions of a turn apart.

        The first question of all, whose numbers are all 0, is asked with the settings' own seed. max_tokens: of this
        reply; 0 takes the settings'. Raises GeneratorError when the call fails for good.
        """
        check_prompt(prompt, f"task {self._task}: the prompt given to `complete` is")
        if not self.turns:
            raise ValueError(f"task {self._task}: `complete` comes before `propose`, which begins a turn; ask it first")
        sampling = self._settings.generator.again(len(self.turns) - 1, *numbers)
        sampling = replace(sampling, max_tokens=max_tokens or sampling.max_tokens)
        what = f"generator {self._generator.name}: complete"
        answer = await _awaitable(self._generator.complete(prompt, sampling), what)
        if not isinstance(answer, Sample):
            raise ValueError(f"{what} returned {answer!r:.60}; expected a Sample(text)")
        reply = Reply(prompt, answer)
        self.turns[-1].replies.append(reply)
        return reply

    def trajectory(
        self,
        reward: float,
        verdict: Verdict,
        prediction: str | int | float | None = None,
        error: str | None = None,
        score: float | None = None,
        measures: Mapping[str, float] | None = None,
        attempts: int | None = None,
    ) -> Trajectory:
        """Return the finished episode. If a call failed for good, it has reward 0 and the verdict "failed".

        attempts: by default the number of calls. The other arguments are fields of `EpisodeInfo`. Raises ValueError for
        a value that the record could not be read back with.
        """
        where = f"task {self._task}:"
        if verdict not in VERDICTS:
            raise ValueError(f"{where} the verdict is {verdict!r:.60}; expected one of {VERDICTS}")
        if isinstance(prediction, bool) or not isinstance(prediction, str | int | float | None):
            raise ValueError(f"{where} the prediction is {prediction!r:.60}; expected a text, a number or None")
        if isinstance(prediction, float):
            _number(prediction, f"{where} the prediction")
        measures = {name: _number(value, f"{where} {name}") for name, value in (measures or {}).items()}
        reward = float(_number(reward, f"{where} reward"))
        score = None if score is None else float(_number(score, f"{where} score"))
        replies = [reply for turn in self.turns for reply in turn.replies]
        usages = [reply.sample.usage for reply in replies]
        if self.failure is not None:
            reward, verdict, error = 0.0, "failed", self.failure
        info = EpisodeInfo(
            verdict,
            self._settings.protocol,
            self._controller.name,
            self._generator.name,
            seed=self._settings.controller.seed,
            draw=self._settings.controller.draw,
            attempts=len(replies) if attempts is None else attempts,
            calls=len(replies),
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cut=sum(turn.sample.finish_reason == "length" for turn in self.turns),
            overlong=self.overlong,
            prediction=prediction,
            error=error,
            score=score,
            measures=measures,
        )
        turns = tuple(turn.turn() for turn in self.turns)
        return Trajectory(self._task, self._example.id, turns, reward, info)


def _awaitable(asked: object, what: str) -> Awaitable[object]:
    """Return `asked`, the result of a method that may be a user's own. Raises ValueError if it is no coroutine."""
    if not isinstance(asked, Awaitable):
        raise ValueError(f"{what} returned {asked!r:.60}, and cannot be awaited; begin it with `async def`")
    return asked


def check_prompt(value: object, what: str) -> None:
    """Raise ValueError, which begins with `what`, unless `value` is a prompt."""
    parts = value if isinstance(value, tuple) else ()
    texts = [text for m in parts if isinstance(m, Message) for text in (m.role, m.content) if isinstance(text, str)]
    if not parts or len(texts) < 2 * len(parts):
        form = "Message(role, content), both texts, such as (Message(...),)"
        raise ValueError(f"{what} {value!r:.80}; expected a tuple of {form}")


def _number(value: object, what: str) -> float:
    """Return `value`, as an int or a float. Raises ValueError if it is no finite number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(f"{what} is {value!r:.60}; expected a finite number")
    return value if type(value) is int else number
