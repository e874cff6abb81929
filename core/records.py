"""The records that travel between sampler, tasks, trainer and report: frozen dataclasses, standard library only.

Every record goes to JSON and back without loss (`to_json`, `from_json`), so a run directory can be replayed.
Token ids and log-probs are present exactly where the model is white-box; text is never re-tokenised.
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from matryoshka.core.packed import Packed, packed


@dataclass(frozen=True)
class Message:
    """One chat message. Example: Message("user", "What is 2 + 2?")."""

    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One problem of a task; `fields` has the task's data, e.g. {"question": ..., "answer": 8}."""

    id: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A measured value with its 95% interval [low, high] over n observations."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Sampling:
    """How one completion is drawn. temperature 0 is greedy; `draw` numbers several answers to the same question."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    draw: int = 0

    def again(self, *numbers: int) -> "Sampling":
        """Return itself for the first request of its kind (all 0), another seed later: a repeat is a new draw."""
        return dataclasses.replace(self, seed=stable_seed(self.seed, *numbers)) if any(numbers) else self


@dataclass(frozen=True)
class Usage:
    """Tokens that one completion read and wrote."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Sample:
    """One completion.

    finish_reason: "stop" (stop id or stop string) or "length" (cut at max_tokens: never chosen for training).
    token_ids: [T] drawn ids, the stop id included; logprobs: [T] natural logs under the untempered, untruncated
    distribution; mask: [T] 1 where a token is trained on (None: all). All three are None for a black box.
    """

    text: str
    finish_reason: str = "stop"
    token_ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    mask: Sequence[int] | None = None
    usage: Usage = Usage()

    def __post_init__(self) -> None:
        for name in ("token_ids", "logprobs", "mask"):
            object.__setattr__(self, name, packed(getattr(self, name)))


@dataclass(frozen=True)
class Call:
    """One black-box call and the environment's outcome of its answer (e.g. "value 12.0" or a traceback)."""

    prompt: Messages
    sample: Sample
    outcome: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn: prompt and action of the controller, every black-box call that it caused, and the feedback."""

    prompt: Messages
    prompt_ids: Sequence[int] | None
    action: Sample
    calls: tuple[Call, ...] = ()
    feedback: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", packed(self.prompt_ids))


Verdict = typing.Literal["right", "wrong", "error", "failed"]
VERDICTS: tuple[Verdict, ...] = typing.get_args(Verdict)


@dataclass(frozen=True)
class EpisodeInfo:
    """The report of an episode besides its turns and its reward; `tasks.episode.Episode` alone makes one.

    verdict: "right"; "wrong"; "error", the last attempt gave no answer; "failed", a black-box call failed for good.
    controller, generator: their names; a controller's carries the hash of its adapter. seed, draw: of the controller's
    sampling. attempts: programs, or whatever the task counts as tries. calls, prompt_tokens, completion_tokens: of the
    black box. cut: guidances that were cut at max_tokens. overlong: a later prompt did not fit the context, so that the
    episode ended there. prediction: the answer, None where there is none. error: what ended the last attempt, or the
    call that failed. score: a graded result, on tasks that have one. measures: the task's own figures by name.
    """

    verdict: Verdict
    protocol: str
    controller: str
    generator: str
    seed: int = 0
    draw: int = 0
    attempts: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: int = 0
    overlong: bool = False
    prediction: str | int | float | None = None
    error: str | None = None
    score: float | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """An answer, read and scored; verdict "error": it could not be read as an answer. Fields as in `EpisodeInfo`."""

    prediction: str | int | float | None
    verdict: Verdict
    reward: float
    score: float | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """One episode: its turns, its reward, and a record of how it went."""

    task: str
    example_id: str
    turns: tuple[Turn, ...]
    reward: float
    info: EpisodeInfo


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the first scored higher. prompt_ids: the ids that the sampler read."""

    prompt: Messages
    prompt_ids: Sequence[int] | None
    chosen: Sample
    rejected: Sample
    chosen_reward: float
    rejected_reward: float
    example_id: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", packed(self.prompt_ids))


@dataclass(frozen=True)
class PairRule:
    """A task's rule for making pairs: kind "binary" (1 over 0) or "ranked" (gap > margin); cap per example.

    scores: names of an episode's measures whose mean rank among the example's episodes takes the reward's place.
    """

    kind: str = "binary"
    cap: int = 4
    margin: float = 0.0
    scores: tuple[str, ...] = ()


@dataclass(frozen=True)
class RolloutSettings:
    """How one episode runs.

    protocol: "label_free" (retries see execution errors only) or "oracle" (retries also see "wrong answer", as in the
    paper; never mixed with the rest). inner_attempts: generator attempts under one guidance; outer_turns: guidances.
    overlong: what a later prompt that outgrew the controller's context does, "error" or "skip" (the episode ends as it
    stands and says so).
    """

    controller: Sampling = Sampling()
    generator: Sampling = Sampling()
    protocol: str = "label_free"
    inner_attempts: int = 1
    outer_turns: int = 1
    overlong: str = "error"

    def __post_init__(self) -> None:
        if self.overlong not in ("error", "skip"):
            raise ValueError(f"settings: overlong {self.overlong!r} is unknown; choose 'error' or 'skip'")
        if self.protocol not in ("label_free", "oracle"):
            raise ValueError(f"settings: protocol {self.protocol!r} is unknown; choose 'label_free' or 'oracle'")
        if self.inner_attempts < 1 or self.outer_turns < 1:
            raise ValueError(
                f"settings: inner_attempts {self.inner_attempts} and outer_turns {self.outer_turns} must be at least 1"
            )


@dataclass(frozen=True)
class RemoteFile:
    """A file of a benchmark. path: in the folder of its files; place: its address behind that of a site or mirror.

    site: the benchmark's own. sha256: "" where it is not known. git_blob: the file's id in the site's git repository,
    "" for none. reported_bytes: its size as somebody else has reported it, 0 for no report. unpack: it is a zip
    archive, whose members go into the folder.
    """

    path: str
    place: str
    site: str
    sha256: str = ""
    git_blob: str = ""
    reported_bytes: int = 0
    unpack: bool = False


R = TypeVar("R")


def to_json(record: Any) -> Any:
    """Return `record` as plain dicts, lists and scalars (tuples become lists)."""
    if (names := _field_names(record.__class__)) is not None:
        return {name: to_json(getattr(record, name)) for name in names}
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, Packed):
        return list(record)
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


@functools.cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def from_json(cls: type[R], data: Any) -> R:
    """Return the record of type `cls` that `to_json` wrote as `data`.

    Raises ValueError naming the field when a key is unknown, missing or of the wrong type.
    """
    return typing.cast(R, _parse(cls, data, cls.__name__))


def _parse(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if data is None and type(None) in options:
            return None
        exact = [option for option in options if type(data) is option]
        return _parse((exact or [option for option in options if option is not type(None)])[0], data, where)
    if origin is Sequence:
        return _numbers(typing.get_args(kind)[0], data, where)
    if origin is typing.Literal:
        if data not in typing.get_args(kind):
            raise ValueError(f"{where}: expected one of {typing.get_args(kind)}, got {data!r:.60}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{where}: expected a list, got {type(data).__name__}")
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        if len(args) != len(data):
            raise ValueError(f"{where}: expected {len(args)} items, got {len(data)}")
        return tuple(_parse(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))
    if origin is dict or kind is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
        return dict(data)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, where)
    if kind is float and type(data) is int and abs(data) < 2**1000:
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {type(data).__name__} ({data!r:.60})")
    return data


def _numbers(kind: Any, data: Any, where: str) -> Any:
    """Return a list of integers or of numbers."""
    if not isinstance(data, list | tuple):
        raise ValueError(f"{where}: expected a list, got {type(data).__name__}")
    wanted = {int} if kind is int else {int, float}
    if not set(map(type, data)) <= wanted:
        at = next(i for i, item in enumerate(data) if type(item) not in wanted)
        _parse(kind, data[at], f"{where}[{at}]")
    return data


def _parse_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r:.60}; known: {', '.join(fields)}")
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: field {name!r} is missing")
    values = {name: _parse(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err


def content_key(*parts: Any) -> str:
    """Return a 32-hex-digit SHA-256 key of the parts' canonical JSON: equal content, equal key, on every machine."""
    text = json.dumps([to_json(part) for part in parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]  # half a surrogate pair is content, too


def stable_seed(*parts: Any) -> int:
    """Return a 63-bit seed that is a pure function of the parts (Python's own `hash` changes between processes)."""
    return int(content_key(*parts)[:16], 16) >> 1
