"""dpo/objectives.py: oracles are the loss functions on log-probs by hand, the training loop's first row, and TRL."""

import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.core.models.attention import Masked
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens, build_tree
from matryoshka.core.training.train import Item, Totals, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.losses import dpo_loss, hinge_loss, ipo_loss, robust_loss, simpo_loss
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    copy_adapter,
    set_active,
    trainable_parameters,
)
from matryoshka.tests.random_weights import randomise_adapter


def pairs(count: int, seed: int = 0) -> list[Item]:
    """Return preference items of random ids: prompts shared by two pairs each, answers of 1 to 9 tokens."""
    draws = random.Random(seed)
    items = []
    for index in range(count):
        if index % 2 == 0:
            prompt = [draws.randrange(256) for _ in range(12)]
        sides = []
        for _ in range(2):
            answer = [draws.randrange(256) for _ in range(draws.randint(1, 9))]
            sides.append(Tokens((*prompt, *answer), (0,) * len(prompt) + (1,) * len(answer)))
        items.append(Item(tuple(sides), f"group {index // 2}"))
    return items


def random_logps(items: list[Item], seed: int) -> dict[int, Tensor]:
    """Return per-token log-probs of every sequence, by the identity of its item and side."""
    draws = torch.Generator().manual_seed(seed)
    lengths = [sum(side.mask) for item in items for side in item.sequences]
    return {i: -5 * torch.rand(length, generator=draws, dtype=torch.float64) for i, length in enumerate(lengths)}


def adapted_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = load_model(folder, dtype)
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    randomise_adapter(model, "policy", 0.2, dtype=torch.float64)
    set_active(model, "policy")
    return model


OBJECTIVES = [
    Preference(),
    Preference(label_smoothing=0.1, beta=0.4),
    Preference(loss="ipo"),
    Preference(loss="ipo_mean", beta=0.3),
    Preference(loss="simpo", beta=2.0, gamma_beta_ratio=0.5),
    Preference(loss="robust", label_smoothing=0.2),
    Preference(loss="hinge", beta=0.4),
    Preference(nll_coefficient=0.7),
    SFT(),
]


def label(objective: object) -> str:
    return str(objective).partition(" object at ")[0]  # an address differs from process to process


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_by_hand(objective: Preference | SFT) -> None:
    """Oracle: the loss functions on sums over each answer's tokens; metrics are sums of beta-scaled log ratios."""
    items = pairs(5)
    policy, reference = random_logps(items, 1), random_logps(items, 2)
    tree = build_tree([side for item in items for side in item.sequences])
    totals = Totals(5, sum(len(logps) for logps in policy.values()))
    logps_S, reference_S = (torch.cat(list(logps.values())) for logps in (policy, reference))
    loss, metrics = objective(logps_S, reference_S, tree, totals)
    if isinstance(objective, SFT):
        torch.testing.assert_close(loss, -logps_S.sum() / totals.tokens, rtol=1e-14, atol=0)
        assert metrics == {}
        return
    c, r = (torch.stack([policy[2 * i + side].sum() for i in range(5)]) for side in (0, 1))
    ref_c, ref_r = (torch.stack([reference[2 * i + side].sum() for i in range(5)]) for side in (0, 1))
    n_c, n_r = (torch.tensor([len(policy[2 * i + side]) for i in range(5)]).double() for side in (0, 1))
    beta = objective.beta
    if objective.loss == "simpo":
        expected = simpo_loss(c / n_c, r / n_r, beta, 0.5)
        chosen_reward, rejected_reward = beta * c / n_c, beta * r / n_r
    else:
        chosen_ratio, rejected_ratio = c - ref_c, r - ref_r
        if objective.loss == "ipo_mean":
            chosen_ratio, rejected_ratio = chosen_ratio / n_c, rejected_ratio / n_r
        chosen_reward, rejected_reward = beta * chosen_ratio, beta * rejected_ratio
        margin = chosen_ratio - rejected_ratio
        expected = {
            "dpo": dpo_loss(margin, beta, objective.label_smoothing),
            "robust": robust_loss(margin, beta, objective.label_smoothing),
            "ipo": ipo_loss(margin, beta),
            "ipo_mean": ipo_loss(margin, beta),
            "hinge": hinge_loss(margin, beta),
        }[objective.loss]
    expected = expected - objective.nll_coefficient * c / n_c
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=0)
    by_hand = {
        "margin": (chosen_reward - rejected_reward).sum().item(),
        "accuracy": sum(a > b for a, b in zip(chosen_reward.tolist(), rejected_reward.tolist(), strict=True)),
        "chosen_reward": chosen_reward.sum().item(),
        "rejected_reward": rejected_reward.sum().item(),
        "chosen_logps": c.sum().item(),
        "rejected_logps": r.sum().item(),
        "chosen_length": n_c.sum().item(),
        "rejected_length": n_r.sum().item(),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(by_hand, rel=1e-12)
    assert 0 < by_hand["accuracy"] < 5


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
@pytest.mark.parametrize("cuts", [(1, 2), (3,), (1, 2, 3, 4)])
def test_micro_batches_add_up(objective: Preference | SFT, cuts: tuple[int, ...]) -> None:
    """Oracle: the full batch. Loss, gradients and metrics of the parts, divided by global counts, are sums."""
    items = pairs(5)
    policy, reference = random_logps(items, 1), random_logps(items, 2)
    totals = Totals(5, sum(len(logps) for logps in policy.values()))

    def part(start: int, end: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        tree = build_tree([side for item in items[start:end] for side in item.sequences])
        logps_S, reference_S = (torch.cat([x[i] for i in range(2 * start, 2 * end)]) for x in (policy, reference))
        leaf = logps_S.clone().requires_grad_()
        loss, metrics = objective(leaf, reference_S, tree, totals)
        return loss, metrics, torch.autograd.grad(loss, leaf)[0]

    whole, whole_metrics, whole_grad = part(0, 5)
    edges = (0, *cuts, 5)
    parts = [part(start, end) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    torch.testing.assert_close(torch.stack([loss for loss, _, _ in parts]).sum(), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in parts]), whole_grad, rtol=1e-13, atol=1e-16)
    for name, value in whole_metrics.items():
        assert sum(metrics[name].item() for _, metrics, _ in parts) == pytest.approx(value.item(), rel=1e-12)


def first_row(folder: Path, model: Any, objective: Any, first_loss: float | None, **config: Any) -> dict[str, float]:
    """Return the first metrics row of preference training that starts where its reference stands."""
    copy_adapter(model, "policy", "reference")
    parameters = trainable_parameters(model, "policy")
    settings = TrainConfig(batch_size=4, **config)
    reference = partial(active, model, "reference")
    rows: Iterator[dict[str, float]] = train(
        model, parameters, pairs(8), settings, objective, token_logps, folder, TrainContext(reference, first_loss)
    )
    return next(rows)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("micro_batch_tokens", [28, 50, 10000])
def test_the_first_loss_is_exactly_log_two(
    tiny_dir: Path, tmp_path: Path, eps: float, micro_batch_tokens: int
) -> None:
    """Oracle: ln 2 in fp32 to the bit (a mean of 4 equal numbers is exact) and a margin of 0.0, whatever the split."""
    objective = Preference(label_smoothing=eps)
    model = adapted_model(tiny_dir)
    row = first_row(tmp_path, model, objective, objective.first_loss, micro_batch_tokens=micro_batch_tokens)
    assert row["loss"] == torch.tensor(math.log(2)).item()
    assert row["margin"] == row["chosen_reward"] == row["rejected_reward"] == row["accuracy"] == 0.0


def test_first_losses(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: 1 / (4 beta^2) for IPO, also where it is large; none is promised for SimPO or with an NLL term."""
    objective = Preference(loss="ipo", beta=0.011)  # fp32 misses it by 2e-4, which is rounding
    assert objective.first_loss == pytest.approx(1 / (4 * 0.011**2))
    row = first_row(tmp_path, adapted_model(tiny_dir), objective, objective.first_loss)
    assert row["loss"] == pytest.approx(2066.115702, rel=1e-6)
    assert Preference(beta=0.5).first_loss == Preference(loss="robust", label_smoothing=0.1).first_loss == math.log(2)
    assert Preference(loss="ipo_mean", beta=0.5).first_loss == Preference(loss="hinge").first_loss == 1.0
    assert Preference(loss="simpo").first_loss is Preference(nll_coefficient=0.1).first_loss is None


def test_needs_reference() -> None:
    """Oracle: by hand; DPO and IPO without reference log-probs are an error, SimPO takes none."""
    items = pairs(1)
    tree = build_tree(items[0].sequences)
    logps_S = -torch.rand(len(tree.target_S), generator=torch.Generator().manual_seed(0))
    for loss, needs in (("dpo", True), ("robust", True), ("ipo", True), ("ipo_mean", True), ("simpo", False)):
        objective = Preference(loss=loss)
        assert objective.needs_reference == needs
        if needs:
            with pytest.raises(ValueError, match=f"loss '{loss}' needs reference log-probs and got none"):
                objective(logps_S, None, tree, Totals(1, 1))
        else:
            assert objective(logps_S, None, tree, Totals(1, 1))[0].isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kto"}, r"loss 'kto' is unknown; choose from \['dpo', 'robust', 'simpo', 'ipo', 'ipo_mean',"),
        ({"beta": 0.0}, "beta 0.0 must be above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing 0.5 must lie in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing -0.1 must lie in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss 'ipo' has no label_smoothing, but it is 0.1; set it to 0 or"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"choose a loss from \['dpo', 'robust', 'simpo'\]"),
        ({"nll_coefficient": -1.0}, "nll_coefficient -1.0 must not be below 0"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=message):
        Preference(**settings)


PREFERENCES = [objective for objective in OBJECTIVES if isinstance(objective, Preference)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("objective", PREFERENCES, ids=str)
def test_a_bad_hidden_state_spoils_the_loss(objective: Preference, side: int, bad: float) -> None:
    """Oracle: training refuses a loss that is not finite: so it must be NaN, on whichever side, never a happy 0."""
    items = pairs(2)
    tree = build_tree([s for item in items for s in item.sequences])
    draws = torch.Generator().manual_seed(0)
    hidden_TD, head_VD = torch.randn(len(tree.ids_T), 5, generator=draws), torch.randn(300, 5, generator=draws)
    reference_S = token_logps(hidden_TD[tree.source_S], head_VD, tree.target_S)
    last = tree.source_S[tree.sequence_S == side][-1]
    hidden_TD[last, 2] = bad
    logps_S = token_logps(hidden_TD[tree.source_S], head_VD, tree.target_S)
    losses_P = objective.pairs(logps_S, reference_S, tree).losses_P
    assert losses_P.isnan().tolist() == [True, False] and losses_P.mean().isnan()


@pytest.mark.slow
def test_equals_trl(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: TRL's DPOTrainer over peft over transformers, the padded batch in fp32: loss and every adapter gradient.

    The policy has moved away from its reference (adapters off). 1e-4 of the largest gradient: fp32 on both sides.
    """
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    model = adapted_model(tiny_dir)
    parameters = trainable_parameters(model, "policy")
    items = pairs(6)
    totals = Totals(6, sum(sum(side.mask) for item in items for side in item.sequences))
    tree = build_tree([side for item in items for side in item.sequences])

    def logps() -> Tensor:
        hidden_TD = model(tree.ids_T[None], tree.positions_T[None], Masked(tree))[0]
        return token_logps(hidden_TD[tree.source_S], model.head_weight, tree.target_S)

    with torch.no_grad(), active(model, None):
        reference_S = logps()
    loss, _ = Preference(beta=0.5)(logps(), reference_S, tree, totals)
    loss.backward()  # type: ignore[no-untyped-call]

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=list(model.lora_targets), task_type="CAUSAL_LM")
    settings = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.5, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = trl.DPOTrainer(
        model=base, args=settings, train_dataset=datasets.Dataset.from_list([row]), peft_config=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_dir),
    )  # fmt: skip
    theirs = dict(trainer.model.named_parameters())
    for name, weight in parameters.items():
        theirs[f"base_model.model.{name.removesuffix('.policy')}.default.weight"].data = weight.detach().clone()
    sides = [item.sequences[side] for side in (0, 1) for item in items]  # chosen first, then rejected
    width = max(len(side.ids) for side in sides)
    batch = {
        "input_ids": torch.tensor([[*side.ids, *(0,) * (width - len(side.ids))] for side in sides]),
        "completion_mask": torch.tensor([[*side.mask, *(0,) * (width - len(side.mask))] for side in sides]),
        "attention_mask": torch.tensor([[int(i < len(side.ids)) for i in range(width)] for side in sides]),
    }
    trainer.model.eval()
    expected = trainer.compute_loss(trainer.model, batch)
    assert abs(expected.item() - math.log(2)) > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    for name, weight in parameters.items():
        wanted = theirs[f"base_model.model.{name.removesuffix('.policy')}.default.weight"].grad
        assert weight.grad is not None and wanted is not None and wanted.any()
        torch.testing.assert_close(weight.grad, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item(), msg=name)
