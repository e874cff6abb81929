"""A check that sampler and trainer agree on the log-probs of the same tokens.

They are two programs over one set of weights. If they differ by more than rounding, the samples come from another
policy than the one that training starts from, and every preference pair is about the wrong model: another adapter was
served, a prompt was rendered by another template, or log-probs were tempered. So a few samples are compared before each
training.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import Tokens
from matryoshka.core.records import Sample, Trajectory, stable_seed
from matryoshka.core.training.memory import plan_memory
from matryoshka.core.training.packing import Item
from matryoshka.core.training.step import MicroBatch
from matryoshka.dpo.data import completion
from matryoshka.dpo.head import token_logps

# Root mean square over the tokens of the samples looked at that rounding may make, in nats. Measured on SmolLM2-135M:
# at most 2e-5 in float32, .079 in bfloat16 (benchmarks/results/parity*.json), of which this is about twice; float16,
# with an eighth of bfloat16's rounding, is not measured.
BOUNDS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.15, "float16": 0.02}
NUM_CHECKED = 4  # samples before each training


@dataclass(frozen=True)
class Difference:
    """How far two programs are apart on the log-probs of the same tokens, in nats: root mean square, and the largest
    with its position among the scored tokens."""

    rms: float
    largest: float
    position: int
    num_tokens: int


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return how far apart the two are. Raises ValueError for no tokens or unequal numbers of them."""
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"parity: {len(ours)} and {len(theirs)} log-probs; expected equal numbers, at least one")
    pairs = zip(ours, theirs, strict=True)
    gaps = [abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]
    largest = max(gaps)
    return Difference(math.sqrt(sum(gap * gap for gap in gaps) / len(gaps)), largest, gaps.index(largest), len(gaps))


def trainer_logps(model: LanguageModel, tokens: Tokens) -> tuple[float, ...]:
    """Return the log-probs of the scored tokens as training computes them under the adapter that is active."""
    device = model.device
    memory = plan_memory("none", model, {}, len(tokens.ids))
    with torch.no_grad():
        batch = MicroBatch(model, token_logps, [Item((tokens,), "")], len(tokens.ids), device, memory)
        return tuple(batch.logps().tolist())


def check_samples(
    model: LanguageModel, samples: Sequence[tuple[str, Sequence[int], Sample]], bound: float, sampler: str
) -> Difference | None:
    """Return the difference over all tokens of `samples` (example id, prompt ids, sample) under the active adapter.

    Samples without log-probs are passed over; None if there are no others. sampler: what drew them, for the message.
    Raises ValueError where it exceeds `bound`, naming the sample that differs most, both values and likely causes. One
    short sample alone would often exceed it by chance in a coarse dtype.
    """
    pairs = []
    for example, prompt_ids, sample in samples:
        if sample.logprobs is not None:
            tokens = completion(prompt_ids, Sample(sample.text, token_ids=sample.token_ids))
            pairs.append((example, sample, trainer_logps(model, tokens), tuple(sample.logprobs)))
    if not pairs:
        return None
    whole = difference([x for *_, row, _ in pairs for x in row], [x for *_, row in pairs for x in row])
    if whole.rms <= bound:
        return whole
    example, sample, computed, drawn = max(pairs, key=lambda pair: difference(*pair[2:]).rms)
    found = difference(computed, drawn)
    at = found.position
    raise ValueError(
        f"parity: {sampler} and the trainer are {whole.rms:.2g} nats a token apart over {len(pairs)} samples (root "
        f"mean square; bound {bound:g}); example {example}, sample {sample.text[:60]!r}: {sampler} gave its "
        f"{found.num_tokens} tokens a log-prob of {sum(drawn):.4f}, the trainer computes {sum(computed):.4f}, "
        f"{found.rms:.2g} a token, most at token {at}: {drawn[at]:.4f} against {computed[at]:.4f}. Nothing was "
        "trained. Likely: another adapter or base model was served under this name; the prompt was made by another "
        "template; the server's log-probs are tempered (--logprobs-mode), or it computes in a coarser dtype"
    )


def check_policy(
    model: LanguageModel, trajectories: Sequence[Trajectory], controller: str, bound: float, seed: int
) -> Difference | None:
    """Check NUM_CHECKED random ones of the samples that `controller` drew, as `check_samples` does.

    The name of a control scheme ends with that of the policy whose samples it gives.
    """
    drawn = [
        (trajectory.example_id, turn.prompt_ids, turn.action)
        for trajectory in trajectories
        if trajectory.info.controller.endswith(controller)
        for turn in trajectory.turns
        if turn.prompt_ids is not None and turn.action.logprobs is not None
    ]
    chosen = random.Random(stable_seed("parity", seed)).sample(drawn, min(NUM_CHECKED, len(drawn)))
    return check_samples(model, chosen, bound, controller)
