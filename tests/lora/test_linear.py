"""lora/linear.py: oracles are gradcheck, peft on the same weights, and the equation W + scale B A by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka.core.models.llama import LORA_TARGETS
from matryoshka.core.models.load import load_model
from matryoshka.lora.files import merge
from matryoshka.lora.functions import LoraFunction
from matryoshka.lora.linear import (
    LoraConfig,
    LoraLinear,
    active,
    add_adapter,
    copy_adapter,
    layers_with,
    remove_adapter,
    set_active,
    target_names,
    trainable_parameters,
)
from matryoshka.tests.random_weights import randomise_adapter

ALL = LORA_TARGETS
IDS = torch.tensor([[1, 5, 250, 3, 77, 8, 9, 100], [4, 4, 2, 201, 30, 31, 32, 33]])


def filled(model: nn.Module, name: str, seed: int = 0) -> None:
    """Give adapter `name` random values in all of its parameters."""
    randomise_adapter(model, name, 0.2, seed, dtype=torch.float64)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.logits(model(ids))
    return out


def matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]


def lora(x: Tensor, *layers: Tensor | None, drop: float = 0.0) -> tuple[Tensor, ...]:
    """Return LoraFunction's outputs at scale 0.7 and dropout seed 3; layers: weight, bias, A, B of each."""
    scales = (None,) * (len(layers) // 4)
    return LoraFunction.apply(x, 0.7, drop, 3, scales, *layers)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_gradients_by_finite_differences(leading: tuple[int, ...], drop: float) -> None:
    """Oracle: torch's gradcheck in float64, for one layer and for two together, any shape, with and without dropout."""
    x, w, bias, a, b = matrices((*leading, 5), (4, 5), (4,), (2, 5), (4, 2))
    other_w, other_a, other_b = matrices((3, 5), (1, 5), (3, 1))
    for tensor in (x, a, b, other_a, other_b):
        tensor.requires_grad_()

    def one(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return lora(x, w, bias, a, b, drop=drop)

    def two(x: Tensor, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> tuple[Tensor, ...]:
        return lora(x, w, bias, a, b, other_w, None, other_a, other_b, drop=drop)

    assert torch.autograd.gradcheck(one, (x, a, b))
    assert torch.autograd.gradcheck(two, (x, a, b, other_a, other_b))


def test_second_derivatives_are_refused() -> None:
    """Oracle: the message; a number that leaves out what is kept for the first derivative would be wrong."""
    x, w, a, b = matrices((3, 5), (4, 5), (2, 5), (4, 2))
    x.requires_grad_()
    (y,) = lora(x, w, None, a, b)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def test_value_by_hand() -> None:
    """Oracle: x (W + scale B A)^T + bias, one product with the merged matrix; a layer beside it changes nothing."""
    x, w, bias, a, b = matrices((3, 5), (4, 5), (4,), (2, 5), (4, 2))
    (y,) = lora(x, w, bias, a, b)
    torch.testing.assert_close(y, x @ (w + 0.7 * b @ a).T + bias, rtol=0, atol=1e-13)
    first, second = lora(x, w, bias, a, b, 2 * w, None, b.T @ w, b)
    torch.testing.assert_close(first, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(second, x @ (2 * w + 0.7 * b @ b.T @ w).T, rtol=0, atol=1e-13)


def test_the_frozen_weight_gets_no_gradient() -> None:
    """Oracle: by definition, though weight and bias ask for one; and an input that wants none costs none."""
    x, w, bias, a, b = matrices((3, 5), (4, 5), (4,), (2, 5), (4, 2))
    for tensor in (w, bias, a, b):
        tensor.requires_grad_()
    lora(x, w, bias, a, b)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is None and bias.grad is None and x.grad is None
    assert a.grad is not None and b.grad is not None
    x.requires_grad_()
    lora(x, w, bias, a.detach(), b.detach())[0].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, (w + 0.7 * b @ a).sum(0).expand(3, 5), rtol=0, atol=1e-13)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_what_is_kept_for_the_backward_pass(drop: float) -> None:
    """Oracle: by hand; x and the matrices as they are, and the ranks of both layers for each row. No mask, no copy."""
    x, w, a, b = matrices((3, 5), (4, 5), (2, 5), (4, 2))
    for tensor in (x, a, b):
        tensor.requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora(x, w, None, a, b, w, None, a, b, drop=drop)
    for tensor in (x, w, a, b):
        del kept[tensor.data_ptr()]
    assert [tuple(tensor.shape) for tensor in kept.values()] == [(3, 2 + 2)]


def test_layers_that_read_the_same_are_computed_together(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same model layer by layer, float64, 1e-12.

    Calls by hand, for two blocks: qkv, o, gate and up, down together, or all seven apart. Apart where dropout is drawn,
    and where one of the layers carries no adapter.
    """
    model = load_model(tiny_dir, torch.float64)
    add_adapter(model, "policy", LoraConfig(rank=3), seed=0)
    filled(model, "policy")
    parameters = trainable_parameters(model, "policy")
    set_active(model, "policy")
    calls: list[int] = []
    apply = LoraFunction.apply

    def counted(x: Tensor, *rest: Any) -> Any:
        calls.append((len(rest) - 4) // 4)
        return apply(x, *rest)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(LoraFunction, "apply", counted)

    def run() -> tuple[list[int], list[Tensor]]:
        calls.clear()
        out = model.logits(model(IDS))
        grads = torch.autograd.grad(out.square().sum(), list(parameters.values()))
        return list(calls), [out, *grads]

    together, shared = run()
    with monkeypatch.context() as patch:
        patch.setattr(LoraLinear, "forward_together", lambda self, x, layers: None)
        apart, alone = run()
    assert together == [3, 1, 2, 1] * 2 and apart == [1] * 7 * 2
    for got, expected in zip(shared, alone, strict=True):  # float64 sums in another order, up to 4e-12 on some CPUs
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)

    add_adapter(model, "some", LoraConfig(rank=2, targets=("q_proj", "v_proj", "gate_proj", "up_proj")), seed=0)
    add_adapter(model, "drop", LoraConfig(rank=2, dropout=0.5), seed=0)
    for name, expected_calls in (("some", [1, 1, 2]), ("drop", [1] * 7)):
        calls.clear()
        with active(model, name):
            model.train()
            logits(model)
        assert calls == expected_calls * 2, name
    calls.clear()
    with active(model, "drop"):
        logits(model.eval())
    assert calls == [3, 1, 2, 1] * 2


def test_a_new_adapter_is_the_identity(tiny_dir: Path) -> None:
    """Oracle: invariant, to the bit: B = 0 adds exact zeros. A is in the interval of its documented distribution."""
    model = load_model(tiny_dir)
    base = logits(model)
    add_adapter(model, "policy", LoraConfig(rank=4), seed=1)
    set_active(model, "policy")
    assert torch.equal(logits(model), base)
    layers = layers_with(model, "policy")
    assert len(layers) == 2 * 7
    for layer in layers:
        bound = layer.weight.shape[1] ** -0.5
        assert 0.5 * bound < layer.lora_A["policy"].abs().max().item() <= bound
        assert layer.lora_A["policy"].shape == (4, layer.weight.shape[1])
        assert layer.lora_A["policy"].dtype == torch.float32


def test_the_seed_decides_the_start(tiny_dir: Path) -> None:
    """Oracle: invariant; equal seeds give equal matrices, another seed others."""
    starts = []
    for seed in (1, 1, 2):
        model = load_model(tiny_dir)
        add_adapter(model, "policy", LoraConfig(rank=4), seed)
        starts.append(layers_with(model, "policy")[3].lora_A["policy"].detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


VARIANTS: dict[str, dict[str, Any]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
VARIANTS["both"] = {"use_rslora": True, "use_dora": True}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj")])
def test_equals_peft(tiny_dir: Path, targets: tuple[str, ...], variant: dict[str, Any]) -> None:
    """Oracle: peft's own layers in a second copy of the model: logits, every gradient, merged weights; float64, 1e-12.

    All of DoRA's parameters are random, its lengths too: at their start value the norm would cancel out.
    """
    peft = pytest.importorskip("peft")
    model, other = load_model(tiny_dir, torch.float64), load_model(tiny_dir, torch.float64)
    flags = {key.removeprefix("use_"): value for key, value in variant.items()}
    add_adapter(model, "policy", LoraConfig(rank=3, alpha=12.0, targets=targets, **flags), seed=0)
    filled(model, "policy")
    set_active(model, "policy")
    parameters = trainable_parameters(model, "policy")
    config = peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=list(targets), **variant)
    theirs = peft.inject_adapter_in_model(config, other)
    their_parameters = {name: weight for name, weight in theirs.named_parameters() if ".lora_" in name}

    def their_name(name: str) -> str:
        return f"{name.removesuffix('.policy')}.default.weight"

    assert {their_name(name) for name in parameters} == set(their_parameters)
    for name, weight in parameters.items():
        their_parameters[their_name(name)].data = weight.detach().clone()
    both: list[Any] = [model, theirs]
    got, expected = (m.logits(m(IDS)) for m in both)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).double()
    for out in (got, expected):
        (out * probe).sum().backward()
    for name, weight in parameters.items():
        wanted = their_parameters[their_name(name)].grad
        assert weight.grad is not None and wanted is not None
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-12, msg=name)
    merge(model, "policy")
    merged = model.state_dict()
    compared = 0
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            torch.testing.assert_close(merged[f"{name}.weight"], module.base_layer.weight.data, rtol=0, atol=1e-12)
            compared += 1
    assert compared == 2 * len(targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_adapter_is_the_identity(tiny_dir: Path, dtype: torch.dtype) -> None:
    """Oracle: invariant, to the bit: m is the norm that it is divided by. A row of zeros stays one."""
    model = load_model(tiny_dir, dtype)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight")[3] = 0
    base = logits(model)
    add_adapter(model, "policy", LoraConfig(rank=4, dora=True), seed=1)
    set_active(model, "policy")
    assert torch.equal(logits(model), base)
    copy_adapter(model, "policy", "reference")
    with active(model, "reference"):
        assert torch.equal(logits(model), base)
    assert len(trainable_parameters(model, "policy")) == 2 * 7 * 3
    for name in ("policy", "reference"):
        remove_adapter(model, name)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("bias", [False, True])
def test_dora_by_hand(bias: bool) -> None:
    """Oracle: m (W + s B A) / ||W + s B A|| by rows, the sum written out. The bias is not scaled, the norm exact."""
    layer = LoraLinear(nn.Linear(5, 4, bias=bias).double())
    a, b, x = matrices((2, 5), (4, 2), (3, 5))
    layer.attach("policy", LoraConfig(rank=2, alpha=3.0, targets=("q_proj",), dora=True), a, b)
    whole = layer.weight + 1.5 * b @ a
    torch.testing.assert_close(layer.lora_magnitude_vector["policy"], whole.norm(dim=1), rtol=0, atol=1e-13)
    with torch.no_grad():
        layer.lora_magnitude_vector["policy"].copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    layer.active = "policy"
    expected = x @ (layer.lora_magnitude_vector["policy"] / whole.norm(dim=1) * whole.T)
    torch.testing.assert_close(layer(x), expected + (layer.bias if bias else 0), rtol=0, atol=1e-13)


def test_the_scales_by_hand() -> None:
    """Oracle: alpha / r = 32 / 16, and alpha / sqrt(r) = 32 / 4."""
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def test_dropout_acts_on_the_adapter_in_training_only(tiny_dir: Path) -> None:
    """Oracle: invariants. A new layer takes over its model's mode; the base's part is never dropped; E[dropout] = x."""
    model = load_model(tiny_dir)
    base = logits(model)
    add_adapter(model, "policy", LoraConfig(rank=4, dropout=0.5), seed=0)
    set_active(model, "policy")
    model.train()
    assert torch.equal(logits(model), base)  # B is 0: all of the difference is the adapter's
    filled(model, "policy")
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.eval()), logits(model))

    layer = LoraLinear(nn.Linear(6, 3, bias=False).double())
    wrapped = nn.ModuleDict({"q_proj": nn.Linear(6, 3, bias=False).double()}).eval()
    add_adapter(wrapped, "policy", LoraConfig(rank=2, dropout=0.5, targets=("q_proj",)), seed=0)
    assert layer.training and not wrapped["q_proj"].training
    filled(wrapped, "policy")
    set_active(wrapped, "policy")
    x = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = wrapped["q_proj"](x)
        wrapped.train()
        mean = wrapped["q_proj"](x.expand(40000, 6)).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02)


def test_bias_stays_and_is_frozen() -> None:
    """Oracle: x (W + scale B A)^T + b."""
    model = nn.ModuleDict({"q_proj": nn.Linear(5, 4).double()})
    add_adapter(model, "policy", LoraConfig(rank=2, alpha=1.0, targets=("q_proj",)), seed=0)
    filled(model, "policy")
    layer = layers_with(model, "policy")[0]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with active(model, "policy"):
        y = layer(x)
    assert layer.bias is not None and not layer.bias.requires_grad
    merged = layer.weight + 0.5 * layer.lora_B["policy"] @ layer.lora_A["policy"]
    torch.testing.assert_close(y, x @ merged.T + layer.bias, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.delta("policy"), merged - layer.weight, rtol=0, atol=1e-13)


def test_adapters_off_is_the_base_to_the_bit(tiny_dir: Path) -> None:
    """Oracle: the logits of the untouched model. `active` nests and restores the earlier state, after errors too."""
    model = load_model(tiny_dir)
    base = logits(model)
    add_adapter(model, "policy", LoraConfig(rank=4), seed=0)
    filled(model, "policy")
    assert torch.equal(logits(model), base)  # nothing is active until it is asked for
    set_active(model, "policy")
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-2)
    with pytest.raises(KeyError), active(model, None):
        assert torch.equal(logits(model), base)
        with active(model, "policy"):
            assert torch.equal(logits(model), adapted)
        assert torch.equal(logits(model), base)
        raise KeyError
    assert torch.equal(logits(model), adapted)
    remove_adapter(model, "policy")
    assert torch.equal(logits(model), base)


def test_layers_wrapped_later_know_what_is_active(tiny_dir: Path) -> None:
    """Oracle: invariant; an adapter on further layers does not disturb which one is active."""
    model = load_model(tiny_dir)
    add_adapter(model, "policy", LoraConfig(rank=2, targets=("v_proj",)), seed=0)
    filled(model, "policy")
    set_active(model, "policy")
    adapted = logits(model)
    add_adapter(model, "other", LoraConfig(rank=2, targets=("q_proj",)), seed=1)
    with active(model, None):
        pass
    assert torch.equal(logits(model), adapted)


def test_the_reference_is_a_frozen_copy(tiny_dir: Path) -> None:
    """Oracle: invariant; equal at first, and a step of the policy leaves it where it was."""
    model = load_model(tiny_dir)
    add_adapter(model, "policy", LoraConfig(rank=4), seed=0)
    filled(model, "policy")
    copy_adapter(model, "policy", "reference")
    parameters = trainable_parameters(model, "policy")
    set_active(model, "reference")
    before = logits(model)
    set_active(model, "policy")
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    model.logits(model(IDS)).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with active(model, "reference"):
        assert torch.equal(logits(model), before)
    for layer in layers_with(model, "reference"):
        assert not layer.lora_A["reference"].requires_grad and layer.lora_A["reference"].grad is None


def test_trainable_parameters_freezes_the_rest(tiny_dir: Path) -> None:
    """Oracle: names and sizes by hand: rank 4, hidden 32, keys 16, feed-forward 64, two layers."""
    model = load_model(tiny_dir)
    add_adapter(model, "policy", LoraConfig(rank=4), seed=0)
    add_adapter(model, "policy2", LoraConfig(rank=4, targets=("q_proj",)), seed=0)
    parameters = trainable_parameters(model, "policy")
    q, kv, mlp = 32 + 32, 2 * (32 + 16), 3 * (32 + 64)
    assert sum(p.numel() for p in parameters.values()) == 2 * 4 * (q + kv + q + mlp)
    assert "model.layers.1.self_attn.q_proj.lora_A.policy" in parameters
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    set_active(model, "policy")
    model.logits(model(IDS)).sum().backward()  # type: ignore[no-untyped-call]
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == set(parameters)
    assert target_names(model, "policy2") == ["q_proj"]
    assert list(trainable_parameters(model, "policy2")) == [
        f"model.layers.{layer}.self_attn.q_proj.lora_{matrix}.policy2" for layer in (0, 1) for matrix in "AB"
    ]


def test_bfloat16_base_keeps_fp32_adapters(tiny_dir: Path) -> None:
    """Oracle: by definition; gradients reach the fp32 matrices in fp32."""
    model = load_model(tiny_dir, torch.bfloat16)
    add_adapter(model, "policy", LoraConfig(rank=4), seed=0)
    filled(model, "policy")
    parameters = trainable_parameters(model, "policy")
    set_active(model, "policy")
    hidden = model(IDS)
    assert hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    for parameter in parameters.values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.any()


def test_errors(tiny_dir: Path) -> None:
    """Oracle: messages; and a refused adapter leaves the model as it was."""
    model = load_model(tiny_dir)
    with pytest.raises(ValueError, match=r"target 'q_porj' matches no linear layer; choose from \['down_proj', "):
        add_adapter(model, "policy", LoraConfig(targets=("q_proj", "q_porj")), seed=0)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    with pytest.raises(ValueError, match=r"the model has no adapter 'policy'; it has \[\]"):
        set_active(model, "policy")
    add_adapter(model, "policy", LoraConfig(targets=("v_proj",)), seed=0)
    with pytest.raises(ValueError, match="adapter 'policy' exists already"):
        add_adapter(model, "policy", LoraConfig(targets=("q_proj", "v_proj")), seed=0)
    assert target_names(model, "policy") == ["v_proj"]
    with pytest.raises(ValueError, match="adapter 'a.b' exists already or has a dot in its name"):
        add_adapter(model, "a.b", LoraConfig(), seed=0)
    for call in (remove_adapter, trainable_parameters, set_active):
        with pytest.raises(ValueError, match=r"no adapter 'other'; it has \['policy'\]"):
            call(model, "other")
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="alpha 0.0 must be above 0"):
        LoraConfig(alpha=0.0)
    with pytest.raises(ValueError, match=r"dropout 1.0 must lie in \[0, 1\)"):
        LoraConfig(dropout=1.0)


def test_the_head_carries_no_adapter() -> None:
    """Oracle: the head is applied by its weight, so an adapter there would be ignored: it is refused instead."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9, bias=False)})
    with pytest.raises(ValueError, match=r"target 'lm_head' matches no linear layer; choose from \['q_proj'\]"):
        add_adapter(model, "policy", LoraConfig(targets=("lm_head",)), seed=0)
