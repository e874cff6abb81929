"""core/models/llama.py: oracles are transformers' LlamaForCausalLM, Meta's reference model, and equations by hand."""

import copy
import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka.core.models import language_model
from matryoshka.core.models.decoder import Config, RMSNorm
from matryoshka.core.models.llama import LORA_TARGETS, Model, read_config
from matryoshka.core.models.load import load_model
from matryoshka.tests.random_weights import randomise

BASE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one query head a group": {"num_key_value_heads": 4},
    "four query heads a group": {"num_key_value_heads": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim of its own": {"head_dim": 6},
    "rope_theta": {"rope_theta": 500000.0},
    "linear, old spelling": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, new spelling": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "llama3, old spelling": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama3, new spelling": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "llama3, theta at the top": {"rope_theta": 500000.0, "rope_parameters": LLAMA3},
}


def pair(config: dict[str, Any], dtype: torch.dtype) -> tuple[Model, Any]:
    """Return our model and transformers' of the same random weights."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(config))).eval()  # it edits dicts
    randomise(theirs, 0.3, 0.3, dtype=torch.float64)
    ours = Model(read_config(config))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype)


def rope_frequencies(config: Config) -> Tensor:
    (rotary,) = set(config.rotary)
    assert rotary is not None
    return rotary.frequencies()


def logits(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_transformers(variant: dict[str, Any]) -> None:
    """Oracle: transformers on 60 tokens, two rows, in float64.

    1e-5 of the largest logit, because transformers computes norms and angles in fp32 even in a float64 model.
    """
    config = {**BASE, **variant}
    ours, theirs = pair(config, torch.float64)
    ids = torch.randint(0, 67, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_rope_types_differ() -> None:
    """Oracle: the equations; a scaling that was read but not applied would leave the frequencies as they are."""
    plain = rope_frequencies(read_config(BASE))
    expected = torch.tensor([10000.0 ** (-i / 8) for i in (0, 2, 4, 6)], dtype=torch.float64)
    torch.testing.assert_close(plain, expected, rtol=1e-14, atol=0)
    linear = rope_frequencies(read_config({**BASE, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    torch.testing.assert_close(linear, plain / 4, rtol=1e-14, atol=0)
    # Original context 100: wavelengths 2 pi, 62.8, 628, 6283 are below 100 / 4, between, above 100, above.
    scaled = {**LLAMA3, "original_max_position_embeddings": 100}
    llama3 = rope_frequencies(read_config({**BASE, "rope_scaling": scaled}))
    smooth = (100 / (2 * math.pi * 10) - 1) / (4 - 1)
    middle = (1 - smooth) * 0.1 / 8 + smooth * 0.1
    torch.testing.assert_close(
        llama3, torch.tensor([1.0, middle, 0.01 / 8, 0.001 / 8], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_as_good_as_transformers(tied: bool) -> None:
    """Oracle: our float64 logits of the same bf16 weights; our error at most 1.5 times that of transformers' bf16."""
    ours, theirs = pair({**BASE, "hidden_size": 64, "tie_word_embeddings": tied}, torch.bfloat16)
    ids = torch.randint(0, 67, (4, 60), generator=torch.Generator().manual_seed(2))
    low = logits(ours, ids)
    assert low.dtype == torch.float32
    with torch.no_grad():
        reference = theirs(ids).logits.double()
    truth = logits(ours.double(), ids)
    ours_error, their_error = ((x.double() - truth).square().mean().sqrt().item() for x in (low, reference))
    assert 0 < ours_error <= 1.5 * their_error, (ours_error, their_error)


@pytest.mark.slow
def test_real_checkpoint(smollm2_dir: Path) -> None:
    """Oracle: transformers on SmolLM2-135M in float64; 1e-5 of the largest logit (transformers' fp32 norms)."""
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(ids).logits
    del theirs
    model = load_model(smollm2_dir, torch.float64)
    assert isinstance(model, Model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scaled", [False, True])
def test_meta_reference_model(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Meta's own Llama 3 (package llama-models), which rotates neighbours (2i, 2i + 1): q and k are permuted.

    Its tensor-parallel layers come from fairscale; on one rank they are a plain linear layer and embedding, which stand
    in for them here. 2e-4 of logits of order 10: both sides in fp32.
    """
    pytest.importorskip("llama_models")
    for name, names in _fairscale().items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llama_models.llama3.model", raising=False)
    meta = importlib.import_module("llama_models.llama3.model")
    monkeypatch.delitem(sys.modules, "llama_models.llama3.model")
    arguments = importlib.import_module("llama_models.llama3.args").ModelArgs
    theirs = meta.Transformer(
        arguments(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=67, multiple_of=16, norm_eps=1e-5,
            rope_theta=500000, use_scaled_rope=scaled, max_batch_size=2, max_seq_len=64,
        )  # fmt: skip
    ).eval()
    width = theirs.layers[0].feed_forward.w1.weight.shape[0]
    config = {**BASE, "intermediate_size": width, "rope_theta": 500000.0}
    if scaled:
        config["rope_scaling"] = {**LLAMA3, "original_max_position_embeddings": 8192}
    ours = Model(read_config(config))
    randomise(ours, 0.3, 0.3, dtype=torch.float64)
    weights = {_meta_name(name): _meta_rows(name, weight) for name, weight in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    ids = torch.randint(0, 67, (2, 60), generator=torch.Generator().manual_seed(3))
    expected = theirs(ids, 0).clone()
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=2e-4)


def _fairscale() -> dict[str, dict[str, Any]]:
    def linear(inputs: int, outputs: int, bias: bool, **ignored: Any) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=bias)

    def embedding(rows: int, size: int, init_method: Any) -> nn.Embedding:
        return nn.Embedding(rows, size)

    parallel = "fairscale.nn.model_parallel"
    initialize = types.ModuleType(f"{parallel}.initialize")
    vars(initialize)["get_model_parallel_world_size"] = lambda: 1
    layers = {"ColumnParallelLinear": linear, "RowParallelLinear": linear, "VocabParallelEmbedding": embedding}
    return {
        "fairscale": {}, "fairscale.nn": {}, parallel: {"initialize": initialize}, f"{parallel}.layers": layers,
        f"{parallel}.initialize": vars(initialize),
    }  # fmt: skip


def _meta_name(name: str) -> str:
    names = {
        "model.": "", "lm_head": "output", "embed_tokens": "tok_embeddings", "self_attn.": "attention.",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "mlp.": "feed_forward.", "gate_proj": "w1",
        "down_proj": "w2", "up_proj": "w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _meta_rows(name: str, weight: Tensor) -> Tensor:
    """Return q and k rows with the pairs (i, i + 4) of each head of 8 next to each other."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    return weight.view(-1, 2, 4, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_rms_norm_by_hand() -> None:
    """Oracle: weight * x / sqrt(mean(x^2) + eps) for x = (3, 4), eps = 0.5: the root of 13."""
    norm = RMSNorm(2, 0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    out = norm(torch.tensor([[[3.0, 4.0]]], dtype=torch.float64))
    expected = torch.tensor([[[6 / 13**0.5, -4 / 13**0.5]]], dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)


def test_a_head_in_low_precision_is_made_wide_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the product with the whole head in fp32; nothing as large as that head is made on the way."""
    monkeypatch.setattr(language_model, "HEAD_ROWS", 16)
    model = Model(read_config({**BASE, "hidden_size": 64}))
    randomise(model, 0.3, 0.3, dtype=torch.float64)
    model = model.bfloat16()
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    made: list[int] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend([out.numel()] if isinstance(out, Tensor) and out.dtype == torch.float32 else [])
            return out

    with torch.no_grad(), Watch():  # type: ignore[no-untyped-call]
        logits = model.logits(hidden)
    assert max(made) < 67 * 64 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.head_weight.float().T, rtol=0, atol=1e-6)


def test_float64_stays_float64() -> None:
    """Oracle: causality and float64 rounding. An fp32 step anywhere would leave errors above 1e-9."""
    model = Model(read_config({**BASE, "tie_word_embeddings": True}))
    randomise(model, 0.3, 0.3, dtype=torch.float64)
    model = model.double()
    ids = torch.randint(0, 67, (1, 40), generator=torch.Generator().manual_seed(4))
    hidden = model(ids)
    assert hidden.dtype == model.logits(hidden).dtype == torch.float64
    # Nudging one embedding by 1e-9 must move its logits smoothly: the difference quotient equals the derivative.
    direction = torch.randn(model.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(5)).double()
    weight = model.model.embed_tokens.weight

    def value(step: float) -> Tensor:
        nudged = {"model.embed_tokens.weight": weight.detach() + step * direction}
        out: Tensor = torch.func.functional_call(model, nudged, (ids,))
        return out.sum()

    with torch.no_grad():
        quotient = (value(1e-6) - value(-1e-6)) / 2e-6
    (gradient,) = torch.autograd.grad(model(ids).sum(), weight)
    torch.testing.assert_close(quotient, (gradient * direction).sum(), rtol=1e-7, atol=0)


def test_what_follows_changes_nothing_before() -> None:
    """Oracle: causality, to the bit of a float64 sum; and positions given equal positions left out."""
    model = Model(read_config(BASE)).double()
    randomise(model, 0.3, 0.3, dtype=torch.float64)
    ids = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(6))
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 67
    torch.testing.assert_close(logits(model, ids)[:, :7], logits(model, other)[:, :7], rtol=0, atol=1e-12)
    assert (logits(model, ids)[:, 7] - logits(model, other)[:, 7]).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, torch.arange(12).expand(2, 12)))
        # Rotary embedding is relative: the same shift for all tokens changes nothing.
        torch.testing.assert_close(model(ids), model(ids, torch.arange(100, 112).expand(2, 12)), rtol=0, atol=1e-10)


def test_names_are_the_checkpoints() -> None:
    """Oracle: by hand, the names of a Hugging Face Llama with a tied head; LoRA targets are linear layers in it."""
    model = Model(read_config({**BASE, "num_hidden_layers": 1, "tie_word_embeddings": True}))
    layer = "model.layers.0."
    attention = [f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    norms = [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"]
    assert set(model.state_dict()) == {"model.embed_tokens.weight", *attention, *mlp, *norms}
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(LORA_TARGETS) == linears


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; Llama is computed with 'silu'"),
        ({"rope_scaling": {"rope_type": "axial"}}, r"rope_type 'axial' is not supported; choose from \["),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic' needs 'factor'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' needs 'low_freq_factor'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "5 of a head's 5 numbers are to be rotated, expected an even number"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    """Oracle: the message, which names the setting."""
    with pytest.raises(ValueError, match=message):
        read_config({**BASE, **change})


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_field_is_named(name: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match=f"field '{name}' is missing"):
        read_config({key: value for key, value in BASE.items() if key != name})
