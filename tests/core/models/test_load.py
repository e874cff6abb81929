"""core/models/load.py: oracles are transformers' Llama on the same folder, and messages written by hand."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.core.models.load import load_model, model_architecture, read_config
from matryoshka.core.models.weights import save_weights


def llama_folder(folder: Path, tied: bool) -> Path:
    """Save a tiny random Llama with transformers, the way checkpoints come."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_llama_gives_the_logits_of_transformers(tmp_path: Path, tied: bool) -> None:
    """Oracle: transformers' LlamaForCausalLM on the same sharded folder, logits of about 0.01.

    1e-7: transformers computes norms and angles in fp32 even in a float64 model.
    """
    transformers = pytest.importorskip("transformers")
    folder = llama_folder(tmp_path, tied)
    assert (folder / "model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ours = load_model(folder, torch.float64)
    assert not ours.training
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert ours.state_dict().keys() == theirs.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_dtype(tmp_path: Path, dtype: torch.dtype | None, expected: torch.dtype) -> None:
    """Oracle: by definition; None keeps the stored dtype, here float32."""
    model = load_model(llama_folder(tmp_path, tied=True), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_architecture_is_found_by_model_type(tmp_path: Path) -> None:
    """Oracle: by hand; a file in core/models is enough, anything else is refused with the list of the known ones."""
    module = model_architecture({"model_type": "llama"}, tmp_path)
    assert module.__name__ == "matryoshka.core.models.llama"
    assert {"q_proj", "down_proj"} <= set(module.LORA_TARGETS)
    for bad in (None, 3, "mistral_nemo", "__init__", "../load", "os", ["llama"], ""):
        with pytest.raises(ValueError, match=r"config\.json: model_type is .*expected one of \[.*'llama'"):
            model_architecture({"model_type": bad}, tmp_path)
    with pytest.raises(ValueError, match="model_type is None"):
        model_architecture({}, tmp_path)


def test_a_new_architecture_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand; a probe architecture whose buffer is not in the checkpoint is filled by its init_buffers."""
    (tmp_path / "probe.py").write_text(
        "import torch\n"
        "LORA_TARGETS = ()\n"
        "def read_config(data):\n"
        "    return data['size']\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self, size):\n"
        "        super().__init__()\n"
        "        self.norm = torch.nn.LayerNorm(size, bias=False)\n"
        "        self.register_buffer('table', torch.zeros(size), persistent=False)\n"
        "    def init_buffers(self, device):\n"
        "        self.table = torch.arange(3.0, device=device)\n"
    )
    monkeypatch.setenv("MATRYOSHKA_CONTROLLERS", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "probe", "size": 3}')
    save_weights({"norm.weight": torch.tensor([1.0, 2.0, 3.0])}, tmp_path)
    model = load_model(tmp_path)
    filled: Any = model
    assert filled.norm.weight.tolist() == [1.0, 2.0, 3.0]
    assert filled.table.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"expected one of \['gemma2', .*'probe'.*docs/controllers.md shows how"):
        model_architecture({"model_type": "gpt2"}, tmp_path)
    (tmp_path / "llama.py").write_text("LORA_TARGETS = ()\n")
    with pytest.raises(ValueError, match=r"computes model_type 'llama' already; rename one"):
        model_architecture({"model_type": "llama"}, tmp_path)
    monkeypatch.setenv("MATRYOSHKA_CONTROLLERS", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="MATRYOSHKA_CONTROLLERS: .*absent is no folder"):
        model_architecture({"model_type": "llama"}, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("LORA_TARGETS = (\n", r"own.py, line 1: '\(' was never closed"),
        ("LORA_TARGETS = ()\nimport no_such_package\n", "own.py cannot be imported: No module named 'no_such_package'"),
        ("LORA_TARGETS = ()\n", "own.py: it has no 'read_config'; docs/controllers.md says what"),
        ("LORA_TARGETS = ()\ndef read_config(data): return data\n", "own.py: it has no 'Model'; docs/controllers.md"),
        ("TARGETS = ()\n", "model_type is 'own', expected one of .*; let .*own.py define LORA_TARGETS: docs/contr"),
    ],
)
def test_what_is_wrong_with_a_file_of_ones_own_is_said(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: each message by hand, in place of a traceback."""
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("MATRYOSHKA_CONTROLLERS", str(tmp_path))
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        model_architecture({"model_type": "own"}, tmp_path)


def test_config_errors(tmp_path: Path) -> None:
    """Oracle: by hand; each message names the file, or the folder that is not there."""
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="config.json: no such file; expected the configuration"):
        load_model(tmp_path)
    path = tmp_path / "config.json"
    for broken, where in ((b'{\n"model_type": "llama",\n', "line 3"), (b'{"model_type": "\xff"}', "byte 17")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"config\.json: .*{where}"):
            load_model(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        load_model(tmp_path)
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: .*is missing"):
        load_model(tmp_path)
    path.write_text(json.dumps({"model_type": "llama", "name": "caf\u00e9"}, ensure_ascii=False))
    assert read_config(tmp_path) == {"model_type": "llama", "name": "caf\u00e9"}


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    """Oracle: by hand; one layer too many in the config is a missing key, never a random layer."""
    folder = llama_folder(tmp_path, tied=False)
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\."):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.1\."):
        load_model(folder)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
HOSTILE = {
    "ten million layers": ("num_hidden_layers", 10_000_000, "a whole number from 1 to 1000"),
    "layers as text": ("num_hidden_layers", "2", "num_hidden_layers is '2'"),
    "a width of 2^62": ("hidden_size", 2**62, "hidden_size is 4611686018427387904"),
    "a vocabulary of 2^40": ("vocab_size", 2**40, "vocab_size is"),
    "half a head": ("num_attention_heads", 1.5, "num_attention_heads is 1.5"),
    "heads true": ("num_attention_heads", True, "num_attention_heads is True"),
    "an epsilon as text": ("rms_norm_eps", "1e-05", "rms_norm_eps is '1e-05', expected a finite number above 0"),
    "an epsilon of 400 digits": ("rms_norm_eps", 10**400, "rms_norm_eps is .*expected a finite number above 0"),
    "a base that is a list": ("rope_theta", [10000.0], "config.json"),
    "scaling that is a list": ("rope_scaling", [1], "config.json"),
    "scaling that is a text": ("rope_scaling", "linear", "config.json"),
    "a factor as text": ("rope_scaling", {"rope_type": "linear", "factor": "2"}, "config.json"),
    "an original length below zero": (
        "rope_scaling", YARN | {"original_max_position_embeddings": -64}, "original_max_position_embeddings is -64"
    ),
    "an original length of 1e999": (
        "rope_scaling", YARN | {"original_max_position_embeddings": float("inf")}, "original_max_position_embeddings is"
    ),
    "a factor without a type": ("rope_scaling", {"factor": 2.0}, "'factor' is not known to rope_type 'default'"),
    "a setting of another type": (
        "rope_scaling", {"type": "linear", "factor": 2.0, "beta_fast": 32.0}, "'beta_fast' is not known to rope_type"
    ),
    "weights that are said to be quantised": (
        "quantization_config", {"quant_method": "awq"}, "quantization_config is .*use the unquantised one"
    ),
    "a scale of 1e300": ("rope_scaling", YARN | {"mscale": 1e300, "mscale_all_dim": 1.0}, "mscale is 1e\\+300"),
    "a factor of 5e-324": ("rope_scaling", {"rope_type": "linear", "factor": 5e-324}, "factor is 5e-324"),
    "a base whose logarithm is 0": ("rope_scaling", YARN | {"rope_theta": 1.0}, "config.json: .*division by zero"),
    "a type that is an object": ("model_type", {"a": 1}, "model_type is"),
    "a path as type": ("model_type", "../../lora/linear", "model_type is"),
    "ties as text": ("tie_word_embeddings", "true", "tie_word_embeddings is 'true'"),
    "an activation of 100,000 letters": ("hidden_act", "a" * 100_000, "hidden_act 'a"),
}


@pytest.mark.parametrize(("name", "value", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_configuration_is_refused_at_once(
    tiny_dir: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    """Oracle: one short message that names the file, before any layer is built."""
    config = json.loads((tiny_dir / "config.json").read_text()) | {name: value}
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config).replace("Infinity", "1e999"))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and len(str(caught.value)) < 1000


EQUAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ranks of the pretraining, which change nothing": ("llama", {"pretraining_tp": 2}, {}),
    "LongRoPE by its first name": (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    ),
    "windows without a size": (
        "qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None}, {},
    ),
    "a window that is null": (
        "gemma2", {"sliding_window": None}, {"layer_types": ["full_attention"] * 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "others"), EQUAL.values(), ids=EQUAL.keys())
def test_fields_that_mean_the_same(model_type: str, fields: dict[str, Any], others: dict[str, Any]) -> None:
    """Oracle: the configuration of other fields, as transformers reads the first ones (a null window is none)."""
    data = json.loads((Path(__file__).parent / "controllers" / f"{model_type}.json").read_text())["base"]
    read = model_architecture({"model_type": model_type}, Path()).read_config
    assert read({**data, **fields}) == read({**data, **others})


FAMILY_FIELDS = {
    "a window that is true": ("phi3", "sliding_window", True, "sliding_window is True"),
    "a window of half a token": ("mistral", "sliding_window", 2.5, "sliding_window is 2.5"),
    "a soft-cap of 1e300": ("gemma2", "final_logit_softcapping", 1e300, "final_logit_softcapping is 1e"),
    "windows from a layer in text": ("qwen2", "max_window_layers", "1", "max_window_layers is '1'"),
    "a switch of YaRN in text": (
        "llama", "rope_scaling", YARN | {"truncate": "false"}, "truncate is 'false', expected true or false"
    ),
    "a rotation wider than the head": ("phi3", "partial_rotary_factor", 2.0, "numbers are to be rotated"),
}


@pytest.mark.parametrize(("model_type", "name", "value", "message"), FAMILY_FIELDS.values(), ids=FAMILY_FIELDS.keys())
def test_a_field_of_one_family_is_checked(model_type: str, name: str, value: object, message: str) -> None:
    """Oracle: the message; without the check the model would compute with the value, or NaN."""
    data = json.loads((Path(__file__).parent / "controllers" / f"{model_type}.json").read_text())["base"]
    with pytest.raises(ValueError, match=message):
        model_architecture({"model_type": model_type}, Path()).read_config({**data, name: value})
