"""lora/files.py: oracles are peft itself, reading our folders and writing its own, and W + scale B A by hand."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import save_weights
from matryoshka.lora import files
from matryoshka.lora.files import adapter_hash, adapter_tensors, load_adapter, merge, read_config, save_adapter
from matryoshka.lora.linear import LoraConfig, LoraLinear, add_adapter, layers_with, set_active
from matryoshka.tests.random_weights import randomise_adapter

IDS = torch.tensor([[1, 5, 250, 3, 77, 8, 9, 100], [4, 4, 2, 201, 30, 31, 32, 33]])
CONFIG = LoraConfig(rank=3, alpha=6.0, dropout=0.25, targets=("q_proj", "v_proj", "down_proj"))


def adapted(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, config: LoraConfig = CONFIG) -> Any:
    """Return the model of `folder` with a random adapter "policy", active."""
    model: Any = load_model(folder, dtype)
    add_adapter(model, "policy", config, seed=0)
    randomise_adapter(model, "policy", 0.3, seed, dtype=torch.float64)
    set_active(model, "policy")
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.logits(model(IDS))
    return out


VARIANTS = [(), ("rslora",), ("dora",), ("rslora", "dora")]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant) or "lora")
def test_peft_reads_ours(tiny_dir: Path, tmp_path: Path, variant: tuple[str, ...]) -> None:
    """Oracle: peft over transformers' Llama gives our logits; 1e-5 of the largest, for the fp32 norms in theirs."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = replace(CONFIG, rslora="rslora" in variant, dora="dora" in variant)
    model = adapted(tiny_dir, torch.float64, config=config)
    save_adapter(model, "policy", tmp_path / "adapter", str(tiny_dir))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    with torch.no_grad():
        expected = theirs(IDS).logits
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(IDS).logits, expected, atol=1e-2)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    loaded = theirs.peft_config["default"]
    assert (loaded.r, loaded.lora_alpha, loaded.lora_dropout, loaded.bias) == (3, 6.0, 0.25, "none")
    assert (loaded.use_rslora, loaded.use_dora) == ("rslora" in variant, "dora" in variant)
    merge(model, "policy")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant) or "lora")
def test_we_read_pefts(tiny_dir: Path, tmp_path: Path, variant: tuple[str, ...]) -> None:
    """Oracle: the logits of the peft model that wrote the folder."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)
    flags = {f"use_{name}": True for name in variant}
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate_proj"], **flags)
    theirs = peft.get_peft_model(base, config)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=draws))
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    model: Any = load_model(tiny_dir, torch.float64)
    load_adapter(model, "theirs", tmp_path)
    set_active(model, "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    targets = ("gate_proj", "o_proj", "q_proj")
    assert read_config(tmp_path) == LoraConfig(2, 8.0, 0.0, targets, "rslora" in variant, "dora" in variant)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trip(tiny_dir: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Oracle: the tensors themselves, to the bit; through a bf16 file, rounded once. Several adapters live together."""
    model = adapted(tiny_dir)
    save_adapter(model, "policy", tmp_path / "adapter", "base", dtype)
    load_adapter(model, "again", tmp_path / "adapter")
    again = adapter_tensors(model, "again")
    assert len(again) == 2 * 3 * 2
    for key, tensor in adapter_tensors(model, "policy").items():
        expected = tensor if dtype is None else tensor.to(dtype).float()
        assert again[key].dtype == torch.float32
        assert torch.equal(again[key], expected), key
    assert layers_with(model, "again")[0].configs["again"] == LoraConfig(3, 6.0, 0.25, tuple(sorted(CONFIG.targets)))
    mode = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "adapter" / "adapter_config.json").stat().st_mode


def test_keys_are_pefts(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the layout by hand. A plain adapter's configuration says nothing of variants, so its hash stays."""
    save_adapter(adapted(tiny_dir), "policy", tmp_path / "adapter", "base")
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (3, 64)
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (32, 3)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [files.CONFIG, files.WEIGHTS]
    names = set(json.loads((tmp_path / "adapter" / files.CONFIG).read_text()))
    assert names == {
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
        "bias", "fan_in_fan_out", "inference_mode",
    }  # fmt: skip
    save_adapter(adapted(tiny_dir, config=replace(CONFIG, dora=True)), "policy", tmp_path / "dora", "base")
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "dora" / files.WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"] == (32,)
    assert len(shapes) == 2 * 3 * 3
    assert set(json.loads((tmp_path / "dora" / files.CONFIG).read_text())) == names | {"use_dora"}


def test_merging_keeps_the_function(tiny_dir: Path) -> None:
    """Oracle: the unmerged forward pass; 2e-5 of logits of order 10, fp32 sums in another order."""
    model = adapted(tiny_dir)
    expected = logits(model)
    merge(model, "policy")
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


def test_a_merged_model_is_a_plain_checkpoint(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: save, load, same logits to the bit, and the names of the checkpoint it came from."""
    model = adapted(tiny_dir)
    merge(model, "policy")
    save_weights(model, tmp_path)
    shutil.copy(tiny_dir / "config.json", tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_bfloat16_base_is_merged_in_fp32(tiny_dir: Path) -> None:
    """Oracle: W + scale B A in float64, rounded once to bf16; a sum in bf16 would differ in thousands of entries."""
    model = adapted(tiny_dir, torch.bfloat16)
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            delta = 2.0 * module.lora_B["policy"].double() @ module.lora_A["policy"].double()
            expected[f"{path}.weight"] = module.weight.double() + delta
    merge(model, "policy")
    merged = model.state_dict()
    assert len(expected) == 6
    wrong = total = 0
    for name, wide in expected.items():
        assert merged[name].dtype == torch.bfloat16
        wrong += int((merged[name] != wide.to(torch.bfloat16)).sum())
        total += wide.numel()
    # fp32 rounds before bf16 does: a tie falls the other way about once in 2^16 entries.
    assert wrong <= total // 1000


def test_merging_drops_other_adapters_and_keeps_biases() -> None:
    """Oracle: by hand; only the named adapter goes into the weight."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4).double(), "v_proj": nn.Linear(4, 4).double()})
    for name, targets in (("policy", ("q_proj",)), ("other", ("q_proj", "v_proj"))):
        add_adapter(model, name, LoraConfig(rank=2, alpha=2.0, targets=targets), seed=0)
        for layer in layers_with(model, name):
            nn.init.normal_(layer.lora_B[name], generator=torch.Generator().manual_seed(1))
    q, v = model["q_proj"], model["v_proj"]
    assert isinstance(q, LoraLinear) and isinstance(v, LoraLinear)
    expected = q.weight + q.lora_B["policy"] @ q.lora_A["policy"]
    merge(model, "policy")
    merged_q, merged_v = model["q_proj"], model["v_proj"]
    assert type(merged_q) is type(merged_v) is nn.Linear
    torch.testing.assert_close(merged_q.weight.data, expected.data, rtol=0, atol=1e-15)
    assert torch.equal(merged_v.weight, v.weight)
    assert q.bias is not None and torch.equal(merged_q.bias, q.bias)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / files.CONFIG
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**data, **changes}.items() if value is not ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / files.WEIGHTS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / files.CONFIG).unlink(), FileNotFoundError, "adapter_config.json: no such file"),
        (lambda f: (f / files.WEIGHTS).unlink(), FileNotFoundError, "adapter_model.safetensors: no such file"),
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no such file"),
        (lambda f: (f / files.CONFIG).write_text("{"), ValueError, "adapter_config.json: malformed JSON"),
        (lambda f: (f / files.CONFIG).write_bytes(b"\xff"), ValueError, "adapter_config.json: not UTF-8"),
        (lambda f: edit_config(f, r=...), ValueError, "adapter_config.json: r is missing; expected an integer"),
        (lambda f: edit_config(f, use_dora=True), ValueError, "lora_magnitude_vector has shape None"),
        (lambda f: edit_config(f, target_modules=["q_porj"]), ValueError, "target 'q_porj' matches no linear layer"),
        (lambda f: edit_config(f, r=4), ValueError, r"has shape \(3, .*\), but r is 4 in adapter_config.json"),
        (lambda f: edit_weights(f, lambda t: t.pop(KEY)), ValueError, r"q_proj.lora_A.weight has shape None"),
        (lambda f: edit_weights(f, lambda t: t.update(extra=t[KEY].clone())), ValueError, "extra has shape"),
        (lambda f: edit_weights(f, lambda t: t.update({KEY: torch.ones(3, 9)})), ValueError, r"shape \(3, 9\)"),
        (lambda f: os.truncate(f / files.WEIGHTS, 1000), ValueError, "not a readable safetensors file"),
        (lambda f: os.truncate(f / files.WEIGHTS, 0), ValueError, "not a readable safetensors file"),
    ],
)
def test_damaged_folders_are_refused(
    tiny_dir: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    """Oracle: the message; and a model that refused an adapter does not have it, so that a whole one can follow."""
    folder = tmp_path / "adapter"
    source = adapted(tiny_dir)
    save_adapter(source, "policy", folder, "base")
    shutil.copytree(folder, tmp_path / "whole")
    damage(folder)
    model: Any = load_model(tiny_dir)
    with pytest.raises(error, match=message):
        load_adapter(model, "policy", folder)
    load_adapter(model, "policy", tmp_path / "whole")
    set_active(model, "policy")
    assert torch.equal(logits(model), logits(source))


# Name of the input -> what adapter_config.json says besides, and what the error must name.
REFUSED = {
    "pissa rewrites the base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "pissa with iterations": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    "olora rewrites the base": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "corda rewrites the base": ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights is 'corda'"),
    "loftq rewrites the base": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "lora_ga rewrites the base": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "mica is another layer": ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'"),
    "an initialisation to come": ({"init_lora_weights": "new"}, "init_lora_weights is 'new'"),
    "a number as initialisation": ({"init_lora_weights": 1}, "init_lora_weights is 1"),
    "null as initialisation": ({"init_lora_weights": None}, "init_lora_weights is None"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = {'q_proj': 4} is not supported"),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern = "),
    "some layers alone": ({"layers_to_transform": [0]}, "layers_to_transform = "),
    "one layer alone": ({"layers_to_transform": 1}, "layers_to_transform = 1"),
    "the first layer alone": ({"layers_to_transform": 0}, "layers_to_transform = 0"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = "),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
    "modules left out": ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "exclude_modules = "),
    "biases, all": ({"bias": "all"}, "bias is 'all'"),
    "biases, adapted layers": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "a bias of the adapter": ({"lora_bias": True}, "lora_bias = True"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    "parameters by name": ({"target_parameters": ["mlp.experts"]}, "target_parameters = "),
    "embeddings of tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices = "),
    "megatron layers": ({"megatron_config": {"a": 1}}, "megatron_config = "),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = "),
    "qalora": ({"use_qalora": True}, "use_qalora = True"),
    "block-diagonal LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = "),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config = "),
    "kasa": ({"kasa_config": {"beta": 1.0}}, "kasa_config = "),
    "velora": ({"velora_config": {"scale": 1.0}}, "velora_config = "),
    "monteclora": ({"monteclora_config": {"num_samples": 1}}, "monteclora_config = "),
    "tied weights kept": ({"ensure_weight_tying": True}, "ensure_weight_tying = True"),
    "layers by full names, one left out": (
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]}, "the model wants",
    ),
    "ranks by EVA": (
        {"init_lora_weights": "eva", "rank_pattern": {"layers.0.self_attn.q_proj": 5}}, "rank_pattern = ",
    ),
    "weights that were merged, in PEFT 0.2": ({"merge_weights": True}, "merge_weights = True"),
    "parts of a fused layer, in PEFT 0.2": ({"enable_lora": [True, False, True]}, "enable_lora = "),
    "Unsloth's pattern": (
        {"target_modules": r"(?:.*?(?:language|text).*?(?:q_proj|k_proj))"}, "target_modules is .*expected a list",
    ),
    "MLX's configuration": ({"peft_type": ..., "fine_tune_type": "lora"}, "peft_type is missing"),
    "adalora": ({"peft_type": "ADALORA", "init_r": 12}, "peft_type is 'ADALORA'"),
    "a type in small letters": ({"peft_type": "lora"}, "peft_type is 'lora'"),
    "bias null": ({"bias": None}, "bias is None"),
    "rslora null": ({"use_rslora": None}, "use_rslora is None"),
    "an unknown switch": ({"use_tomorrows_lora": True}, "use_tomorrows_lora = True is not supported"),
    "an unknown number": ({"gate": 0.5}, "gate = 0.5 is not supported"),
    "another kind of adapter": ({"peft_type": "IA3"}, "peft_type is 'IA3' .*expected 'LORA'"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "targets as a pattern": ({"target_modules": ".*proj"}, "target_modules is '.*proj' .*expected a list of strings"),
    "targets as 'all-linear'": ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
    "no targets": ({"target_modules": []}, r"target_modules is \[\]"),
    "targets null": ({"target_modules": None}, "target_modules is None"),
    "rank as text": ({"r": "4"}, r"r is '4' \(str\); expected an integer of at least 1"),
    "rank with a point": ({"r": 3.0}, "r is 3.0"),
    "rank true": ({"r": True}, "r is True"),
    "rank zero": ({"r": 0}, "r is 0"),
    "rank of ten digits": ({"r": 10**10}, r"has shape \(3, .*\), but r is 10000000000 in adapter_config.json"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16' .*expected a finite number"),
    "alpha zero": ({"lora_alpha": 0}, r"adapter_config.json: lora_alpha is 0 \(int\); expected a number above 0"),
    "alpha below zero": ({"lora_alpha": -4.0}, "adapter_config.json: lora_alpha is -4.0"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is None"),
    "alpha beyond float": ({"lora_alpha": 10**400}, "lora_alpha is "),
    "dropout null": ({"lora_dropout": None}, "lora_dropout is None .*expected a finite number"),
    "dropout of one": ({"lora_dropout": 1.0}, r"adapter_config.json: .*lora_dropout.*\[0, 1\)"),
    "rslora as text": ({"use_rslora": "false"}, "use_rslora is 'false' .*expected true or false"),
    "dora as a number": ({"use_dora": 1}, "use_dora is 1 "),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_key_that_changes_the_computation_is_refused_by_name(
    tiny_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message, which names the file and the key; the model stays without the adapter, so merge fails."""
    save_adapter(adapted(tiny_dir), "policy", tmp_path / "adapter", "base")
    edit_config(tmp_path / "adapter", **changes)
    model: Any = load_model(tiny_dir)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, "policy", tmp_path / "adapter")
    with pytest.raises(ValueError, match="the model has no adapter 'policy'"):
        merge(model, "policy")


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}, "layers_pattern": "layers", "qalora_group_size": 32},
        {"target_modules": ["self_attn.q_proj", "v_proj", "mlp.down_proj"]},
        {"target_modules": [f"model.layers.{i}.{name}" for i in (0, 1) for name in (
            "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]},
        {"enable_lora": None, "merge_weights": False, "auto_mapping": {"unsloth_fixed": True}, "task_type": None},
        {"tomorrow": None, "later": False, "rank_pattern": {}, "revision": "main", "modules_to_save": []},
    ],
)
def test_a_key_that_changes_nothing_is_read_over(tiny_dir: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Oracle: the logits of the same folder without the key."""
    source = adapted(tiny_dir)
    save_adapter(source, "policy", tmp_path / "adapter", "base")
    edit_config(tmp_path / "adapter", **changes)
    model: Any = load_model(tiny_dir)
    load_adapter(model, "policy", tmp_path / "adapter")
    set_active(model, "policy")
    assert torch.equal(logits(model), logits(source))


def test_every_key_of_the_installed_peft_is_computed_or_refused(tmp_path: Path) -> None:
    """Oracle: peft's own list of settings: each that our lists do not name is refused once it is on."""
    peft = pytest.importorskip("peft")
    peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_config(tmp_path) == LoraConfig(8, 8.0, 0.0, ("q_proj",))
    named = {*files.COMPUTED, *files.DESCRIPTIVE, *files.NO_EFFECT_ALONE, "bias", "init_lora_weights"}
    others = json.loads((tmp_path / files.CONFIG).read_text()).keys() - named
    assert len(others) >= 15
    for key in others:
        edit_config(tmp_path, **{key: True})
        with pytest.raises(ValueError, match=f"{key} = True is not supported"):
            read_config(tmp_path)
        edit_config(tmp_path, **{key: None})


BASES: dict[str, tuple[str, bool]] = {
    "the same folder": ("{model}", False),
    "a copy under another name": ("{copy}", False),
    "other weights": ("{other}", True),
    "a hub id with the folder's name": ("Owner/Model", False),
    "a folder of that name on another machine": ("/elsewhere/model", False),
    "a model of another name": ("Owner/Model-Instruct", True),
    "no name": ("", False),
}


@pytest.mark.parametrize(("named", "is_told"), BASES.values(), ids=BASES.keys())
def test_a_base_that_the_adapter_was_not_trained_over_is_told(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str, is_told: bool
) -> None:
    """Oracle: by definition: weights decide where both models are here, else names do. The adapter is loaded."""
    places = {name: tmp_path / name for name in ("model", "copy", "other")}
    for place in places.values():
        shutil.copytree(tiny_dir, place)
    tensors = load_file(places["other"] / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, places["other"] / "model.safetensors")
    save_adapter(adapted(tiny_dir), "policy", tmp_path / "adapter", named.format(**places))
    model = load_model(places["model"])
    load_adapter(model, "policy", tmp_path / "adapter", base=places["model"])
    assert ("the adapter was trained over" in caplog.text) is is_told
    assert layers_with(model, "policy")


def fill(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[KEY].view(-1)[1:2].fill_(value)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "not a number": (fill(float("nan")), "has numbers that are not finite"),
    "infinite": (fill(float("-inf")), "has numbers that are not finite"),
    "integers": (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), "is stored as torch.int8"),
    "true and false": (lambda t: t.update({KEY: t[KEY] > 0}), "is stored as torch.bool"),
    "eight bits": (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), "is stored as torch.float8_e4m3fn"),
    "no dimension": (lambda t: t.update({KEY: torch.tensor(1.0)}), r"has shape \(\), but r is 3"),
}


@pytest.mark.parametrize(("edit", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_are_no_adapter_are_refused(
    tiny_dir: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """Oracle: the message names the file and the tensor."""
    save_adapter(adapted(tiny_dir), "policy", tmp_path / "adapter", "base")
    edit_weights(tmp_path / "adapter", edit)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {KEY} {message}"):
        load_adapter(load_model(tiny_dir), "policy", tmp_path / "adapter")


def test_a_folder_is_replaced_whole_or_not_at_all(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the hash of the old adapter. A save that fails leaves it, and nothing else; a good one replaces it."""
    folder = tmp_path / "adapter"
    save_adapter(adapted(tiny_dir), "policy", folder, "base")
    before = adapter_hash(folder)
    other = adapted(tiny_dir, seed=1)
    with monkeypatch.context() as patch:

        def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            path.write_bytes(b"half a file")
            raise OSError("no space left on device")

        patch.setattr("matryoshka.core.models.weights.save_file", full)
        with pytest.raises(OSError, match="no space left"):
            save_adapter(other, "policy", folder, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert adapter_hash(folder) == before
    with monkeypatch.context() as patch:

        def interrupt(source: Path, target: Path, rename: Any = os.rename) -> None:
            if source.name.endswith(".tmp"):
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr("matryoshka.core.files._exchange", lambda one, other: False)
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(other, "policy", folder, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert adapter_hash(folder) == before
    (folder / "stale.txt").touch()
    save_adapter(other, "policy", folder, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == [files.CONFIG, files.WEIGHTS]
    assert adapter_hash(folder) != before


def test_the_hash_is_of_the_content(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: invariant; equal adapters have equal hashes, another setting or another weight another one."""
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        save_adapter(adapted(tiny_dir, seed=seed), "policy", tmp_path / name, "base")
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    edit_config(tmp_path / "four", lora_alpha=7.0)
    hashes = [adapter_hash(tmp_path / name) for name in ("one", "two", "three", "four")]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert all(len(value) == 16 for value in hashes)
