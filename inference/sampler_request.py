"""A request for one draw: the checks before it starts, the conditions that end it, and the delivery of its outcome.

There are no tensors here: `inference/sampler.py` computes, this file knows prompts, text and event loops.
"""

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from matryoshka.core.protocols import ContextError
from matryoshka.core.records import Sample, Sampling, Usage
from matryoshka.core.text.tokenizer import TextStream

MIN_PREFIX = 8  # shorter common beginnings are not worth a cache of their own


@dataclass(eq=False)
class Request:
    """One draw that is wanted, and the tokens drawn so far. uniforms: the random numbers of these tokens."""

    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Sample]"
    stream: TextStream
    random: random.Random
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)

    def uniform(self) -> float:
        """Return the random number of the next token, the same one until that token is drawn."""
        if len(self.uniforms) == len(self.ids):
            self.uniforms.append(self.random.random())
        return self.uniforms[-1]


def finished_sample(request: Request, stop_ids: Sequence[int]) -> Sample | None:
    """Return the sample if the last token ended it: a stop id, a stop string, or the length."""
    token, reason = request.ids[-1], ""
    if token in stop_ids:
        reason = "stop"
    else:
        request.stream.push(token)
    text = request.stream.text
    if cuts := [text.find(stop) for stop in request.sampling.stop if stop in text]:
        text, reason = text[: min(cuts)], "stop"
    if not reason and len(request.ids) >= request.sampling.max_tokens:
        reason = "length"
    if not reason:
        return None
    usage = Usage(len(request.prompt), len(request.ids))
    return Sample(text, reason, tuple(request.ids), tuple(request.logprobs), None, usage)


def common_prefix(oldest: Request, waiting: Sequence[Request]) -> tuple[int, list[Request]]:
    """Return the prefix length to share and the requests that share it: the length that saves the most tokens.

    A prompt's last token is always left to the tail, since its logits are needed. With length 0 all requests of the
    same adapter go together and share nothing.
    """
    peers = [request for request in waiting if request.adapter == oldest.adapter]
    common = {}
    for request in peers:
        pairs = zip(oldest.prompt[:-1], request.prompt[:-1], strict=False)
        common[id(request)] = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(oldest.prompt), len(request.prompt)) - 1
        )
    best, best_saved = 0, 0
    for length in set(common.values()):
        prompts = {request.prompt for request in peers if common[id(request)] >= length}
        if length >= MIN_PREFIX and (saved := length * (len(prompts) - 1)) > best_saved:
            best, best_saved = length, saved
    return best, [request for request in peers if common[id(request)] >= best]


def check_context(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raise ContextError when a prompt and its completion do not fit the context together."""
    if prompt_tokens + max_tokens > context_length:
        raise ContextError(
            f"prompt of {prompt_tokens} tokens + max_tokens {max_tokens} exceed the context of {context_length}; "
            "shorten the prompt or lower max_tokens"
        )


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError naming the setting that is out of range."""
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature {sampling.temperature} must be 0 (greedy) or a positive number")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p {sampling.top_p} must lie in (0, 1]")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens {sampling.max_tokens} must be at least 1")
    if "" in sampling.stop:
        raise ValueError("stop holds an empty string, which every text contains; leave it out")


def answer(request: Request, outcome: Sample | Exception) -> None:
    """Hand the outcome to the request's event loop, unless the caller has left."""

    def settle() -> None:
        if request.future.done():
            return
        if isinstance(outcome, StopIteration):  # futures refuse it, and the caller would wait for ever
            request.future.set_exception(RuntimeError(f"a pass raised {outcome!r}"))
        elif isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)

    try:
        request.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed, and with it every caller is gone
        pass
