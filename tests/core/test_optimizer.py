"""core/optimizer.py: oracles are peft's own LoRA+ optimizer and AdamW's first step by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.core.load import load_model
from matryoshka.core.optimizer import parameter_groups
from matryoshka.core.packing import Item
from matryoshka.core.train import TrainConfig, train
from matryoshka.core.tree import Tokens
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters


def adapted(folder: Path) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    model: Any = load_model(folder, torch.float64)
    add_adapter(model, "default", LoraConfig(rank=2), seed=0)
    set_active(model, "default")
    return model, trainable_parameters(model, "default")


def test_lora_plus_equals_peft(tiny_dir: Path) -> None:
    """Oracle: peft's create_loraplus_optimizer, given the same weights and gradients; three steps, float64, 1e-14."""
    pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = (adapted(tiny_dir) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}
    optimizer: Any = torch.optim.AdamW(parameter_groups(ours[1], 16.0), weight_decay=0.1, **settings)
    for group in optimizer.param_groups:
        group["lr"] *= group["ratio"]
    expected = create_loraplus_optimizer(
        theirs[0], torch.optim.AdamW, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, **settings
    )
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in ours[1].items():
            parameter.grad = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            theirs[1][name].grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
    for name, parameter in ours[1].items():
        torch.testing.assert_close(parameter, theirs[1][name], rtol=0, atol=1e-14, msg=name)


def test_groups_by_hand(tiny_dir: Path) -> None:
    """Oracle: names. A ratio of 1 is one group in the order of the parameters; without B there is nothing to scale."""
    _, parameters = adapted(tiny_dir)
    (whole,) = parameter_groups(parameters, 1.0)
    assert [id(p) for p in whole["params"]] == [id(p) for p in parameters.values()] and whole["ratio"] == 1.0
    rest, ups = parameter_groups(parameters, 4.0)
    assert (rest["ratio"], ups["ratio"]) == (1.0, 4.0)
    assert {id(p) for p in ups["params"]} == {id(p) for name, p in parameters.items() if "lora_B" in name}
    assert {id(p) for p in rest["params"]} == {id(p) for name, p in parameters.items() if "lora_A" in name}
    with pytest.raises(ValueError, match="lora_plus_ratio 4.0 wants LoRA's B matrices among the trained parameters"):
        parameter_groups({"weight": torch.nn.Parameter(torch.zeros(2))}, 4.0)
    with pytest.raises(ValueError, match="lora_plus_ratio 0.0 must be above 0"):
        TrainConfig(lora_plus_ratio=0.0)


def test_training_with_lora_plus(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: AdamW's first step, w - lr g / (|g| + eps): B moves by 8 times the rate. Resumed: the same bits."""
    items = [Item((Tokens((1, 2, 3 + i, 4, 5), (0, 0, 1, 1, 1)),), str(i)) for i in range(4)]
    config = TrainConfig(
        learning_rate=1e-3, batch_size=2, warmup_ratio=0.0, lora_plus_ratio=8.0, max_grad_norm=1e9, save_every=1
    )

    def run(steps: int, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
        model, parameters = adapted(tiny_dir)
        start = {name: p.detach().clone() for name, p in parameters.items()}
        training = train(model, parameters, items, config, SFT(), token_logps, tmp_path / folder)
        rows = [next(training) for _ in range(steps)]
        training.close()  # type: ignore[attr-defined]
        return start, {name: p.detach() for name, p in parameters.items()}, rows

    start, moved, rows = run(1, "one")
    assert rows[0]["lr"] == 1e-3
    for name in start:
        step = (moved[name] - start[name]).abs()
        if "lora_B" in name:
            assert step.max().item() == pytest.approx(8e-3, rel=1e-4)
        else:  # B is zero at first, so A has no gradient
            assert not step.any()
    _, resumed, _ = run(1, "one")
    _, whole, _ = run(2, "two")
    for name in whole:
        assert torch.equal(resumed[name], whole[name])
    plain = replace(config, lora_plus_ratio=1.0)
    with pytest.raises(ValueError, match="another training configuration"):
        next(train(*adapted(tiny_dir), items, plain, SFT(), token_logps, tmp_path / "two"))
