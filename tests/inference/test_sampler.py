"""inference/sampler.py: oracles are a loop without a cache, the trainer's own log-probs, and each request alone."""

import asyncio
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.core.models.attention import Masked
from matryoshka.core.models.llama import Model, read_config
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens, build_tree
from matryoshka.core.models.weights import save_weights
from matryoshka.core.records import Sample, Sampling, Usage
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.head import token_logps
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.linear import LoraConfig, active, add_adapter, layers_with, remove_adapter
from matryoshka.lora.quantized import quantize_linears
from matryoshka.tests.random_weights import randomise_adapter

GREEDY = Sampling(max_tokens=16)
WARM = Sampling(temperature=1.2, max_tokens=12, seed=3)
Wanted = tuple[Sequence[int], Sampling, str | None]


def make_model(folder: Path, adapters: Sequence[str] = ()) -> Any:
    """Return the tiny model with random adapters of these names."""
    model: Any = load_model(folder)
    for seed, name in enumerate(adapters):
        add_adapter(model, name, LoraConfig(rank=2, dropout=0.5), seed)
        randomise_adapter(model, name, 0.3, seed)
    return model


@contextmanager
def sampler_of(folder: Path, model: Any = None, **settings: Any) -> Iterator[Sampler]:
    with Sampler(model or make_model(folder), Tokenizer.load(folder), num_threads=1, **settings) as sampler:
        yield sampler


def run(sampler: Sampler, wanted: Sequence[Wanted]) -> list[Sample]:
    """Return the answers to requests that were all submitted at once."""

    async def main() -> list[Sample]:
        async with asyncio.timeout(60):
            return list(await asyncio.gather(*(sampler.generate(*request) for request in wanted)))

    return asyncio.run(main())


def prompts(count: int, header: int = 0, seed: int = 0) -> list[list[int]]:
    """Return prompts of 1 to 20 random ids after a common header."""
    draws = random.Random(seed)
    shared = [draws.randrange(256) for _ in range(header)]
    return [[*shared, *(draws.randrange(256) for _ in range(draws.randint(1, 20)))] for _ in range(count)]


def trainer_logps(model: Any, prompt: Sequence[int], sample: Sample, adapter: str | None = None) -> Tensor:
    """Return the drawn tokens' log-probs as training computes them: token tree, full attention, head."""
    assert sample.token_ids is not None
    tree = build_tree([Tokens((*prompt, *sample.token_ids), (0,) * len(prompt) + (1,) * len(sample.token_ids))])
    with torch.no_grad(), active(model, adapter):
        hidden_TD = model(tree.ids_T[None], tree.positions_T[None], Masked(tree))[0]
        return token_logps(hidden_TD[tree.source_S], model.head_weight, tree.target_S)


def check_logps(model: Any, prompt: Sequence[int], sample: Sample, adapter: str | None = None) -> None:
    """Oracle of all log-probs: 1e-4, fp32 sums in another order over logits of order 10."""
    got = torch.tensor(sample.logprobs)
    torch.testing.assert_close(got, trainer_logps(model, prompt, sample, adapter), rtol=0, atol=1e-4)


@pytest.mark.parametrize("convert", [None, quantize_linears], ids=["plain", "nf4"])
def test_greedy_is_a_loop_without_a_cache(tiny_dir: Path, convert: Any) -> None:
    """Oracle: argmax of a full forward pass for every token, ids exactly; prompts of 1 to 300 tokens."""
    if convert:
        pytest.importorskip("bitsandbytes")
    model: Any = load_model(tiny_dir, convert=convert)
    draws = random.Random(1)
    for length in (1, 2, 40, 300):
        prompt = [draws.randrange(256) for _ in range(length)]
        ids = list(prompt)
        for _ in range(30):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
        with sampler_of(tiny_dir, model) as sampler:
            (sample,) = run(sampler, [(prompt, Sampling(max_tokens=30), None)])
        stops = [i for i, id in enumerate(ids[length:]) if id in sampler.tokenizer.stop_ids]
        assert sample.token_ids == tuple(ids[length:][: stops[0] + 1 if stops else None])
        check_logps(model, prompt, sample)
        assert sample.usage == Usage(length, len(sample.token_ids))
        assert sampler.prompt_tokens_read == length and sampler.tokens_drawn == len(sample.token_ids)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.5, 1.0), (1.5, 0.7), (0.7, 0.9)])
def test_log_probs_are_the_trainers(tiny_dir: Path, temperature: float, top_p: float) -> None:
    """Oracle: `trainer_logps`: neither temperature nor top-p shows in them."""
    model = make_model(tiny_dir)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=40)
    wanted = [(prompt, replace(sampling, seed=i), None) for i, prompt in enumerate(prompts(4))]
    with sampler_of(tiny_dir, model) as sampler:
        samples = run(sampler, wanted)
    assert len({sample.token_ids for sample in samples}) == 4
    for (prompt, _, _), sample in zip(wanted, samples, strict=True):
        check_logps(model, prompt, sample)


@pytest.mark.parametrize("header", [0, 40])
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_together_as_alone(tiny_dir: Path, header: int, max_rows: int) -> None:
    """Oracle: each request alone in a deterministic sampler: same ids, log-probs within 1e-4 of the trainer's.

    Greedy and warm, ragged prompts, some asked for several draws, some ending early, with and without a common header,
    more than there are rows for.
    """
    model = make_model(tiny_dir)
    wanted: list[Wanted] = []
    for i, prompt in enumerate(prompts(6, header)):
        wanted.append((prompt, replace(GREEDY, max_tokens=1 + 3 * i), None))
        wanted += [(prompt, replace(WARM, draw=draw), None) for draw in range(i % 3)]
    with sampler_of(tiny_dir, model, max_rows=max_rows) as sampler:
        together = run(sampler, wanted)
    assert sampler._cohorts == [] and sampler._waiting == []
    with sampler_of(tiny_dir, model, deterministic=True) as sampler:
        alone = [run(sampler, [request])[0] for request in wanted]
    for request, one, other in zip(wanted, together, alone, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        check_logps(model, request[0], one)


def test_rows_never_exceed_their_maximum(tiny_dir: Path, one_wave: None) -> None:
    """Oracle: by definition, looked at in every decoding step; and rows that end make room for others at once."""
    seen: list[int] = []
    with sampler_of(tiny_dir, max_rows=4) as sampler:
        step = sampler._step

        def counted(cohort: Any) -> None:
            seen.append(sum(len(c.requests) for c in sampler._cohorts))
            step(cohort)

        sampler._step = counted  # type: ignore[method-assign]
        run(sampler, [(prompt, replace(WARM, max_tokens=5), None) for prompt in prompts(11)])
    assert max(seen) == 4
    assert Counter(seen)[4] >= 8


def test_shared_prefixes_are_read_once(tiny_dir: Path, one_wave: None) -> None:
    """Oracle: counted by hand: the header once and each tail once, however many draws are asked for."""
    shared = prompts(8, header=50)
    longest_common = next(i for i in range(70) if len({prompt[i] for prompt in shared if i < len(prompt)}) > 1)
    assert longest_common == 50
    wanted = [(prompt, replace(WARM, draw=draw), None) for prompt in shared for draw in range(3)]
    with sampler_of(tiny_dir) as sampler:
        run(sampler, wanted)
        once = 50 + sum(len(prompt) - 50 for prompt in shared)
        assert sampler.prompt_tokens_read == once
        run(sampler, wanted)  # the header is still there: only the tails are read again
        assert sampler.prompt_tokens_read == 2 * once - 50
    with sampler_of(tiny_dir, deterministic=True) as sampler:
        run(sampler, wanted[:4])
        assert sampler.prompt_tokens_read == sum(len(prompt) for prompt, _, _ in wanted[:4])


def test_one_prompt_is_read_once_for_all_its_draws(tiny_dir: Path, one_wave: None) -> None:
    """Oracle: counted by hand; and a prompt that is the beginning of another still gets its own logits."""
    long = prompts(1, header=30)[0]
    wanted = [(long, replace(WARM, draw=draw), None) for draw in range(5)]
    with sampler_of(tiny_dir) as sampler:
        run(sampler, wanted)
        assert sampler.prompt_tokens_read == len(long)
    nested: list[Wanted] = [(long, GREEDY, None), (long[:20], GREEDY, None), (long[:21], GREEDY, None)]
    model = make_model(tiny_dir)
    with sampler_of(tiny_dir, model) as sampler:
        for (prompt, _, _), sample in zip(nested, run(sampler, nested), strict=True):
            check_logps(model, prompt, sample)
        assert sampler.prompt_tokens_read < sum(len(prompt) for prompt, _, _ in nested)


def test_several_adapters_at_once(tiny_dir: Path) -> None:
    """Oracle: the trainer's log-probs under each request's own adapter. They differ, and dropout is off in sampling."""
    model = make_model(tiny_dir, ["one", "two"]).train()
    names: list[str | None] = [None, "one", "two"]
    wanted: list[Wanted] = [(prompt, WARM, name) for prompt in prompts(4, header=12) for name in names]
    with sampler_of(tiny_dir, model) as sampler:
        samples = run(sampler, wanted)
    assert not model.training
    for (prompt, _, name), sample in zip(wanted, samples, strict=True):
        check_logps(model, prompt, sample, name)
    assert len({sample.token_ids for sample in samples}) == len(samples)
    other = trainer_logps(model, wanted[0][0], samples[0], "two")
    assert (torch.tensor(samples[0].logprobs) - other).abs().max() > 0.1


def test_new_weights_are_not_mixed_with_old_prefixes(tiny_dir: Path) -> None:
    """Oracle: the trainer's log-probs after the adapter was trained in place, and after another one took its name."""
    model = make_model(tiny_dir, ["policy"])
    wanted: list[Wanted] = [(prompt, WARM, "policy") for prompt in prompts(3, header=40)]
    with sampler_of(tiny_dir, model) as sampler:
        run(sampler, wanted)
        with torch.no_grad():
            for layer in layers_with(model, "policy"):
                layer.lora_B["policy"].add_(0.3)
        for (prompt, _, name), sample in zip(wanted, run(sampler, wanted), strict=True):
            check_logps(model, prompt, sample, name)
        remove_adapter(model, "policy")
        add_adapter(model, "policy", LoraConfig(rank=2), seed=9)
        for (prompt, _, name), sample in zip(wanted, run(sampler, wanted), strict=True):
            check_logps(model, prompt, sample, name)


def test_length_and_stop_ids(tiny_dir: Path) -> None:
    """Oracle: the greedy sequence itself: cut at max_tokens, or after a stop id, which is in the ids, not the text."""
    model = make_model(tiny_dir)
    with sampler_of(tiny_dir, model) as sampler:
        ((prompt, _, _),) = wanted = [(prompts(1)[0], replace(GREEDY, max_tokens=20), None)]
        (whole,) = run(sampler, wanted)
        assert whole.finish_reason == "length" and whole.token_ids is not None and len(whole.token_ids) == 20
        (one,) = run(sampler, [(prompt, replace(GREEDY, max_tokens=1), None)])
        assert (one.token_ids, one.finish_reason) == (whole.token_ids[:1], "length")
    tokenizer = Tokenizer.load(tiny_dir)
    stop = next(id for id in whole.token_ids if id != whole.token_ids[0])
    at = whole.token_ids.index(stop)
    tokenizer.stop_ids = (258, stop)
    with Sampler(model, tokenizer, num_threads=1) as sampler:
        (sample,) = run(sampler, wanted)
        (exact,) = run(sampler, [(prompt, replace(GREEDY, max_tokens=at + 1), None)])
    assert sample.token_ids == whole.token_ids[: at + 1]
    assert (sample.finish_reason, exact.finish_reason) == ("stop", "stop")
    assert whole.logprobs is not None and sample.logprobs is not None
    assert sample.logprobs == pytest.approx(whole.logprobs[: at + 1], abs=1e-5)
    assert sample.text == tokenizer.decode(sample.token_ids[:-1]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_stop_strings(tiny_dir: Path) -> None:
    """Oracle: the same draw without them, by hand. Text ends before the stop; the ids are all that were drawn."""
    with sampler_of(tiny_dir) as sampler:
        wanted = [(prompt, Sampling(temperature=1.0, max_tokens=40), None) for prompt in prompts(30)]
        free = run(sampler, wanted)
        tried = 0
        for (prompt, sampling, _), sample in zip(wanted, free, strict=True):
            early, late = sample.text[3:4], sample.text[7:9]
            if len(early + late) < 3 or "\N{REPLACEMENT CHARACTER}" in early + late:
                continue
            tried += 1
            (cut,) = run(sampler, [(prompt, replace(sampling, stop=(late, early, "never in there")), None)])
            end = min(sample.text.find(early), sample.text.find(late))
            assert (cut.text, cut.finish_reason) == (sample.text[:end], "stop")
            assert sample.token_ids is not None and cut.token_ids is not None
            count = len(cut.token_ids)
            assert cut.token_ids == sample.token_ids[:count]
            stops = (early, late)
            shown = [sampler.tokenizer.decode(sample.token_ids[:n]) for n in (count - 1, count)]
            assert [any(stop in text for stop in stops) for text in shown] == [False, True]
        assert tried >= 4


def test_seeds(tiny_dir: Path) -> None:
    """Oracle: invariants. Equal seed and draw are equal; another seed, draw or prompt is independent."""
    prompt, other = prompts(2)
    sampling = Sampling(temperature=1.0, max_tokens=10, seed=5)
    with sampler_of(tiny_dir) as sampler:
        wanted = [
            (prompt, sampling, None), (prompt, sampling, None), (prompt, replace(sampling, draw=1), None),
            (prompt, replace(sampling, seed=6), None), (other, sampling, None),
        ]  # fmt: skip
        ids = [sample.token_ids for sample in run(sampler, wanted)]
        assert ids[0] == ids[1] and len(set(ids)) == 4
        assert run(sampler, wanted[:1])[0].token_ids == ids[0]


def test_one_seed_for_many_prompts_gives_independent_draws(tiny_dir: Path) -> None:
    """Oracle: inverse CDF. A uniform that all prompts shared would lie in every drawn token's interval."""
    model = make_model(tiny_dir)
    sampling = Sampling(temperature=1.0, max_tokens=1)
    wanted: list[Wanted] = [(prompt, sampling, None) for prompt in prompts(40)]
    with sampler_of(tiny_dir, model) as sampler:
        samples = run(sampler, wanted)
    low, high = 0.0, 1.0
    for (prompt, _, _), sample in zip(wanted, samples, strict=True):
        assert sample.token_ids is not None
        with torch.no_grad():
            probs = model.logits(model(torch.tensor([prompt])))[0, -1].double().softmax(-1)
        end = float(probs[: sample.token_ids[0] + 1].sum())
        low, high = max(low, end - float(probs[sample.token_ids[0]])), min(high, end)
    assert low > high


def test_draws_have_the_models_distribution(tiny_dir: Path) -> None:
    """Oracle: chi-square of 3000 first tokens against softmax at temperature 0.7; 48.27 is its 0.9999 quantile.

    The 19 likeliest ids and all others together, seeded. Each draw comes through the whole sampler.
    """
    model = make_model(tiny_dir)
    prompt = prompts(1)[0]
    sampling = Sampling(temperature=0.7, max_tokens=1)
    with sampler_of(tiny_dir, model, max_rows=1000) as sampler:
        samples = run(sampler, [(prompt, replace(sampling, draw=draw), None) for draw in range(3000)])
    with torch.no_grad():
        probs = (model.logits(model(torch.tensor([prompt])))[0, -1].double() / 0.7).softmax(-1)
    counts = Counter(sample.token_ids[0] for sample in samples if sample.token_ids)
    top = probs.topk(19)
    expected = [*(3000 * top.values).tolist(), 3000 * (1 - float(top.values.sum()))]
    seen = [counts[id] for id in top.indices.tolist()]
    seen.append(3000 - sum(seen))
    assert min(expected) > 5
    assert sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True)) < 48.27


def test_deterministic_mode_is_bitwise(tiny_dir: Path) -> None:
    """Oracle: the same request alone, in a fresh process's worth of state: ids and log-probs to the bit."""
    model = make_model(tiny_dir, ["one"])
    wanted: list[Wanted] = [
        (prompt, replace(WARM, max_tokens=20 - i), None if i % 2 else "one")
        for i, prompt in enumerate(prompts(6, header=20))
    ]
    with sampler_of(tiny_dir, model, deterministic=True) as sampler:
        together = run(sampler, wanted)
        again = run(sampler, list(reversed(wanted)))[::-1]
    for request, one, two in zip(wanted, together, again, strict=True):
        with sampler_of(tiny_dir, model, deterministic=True) as sampler:
            (alone,) = run(sampler, [request])
        assert one == two == alone


def active_name(model: Any) -> str | None:
    return next(layer.active for layer in layers_with(model, "one"))


def test_the_model_is_free_once_the_answers_are_there(tiny_dir: Path) -> None:
    """Oracle: by definition; at the last answer no adapter is active, and none is switched on later."""
    model = make_model(tiny_dir, ["one"])
    with sampler_of(tiny_dir, model) as sampler:
        for seed in range(30):
            run(sampler, [([1, 2, 3], Sampling(temperature=1.0, max_tokens=2, seed=seed), "one")])
            assert active_name(model) is None
            with active(model, "one"):
                time.sleep(0.002)
                assert active_name(model) == "one"


def test_what_cannot_be_served_is_refused(tiny_dir: Path) -> None:
    """Oracle: messages; nothing is drawn."""
    cases: list[tuple[Sequence[int], Sampling, str]] = [
        ([1] * 500, Sampling(max_tokens=13), "prompt of 500 tokens .* max_tokens 13 exceed the context of 512"),
        ([], GREEDY, r"the prompt \[\]\.\.\. is empty or holds ids outside"),
        ([1, 259], GREEDY, "is empty or holds ids outside of the model's 259"),
        ([-1, 2], GREEDY, "is empty or holds ids outside"),
        ([1], Sampling(max_tokens=0), "max_tokens 0 must be at least 1"),
        ([1], Sampling(temperature=-1.0), r"temperature -1.0 must be 0 \(greedy\) or a positive number"),
        ([1], Sampling(temperature=float("nan")), "temperature nan"),
        ([1], Sampling(temperature=1.0, top_p=0.0), r"top_p 0.0 must lie in \(0, 1\]"),
        ([1], Sampling(stop=("a", "")), "stop holds an empty string"),
    ]
    with sampler_of(tiny_dir) as sampler:
        for prompt, sampling, message in cases:
            with pytest.raises(ValueError, match=message):
                run(sampler, [(prompt, sampling, None)])
        assert sampler.tokens_drawn == 0
        (sample,) = run(sampler, [([1] * 500, Sampling(max_tokens=12), None)])  # exactly full
        assert sample.token_ids
    with pytest.raises(ValueError, match="max_rows 0 must be at least 1"):
        Sampler(make_model(tiny_dir), Tokenizer.load(tiny_dir), max_rows=0)


def test_cancelled_requests_are_dropped(tiny_dir: Path) -> None:
    """Oracle: counted. One of two is cancelled in the middle, one while it waits: neither costs another token."""
    model = make_model(tiny_dir)
    reached, go_on = threading.Event(), threading.Event()
    passes = 0

    def pause(module: Any, inputs: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            reached.set()
            go_on.wait(60)

    model.register_forward_pre_hook(pause)
    with sampler_of(tiny_dir, model, max_rows=2) as sampler:

        async def main() -> Sample:
            async with asyncio.timeout(60):
                kept, cancelled = (
                    asyncio.create_task(sampler.generate([1, i], Sampling(temperature=1.0, max_tokens=count)))
                    for i, count in ((2, 12), (3, 400))
                )
                await asyncio.to_thread(reached.wait, 60)
                waiting = asyncio.create_task(sampler.generate([1, 4], Sampling(max_tokens=400)))
                await asyncio.sleep(0)
                for task in (cancelled, waiting):
                    task.cancel()
                await asyncio.sleep(0)
                go_on.set()
                return await kept

        sample = asyncio.run(main())
    assert sample.token_ids is not None and sample.finish_reason in ("length", "stop")
    # Five passes were over or under way: prefill and four decoding steps drew for both rows, the rest for one.
    assert sampler.tokens_drawn <= len(sample.token_ids) + 5


def test_close_finishes_what_runs(tiny_dir: Path) -> None:
    """Oracle: every answer that was asked for comes, closed from the event loop's thread or another; then no more."""
    for elsewhere in (False, True):
        sampler = Sampler(make_model(tiny_dir), Tokenizer.load(tiny_dir), max_rows=2, num_threads=1)

        async def main(sampler: Sampler, elsewhere: bool) -> list[Sample]:
            async with asyncio.timeout(60):
                tasks = [asyncio.create_task(sampler.generate([1, i], GREEDY)) for i in range(5)]
                await asyncio.sleep(0)
                if elsewhere:
                    await asyncio.to_thread(sampler.close)
                else:
                    sampler.close()
                return list(await asyncio.gather(*tasks))

        samples = asyncio.run(main(sampler, elsewhere))
        assert all(sample.token_ids for sample in samples) and len(samples) == 5
        with pytest.raises(RuntimeError, match="closed; make a new one"):
            run(sampler, [([1], GREEDY, None)])
        sampler.close()  # once more does nothing


def test_an_event_loop_that_is_gone_does_no_harm(tiny_dir: Path) -> None:
    """Oracle: the next loop is served. The first one ended while its request was in the middle."""
    model = make_model(tiny_dir)
    reached, go_on = threading.Event(), threading.Event()

    def pause(module: Any, inputs: Any) -> None:
        if not reached.is_set():
            reached.set()
            go_on.wait(60)

    model.register_forward_pre_hook(pause)
    with sampler_of(tiny_dir, model) as sampler:
        loop = asyncio.new_event_loop()
        task = loop.create_task(sampler.generate([1, 2], replace(GREEDY, max_tokens=1)))
        loop.run_until_complete(asyncio.sleep(0))
        assert reached.wait(60)
        loop.close()  # not cancelled: the worker finds out when it answers
        go_on.set()
        (sample,) = run(sampler, [([1, 2], GREEDY, None)])
        assert sample.token_ids
        task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_ids_beyond_the_vocabulary_are_never_drawn(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: a padded embedding, whose rows beyond the tokenizer are the likeliest: no answer has them.

    They stay in the softmax: log-probs are the trainer's, which knows nothing of vocabularies.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, tmp_path)
    config = {**json.loads((tiny_dir / "config.json").read_text()), "vocab_size": 272}
    (tmp_path / "config.json").write_text(json.dumps(config))
    padded = Model(read_config(config))
    tiny = load_model(tiny_dir).state_dict()
    embedding = tiny["model.embed_tokens.weight"]
    tiny["model.embed_tokens.weight"] = torch.cat((embedding, 3 * embedding[:13]))
    padded.load_state_dict(tiny)
    save_weights(padded, tmp_path)
    model: Any = load_model(tmp_path)
    wanted: list[Wanted] = [(prompt, sampling, None) for prompt in prompts(4) for sampling in (GREEDY, WARM)]
    with sampler_of(tmp_path, model) as sampler:
        for (prompt, _, _), sample in zip(wanted, run(sampler, wanted), strict=True):
            assert sample.token_ids is not None and max(sample.token_ids) < 259
            check_logps(model, prompt, sample)
    with torch.no_grad():
        assert model.logits(model(torch.tensor([wanted[0][0]])))[0].argmax(-1).max() >= 259
