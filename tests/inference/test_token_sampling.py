"""token_sampling.py: oracles are softmax, nucleus and inverse-CDF by hand, and chi-square on many seeded draws."""

import math
import random

import pytest
import torch
from torch import Tensor

from matryoshka.core.records import Sampling
from matryoshka.inference.token_sampling import draw_tokens

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.9, -1.0, 0.0, 2.0, -8.0, 1.5, 0.7, -0.3])
# chi-square quantile at 1 - 1e-4; seeded, so a failure is a fault of the code and not of luck.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88, 8: 31.83, 9: 33.72, 10: 35.56}


def draw_many(sampling: Sampling, count: int = 20000) -> list[int]:
    draws = random.Random(5)
    uniforms = [draws.random() for _ in range(count)]
    ids_B, _ = draw_tokens(LOGITS.expand(count, -1), [sampling] * count, uniforms)
    return ids_B.tolist()


def nucleus_by_hand(temperature: float, top_p: float) -> list[float]:
    """Return the truncated, renormalised distribution, in plain Python."""
    weights = [math.exp(z / temperature) for z in LOGITS.tolist()]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = set(), 0.0
    for id in sorted(range(len(probs)), key=lambda id: -probs[id]):
        if mass >= top_p:
            break
        kept.add(id)
        mass += probs[id]
    return [p / mass if id in kept else 0.0 for id, p in enumerate(probs)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (1.5, 0.95)])
def test_frequencies(temperature: float, top_p: float) -> None:
    """Oracle: chi-square against the distribution by hand; ids with fewer than 5 expected draws are put together."""
    drawn = draw_many(Sampling(temperature=temperature, top_p=top_p))
    probs = nucleus_by_hand(temperature, top_p)
    assert all(probs[id] > 0 for id in drawn)
    count = len(drawn)
    bins = [(p * count, drawn.count(id)) for id, p in enumerate(probs) if p * count >= 5]
    rare_expected, rare_seen = count - sum(e for e, _ in bins), count - sum(s for _, s in bins)
    if rare_expected >= 5:
        bins.append((rare_expected, rare_seen))
    else:
        assert rare_seen < 20
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in bins)
    assert statistic < CHI_SQUARE[min(len(bins) - 1, 10)], (statistic, bins)


def test_which_token_a_uniform_draws() -> None:
    """Oracle: the inverse of the cumulative distribution by hand: probabilities 1/8, 4/8, 3/8 in id order."""
    logits = torch.tensor([1.0, 4.0, 3.0]).log()
    uniforms = [0.0, 0.1249, 0.126, 0.62, 0.63, 0.999]
    ids_B, logps_B = draw_tokens(logits.expand(6, 3), [Sampling(temperature=1.0)] * 6, uniforms)
    assert ids_B.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.tensor([1 / 8, 1 / 8, 4 / 8, 4 / 8, 3 / 8, 3 / 8]).log()
    torch.testing.assert_close(logps_B, expected, rtol=0, atol=1e-6)
    # top_p 0.8 keeps 4/8 and 3/8, in order of falling probability: the first for uniforms below 4/7.
    nucleus = [Sampling(temperature=1.0, top_p=0.8)] * 6
    ids_B, logps_B = draw_tokens(logits.expand(6, 3), nucleus, [0.0, 0.3, 0.57, 0.58, 0.9, 0.9999])
    assert ids_B.tolist() == [1, 1, 1, 2, 2, 2]
    # The log-prob is of the whole distribution, neither tempered nor truncated.
    torch.testing.assert_close(logps_B[0], torch.tensor(0.5).log(), rtol=0, atol=1e-6)


def test_rows_do_not_touch_each_other() -> None:
    """Oracle: each row alone; greedy, plain, tempered and nucleus rows in one batch."""
    draws = torch.Generator().manual_seed(0)
    logits_BV = 2 * torch.randn(8, 50, generator=draws)
    samplings = [
        Sampling(temperature=t, top_p=p) for t, p in ((0, 1.0), (1, 1.0), (0.7, 0.9), (2, 1.0), (0, 0.5), (1, 0.3))
    ]
    samplings += [Sampling(temperature=1.0), Sampling(temperature=0.5, top_p=0.99)]
    uniforms = [0.9, 0.31, 0.77, 0.05, 0.5, 0.99, 0.62, 0.14]
    ids_B, logps_B = draw_tokens(logits_BV, samplings, uniforms)
    for row in range(8):
        alone, logp = draw_tokens(logits_BV[row : row + 1], samplings[row : row + 1], uniforms[row : row + 1])
        assert (alone.item(), logp.item()) == (ids_B[row].item(), logps_B[row].item())
    expected = logits_BV.log_softmax(-1).gather(1, ids_B[:, None]).squeeze(1)
    torch.testing.assert_close(logps_B, expected, rtol=0, atol=1e-5)
    assert ids_B[0] == logits_BV[0].argmax() and ids_B[4] == logits_BV[4].argmax()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_uniform_that_rounds_to_one_draws_a_real_token(top_p: float) -> None:
    """Oracle: probability 0 is never drawn; 1 - 2^-53 is 1.0 in fp32, and the last ids here have exactly no mass."""
    logits = torch.full((1, 1000), -200.0)
    logits[0, :3] = torch.tensor([0.0, 0.1, 0.2])
    for uniform in (0.0, 1 - 2**-53):
        ids_B, _ = draw_tokens(logits, [Sampling(temperature=1.0, top_p=top_p)], [uniform])
        assert ids_B.item() < 3


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_extreme_temperatures(top_p: float) -> None:
    """Oracle: limits. A temperature near 0 is greedy, a huge one is uniform over the kept tokens; nothing overflows."""
    logits = torch.tensor([[50.0, 80.0, -30.0, 79.0]])
    for temperature in (1e-4, 1e-5, 1e-30, 5e-324):
        for uniform in (0.0, 0.5, 0.999):
            ids_B, logps_B = draw_tokens(logits, [Sampling(temperature=temperature, top_p=top_p)], [uniform])
            assert ids_B.item() == 1 and logps_B.isfinite().all()
    if top_p == 1.0:
        ids_B, _ = draw_tokens(logits.expand(4, 4), [Sampling(temperature=1e9)] * 4, [0.1, 0.3, 0.6, 0.9])
        assert ids_B.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_get_no_log_prob(value: float) -> None:
    """Oracle: the other rows alone. A NaN or infinity gives its row NaN; -inf is a token without probability."""
    logits_BV = torch.tensor([[1.0, 2.0, 3.0], [1.0, value, 3.0], [3.0, 2.0, 1.0]])
    for sampling in (Sampling(), Sampling(temperature=0.7), Sampling(temperature=0.7, top_p=0.9)):
        ids_B, logps_B = draw_tokens(logits_BV, [sampling] * 3, [0.4] * 3)
        clean, expected_B = draw_tokens(logits_BV[[0, 2]], [sampling] * 2, [0.4] * 2)
        assert ids_B[[0, 2]].tolist() == clean.tolist() and logps_B[[0, 2]].tolist() == expected_B.tolist()
        assert 0 <= ids_B[1] < 3
        assert logps_B[1].isfinite() if value < 0 else logps_B[1].isnan()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)])
def test_unknown_ids_are_never_drawn(sampling: Sampling) -> None:
    """Oracle: by hand; id 1 is by far the likeliest but unknown. Its mass stays in the log-probs, as in training."""
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    unknown_V = torch.tensor([False, True, False])
    for uniform in (0.0, 0.4, 0.99):
        ids_B, logps_B = draw_tokens(logits, [sampling], [uniform], unknown_V)
        assert ids_B.item() in (0, 2)
        expected: Tensor = logits.log_softmax(-1)[0, ids_B]
        torch.testing.assert_close(logps_B, expected, rtol=0, atol=1e-6)
