"""OpenAI's chat format from the client's side: the request's bytes, the answer's Sample, and what a refusal means.

Nothing is sent or waited for here. The invariant: everything that can come back from a server is either a Sample or an
AttemptError whose `blame` decides what happens next, and whose `cost` says what it may have cost.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from matryoshka.core.records import Messages, Sample, Sampling, Usage
from matryoshka.inference.http_client import Reply
from matryoshka.inference.limits import retry_after_s

# A 400 about this one prompt fails its episode only. OpenAI and Azure give a code, other servers only words.
_PROMPT_CODES = {"context_length_exceeded", "string_above_max_length", "invalid_prompt", "content_filter"}
_PROMPT_WORDS = ("context length", "context size", "context window", "prompt is too long", "input token count")
_NO_MONEY = "insufficient_quota"  # OpenAI's 429 for an account without money
_GATEWAY = (408, 502, 504, 524)  # somebody in between gave up; the model may have answered, and been billed
_NOTHING = Usage()


@dataclass(frozen=True)
class Answer:
    """A 200's sample, and the model that it says it is from ("" where it does not say)."""

    sample: Sample
    model: str


class AttemptError(Exception):
    """One attempt without an answer.

    blame: "passing" (try again), "endpoint" (a wrong key, model or URL: it will answer nobody), "prompt" (this prompt
    cannot be answered) or "request" (no prompt can: a parameter that is refused). cost: what was billed; None where it
    is not known, which counts as the most that it may have been. retry_after_s: what the server asks to wait.
    """

    def __init__(
        self,
        reason: str,
        blame: Literal["passing", "endpoint", "prompt", "request"],
        cost: Usage | None = _NOTHING,
        retry_after_s: float = 0.0,
        status: int = 0,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.blame = blame
        self.cost = cost
        self.retry_after_s = retry_after_s
        self.status = status


def most_tokens(prompt: Messages, sampling: Sampling) -> Usage:
    """Return the most tokens that a request can cost.

    No tokenizer of the field makes more tokens of a text than it has bytes in UTF-8; a chat template adds some for each
    message and possibly a system prompt of its own.
    """
    size = sum(len(message.content.encode("utf-8", "surrogatepass")) + 16 for message in prompt)
    return Usage(size + 64, sampling.max_tokens)


def likely_tokens(prompt: Messages, sampling: Sampling) -> int:
    """Return about how many tokens a provider's limiter counts when it sees the request: text / 4 + max_tokens."""
    return sum(len(message.content) // 4 + 4 for message in prompt) + sampling.max_tokens


def chat_body(
    model: str, prompt: Messages, sampling: Sampling, length_key: str, omit: tuple[str, ...], extra: Mapping[str, Any]
) -> bytes:
    """Return the request's JSON. The seed is sampling.seed + sampling.draw; a greedy request has none."""
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in prompt],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        length_key: sampling.max_tokens,
    }
    if sampling.stop:
        request["stop"] = list(sampling.stop)
    if sampling.temperature > 0:
        request["seed"] = sampling.seed + sampling.draw
    kept = {name: value for name, value in request.items() if name not in omit}
    return json.dumps({**kept, **extra}).encode()


def parse_answer(text: str) -> Answer:
    """Return what a 200's body holds. Raises AttemptError when that is no answer."""
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        content, finish_reason = choice["message"]["content"], str(choice.get("finish_reason") or "stop")
        usage = data.get("usage") or {}
        tokens = Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        model = str(data.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as err:
        raise AttemptError(f"the answer holds no choice with a message ({text[:200]!r})", "passing", None) from err
    if not isinstance(content, str):
        reason = f"the message has no content (finish_reason {finish_reason!r})"
        if finish_reason == "content_filter":
            raise AttemptError(f"{reason}: the server's filter", "prompt", told(tokens))
        if finish_reason == "length":
            raise AttemptError(f"{reason}: all tokens went into thinking; raise max_tokens", "prompt", told(tokens))
        raise AttemptError(reason, "passing", told(tokens))
    # Half a surrogate pair is no Unicode: neither a file of ours nor a tokenizer could hold it.
    content = content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer(Sample(content, finish_reason, usage=tokens), model)


def told(usage: Usage) -> Usage | None:
    """Return what an answer says that it cost, None where it does not say."""
    return None if usage == _NOTHING else usage


def refusal(reply: Reply) -> AttemptError:
    """Return what a reply that is no 200 means."""
    message, code = _error_text(reply.text)
    reason = f"{reply.status} {message}"
    status = reply.status
    if code == _NO_MONEY or status in (401, 403, 404):
        return AttemptError(reason, "endpoint", status=status)
    if status in (408, 409, 429) or status >= 500:
        cost = None if status in _GATEWAY else _NOTHING
        return AttemptError(reason, "passing", cost, retry_after_s(reply.headers), status)
    about_prompt = code in _PROMPT_CODES or any(word in message.lower() for word in _PROMPT_WORDS)
    if status == 413 or (status == 400 and about_prompt):
        return AttemptError(reason, "prompt", status=status)
    if 300 <= status < 400:
        reason += f" (it points to {reply.headers.get('location', 'nowhere')}; redirects are not followed)"
    return AttemptError(reason, "request", status=status)


def remedy(status: int, key_name: str) -> str:
    """Return what a user can do about a refusal that ends the run."""
    remedies = {
        401: f"check the key in {key_name or 'api_key_env (none is set)'}",
        403: f"check what the key in {key_name or 'api_key_env (none is set)'} may use",
        404: "check that base_url is right (it usually ends in /v1) and that the model is served there",
        429: "the account has no quota left: add to it, then start again",
    }
    if status >= 500:
        return "wait until the server is well and start again"
    return remedies.get(status, "check base_url, model and the sampling parameters ([generator] omit leaves some out)")


def _error_text(text: str) -> tuple[str, str]:
    """Return (message, code) of an error's body in any of the forms that servers send it in."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()[:300], ""
    if isinstance(data, list) and data:  # Gemini's
        data = data[0]
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return str(error)[:300], ""
    message = next((error[name] for name in ("message", "detail", "msg") if error.get(name)), text)
    return str(message)[:1000], str(error.get("code") or "")
