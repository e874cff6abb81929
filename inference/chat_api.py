"""OpenAI's chat format from the client's side: the request's bytes, the answer's Sample, and the meaning of a refusal.

Nothing is sent or waited for here. The invariant: everything that can come back from a server is either an Answer or an
AttemptError, whose `blame` decides what happens next and whose `billed` says what it may have cost; neither holds a
known secret, since texts are redacted after they have been decoded.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from matryoshka.core.json_values import all_values, as_count, as_text, parse_reply
from matryoshka.core.records import Messages, Sample, Sampling, Usage, content_key
from matryoshka.core.redaction import redact
from matryoshka.core.text.reasoning import without_reasoning
from matryoshka.inference.http_client import Reply
from matryoshka.inference.limits import retry_after_s

Blame = Literal["passing", "endpoint", "prompt", "request", "unclear"]

# How servers say that an answer is whole, and that it was cut at max_tokens. Any other word reports a failure.
_WHOLE = {
    "stop", "eos", "eos_token", "stop_sequence", "stop_token", "end_turn", "complete", "completed", "finished",
    "normal", "endoftext", "end_of_text",
}  # fmt: skip
_CUT = {
    "length", "max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit", "max_new_tokens",
    "maximum_tokens", "model_context_window_exceeded", "repetition",  # the last: vLLM cut a model that repeats itself
}  # fmt: skip
_FILTERED = re.compile(r"filter|safety|sensitive|recitation|prohibited|blocklist|spii|refusal|guardrail|toxic")
_TOOL = re.compile("tool|function_call")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")  # beside the content
# Azure reports with an otherwise good answer that its filter did not run.
_NOT_ABOUT_THE_ANSWER = ("content_filter_results", "content_filter_result", "prompt_filter_results")

# An account without money, which some providers report with status 429 or 200.
_NO_MONEY = re.compile(
    r"insufficient.(user.)?(quota|balance|funds|credit)|exceeded_current_quota_error|used all available credits|欠费"
    r"|(余额|额度)不足",
    re.I,
)
_GATEWAY = (408, 499, 502, 504, 520, 524)  # a gateway gave up; the model may have answered, and been billed
_PASSING = (*_GATEWAY, 409, 421, 424, 425, 429, 498)  # 424: a worker failed; 498: Groq has no room
_REFUSES_ALL = (401, 402, 404, 405, 407, 410)
# Codes of one prompt alone; the last three say that the model's answer to it could not be read.
_PROMPT_CODES = {
    "string_above_max_length", "invalid_prompt", "data_inspection_failed", "datainspectionfailed", "1301",
    "tool_use_failed", "output_parse_failed", "json_validate_failed",
}  # fmt: skip
# Words that are said of one prompt only: it is too long, or against a rule.
_ABOUT_PROMPT = re.compile(
    r"context.?(length|size|window|limit)|string too long|too many (input )?tokens|input.token|`?inputs`? tokens"
    r"|(prompt|inputs?|messages?|sequence|content|text|request)\b[^.]{0,60}\b(too (long|large|many)|length"
    r"|exceed(s|ed)?|longer|must (have|be) less|blocked|blank|empty)|token (count|limit)|reduce the length|\brisk"
    r"|tokens of \d+ exceeded|max (completion )?tokens[^.]{0,40} got -\d|text parameter|surrogate"
    r"|(?<!case.)sensitive|moderation|flagged|inappropriate|unsafe|harmful|safety|(usage|content).polic|violat"
    r"|content.?(filter|management)|filtered|prohibited|guardrail|jailbreak|recitation"
    r"|(输入|长度|内容|prompt|token)[^。]{0,20}(过长|超长|超过|超出|超限)|上下文|敏感|不安全|违规|违反|不合规|风险|风控",
    re.I,
)
# Subjects of a refusal that every request to the endpoint meets: its key, account, model or address.
_ABOUT_ENDPOINT = re.compile(
    r"api.?key|credential|authenticat|unauthori|access denied|(have|no) access|permission|\baccount\b"
    r"|organi[sz]ation|\bcredits?\b|\bbalance\b|billing|payment|\bquota\b|free tier|subscription|\bregion\b"
    r"|\blocation\b|\bdeployment\b|模型不存在"
    r"|model\b([^.]|\.\w){0,80}\b(not (a|in|found|exist|available|supported|served|deployed|loaded|enabled|valid"
    r"|allowed)|(doesn|isn).t (exist|supported|available)|no longer|unknown|invalid|unavailable|unsupported"
    r"|deprecated)\b"
    r"|(unknown|(in)?valid|no such|unsupported) model|no models? (is )?loaded",
    re.I,
)
_ABOUT_PARAMETER = re.compile(
    r"\bparam|keyword argument|not supported|unsupported|unrecogni[sz]ed|not permitted|extra_forbidden"
    r"|unexpected (key|field)|response_format|\bstream\b|logprobs|penalty",
    re.I,
)
_NAMES_PROMPT = re.compile(r"\b(prompt|input|message|content|text|conversation|query|question)s?\b|输入|内容", re.I)


@dataclass(frozen=True)
class Billed:
    """The cost that a reply states. Unless it is exact, the real cost may be as high as the request allows."""

    usage: Usage = Usage()
    is_exact: bool = True

    def at_most(self, most: Usage) -> Usage:
        """Return what counts against a budget, `most` being the bound of the request."""
        if self.is_exact:
            return self.usage
        return Usage(
            max(self.usage.prompt_tokens, most.prompt_tokens), max(self.usage.completion_tokens, most.completion_tokens)
        )


NOTHING = Billed()
UNKNOWN = Billed(is_exact=False)


@dataclass(frozen=True)
class Answer:
    """The sample of a reply with status 200, the model that it names ("" for none), and its cost."""

    sample: Sample
    model: str
    billed: Billed


class AttemptError(Exception):
    """One attempt without an answer.

    blame: "passing" (try again), "endpoint" (a wrong key, model or URL: it will answer nobody), "prompt" (this prompt
    cannot be answered), "request" (no prompt can: a parameter is refused), "unclear" (a refusal that does not say which
    of these). retry_after_s: what the server asks to wait.
    """

    def __init__(
        self, reason: str, blame: Blame, billed: Billed = NOTHING, retry_after_s: float = 0.0, status: int = 0
    ) -> None:
        self.reason = redact(as_text(reason) or "")
        super().__init__(self.reason)
        self.blame = blame
        self.billed = billed
        self.retry_after_s = retry_after_s
        self.status = status


def most_tokens(prompt: Messages, sampling: Sampling) -> Usage:
    """Return the most tokens that a request can cost, unless its server bills thinking beyond max_tokens.

    No tokenizer of the field makes more tokens of a text than it has bytes in UTF-8; a chat template adds some for each
    message and possibly a system prompt of its own.
    """
    size = sum(len(message.content.encode("utf-8", "surrogatepass")) + 16 for message in prompt)
    return Usage(size + 64, sampling.max_tokens)


def likely_tokens(prompt: Messages, sampling: Sampling) -> int:
    """Return about how many tokens a provider's limiter counts when it sees the request: text / 4 + max_tokens."""
    return sum(len(message.content) // 4 + 4 for message in prompt) + sampling.max_tokens


def server_seed(seed: int, draw: int) -> int:
    """Return the seed that is sent for draw `draw` of `seed`: 31 bits, since servers read a seed as a signed or
    unsigned 32-bit integer, and some take the largest unsigned one for "random".

    Two draws of one seed never share it, and those of different seeds only by chance: the seed is hashed before the
    draw is added, so (seed, draw + 1) is not (seed + 1, draw).
    """
    return (int(content_key("server seed", seed)[:8], 16) + draw) % 2**31


def chat_body(
    model: str, prompt: Messages, sampling: Sampling, length_key: str, omit: tuple[str, ...], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the request. A greedy request has no seed."""
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
        request["seed"] = server_seed(sampling.seed, sampling.draw)
    kept = {name: value for name, value in request.items() if name not in omit}
    return {**kept, **extra}


def parse_answer(body: bytes) -> Answer:
    """Return the answer in the body of a reply with status 200. Raises AttemptError if it has none."""
    try:
        data = parse_reply(body)
    except ValueError as err:
        shown = body[:200].decode("utf-8", "replace")
        raise AttemptError(f"the reply is no JSON: {err} ({shown!r})", "passing", UNKNOWN) from None
    billed = _billed(data.get("usage") if isinstance(data, dict) else None)
    for name, value in all_values(data, _NOT_ABOUT_THE_ANSWER):
        # Some gateways send an error object whose fields are all empty with every answer.
        is_error = name == "error" and (any(value.values()) if isinstance(value, dict) else value)
        is_error = is_error or (name == "errors" and isinstance(value, list) and value)
        if is_error or (name == "base_resp" and isinstance(value, dict) and value.get("status_code")):  # MiniMax's
            raise _reported_error(value, billed)
    try:
        choice = data["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason", "stop")
        content, refused = _content(message)
    except (KeyError, IndexError, TypeError, AttributeError):
        if _told(data)[0]:  # the whole reply is an error object
            raise _reported_error(data, billed) from None
        shown = body[:200].decode("utf-8", "replace")
        raise AttemptError(f"the answer holds no choice with a message ({shown!r})", "passing", billed) from None
    ended = str(finish_reason).lower()
    what = f"the answer ended with finish_reason {finish_reason!r:.80}"
    if refused:
        raise AttemptError(f"the model refuses: {refused[:500]}", "prompt", billed)
    if _FILTERED.search(ended):
        raise AttemptError(f"{what}: the server's filter took it or a part of it", "prompt", billed)
    if _TOOL.search(ended) or (content is None and message.get("tool_calls")):
        raise AttemptError(f"{what}: it calls a tool, and none was offered", "prompt", billed)
    if ended not in _WHOLE | _CUT:
        raise AttemptError(f"{what}, which reports no whole answer", "passing", billed)
    is_blank = not without_reasoning(content or "").strip()
    if ended in _CUT and is_blank:
        what += " and has no content: all tokens went into thinking; raise max_tokens"
        raise AttemptError(what, "prompt", billed)
    # Asked again, these two would be billed again, and be the same.
    if is_blank and ((content or "").strip() or any(message.get(name) for name in _THOUGHTS)):
        what += " and is a thought alone: the model never ended it, or the server's reasoning parser took the answer"
        raise AttemptError(what, "prompt", billed)
    if content is None and isinstance(message.get("content"), list):
        raise AttemptError("the answer has no text among its parts", "prompt", billed)
    if content is None:
        raise AttemptError(f"the message has no content (finish_reason {finish_reason!r:.80})", "passing", billed)
    usage = billed.usage if billed.is_exact else Usage()
    sample = Sample(redact(content), "stop" if ended in _WHOLE else "length", usage=usage)
    return Answer(sample, as_text(data.get("model")) or "", billed)


def _content(message: dict[str, Any]) -> tuple[str | None, str]:
    """Return a message's text, None if it has none, and its refusal, "" if it has none. Parts of a text are put
    together with nothing between them; thoughts are left out.

    Raises TypeError for anything but texts.
    """
    content, refused = message.get("content"), [as_text(message.get("refusal")) or ""]
    if isinstance(content, list):
        texts = []
        for part in content:
            if part.get("type") == "refusal":
                refused.append(str(as_text(part.get("refusal"))))
            elif part.get("type", "text") in ("text", "output_text") and "text" in part:
                texts.append(part["text"])
        content = "".join(texts) if texts else None
    elif content is not None and not isinstance(content, str):
        raise TypeError
    return as_text(content), "".join(refused)


def _billed(usage: Any) -> Billed:
    """Return a reply's usage: at least its total, with thinking and cached tokens that are counted beside the others.
    """
    if not isinstance(usage, dict):
        return UNKNOWN
    read, written = (
        found if isinstance(found := usage.get(f"{side}_tokens_details"), dict) else {}
        for side in ("prompt", "completion")
    )
    told = [usage.get("prompt_tokens", usage.get("input_tokens"))]  # the second is Anthropic's own name
    told += [usage.get("completion_tokens", usage.get("output_tokens")), usage.get("total_tokens")]
    told += [written.get("reasoning_tokens"), usage.get("reasoning_tokens")]
    told += [read.get("cached_tokens"), usage.get("cache_read_input_tokens")]
    told += [read.get("cache_creation_tokens"), usage.get("cache_creation_input_tokens")]
    told += [usage.get("citation_tokens")]  # Perplexity's: pages that it read, billed beside the prompt
    counts = [as_count(value) for value in told]
    is_exact = all(count is not None or value is None for count, value in zip(counts, told, strict=True))
    prompt, completion, total, *parts = (count or 0 for count in counts)
    thoughts, cached = max(parts[:2]), max(parts[2:4]) + max(parts[4:6])
    # A part that is larger than its whole is none, but was counted beside it.
    prompt += (cached if cached > prompt else 0) + parts[6]
    completion += thoughts if thoughts > completion else 0
    # No answer costs nothing on one of its sides; some servers leave out what they had in a cache, or never count.
    is_exact = is_exact and ((prompt > 0 and completion > 0) or total > max(prompt, completion))
    return Billed(Usage(prompt, max(completion, total - prompt)), is_exact)


def _reported_error(error: Any, billed: Billed) -> AttemptError:
    """Return the meaning of an error object in a reply with status 200."""
    message, codes, param = _told(error)
    message = message or f"{error!r:.200}"
    blame: Blame = "passing"
    if _NO_MONEY.search(". ".join([message, *codes])):
        blame = "endpoint"
    elif _blame(message, codes, param, ()) == "prompt":
        blame = "prompt"
    return AttemptError(f"the reply reports an error: {message}", blame, billed)


def refusal(reply: Reply, sent: Collection[str] = ()) -> AttemptError:
    """Return the meaning of a reply with another status; `sent` are the names of the request's fields."""
    message, codes, param = _error_of(reply.body)
    status = reply.status
    reason = f"{status} {message or reply.body[:1200].decode('utf-8', 'replace').strip()[:300]}"
    blame = _blame(message, codes, param, sent)
    # A page is a firewall's or a proxy's, which may dislike one prompt for the code in it, and knows no key or model.
    is_page = reply.body.lstrip()[:1] == b"<"
    blame = "unclear" if is_page and blame != "prompt" else blame
    has_no_money = _NO_MONEY.search(". ".join([message, *codes]))
    if has_no_money or status in _REFUSES_ALL or (status == 403 and blame in ("endpoint", "request")):
        return AttemptError(reason, "endpoint", status=status)
    # A gateway's guardrail, and a prompt of more tokens than the account may send in a minute.
    if blame == "prompt" and (status == 424 or (status == 429 and "request too large" in message.lower())):
        return AttemptError(reason, "prompt", status=status)
    if status in _PASSING or status >= 500:
        billed = UNKNOWN if status in _GATEWAY else NOTHING
        return AttemptError(reason, "passing", billed, retry_after_s(reply.headers), status)
    if status < 300:
        return AttemptError(f"{reason} (a status that brings no answer)", "passing", UNKNOWN, status=status)
    if status < 400:
        reason += f" (it points to {reply.headers.get('location', 'nowhere')}; redirects are not followed)"
        return AttemptError(reason, "request", status=status)
    return AttemptError(reason, "prompt" if status == 413 else blame, status=status)


def _blame(message: str, codes: Collection[str], param: str, sent: Collection[str]) -> Blame:
    """Return the subject of a refusal, by its words; other words than ours make it "unclear"."""
    if _PROMPT_CODES & set(codes) or param.startswith(("messages", "prompt", "input")):
        return "prompt"
    said = ". ".join([message, *codes]).replace("_", " ")
    if _ABOUT_PROMPT.search(said):
        return "prompt"
    if _ABOUT_ENDPOINT.search(said):
        return "endpoint"
    # INVALID_ARGUMENT, "invalid params" and the like begin all of a provider's refusals.
    words = " ".join([message, param, *(code for code in codes if not code.startswith("invalid"))])
    words = re.sub("invalid param(eter)?s?\\b", "", words, flags=re.I)
    names = [name for name in sent if name not in ("model", "messages")]
    if _ABOUT_PARAMETER.search(words) or any(re.search(rf"\b{re.escape(name)}\b", words) for name in names):
        return "request"
    return "prompt" if _NAMES_PROMPT.search(said) else "unclear"


def remedy(status: int, key_name: str) -> str:
    """Return the remedy for a refusal that ends the run."""
    remedies = {
        401: f"check the key in {key_name or 'api_key_env (none is set)'}",
        402: "the account has no credit left: add to it, then start again",
        403: f"check what the key in {key_name or 'api_key_env (none is set)'} may use",
        404: "check that base_url is right (it usually ends in /v1) and that the model is served there",
        429: "the account has no quota left: add to it, then start again",
    }
    if status >= 500:
        return "wait until the server is well and start again"
    return remedies.get(status, "check base_url, model and the sampling parameters ([generator] omit leaves some out)")


def _error_of(body: bytes) -> tuple[str, list[str], str]:
    """Return the message, the codes and the parameter of an error's body, in any of the forms that servers send."""
    try:
        data = parse_reply(body)
    except ValueError:  # a page or plain text
        return re.sub("<[^>]*>", " ", body[:1200].decode("utf-8", "replace")).strip()[:300], [], ""
    if isinstance(data, list) and data:  # Gemini's
        data = data[0]
    inner = data.get("error") if isinstance(data, dict) else None
    return _told(inner if isinstance(inner, dict) and inner else data)


def _told(error: Any) -> tuple[str, list[str], str]:
    """Return the message, the codes in lower case, and the parameter that an error object names."""
    message = _words(error)[:1000]
    if not isinstance(error, dict):
        return message, [], ""
    codes = [str(error.get(name) or "").lower() for name in ("code", "type", "status")]
    return message, [code for code in codes if code], str(error.get("param") or "")


def _words(error: Any, depth: int = 0) -> str:
    """Return the texts in which an error says what is wrong, without the request, which some servers repeat."""
    if isinstance(error, str):
        return re.split("['\"]input['\"]:", error)[0]
    if depth == 4 or not isinstance(error, dict | list):
        return ""
    if isinstance(error, list):
        return "; ".join(filter(None, (_words(item, depth + 1) for item in error[:10])))
    if "loc" in error:  # FastAPI's
        return f"{error.get('msg')} ({error.get('type')}) at {error['loc']}"
    said = [error.get(name) for name in ("message", "detail", "msg", "error_msg", "status_msg", "error", "errors")]
    said += [error["metadata"].get("raw")] if isinstance(error.get("metadata"), dict) else []  # OpenRouter's
    return ": ".join(filter(None, (_words(item, depth + 1) for item in said)))
