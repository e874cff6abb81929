"""The pure-PyTorch sampler: a KV cache, batching over whatever is waiting, shared prefixes read once.

Requests arrive from asyncio and are served by one worker thread. Requests with the same adapter and a common prompt
prefix form a cohort with one cache; each turn of the worker admits waiting requests into cohorts and decodes one token
for every row. In deterministic mode one request is served at a time and nothing is shared, so that an answer is a pure
function of its request, bit for bit. Ids and log-probs of the drawn tokens come back with every sample.

A failure costs the requests that cause it and no others. A pass that fails is repeated with halves of its rows until
the culprits are alone, and a row whose logits are not finite ends with NonFiniteLogits.
"""

import asyncio
import copy
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.records import Sample, Sampling, stable_seed
from matryoshka.core.text.tokenizer import TextStream, Tokenizer
from matryoshka.inference.kv_cache import CachedAttention, Prefix
from matryoshka.inference.sampler_request import (
    Request,
    answer,
    check_context,
    check_sampling,
    common_prefix,
    finished_sample,
)
from matryoshka.inference.token_sampling import draw_tokens
from matryoshka.lora.linear import active

logger = logging.getLogger(__name__)

PREFIXES_KEPT = 4
PREFILL_TOKENS = 4096  # bounds the memory of one prefill pass
GROW_AHEAD = 64  # tail tokens to make room for at once when rows are admitted
GATHER_S = 0.004  # an idle worker waits this long for the rest of a wave

T = TypeVar("T")


class NonFiniteLogits(RuntimeError):
    """The model computed NaN or infinite logits, so that no token can be drawn."""


class DeviceLost(RuntimeError):
    """The device fails at everything, as a GPU does after an illegal access, until the process ends."""


@dataclass
class Cohort:
    """Requests that decode together: one adapter, one prefix, row i of the cache belongs to requests[i]."""

    adapter: str | None
    prefix: Prefix | None
    cache: CachedAttention
    requests: list[Request]

    def halves(self) -> "list[Cohort]":
        """Return two cohorts with half the rows each, which share no memory."""
        cohorts, middle = [], len(self.requests) // 2
        for rows in (range(middle), range(middle, len(self.requests))):
            cache = copy.copy(self.cache)
            cache.select(torch.tensor(rows, device=cache.lengths_B.device))
            cohorts.append(Cohort(self.adapter, self.prefix, cache, [self.requests[row] for row in rows]))
        return cohorts


class Sampler:
    """Draws completions from `model` under its named adapters. Close it (or use `with`) to end its thread.

    The model is put in evaluation mode, and is the sampler's alone while requests run: training it, or activating an
    adapter, has to wait. max_rows: rows decoded together. deterministic: see the module. num_threads: torch's, in the
    worker thread.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_rows: int = 64,
        deterministic: bool = False,
        num_threads: int | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"sampler: max_rows {max_rows} must be at least 1")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context_length = model.config.max_position_embeddings
        self.max_rows = 1 if deterministic else max_rows
        self.deterministic = deterministic
        self.num_threads = num_threads
        self.prompt_tokens_read = 0  # tokens that went through prefill; shared prefixes count once
        self.tokens_drawn = 0
        self.illness = ""  # why no request can be served any more
        self._queue: queue.Queue[Request | None] = queue.Queue()
        self._waiting: list[Request] = []
        self._cohorts: list[Cohort] = []
        self._outcomes: list[tuple[Request, Sample | Exception]] = []
        self._prefixes: dict[tuple[str | None, int, tuple[int, ...]], Prefix] = {}
        unknown_V = torch.tensor([not _is_known(tokenizer, id) for id in range(model.config.vocab_size)])
        self._unknown_V = unknown_V.to(model.head_weight.device) if unknown_V.any() else None
        self._closing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the requests that run and end the worker thread."""
        self._queue.put(None)
        self._thread.join()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Sample:
        """Return one completion of `prompt_ids`; equal (prompt, seed, draw) and logits give equal tokens.

        Raises ValueError when prompt and max_tokens do not fit the context together, for a prompt that is empty or has
        ids outside of the model's vocabulary, an adapter that the model lacks, and settings out of range;
        NonFiniteLogits; whatever the model raises for this request; RuntimeError when the sampler is closed.
        """
        check_sampling(sampling)
        check_context(len(prompt_ids), sampling.max_tokens, self.context_length)
        vocab_size = self.model.config.vocab_size
        if not prompt_ids or not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise ValueError(
                f"sampler: the prompt {list(prompt_ids[:8])}... is empty or holds ids outside of the model's "
                f"{vocab_size}; use the tokenizer of this model"
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        prompt = tuple(prompt_ids)
        # The prompt is part of the seed, so that one draw of many prompts is many independent draws.
        draws = random.Random(stable_seed("sampler", sampling.seed, sampling.draw, prompt))
        self._queue.put(Request(prompt, sampling, adapter, loop, future, TextStream(self.tokenizer), draws))
        if self._ended.is_set():  # looked at after the put: before it, the worker could end in between
            raise RuntimeError(f"sampler: {self.illness or 'closed; make a new one'}")
        return await future

    # The rest runs in the worker thread.

    def _work(self) -> None:
        try:
            if self.num_threads:
                torch.set_num_threads(self.num_threads)
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as err:
            self.illness = f"the worker thread has ended ({type(err).__name__}: {err}); start again"
            raise
        finally:
            # Requests must not wait for a worker that is gone, whether it was closed or an error ended it.
            self._ended.set()
            self._collect(block=False)
            self._fail_all(RuntimeError(f"sampler: {self.illness or 'closed while this request arrived'}"))

    def _turn(self) -> bool:
        """Admit waiting requests, decode one token for every row and deliver; return False once closed and done."""
        try:
            self._collect(block=not (self._waiting or self._cohorts))
            self._admit()
            for cohort in list(self._cohorts):
                self._step(cohort)
            self._cohorts = [cohort for cohort in self._cohorts if cohort.requests]
            self._deliver()
        except DeviceLost:
            raise
        except Exception as err:  # a fault outside of all passes, which no request can be blamed for
            logger.exception("sampler: a turn failed; all its requests fail")
            self._fail_all(err)
        return not self._closing or bool(self._waiting or self._cohorts)

    def _collect(self, block: bool) -> None:
        """Move arrived requests to the waiting list, and note when the sampler is to close."""
        arrived = [self._queue.get()] if block else []
        if block and not self.deterministic:
            time.sleep(GATHER_S)
        while True:
            try:
                arrived.append(self._queue.get_nowait())
            except queue.Empty:
                break
        self._closing = self._closing or None in arrived
        self._waiting += [request for request in arrived if request is not None]

    def _deliver(self) -> None:
        """Hand out the outcomes. No adapter is active here, so the caller may use the model after its last answer."""
        for request, outcome in self._outcomes:
            answer(request, outcome)
        self._outcomes = []

    def _fail(self, requests: Sequence[Request], err: Exception) -> None:
        self._outcomes += [(request, err) for request in requests]

    def _fail_all(self, err: Exception) -> None:
        """Fail every request that is not answered yet, and deliver."""
        self._fail([*self._waiting, *(request for cohort in self._cohorts for request in cohort.requests)], err)
        self._waiting, self._cohorts = [], []
        self._deliver()

    def _admit(self) -> None:
        """Turn waiting requests into rows while there is room; the oldest request decides which others go with it."""
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]
        while self._waiting:
            room = self.max_rows - sum(len(cohort.requests) for cohort in self._cohorts)
            # A prefill of one row costs almost as much as one of many: wait until a quarter of the rows is free.
            if room < min(len(self._waiting), max(1, self.max_rows // 4)):
                return
            oldest = self._waiting[0]
            length, group = (0, [oldest]) if self.deterministic else common_prefix(oldest, self._waiting)
            chosen = group[:room]
            self._start(chosen, oldest.prompt[:length])
            self._waiting = [request for request in self._waiting if request not in chosen]

    def _start(self, requests: list[Request], prefix_ids: tuple[int, ...]) -> None:
        """Make rows of `requests`, whose prompts begin with `prefix_ids`."""
        order = sorted({request.prompt for request in requests}, key=len)
        while order:
            # Prompts of similar length go together, so that padding stays small.
            rows = max(1, PREFILL_TOKENS // max(1, len(order[-1]) - len(prefix_ids)))
            self._read(order[-rows:], requests, prefix_ids)
            order = order[:-rows]

    def _read(self, prompts: list[tuple[int, ...]], requests: list[Request], prefix_ids: tuple[int, ...]) -> None:
        """Read `prompts`, draw the first tokens of the requests that have them, and add these as rows to a cohort."""
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        members = [request for request in requests if request.prompt in row_of]
        adapter = members[0].adapter

        def read() -> tuple[Prefix | None, CachedAttention, Tensor]:
            with active(self.model, adapter):
                prefix = self._prefix(adapter, prefix_ids) if prefix_ids else None
                return prefix, *self._prefill([prompt[len(prefix_ids) :] for prompt in prompts], prefix)

        result = self._attempt(read)
        if isinstance(result, Exception):
            if middle := len(prompts) // 2:
                self._read(prompts[:middle], members, prefix_ids)
                self._read(prompts[middle:], members, prefix_ids)
            else:
                self._fail(members, result)
            return
        prefix, cache, logits_UV = result
        index = torch.tensor([row_of[request.prompt] for request in members], device=logits_UV.device)
        done = self._draw(members, logits_UV[index])
        rows = [row for row in range(len(members)) if row not in done]
        if not rows:
            return
        members = [members[row] for row in rows]
        running = (c for c in self._cohorts if c.requests and c.adapter == adapter and c.prefix is prefix)
        cohort = next(running, None)

        def join() -> None:
            cache.select(index[rows])
            ahead = max(min(request.sampling.max_tokens, GROW_AHEAD) for request in members)
            cache.reserve(int(cache.lengths_B.max()) + ahead)
            if cohort is not None:
                cohort.cache.extend(cache)

        if lack := self._attempt(join):  # a cohort that was to take them is as it was
            self._fail(members, lack)
        elif cohort is None:
            self._cohorts.append(Cohort(adapter, prefix, cache, members))
        else:
            cohort.requests.extend(members)

    def _prefix(self, adapter: str | None, ids: tuple[int, ...]) -> Prefix:
        # Weights that were trained or replaced since are other weights: keys and values of the old ones are not reused.
        weights = hash(tuple((id(p), p._version) for p in self.model.parameters()))
        key = (adapter, weights, ids)
        if key not in self._prefixes:
            cache, _ = self._prefill([ids], None)
            keys = [k[:, :, : len(ids)].contiguous() for k in cache.keys]
            values = [v[:, :, : len(ids)].contiguous() for v in cache.values]
            while len(self._prefixes) >= PREFIXES_KEPT:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[key] = Prefix(ids, keys, values)
        self._prefixes[key] = self._prefixes.pop(key)  # most recently used last
        return self._prefixes[key]

    def _prefill(self, tails: Sequence[Sequence[int]], prefix: Prefix | None) -> tuple[CachedAttention, Tensor]:
        """Read token rows after `prefix`; return their cache and the [rows, V] logits that follow each row."""
        config, weight = self.model.config, self.model.head_weight
        cache = CachedAttention(
            prefix, config.num_hidden_layers, len(tails), config.num_key_value_heads, config.head_dim, weight
        )
        lengths_B = torch.tensor([len(tail) for tail in tails], device=weight.device)
        width = int(lengths_B.max())
        ids_BT = torch.tensor([[*tail, *(0,) * (width - len(tail))] for tail in tails], device=weight.device)
        start = len(prefix.ids) if prefix else 0
        positions_BT = torch.arange(start, start + width, device=weight.device).expand_as(ids_BT)
        cache.begin(width)
        hidden_BTD = self.model(ids_BT, positions_BT, cache)
        cache.lengths_B = lengths_B
        self.prompt_tokens_read += int(lengths_B.sum())
        last_BD = hidden_BTD[torch.arange(len(tails)), lengths_B - 1]
        return cache, self.model.logits(last_BD)

    def _step(self, cohort: Cohort) -> None:
        """Decode one token for every row of the cohort."""
        if not cohort.requests:
            return
        logits_BV = self._attempt(lambda: self._decode(cohort))
        if isinstance(logits_BV, Exception):
            self._split(cohort, logits_BV)
            return
        cohort.cache.lengths_B = cohort.cache.lengths_B + 1
        self._drop(cohort, self._draw(cohort.requests, logits_BV))

    def _decode(self, cohort: Cohort) -> Tensor:
        """Return the [rows, V] logits after each row's newest token; repeatable until the lengths are raised."""
        device = cohort.cache.lengths_B.device
        ids_B1 = torch.tensor([[request.ids[-1]] for request in cohort.requests], device=device)
        start = len(cohort.prefix.ids) if cohort.prefix else 0
        with active(self.model, cohort.adapter):
            cohort.cache.begin(1)
            hidden_B1D = self.model(ids_B1, cohort.cache.lengths_B[:, None] + start, cohort.cache)
            return self.model.logits(hidden_B1D[:, 0])

    def _split(self, cohort: Cohort, err: Exception) -> None:
        """Decode the rows of a pass that failed with `err` again, each half by itself; a single row fails."""
        requests, middle = cohort.requests, len(cohort.requests) // 2
        halves = self._attempt(cohort.halves) if middle else []
        if isinstance(halves, Exception):  # no memory for copies: the younger half makes room for the older
            self._fail(requests[middle:], err)
            self._drop(cohort, set(range(middle, len(requests))))
            self._step(cohort)
            return
        if not halves:
            self._fail(requests, err)
        cohort.requests = []
        self._cohorts.extend(halves)
        for half in halves:
            self._step(half)

    def _draw(self, requests: Sequence[Request], logits_BV: Tensor) -> set[int]:
        """Draw the next token of each request; return the rows that are done: finished, failed or cancelled."""
        uniforms = [request.uniform() for request in requests]
        samplings = [request.sampling for request in requests]
        drawn = self._attempt(
            lambda: [tensor.tolist() for tensor in draw_tokens(logits_BV, samplings, uniforms, self._unknown_V)]
        )
        if isinstance(drawn, Exception):
            if len(requests) == 1:
                self._fail(requests, drawn)
                return {0}
            rows = range(len(requests))
            return {row for row in rows if self._draw([requests[row]], logits_BV[row : row + 1])}
        done = set()
        for row, (request, id, logp) in enumerate(zip(requests, *drawn, strict=True)):
            try:
                sample = self._take(request, id, logp)
            except Exception as err:  # logits that are not finite, an id that has no text
                self._fail([request], err)
                done.add(row)
                continue
            if sample is not None:
                self._outcomes.append((request, sample))
            if sample is not None or request.future.cancelled():
                done.add(row)
        return done

    def _take(self, request: Request, id: int, logp: float) -> Sample | None:
        """Add a drawn token to `request`; return its sample if that ended it."""
        if not math.isfinite(logp):
            raise NonFiniteLogits(
                f"sampler: the logits of token {len(request.ids) + 1} of the answer are not finite, with "
                f"{'the base model' if request.adapter is None else f'adapter {request.adapter!r}'}; its weights hold "
                "NaN or infinity, or its numbers overflow the dtype"
            )
        request.ids.append(id)
        request.logprobs.append(logp)
        self.tokens_drawn += 1
        return finished_sample(request, self.tokenizer.stop_ids)

    def _drop(self, cohort: Cohort, rows: set[int]) -> None:
        """Take `rows` out of the cohort."""
        if not rows:
            return
        left = [request for row, request in enumerate(cohort.requests) if row not in rows]
        order = self._attempt(lambda: cohort.cache.drop(rows)) if left else []
        if isinstance(order, Exception):  # some layers may have moved their rows and others not
            self._fail(left, order)
            order = []
        cohort.requests = [cohort.requests[row] for row in order]

    def _attempt(self, work: Callable[[], T]) -> T | Exception:
        """Return the result of `work`, or its exception without the traceback, whose frames hold tensors.

        Raises DeviceLost where the device can no longer do anything.
        """
        try:
            return work()
        except Exception as err:  # out of memory, an unknown adapter, a fault in the model: the requests hear of it
            logger.warning("sampler: %s: %s", type(err).__name__, err, exc_info=not isinstance(err, ValueError))
            try:
                torch.zeros(1, device=self.model.head_weight.device).add(1).item()
            except Exception as lost:
                raise DeviceLost(f"the device is lost ({lost}), since a pass failed with: {err}") from err
            return err.with_traceback(None)


def _is_known(tokenizer: Tokenizer, id: int) -> bool:
    try:
        tokenizer.bytes_of(id)
    except ValueError:
        return False
    return True
