"""The pure-PyTorch sampler: a KV cache, batching over whatever is waiting, shared prefixes read once.

Requests arrive from asyncio and are served by one worker thread. Requests with the same adapter and a common prompt
prefix form a cohort with one cache; each turn of the worker admits what waits into cohorts and decodes one token for
every row. In deterministic mode one request is served at a time and nothing is shared, so that an answer is a pure
function of its request, bit for bit. Ids and log-probs of what was drawn come back with every sample.
"""

import asyncio
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

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
    fail,
    finished_sample,
)
from matryoshka.inference.token_sampling import draw_tokens
from matryoshka.lora.linear import active

PREFIXES_KEPT = 4
PREFILL_TOKENS = 4096  # bounds the memory of one prefill pass
GROW_AHEAD = 64  # tail tokens to make room for at once when rows are admitted
GATHER_S = 0.004  # an idle worker waits this long for the rest of a wave


@dataclass
class Cohort:
    """Requests that decode together: one adapter, one prefix, row i of the cache belongs to requests[i]."""

    adapter: str | None
    prefix: Prefix | None
    cache: CachedAttention
    requests: list[Request]


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
        self.prompt_tokens_read = 0  # tokens that went through prefill: what sharing saves shows here
        self.tokens_drawn = 0
        self._queue: queue.Queue[Request | None] = queue.Queue()
        self._waiting: list[Request] = []
        self._cohorts: list[Cohort] = []
        self._finished: list[tuple[Request, Sample]] = []
        self._prefixes: dict[tuple[str | None, int, tuple[int, ...]], Prefix] = {}
        unknown_V = torch.tensor([not _is_known(tokenizer, id) for id in range(model.config.vocab_size)])
        self._unknown_V = unknown_V.to(model.head_weight.device) if unknown_V.any() else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is running and end the worker thread."""
        self._queue.put(None)
        self._thread.join()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Sample:
        """Return one completion of `prompt_ids`; equal (prompt, seed, draw) and logits give equal tokens.

        Raises ValueError when prompt and max_tokens do not fit the context together, for a prompt that is empty or has
        ids outside of the model's vocabulary, an adapter that the model lacks, and settings out of range; RuntimeError
        when the sampler is closed.
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
            raise RuntimeError("sampler: closed; make a new one")
        return await future

    # The rest runs in the worker thread.

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            # Nobody may wait for a worker that is gone, whether it was closed or an unforeseen error ended it.
            self._ended.set()
            self._deliver()
            self._collect(block=False)
            left = [*self._waiting, *(request for cohort in self._cohorts for request in cohort.requests)]
            fail(left, RuntimeError("sampler: the worker thread has ended, closed or by an error that it printed"))

    def _serve(self) -> None:
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        closing = False
        with torch.inference_mode():
            while not closing or self._waiting or self._cohorts:
                idle = not (self._waiting or self._cohorts)
                closing = self._collect(block=idle) or closing
                self._admit()
                for cohort in list(self._cohorts):
                    self._guard(cohort)
                self._cohorts = [cohort for cohort in self._cohorts if cohort.requests]
                self._deliver()

    def _deliver(self) -> None:
        """Hand out what is finished, while no adapter is active: who gets the last answer may use the model at once."""
        for request, sample in self._finished:
            answer(request, sample)
        self._finished = []

    def _collect(self, block: bool) -> bool:
        """Move arrived requests to the waiting list; True when the sampler is to close."""
        arrived = [self._queue.get()] if block else []
        if block and not self.deterministic:
            time.sleep(GATHER_S)
        while True:
            try:
                arrived.append(self._queue.get_nowait())
            except queue.Empty:
                break
        self._waiting += [request for request in arrived if request is not None]
        return None in arrived

    def _admit(self) -> None:
        """Turn waiting requests into rows while there is room; the oldest request decides who goes with it."""
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]
        while self._waiting:
            room = self.max_rows - sum(len(cohort.requests) for cohort in self._cohorts)
            # A prefill of one row costs almost as much as one of many: wait until a quarter of the rows is free.
            if room < min(len(self._waiting), max(1, self.max_rows // 4)):
                return
            oldest = self._waiting[0]
            length, group = (0, [oldest]) if self.deterministic else common_prefix(oldest, self._waiting)
            chosen = group[:room]
            try:
                with active(self.model, oldest.adapter):
                    self._start(chosen, oldest.prompt[:length])
            except (RuntimeError, ValueError) as err:  # out of memory, unknown adapter: these fail, not the rest
                fail(chosen, err)
            self._waiting = [request for request in self._waiting if request not in chosen]

    def _start(self, requests: list[Request], prefix_ids: tuple[int, ...]) -> None:
        prefix = self._prefix(requests[0].adapter, prefix_ids) if prefix_ids else None
        unique = list(dict.fromkeys(request.prompt for request in requests))
        tails = {prompt: prompt[len(prefix_ids) :] for prompt in unique}
        order = sorted(unique, key=lambda prompt: len(tails[prompt]))
        running = (c for c in self._cohorts if c.requests and c.adapter == requests[0].adapter and c.prefix is prefix)
        cohort = next(running, None)
        while order:
            # Prompts of similar length go together, so that padding stays small.
            rows = max(1, PREFILL_TOKENS // max(1, len(tails[order[-1]])))
            batch, order = order[-rows:], order[:-rows]
            cache, logits_UV = self._prefill([tails[prompt] for prompt in batch], prefix)
            row_of = {prompt: row for row, prompt in enumerate(batch)}
            members = [request for request in requests if request.prompt in row_of]
            index = torch.tensor([row_of[request.prompt] for request in members], device=logits_UV.device)
            cache.select(index)
            ahead = max(min(request.sampling.max_tokens, GROW_AHEAD) for request in members)
            cache.reserve(int(cache.lengths_B.max()) + ahead)
            if cohort is None:
                cohort = Cohort(requests[0].adapter, prefix, cache, members)
                self._cohorts.append(cohort)
            else:
                cohort.cache.extend(cache)
                cohort.requests.extend(members)
            first = len(cohort.requests) - len(members)
            self._emit(cohort, members, logits_UV[index], first)

    def _prefix(self, adapter: str | None, ids: tuple[int, ...]) -> Prefix:
        # Weights that were trained or replaced since are other weights: what they made of the prefix is not reused.
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

    def _guard(self, cohort: Cohort) -> None:
        try:
            with active(self.model, cohort.adapter):
                self._step(cohort)
        except (RuntimeError, ValueError) as err:  # out of memory, an adapter that was removed
            fail(cohort.requests, err)
            cohort.requests = []

    def _step(self, cohort: Cohort) -> None:
        """Decode one token for every row of the cohort."""
        if not cohort.requests:
            return
        device = cohort.cache.lengths_B.device
        ids_B1 = torch.tensor([[request.ids[-1]] for request in cohort.requests], device=device)
        start = len(cohort.prefix.ids) if cohort.prefix else 0
        cohort.cache.begin(1)
        hidden_B1D = self.model(ids_B1, cohort.cache.lengths_B[:, None] + start, cohort.cache)
        cohort.cache.lengths_B = cohort.cache.lengths_B + 1
        self._emit(cohort, cohort.requests, self.model.logits(hidden_B1D[:, 0]), 0)

    def _emit(self, cohort: Cohort, requests: list[Request], logits_BV: Tensor, first: int) -> None:
        """Draw the next token of `requests` (rows first.. of the cohort) and take finished rows out."""
        uniforms = [request.random.random() for request in requests]
        samplings = [request.sampling for request in requests]
        ids_B, logps_B = draw_tokens(logits_BV, samplings, uniforms, self._unknown_V)
        finished = set()
        for offset, (request, token, logp) in enumerate(zip(requests, ids_B.tolist(), logps_B.tolist(), strict=True)):
            request.ids.append(token)
            request.logprobs.append(logp)
            self.tokens_drawn += 1
            if (sample := finished_sample(request, self.tokenizer.stop_ids)) is not None or request.future.cancelled():
                finished.add(first + offset)
                if sample is not None:
                    self._finished.append((request, sample))
        if finished:
            order = cohort.cache.drop(finished)
            cohort.requests = [cohort.requests[row] for row in order]


def _is_known(tokenizer: Tokenizer, id: int) -> bool:
    try:
        tokenizer.bytes_of(id)
    except ValueError:
        return False
    return True
