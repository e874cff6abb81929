"""From the JSON of an OpenAI request to a checked Job: the prompts' token ids and one Sampling.

Nothing is drawn here. Parameters that are not honoured are refused unless they have their neutral value, so an answer
is always drawn as asked; a null counts as not given. Every refusal names the parameter and the values that are taken.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from matryoshka.core.records import Message, Messages, Sample, Sampling
from matryoshka.inference.http_server import HttpError

if TYPE_CHECKING:
    from matryoshka.core.text.tokenizer import Tokenizer

MAX_N = 128
MAX_ANSWERS = 1024  # to one request: prompts times n
MAX_STOPS, MAX_STOP_CHARS = 16, 1000  # every stop string is looked for after every token
MAX_MESSAGES = 512  # the time to render a chat grows with their square
MAX_CHARS_PER_TOKEN = 16  # a text of more characters for each token of the context is not even tokenized
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat answer may fill the context

_HONOURED = {"model", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "logprobs"}
# They say nothing about the answer.
_IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "stream": (False, "answers are sent whole"),
    "presence_penalty": (0, "penalties are not implemented"),
    "frequency_penalty": (0, "penalties are not implemented"),
    "logit_bias": ({}, "biases are not implemented"),
    "top_logprobs": (0, "only the drawn tokens' log-probs are kept"),
    "response_format": ({"type": "text"}, "output is not constrained"),
    "tools": ([], "tool calls are not implemented"),
    "echo": (False, "the prompt is not scored, so that log-likelihood tasks of evaluation clients cannot be served"),
    "best_of": (1, "every draw is returned"),
    "suffix": ("", "insertion is not implemented"),
    # Parameters of vLLM that common clients send along.
    "top_k": (-1, "only top_p truncates"),
    "min_p": (0, "only top_p truncates"),
    "repetition_penalty": (1, "penalties are not implemented"),
}


class Engine(Protocol):
    """The model behind the server: one base model with its adapters, on one tokenizer."""

    tokenizer: "Tokenizer"
    context_length: int

    def models(self) -> list[str]:
        """Return the names that `generate` takes: the base model and its adapters."""
        ...

    def illness(self) -> str:
        """Return why no request can be answered any more, or "" while they can."""
        ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        """Return one draw, with token ids and log-probs. Cancelling it must end its work."""
        ...


@dataclass(frozen=True)
class Job:
    """A checked request: each prompt is answered n times under `sampling`, prompt by prompt, answer i as draw i."""

    model: str
    prompts: list[tuple[int, ...]]
    sampling: Sampling
    n: int
    logprobs: bool


def read_json(body: bytes) -> dict[str, Any]:
    """Return the request's JSON object without its nulls. Raises HttpError 400."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise HttpError(400, f"the body is not valid JSON: {err}", code="invalid_json") from err
    if not isinstance(data, dict):
        raise HttpError(400, f"the body must be a JSON object, got {type(data).__name__}", code="invalid_json")
    return {name: value for name, value in data.items() if value is not None}


def chat_job(engine: "Engine", data: dict[str, Any]) -> Job:
    """Return the job of a /v1/chat/completions request. Raises HttpError 400 or 404."""
    _check_names(data, _HONOURED | {"messages", "max_completion_tokens"})
    model = _model(engine, data)
    messages = read_messages(data)
    _check_length("messages", sum(len(message.content) for message in messages), engine)
    try:
        prompt = tuple(engine.tokenizer.render(messages, add_generation_prompt=True).ids)
    except ValueError as err:  # the chat template takes no such roles, or not in this order
        raise _invalid("messages", str(err)) from err
    name = "max_completion_tokens" if "max_completion_tokens" in data else "max_tokens"
    if data.get("max_tokens", data.get(name)) != data.get(name):
        raise _invalid("max_tokens", "differs from max_completion_tokens; send one of them")
    max_tokens = _integer(data, name, max(1, engine.context_length - len(prompt)), 1)
    logprobs = data.get("logprobs", False)
    if not isinstance(logprobs, bool):
        raise _invalid("logprobs", f"expected true or false, got {_show(logprobs)}")
    return _job(engine, data, model, [prompt], max_tokens, logprobs)


def completion_job(engine: "Engine", data: dict[str, Any]) -> Job:
    """Return the job of a /v1/completions request. Raises HttpError 400 or 404."""
    _check_names(data, _HONOURED | {"prompt"})
    model = _model(engine, data)
    prompts = _prompts(engine, data)
    # OpenAI's number of alternatives; 1 is taken because clients send it to get the drawn tokens' log-probs.
    logprobs = "logprobs" in data and _integer(data, "logprobs", 0, 0, 1) >= 0
    return _job(engine, data, model, prompts, _integer(data, "max_tokens", COMPLETION_MAX_TOKENS, 1), logprobs)


def _job(
    engine: "Engine", data: dict[str, Any], model: str, prompts: list[tuple[int, ...]], max_tokens: int, logprobs: bool
) -> Job:
    n = _integer(data, "n", 1, 1, MAX_N)
    if len(prompts) * n > MAX_ANSWERS:
        raise _invalid("n", f"{len(prompts)} prompts times n {n} is more than {MAX_ANSWERS} answers; split the request")
    for prompt in prompts:
        if not prompt:
            raise _invalid("prompt", "the prompt has no tokens")
        if len(prompt) + max_tokens > engine.context_length:
            message = (
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}: together "
                f"{len(prompt) + max_tokens}, more than the context length of {engine.context_length} tokens; "
                "shorten the prompt or ask for less"
            )
            raise HttpError(400, message, "max_tokens", "context_length_exceeded")
    sampling = Sampling(
        temperature=_real(data, "temperature", 1.0, 0.0, 2.0),
        top_p=_real(data, "top_p", 1.0, 1e-6, 1.0),
        max_tokens=max_tokens,
        stop=_stop(data),
        # Without a seed, equal requests must draw different answers; the seed that was drawn is returned.
        seed=_integer(data, "seed", secrets.randbits(63), -(2**63), 2**63 - 1),
    )
    return Job(model, prompts, sampling, n, logprobs)


def _check_names(data: dict[str, Any], known: set[str]) -> None:
    for name, value in data.items():
        if name in _NEUTRAL:
            neutral, why = _NEUTRAL[name]
            if value != neutral:
                message = f"{name}: only {_show(neutral)} is supported ({why}), got {_show(value)}"
                raise HttpError(400, message, name, "unsupported_value")
        elif name not in known | _IGNORED:
            names = ", ".join(sorted(known))
            raise HttpError(400, f"unknown parameter {name[:80]!r}; known: {names}", name[:80], "unknown_parameter")


def _model(engine: "Engine", data: dict[str, Any]) -> str:
    served = engine.models()
    model = data.get("model")
    if not isinstance(model, str):
        raise _invalid("model", f"expected one of {', '.join(served)}, got {_show(model)}")
    if model not in served:
        message = f"model {model[:200]!r} is not served here; served: {', '.join(served)}"
        raise HttpError(404, message, "model", "model_not_found")
    return model


def read_messages(data: dict[str, Any]) -> Messages:
    """Return the messages of a chat request. Raises HttpError 400."""
    rows = data.get("messages")
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_MESSAGES:
        got = f"{len(rows)} messages" if isinstance(rows, list) else _show(rows)
        raise _invalid("messages", f"expected a list of 1 to {MAX_MESSAGES} messages, got {got}")
    messages = []
    for index, row in enumerate(rows):
        where = f"messages[{index}]"
        if not isinstance(row, dict):
            raise _invalid(where, f"expected an object with role and content, got {_show(row)}")
        given = {key for key, value in row.items() if value not in (None, [])}  # an answer that is sent back has these
        if row.get("type") == "text":  # some evaluation clients mark whole messages as they mark parts
            given.remove("type")
        if unknown := sorted(given - {"role", "content"}):
            raise _invalid(where, f"key {unknown[0][:80]!r} is not supported; known: role, content")
        role = row.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise _invalid(f"{where}.role", f"expected system, developer, user or assistant, got {_show(role)}")
        messages.append(Message(role, _content(row.get("content"), f"{where}.content")))
    return tuple(messages)


def _content(content: Any, where: str) -> str:
    """Return a message's text; text parts are put together with nothing between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(where, f"expected a string or a list of text parts, got {_show(content)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _invalid(where, f'expected parts {{"type": "text", "text": "..."}}, got {_show(part)}')
    return "".join(part["text"] for part in content)


def _prompts(engine: "Engine", data: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the prompts' ids. Text starts as the tokenizer starts it and holds no special token; ids can be any."""
    prompt = data.get("prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and all(_is_id(item) for item in prompt))
    rows = [prompt] if single else prompt
    if not isinstance(rows, list):
        raise _invalid("prompt", f"expected a string, token ids, or a list of those, got {_show(prompt)}")
    if len(rows) > MAX_ANSWERS:  # before any of them is tokenized
        raise _invalid("prompt", f"{len(rows)} prompts are more than {MAX_ANSWERS} answers; split the request")
    prompts = []
    for row in rows:
        if not isinstance(row, str) and not (isinstance(row, list) and all(_is_id(item) for item in row)):
            raise _invalid("prompt", f"expected a string or token ids, got {_show(row)}")
        if isinstance(row, str):
            _check_length("prompt", len(row), engine)
        try:  # text that is not Unicode (half a surrogate pair) and ids outside the vocabulary end here
            ids = engine.tokenizer.encode_prompt(row) if isinstance(row, str) else row
            engine.tokenizer.decode(ids)
        except ValueError as err:
            raise _invalid("prompt", str(err)) from err
        prompts.append(tuple(ids))
    return prompts


def _check_length(param: str, chars: int, engine: "Engine") -> None:
    if chars > MAX_CHARS_PER_TOKEN * engine.context_length:
        message = f"{param}: {chars} characters do not fit the context length of {engine.context_length} tokens"
        raise HttpError(400, f"{message}; shorten the prompt", param, "context_length_exceeded")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stop(data: dict[str, Any]) -> tuple[str, ...]:
    stop = data.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(item, str) and item for item in strings):
        raise _invalid("stop", f"expected a non-empty string or a list of them, got {_show(stop)}")
    if len(strings) > MAX_STOPS or max(map(len, strings), default=0) > MAX_STOP_CHARS:
        limits = f"at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters"
        raise _invalid("stop", f"expected {limits}, got {len(strings)} of up to {max(map(len, strings))}")
    return tuple(strings)


def _integer(data: dict[str, Any], name: str, default: int, low: int, high: int | None = None) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise _invalid(name, f"expected an integer, {limits}, got {_show(value)}")
    return value


def _real(data: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(name, f"expected a number between {low:g} and {high:g}, got {_show(value)}")
    return float(value)


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:80]


def _invalid(param: str, message: str) -> HttpError:
    return HttpError(400, f"{param}: {message}", param, "invalid_value")
