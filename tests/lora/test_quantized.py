"""lora/quantized.py: oracles are the model over the dense weights, gradcheck, and bitsandbytes' layers with peft."""

import json
import random
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.models.llama import LORA_TARGETS, Model, read_config
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.models.weights import save_weights
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import Preference
from matryoshka.lora.files import load_adapter, merge, save_adapter
from matryoshka.lora.functions import BaseFunction, LoraFunction
from matryoshka.lora.linear import LoraConfig, active, add_adapter, layers_with, set_active, trainable_parameters
from matryoshka.lora.nf4 import dense, dense_twin, quantize
from matryoshka.lora.quantized import QuantizedLinear, quantize_linears
from matryoshka.tests.random_weights import randomise, randomise_adapter

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[1, 5, 250, 3, 77, 8, 9, 100], [4, 4, 2, 201, 30, 31, 32, 33]])


def quantised(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    return load_model(folder, dtype, device, quantize_linears)


def dense_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the unquantised model with the values that the quantised one has, by the twin."""
    model, packed = load_model(folder, dtype, device), quantised(folder, dtype, device)
    with torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, QuantizedLinear):
                weight = dense_twin(module.weight, module.scales, dtype)
                model.get_submodule(path).get_parameter("weight").copy_(weight)
    return model


@pytest.fixture(scope="module")
def rows_of_64(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with rows of 64 and 128 numbers, its weights random.

    bitsandbytes 0.50.2 is an oracle for such rows alone: on CPUs with AVX-512 it makes others dense wrongly.
    """
    folder = tmp_path_factory.mktemp("rows-of-64")
    config = json.loads((tiny_dir / "config.json").read_text()) | {"hidden_size": 64, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    model = Model(read_config(config))
    randomise(model, 0.15)
    save_weights(model, folder)
    return folder


def adapted(model: Any, seed: int = 0, **config: Any) -> dict[str, nn.Parameter]:
    """Give the model an active adapter with random values and return its parameters."""
    add_adapter(model, "policy", LoraConfig(**{"rank": 3, **config}), seed)
    randomise_adapter(model, "policy", 0.2, seed, dtype=torch.float64)
    set_active(model, "policy")
    return trainable_parameters(model, "policy")


def outputs_and_gradients(model: Any, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    out = model.logits(model(IDS.to(model.head_weight.device)))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), list(parameters.values()))]


VARIANTS: dict[str, dict[str, Any]] = {
    "all": {}, "some": {"targets": ("q_proj", "v_proj", "up_proj")}, "dora": {"dora": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_computes_what_the_dense_weights_do(tiny_dir: Path, variant: dict[str, Any], dtype: torch.dtype) -> None:
    """Oracle: LoRA over the twin's dense weights, to the bit: the same products of the same numbers.

    Logits, gradients of the adapter (through layers with and without one), and the base with its adapter off.
    """
    models = [quantised(tiny_dir, dtype), dense_model(tiny_dir, dtype)]
    found = []
    for model in models:
        found.append(outputs_and_gradients(model, adapted(model, **variant)))
        with torch.no_grad(), active(model, None):
            found[-1].append(model(IDS))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(found[0][-1], load_model(tiny_dir, dtype)(IDS))


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_gradients_by_finite_differences(drop: float) -> None:
    """Oracle: gradcheck: float64 products over a base that is dequantised from four bits; two layers, one packed."""
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 6), (4, 6), (4,), (2, 6), (4, 2), (3, 6), (1, 6), (3, 1)]
    x, w, bias, a, b, other_w, other_a, other_b = (
        torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes
    )
    packed, scales = quantize(w)
    for tensor in (x, a, b, other_a, other_b):
        tensor.requires_grad_()

    def two(x: Tensor, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Any:
        layers = (packed, bias, a, b, other_w, None, other_a, other_b)
        return LoraFunction.apply(x, 0.7, drop, 3, (scales, None), *layers)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(two, (x, a, b, other_a, other_b))
    base: Any = BaseFunction.apply
    assert torch.autograd.gradcheck(lambda x: base(x, packed, scales, bias), x)


@pytest.mark.parametrize("with_adapter", [True, False])
def test_no_dense_weight_is_kept(tiny_dir: Path, with_adapter: bool) -> None:
    """Oracle: what autograd saves: the packed bytes, and no floating tensor as large as a weight that has no adapter.

    For one row of tokens everything else that is saved is smaller than the smallest weight.
    """
    model = quantised(tiny_dir)
    adapted(model, rank=1, targets=("q_proj",))
    set_active(model, "policy" if with_adapter else None)
    layer = model.model.layers[0]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(1, 2, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.self_attn.q_proj(x)
        layer.mlp.up_proj(x)
    packed = {layer.self_attn.q_proj.weight.data_ptr(), layer.mlp.up_proj.weight.data_ptr()}
    assert {tensor.data_ptr() for tensor in saved if tensor.dtype == torch.uint8} == packed
    assert max((tensor.numel() for tensor in saved if tensor.is_floating_point()), default=0) <= x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes_and_peft(rows_of_64: Path, dtype: torch.dtype) -> None:
    """Oracle: bitsandbytes' Linear4bit under peft's LoRA in a copy of the model: logits and every adapter gradient.

    fp32: 1e-5 of each tensor's norm, the order of the sums. bf16: as far from fp32 as they are, to a
    factor of 1.5: peft multiplies by the adapter in fp32, we round it to bf16.
    """
    peft = pytest.importorskip("peft")
    model, stored = quantised(rows_of_64, dtype), load_model(rows_of_64).state_dict()
    other: Any = load_model(rows_of_64, dtype)
    for path, module in list(other.named_modules()):
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            theirs = bitsandbytes.nn.Linear4bit(
                inputs, outputs, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
            )
            theirs.weight = bitsandbytes.nn.Params4bit(stored[f"{path}.weight"], quant_type="nf4", requires_grad=False)
            parent, _, leaf = path.rpartition(".")
            setattr(other.get_submodule(parent), leaf, theirs.to("cpu"))
    parameters = adapted(model, alpha=12.0)
    other.is_loaded_in_4bit = True
    other.train()  # on CPUs that multiply in bf16 its evaluation mode rounds inputs to bf16
    config = peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=list(LORA_TARGETS))
    injected = peft.inject_adapter_in_model(config, other)
    kinds = {type(m) for m in injected.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == {peft.tuners.lora.bnb.Linear4bit}
    named = dict(injected.named_parameters())
    their_parameters = {name: named[f"{name.removesuffix('.policy')}.default.weight"] for name in parameters}
    for name, weight in parameters.items():
        their_parameters[name].data = weight.detach().clone()
    got, expected = outputs_and_gradients(model, parameters), outputs_and_gradients(injected, their_parameters)
    if dtype == torch.float32:
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        return
    exact_model = quantised(rows_of_64)
    exact = outputs_and_gradients(exact_model, adapted(exact_model, alpha=12.0))
    errors = [
        sum(((tensor - wanted).norm() / wanted.norm()).item() for tensor, wanted in zip(found, exact, strict=True))
        for found in (got, expected)
    ]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_what_is_quantised(tiny_dir: Path) -> None:
    """Oracle: the list by hand. Embedding (the tied head) and norms keep their dtype; no state dict has scales."""
    model = quantised(tiny_dir, torch.bfloat16)
    packed = [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 2 * 7 and not [m for m in model.modules() if type(m) is nn.Linear]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name.removesuffix(".weight") for name, dtype in dtypes.items() if dtype == torch.uint8} == set(packed)
    assert {dtype for dtype in dtypes.values()} == {torch.uint8, torch.bfloat16}
    assert model.state_dict().keys() == load_model(tiny_dir).state_dict().keys()
    assert not any(model.get_parameter(f"{path}.weight").requires_grad for path in packed)
    for name in adapted(model):
        assert model.get_parameter(name).dtype == torch.float32


def test_an_untied_head_stays_dense() -> None:
    """Oracle: the type; the head is applied through its weight alone."""
    model: Any = nn.ModuleDict({"lm_head": nn.Linear(6, 4), "q_proj": nn.Linear(6, 4)})
    weight, bias = model["q_proj"].weight.detach().clone(), model["q_proj"].bias
    quantize_linears(model)
    assert type(model["lm_head"]) is nn.Linear and isinstance(model["q_proj"], QuantizedLinear)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize(weight)
    torch.testing.assert_close(model["q_proj"](x), x @ dense(packed, scales, torch.float32).T + bias)


def test_loading_holds_one_tensor_at_a_time(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: weak references: when a weight is packed, those before are gone; bytes are those of the whole."""
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_dir, folder)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    pack = QuantizedLinear.pack

    def watched(self: QuantizedLinear, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(weight_OI))
        return pack(self, weight_OI, dtype)

    monkeypatch.setattr(QuantizedLinear, "pack", watched)
    model = load_model(folder, None, convert=quantize_linears)
    assert alive == [0] * 14
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed, scales = quantize(stored[f"{path}.weight"])
            assert torch.equal(module.weight, packed) and all(map(torch.equal, module.scales, scales))
            assert module.dtype == torch.bfloat16


def test_a_checkpoint_that_does_not_fit_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the message names the checkpoint's shapes, not those of the bytes; and integers stay refused."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 62}))
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(64, 32\), the model expects \(62, 32\)"):
        quantised(folder)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(62, 32, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gate_proj.weight is stored as U8"):
        quantised(folder)


def test_adapters_travel_to_the_unquantised_model(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the file's tensors; merged there it is W + scale B A by hand. Over four bits `merge` is refused."""
    model = quantised(tiny_dir)
    parameters = adapted(model)
    save_adapter(model, "policy", tmp_path / "adapter", "base")
    plain = load_model(tiny_dir)
    load_adapter(plain, "policy", tmp_path / "adapter")
    for name, parameter in parameters.items():
        assert torch.equal(plain.get_parameter(name), parameter)
    layer = layers_with(plain, "policy")[3]
    expected = layer.weight + layer.configs["policy"].scale * layer.lora_B["policy"] @ layer.lora_A["policy"]
    merge(plain, "policy")
    merged = plain.state_dict()["model.layers.0.self_attn.o_proj.weight"]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="merge: the base under adapter 'policy' is quantised; load the model without"):
        merge(model, "policy")
    assert len(layers_with(model, "policy")) == 14


def preferences(count: int) -> list[Item]:
    draws = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draws.randrange(256) for _ in range(length))

    items = []
    for index in range(count):
        prompt = ids(10)
        sides = (prompt + ids(draws.randint(1, 6)) for _ in range(2))
        items.append(Item(tuple(Tokens(s, (0,) * 10 + (1,) * (len(s) - 10)) for s in sides), f"example {index}"))
    return items


def dpo(model: Any, folder: Path, **config: Any) -> list[dict[str, float]]:
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    set_active(model, "policy")
    objective = Preference()
    settings = TrainConfig(**{"learning_rate": 1e-2, "epochs": 3, "batch_size": 4, "micro_batch_tokens": 60, **config})
    parameters, reference = trainable_parameters(model, "policy"), partial(active, model, None)
    arguments = preferences(8), settings, objective, token_logps, folder
    return list(train(model, parameters, *arguments, TrainContext(reference, objective.first_loss)))


@pytest.mark.parametrize("make", [quantised, dense_model])
def test_training_starts_at_ln_2_and_learns(tiny_dir: Path, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """Oracle: invariants: policy and reference are equal at first, to the check in the loop; then the loss falls.

    Over the dense weights the losses are the same bits.
    """
    rows = dpo(make(tiny_dir), tmp_path / "run")
    other = dpo(quantised(tiny_dir), tmp_path / "other")
    assert rows[0]["margin"] == 0.0 and rows[-1]["loss"] < rows[0]["loss"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in other]


def test_every_activation_policy_gives_the_same_bits(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: policy "none"; packed weights pass through the hooks that recompute."""
    losses = {
        policy: [row["loss"] for row in dpo(quantised(tiny_dir), tmp_path / policy, activations=policy)]
        for policy in ("none", "selective", "full")
    }
    assert losses["selective"] == losses["none"] == losses["full"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the same run over the dense weights in bf16; the sums' order differs by one bf16 rounding at most."""
    losses = [
        [row["loss"] for row in dpo(make(tiny_dir, torch.bfloat16, "cuda"), tmp_path / make.__name__)]
        for make in (quantised, dense_model)
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-2, atol=1e-3)
