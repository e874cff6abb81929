"""dpo/parity.py: oracles are the whole model's log_softmax, our sampler's log-probs, and other adapters' samples."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.core.models.load import load_model
from matryoshka.core.records import EpisodeInfo, Message, Sample, Sampling, Trajectory, Turn
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.data import completion
from matryoshka.dpo.parity import BOUNDS, check_policy, check_samples, difference, trainer_logps
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.linear import LoraConfig, active, add_adapter
from matryoshka.tests.random_weights import randomise_adapter

PROMPT = (Message("user", "What is two plus two?"),)


@pytest.fixture(scope="module")
def drawn(tiny_dir: Path) -> tuple[Any, tuple[int, ...], list[Sample]]:
    """A model with adapters "a" and "b", a prompt's ids, and samples that the sampler drew under "a"."""
    model, tokenizer = load_model(tiny_dir), Tokenizer.load(tiny_dir)
    for seed, name in enumerate("ab"):
        add_adapter(model, name, LoraConfig(rank=2, targets=("q_proj", "down_proj")), seed)
        randomise_adapter(model, name, 0.3, seed, ("lora_B",))
    ids = tokenizer.render(PROMPT, add_generation_prompt=True).ids

    async def draw() -> list[Sample]:
        with Sampler(model, tokenizer) as sampler:
            hot = Sampling(temperature=1.0, max_tokens=20)
            return [await sampler.generate(ids, replace(hot, draw=i), "a") for i in range(5)]

    return model, ids, asyncio.run(draw())


def test_the_trainer_computes_the_models_log_probs(drawn: Any) -> None:
    """Oracle: log_softmax over the whole model's logits; 1e-5 is fp32's rounding in sums over 259 tokens."""
    model, ids, (sample, *_) = drawn
    whole = torch.tensor([[*ids, *sample.token_ids]])
    with active(model, "a"), torch.no_grad():
        expected = model.logits(model(whole))[0, len(ids) - 1 : -1].log_softmax(-1)
        computed = trainer_logps(model, completion(ids, sample))
    expected_S = expected.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
    assert computed == pytest.approx(expected_S.tolist(), abs=1e-5)


def test_the_difference() -> None:
    """Oracle: by hand."""
    found = difference((-1.0, -2.0, -3.0), (-1.0, -2.3, -3.4))
    assert found.rms == pytest.approx(math.sqrt((0.09 + 0.16) / 3))
    assert found.largest == pytest.approx(0.4)
    assert (found.position, found.num_tokens) == (2, 3)
    assert difference((math.nan,), (-1.0,)).rms == math.inf
    with pytest.raises(ValueError, match="1 and 2 log-probs"):
        difference((-1.0,), (-1.0, -1.0))


def test_samples_of_the_right_adapter_pass_and_of_another_do_not(drawn: Any) -> None:
    """Oracle: samples drawn under adapter a have its log-probs; halved ones, or another adapter's, do not."""
    model, ids, samples = drawn
    rows = [(f"example-{i}", ids, sample) for i, sample in enumerate(samples)]
    with active(model, "a"):
        worst = check_samples(model, rows, BOUNDS["float32"], "a")
        assert worst is not None and worst.rms < 1e-4
        assert check_samples(model, [("x", ids, replace(samples[0], logprobs=None))], 0.0, "a") is None
        tempered = replace(samples[1], logprobs=tuple(x / 2 for x in samples[1].logprobs))
        with pytest.raises(ValueError, match=r"example example-1, .*a gave its \d+ tokens a log-prob of .*tempered"):
            check_samples(model, [rows[0], ("example-1", ids, tempered)], BOUNDS["float32"], "a")
    for other in ("b", None):
        with active(model, other), pytest.raises(ValueError, match="Likely: another adapter"):
            check_samples(model, rows, BOUNDS["float32"], "a")


def test_a_policys_own_samples_are_looked_at(drawn: Any) -> None:
    """Oracle: samples of another controller would fail the check, so they are passed over; a seed chooses among the
    rest.
    """
    model, ids, samples = drawn

    def trajectory(sample: Sample, name: str) -> Trajectory:
        return Trajectory("t", "e", (Turn(PROMPT, ids, sample),), 1.0, EpisodeInfo("right", "label_free", name, "g"))

    wrong = replace(samples[0], logprobs=(-50.0,) * len(samples[0].logprobs))
    rows = [*(trajectory(sample, "a") for sample in samples), trajectory(wrong, "b")]
    with active(model, "a"):
        assert check_policy(model, rows, "a", BOUNDS["float32"], 0) is not None
        assert check_policy(model, rows, "nobody", BOUNDS["float32"], 0) is None
        with pytest.raises(ValueError, match="b gave its"):
            check_policy(model, rows, "b", BOUNDS["float32"], 0)
