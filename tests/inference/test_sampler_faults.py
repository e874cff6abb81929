"""A draw that fails costs its own request alone: in prefill, decoding, sampling, adapter swap, text and the thread."""

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.core.records import Sample, Sampling
from matryoshka.inference import sampler as module
from matryoshka.inference.kv_cache import CachedAttention
from matryoshka.inference.sampler import NonFiniteLogits, Sampler
from matryoshka.inference.sampler_request import finished_sample
from matryoshka.inference.token_sampling import draw_tokens
from matryoshka.lora.linear import active, layers_with
from matryoshka.tests.inference.test_sampler import GREEDY, WARM, Wanted, check_logps, make_model, run, sampler_of

CULPRIT = 77  # a token id that only the failing prompt holds
PROMPTS: list[Sequence[int]] = [[1, 2, 3], [4, 5, CULPRIT], [1, 2, 9, 10], [7, 8], [1, 2, 3, 4]]
FAILURES: tuple[type[Exception], ...] = (RuntimeError, MemoryError, KeyError)


def outcomes(sampler: Sampler, wanted: Sequence[Wanted]) -> list[Sample | BaseException]:
    async def main() -> list[Sample | BaseException]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*(sampler.generate(*request) for request in wanted), return_exceptions=True)

    return asyncio.run(main())


def check_others(sampler: Sampler, wanted: list[Wanted], found: Sequence[Any], failed: set[int], kind: type) -> None:
    """Oracle: the requests in `failed` have an error of `kind`, the others what another sampler gives each alone."""
    for index, outcome in enumerate(found):
        if index in failed:
            assert isinstance(outcome, kind), (index, outcome)
    healthy = [request for index, request in enumerate(wanted) if index not in failed]
    answered = [outcome for index, outcome in enumerate(found) if index not in failed]
    with Sampler(sampler.model, sampler.tokenizer, deterministic=True, num_threads=1) as calm:
        alone_each = run(calm, healthy)
    for request, outcome, alone in zip(healthy, answered, alone_each, strict=True):
        assert isinstance(outcome, Sample) and outcome.token_ids == alone.token_ids
        check_logps(sampler.model, request[0], outcome, request[2])
    assert sampler.illness == ""


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("width", ["prefill", "decoding"])
def test_a_pass_that_fails_for_one_prompt(tiny_dir: Path, one_wave: None, kind: type[Exception], width: str) -> None:
    """Oracle: `check_others`. The model fails whenever the culprit's token is in a pass of that kind."""
    model = make_model(tiny_dir)
    broken = [True]
    wanted: list[Wanted] = [(prompt, WARM, None) for prompt in PROMPTS]
    with sampler_of(tiny_dir, model) as sampler:
        if width == "prefill":
            trigger = CULPRIT
        else:
            (culprit,) = run(sampler, [wanted[1]])
            assert culprit.token_ids is not None
            trigger = culprit.token_ids[2]  # its third token, which others may draw as well: they fail then, too

        def breaking(_: Any, inputs: Any) -> None:
            ids_BT = inputs[0]
            if broken and (ids_BT == trigger).any() and (ids_BT.shape[1] > 1) == (width == "prefill"):
                raise kind("out of memory")

        handle = model.register_forward_pre_hook(breaking)
        found = outcomes(sampler, wanted)
        broken.clear()
        handle.remove()
        failed = {1}
        if width == "decoding":
            with sampler_of(tiny_dir, model, deterministic=True) as calm:
                alone = [sample.token_ids or () for sample in run(calm, wanted)]
            failed = {index for index, ids in enumerate(alone) if trigger in ids[:-1]}
            assert 1 in failed and len(failed) < len(wanted)
        check_others(sampler, wanted, found, failed, kind)
        assert sampler._cohorts == [] and sampler._waiting == []


def test_no_memory_to_split_a_cohort(tiny_dir: Path, one_wave: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by definition: the pass takes two rows at most and copies fail; two of four are answered."""
    model = make_model(tiny_dir)

    def small(_: Any, inputs: Any) -> None:
        if inputs[0].shape[1] == 1 and inputs[0].shape[0] > 2:
            raise RuntimeError("out of memory")

    def no_copies(self: Any, rows: Any) -> None:
        if len(rows) < self.rows:
            raise RuntimeError("no memory for copies")
        select(self, rows)

    model.register_forward_pre_hook(small)
    select = CachedAttention.select
    monkeypatch.setattr(CachedAttention, "select", no_copies)
    wanted: list[Wanted] = [([1, 2, i], GREEDY, None) for i in range(4)]
    with sampler_of(tiny_dir, model) as sampler:
        found = outcomes(sampler, wanted)
        assert sorted(isinstance(outcome, Sample) for outcome in found) == [False, False, True, True]
        failed = {index for index, outcome in enumerate(found) if not isinstance(outcome, Sample)}
        check_others(sampler, wanted, found, failed, RuntimeError)


@pytest.mark.parametrize(
    ("sampling", "value"),
    [
        (GREEDY, float("nan")),
        (WARM, float("inf")),
        (Sampling(temperature=0.7, top_p=0.9, max_tokens=8), float("nan")),
    ],
    ids=["greedy-nan", "warm-inf", "nucleus-nan"],
)
def test_logits_that_are_not_finite(tiny_dir: Path, one_wave: None, sampling: Sampling, value: float) -> None:
    """Oracle: `check_others`. An adapter with NaN or infinity fails its requests, greedy ones too, and no others."""
    model = make_model(tiny_dir, ["good", "bad"])
    with torch.no_grad():
        layers_with(model, "bad")[0].lora_B["bad"][0, 0] = value
    names = (None, "bad", "good", "bad")
    wanted: list[Wanted] = [([*range(20), i], sampling, name) for i in range(2) for name in names]
    failed = {index for index, request in enumerate(wanted) if request[2] == "bad"}
    with sampler_of(tiny_dir, model) as sampler:
        for _ in range(2):
            found = outcomes(sampler, wanted)
            check_others(sampler, wanted, found, failed, NonFiniteLogits)
            assert "the logits of token 1 of the answer are not finite, with adapter 'bad'" in str(found[1])


def test_a_row_that_turns_to_nan_leaves_no_trace_in_its_cohort(tiny_dir: Path, one_wave: None) -> None:
    """Oracle: `check_others`. One row's cached values become NaN in the middle; rows that take its place are clean."""
    model = make_model(tiny_dir)
    wanted: list[Wanted] = [([i, i + 1], Sampling(temperature=1.0, max_tokens=24, seed=i), None) for i in range(12)]
    with sampler_of(tiny_dir, model, max_rows=4) as sampler:
        step, steps = sampler._step, [0]

        def poisoned(cohort: Any) -> None:
            steps[0] += 1
            if steps[0] == 3:
                for values in cohort.cache.values:
                    values[1] = float("nan")
            step(cohort)

        sampler._step = poisoned  # type: ignore[method-assign]
        found = outcomes(sampler, wanted)
        failed = {index for index, outcome in enumerate(found) if not isinstance(outcome, Sample)}
        assert len(failed) == 1
        check_others(sampler, wanted, found, failed, NonFiniteLogits)


def test_drawing_that_raises_for_one_row(tiny_dir: Path, one_wave: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `check_others`: `draw_tokens` raises for every batch that holds the culprit's seed."""

    def raising(logits_BV: Any, samplings: Sequence[Sampling], uniforms: Any, unknown_V: Any) -> Any:
        if any(sampling.seed == CULPRIT for sampling in samplings):
            raise IndexError("index out of range")
        return draw_tokens(logits_BV, samplings, uniforms, unknown_V)

    wanted: list[Wanted] = [(prompt, Sampling(1.0, max_tokens=9, seed=i), None) for i, prompt in enumerate(PROMPTS)]
    wanted.append(([1, 2], Sampling(1.0, max_tokens=9, seed=CULPRIT), None))
    with sampler_of(tiny_dir) as sampler:
        monkeypatch.setattr(module, "draw_tokens", raising)
        found = outcomes(sampler, wanted)
        monkeypatch.undo()
        check_others(sampler, wanted, found, {5}, IndexError)


def test_a_token_without_text_fails_its_request(
    tiny_dir: Path, one_wave: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `check_others`: the text of one request's tokens cannot be had."""
    def raising(request: Any, stop_ids: Any) -> Any:
        if CULPRIT in request.prompt:
            raise ValueError("id is not in the vocabulary")
        return finished_sample(request, stop_ids)

    wanted: list[Wanted] = [(prompt, WARM, None) for prompt in PROMPTS]
    monkeypatch.setattr(module, "finished_sample", raising)
    with sampler_of(tiny_dir) as sampler:
        found = outcomes(sampler, wanted)
        monkeypatch.undo()
        check_others(sampler, wanted, found, {1}, ValueError)


@pytest.mark.parametrize("leaving", [False, True])
def test_an_adapter_swap_that_fails(
    tiny_dir: Path, one_wave: None, monkeypatch: pytest.MonkeyPatch, leaving: bool
) -> None:
    """Oracle: `check_others`: activating or deactivating adapter "one" fails, its requests with it."""

    class Failing:
        def __init__(self, model: Any, name: str | None) -> None:
            self.name, self.block = name, active(model, name)

        def __enter__(self) -> None:
            if self.name == "one" and not leaving:
                raise RuntimeError("cannot switch")
            self.block.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.block.__exit__(*error)
            if self.name == "one" and leaving:
                raise RuntimeError("cannot switch")

    wanted: list[Wanted] = [([1, 2, i], WARM, name) for i in range(3) for name in (None, "one", "two")]
    with sampler_of(tiny_dir, make_model(tiny_dir, ["one", "two"])) as sampler:
        monkeypatch.setattr(module, "active", Failing)
        found = outcomes(sampler, wanted)
        monkeypatch.setattr(module, "active", active)
        check_others(sampler, wanted, found, {1, 4, 7}, RuntimeError)


def test_an_unknown_adapter_fails_its_own_requests_only(tiny_dir: Path) -> None:
    """Oracle: `check_others`, and the message."""
    wanted: list[Wanted] = [([1, 2, 3], GREEDY, name) for name in (None, "nobody", "one", "nobody")]
    with sampler_of(tiny_dir, make_model(tiny_dir, ["one"])) as sampler:
        found = outcomes(sampler, wanted)
        check_others(sampler, wanted, found, {1, 3}, ValueError)
        assert "no adapter 'nobody'" in str(found[1])


def test_a_fault_that_no_request_can_be_blamed_for(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by definition: what waited fails with the fault, and the worker serves the next request."""

    fault: list[Exception] = [KeyError("a fault in the code")]

    def raising(*arguments: Any) -> Any:
        raise fault[0]

    with sampler_of(tiny_dir) as sampler:
        monkeypatch.setattr(module, "common_prefix", raising)
        assert [type(outcome) for outcome in outcomes(sampler, [([1, 2], GREEDY, None)] * 3)] == [KeyError] * 3
        fault[0] = StopIteration("which no future takes")
        assert [type(outcome) for outcome in outcomes(sampler, [([1, 2], GREEDY, None)])] == [RuntimeError]
        monkeypatch.undo()
        assert isinstance(run(sampler, [([1, 2], GREEDY, None)])[0], Sample) and sampler.illness == ""


def ends_the_thread(module: Any, inputs: Any) -> None:
    raise SystemExit("the thread is told to end")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (ends_the_thread, r"the worker thread has ended \(SystemExit: the thread is told to end\)"),
        (None, "the device is lost .*an illegal access"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callers_do_not_wait_for_a_worker_that_is_gone(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, breaks: Callable[..., None] | None, message: str
) -> None:
    """Oracle: every request of then and later is told why, none hangs, and the sampler says that it is ill."""
    model = make_model(tiny_dir)

    def lost(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal access")

    model.register_forward_pre_hook(breaks or lost)
    with sampler_of(tiny_dir, model, max_rows=2) as sampler:
        if breaks is None:  # every operation on the device fails from then on
            monkeypatch.setattr(torch, "zeros", lost)
        found = outcomes(sampler, [([1, 2, i], GREEDY, None) for i in range(5)])
        monkeypatch.undo()
        for outcome in found:
            assert isinstance(outcome, RuntimeError) and re.search(message, str(outcome))
        with pytest.raises(RuntimeError, match=message):
            run(sampler, [([1], GREEDY, None)])
        assert sampler.illness
