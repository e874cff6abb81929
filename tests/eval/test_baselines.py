"""Control schemes without a model give fixed guidance and refuse unknown prompts."""

import asyncio

import pytest

from matryoshka.core.protocols import Controller
from matryoshka.core.records import Message, Messages, Sample, Sampling
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance, ScriptedGuidance


def prompt(text: str) -> Messages:
    return (Message("system", "Split the problem."), Message("user", text))


def test_no_guidance_is_empty() -> None:
    """Oracle: the definition: n samples, no text, no tokens spent, nothing white-box."""
    controller: Controller = NoGuidance()
    samples = asyncio.run(controller.propose(prompt("2 + 2?"), 3, Sampling()))
    assert samples == [Sample("")] * 3
    assert samples[0].usage.prompt_tokens == samples[0].usage.completion_tokens == 0
    assert controller.prompt_ids(prompt("2 + 2?")) is None
    assert controller.count_tokens(prompt("2 + 2?")) == 0


def test_scripted_guidance_follows_its_table() -> None:
    """Oracle: the table itself; a later change of the caller's mapping must not reach the controller."""
    table = {prompt("a"): "first do a", prompt("b"): "first do b"}
    controller: Controller = ScriptedGuidance("gold", table)
    table.clear()
    assert controller.name == "gold"
    assert asyncio.run(controller.propose(prompt("b"), 2, Sampling(seed=9))) == [Sample("first do b")] * 2
    assert controller.prompt_ids(prompt("a")) is None
    assert controller.count_tokens(prompt("a")) == 0


def test_scripted_guidance_refuses_other_prompts() -> None:
    """Oracle: the contract; guidance meant for one problem is never given to another. The roles count as well."""
    controller = ScriptedGuidance("wrong", {prompt("a"): "mislead"})
    for other in (prompt("c"), (Message("user", "a"),), ()):
        with pytest.raises(ValueError, match="wrong: no guidance is scripted"):
            asyncio.run(controller.propose(other, 1, Sampling()))


def test_the_generator_s_own_guidance_has_no_reasoning() -> None:
    """Oracle: by hand: a warm-up learns from these texts, so they are the plan alone."""

    class Thinker:
        name = "thinker"

        async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
            return Sample(f"<think>Which one?</think>\nplan {sampling.draw}")

    samples = asyncio.run(GeneratorGuidance(Thinker()).propose((Message("user", "q"),), 2, Sampling(draw=1)))
    assert [sample.text for sample in samples] == ["plan 1", "plan 2"]
