"""core/training/optimizer.py: oracles are peft's own LoRA+ optimizer, torch's AdamW, and AdamW's first step by hand."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.training.optimizer import OPTIMIZERS, make_optimizer, moment_bytes, parameter_groups
from matryoshka.core.training.packing import Item
from matryoshka.core.training.train import TrainConfig, train
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


EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")


def problem(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    """Return a parameter that is large enough for moments in 8 bits, the last block not full, and one that is not."""
    draws = torch.Generator().manual_seed(0)
    shapes = {"large": (65, 70), "small": (64, 63)}
    return {name: torch.nn.Parameter(torch.randn(s, generator=draws).to(dtype)) for name, s in shapes.items()}


def steps(name: str, parameters: dict[str, torch.nn.Parameter], count: int) -> torch.optim.Optimizer:
    optimizer = make_optimizer(name, parameters, 1e-2, (0.9, 0.95), 0.1)
    draws = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()
    return optimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_moments_in_8_bits(name: str) -> None:
    """Oracle: torch's AdamW. Step 1 is exact but for fp32's rounding: moments are quantised after their use.

    Ten steps: the small parameter as in fp32; the large one 2% of its way off, as the steps themselves are noise to
    the nearest of 256 levels (bitsandbytes' dynamic map, up to 2% of a block's largest apart).
    """
    pytest.importorskip("bitsandbytes")
    for count, tolerance in ((1, 1e-6), (10, 0.02)):
        start, ours, expected = problem(), problem(), problem()
        optimizer = steps(name, ours, count)
        steps("adamw", expected, count)
        for key, parameter in ours.items():
            way = (expected[key] - start[key]).norm()
            error = (parameter - expected[key]).norm() / way
            assert error <= (1e-6 if key == "small" else tolerance), (key, count)
        assert optimizer.state[ours["large"]]["state1"].dtype == torch.uint8
    for parameter in ours.values():
        state = optimizer.state[parameter]
        held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
        assert held == 2 * moment_bytes(parameter, name)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the run without a stop. Rank 128 makes matrices of 4096 numbers, whose moments take 8 bits."""
    pytest.importorskip("bitsandbytes")
    items = [Item((Tokens((1, 2, 3 + i, 4, 5), (0, 0, 1, 1, 1)),), str(i)) for i in range(6)]
    config = TrainConfig(learning_rate=1e-3, batch_size=2, lora_plus_ratio=2.0, optimizer=name, save_every=1)

    def run(stops: list[int], folder: str) -> dict[str, Tensor]:
        for count in stops:
            model: Any = load_model(tiny_dir)
            add_adapter(model, "policy", LoraConfig(rank=128, targets=("q_proj", "k_proj", "gate_proj")), seed=0)
            set_active(model, "policy")
            parameters = trainable_parameters(model, "policy")
            training = train(model, parameters, items, config, SFT(), token_logps, tmp_path / folder)
            for _ in range(count):
                next(training)
            training.close()  # type: ignore[attr-defined]
        return {name: parameter.detach() for name, parameter in parameters.items()}

    whole, resumed = run([3], "whole"), run([1, 1, 1], "resumed")
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key
    if name != "adamw":
        (state,) = (tmp_path / "whole").glob("step-*/state.safetensors")
        kinds = {t.dtype for key, t in load_file(state).items() if "/state1/" in key}
        assert kinds == {torch.uint8, torch.float32}  # k_proj's B is [16, 128]
        with pytest.raises(ValueError, match="another training configuration"):
            config = replace(config, optimizer="adamw")
            run([1], "whole")


def test_what_an_8_bit_optimizer_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the messages: float64, another name, and the extra to install where bitsandbytes is missing."""
    for name in EIGHT_BIT:
        with pytest.raises(ValueError, match=f"optimizer '{name}' cannot take large, which is float64; choose 'adamw'"):
            make_optimizer(name, problem(torch.float64), 1e-2, (0.9, 0.95), 0.0)
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ValueError, match=f"optimizer = '{name}' needs bitsandbytes: pip install 'matryoshka-pilot"):
            make_optimizer(name, problem(), 1e-2, (0.9, 0.95), 0.0)
    for call in (
        lambda: make_optimizer("adam", problem(), 1e-2, (0.9, 0.95), 0.0),
        lambda: TrainConfig(optimizer="adam"),
    ):
        with pytest.raises(ValueError, match=r"optimizer 'adam' is unknown; choose from \['adamw', 'adamw8bit', "):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pages_survive_a_checkpoint() -> None:
    """Oracle: bitsandbytes' own mark of a paged tensor, and the moments' bits before and after."""
    pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.randn(400, 300, device="cuda"))  # smaller ones are not paged
    optimizer = make_optimizer("paged_adamw8bit", {"weight": parameter}, 1e-2, (0.9, 0.95), 0.0)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other = make_optimizer("paged_adamw8bit", {"weight": parameter}, 1e-2, (0.9, 0.95), 0.0)
    other.load_state_dict(optimizer.state_dict())
    for key in ("state1", "state2"):
        before, after = optimizer.state[parameter][key], other.state[parameter][key]
        assert before.is_paged and after.is_paged and torch.equal(before.cpu(), after.cpu())
