"""The contract of core/models/ and of a user's own folder (`--controller FOLDER`): each test is a clause of it.

Oracles: transformers in true float64, PEFT, and invariants; `controller_contract.py` says how. A failure names the
clause, the architecture and the configuration.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka.core.models.attention import Branches, Flex, Masked
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.layer_attention import Attend
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree
from matryoshka.core.models.varlen import Varlen
from matryoshka.core.models.weights import save_weights
from matryoshka.dpo.head import token_logps
from matryoshka.inference.kv_cache import CachedAttention, Prefix
from matryoshka.lora.files import load_adapter, merge, save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters
from matryoshka.lora.nf4 import dense_twin
from matryoshka.lora.quantized import QuantizedLinear, quantize_linears
from matryoshka.tests.core.models.controller_contract import (
    Architecture,
    Case,
    architectures,
    difference,
    float64,
    loss,
    relative,
    some_ids,
    unread_fields,
)
from matryoshka.tests.core.parallel import ranks

pytest.importorskip("transformers")

EXACT = 1e-10  # of the largest number; float64 sums in another order differ by some 1e-14


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--controller")
    found = architectures(Path(folder) if folder else None)
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", found, ids=[one.model_type for one in found])
    if "case" in metafunc.fixturenames:
        cases = [case for one in found for case in one.cases]
        metafunc.parametrize("case", cases, ids=map(str, cases))


def base(architecture: Architecture) -> Case:
    return architecture.cases[0]


def test_clause_1_it_exports_its_parts(architecture: Architecture) -> None:
    """Clause 1: a LanguageModel; LORA_TARGETS are its linear layers without the head; one attention record a layer."""
    model = base(architecture).ours()
    assert isinstance(model, LanguageModel), "clause 1: Model is no LanguageModel"
    linears = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = set(architecture.module.LORA_TARGETS)
    assert targets == linears - {"lm_head"}, "clause 1: LORA_TARGETS are not the linear layers of a block"
    layers = [layer.index for layer in model.config.attention]
    assert layers == list(range(model.config.num_hidden_layers)), "clause 1: attention needs one record a layer"
    assert len(model.blocks) == len(layers), "clause 1: blocks are not the layers"


def test_clause_2_logits_and_gradients_are_transformers(case: Case) -> None:
    """Clause 2: logits of 2 rows of 40 tokens, and the gradient of a loss in every weight, in float64."""
    found = difference(case)
    assert found.logits < EXACT, f"clause 2: logits differ by {found.logits:.1e}"
    assert found.gradients < EXACT, f"clause 2: gradients differ by {found.gradients:.1e}"


def test_clause_3_settings_are_computed_or_refused(architecture: Architecture) -> None:
    """Clause 3: each field of transformers' configuration is heeded or refused; the listed ones by name."""
    unread = sorted(unread_fields(architecture))
    assert not unread, f"clause 3: read_config neither heeds nor refuses {unread}"
    for name, value in architecture.settings.get("refused", {}).items():
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            architecture.module.read_config({**architecture.settings["base"], name: value})
        parts = [name, *(value if isinstance(value, dict) else ())]
        assert any(part in str(caught.value) for part in parts), f"clause 3: the error does not name {name}"
    with pytest.raises(ValueError, match="hidden_size"):
        fields = {key: value for key, value in architecture.settings["base"].items() if key != "hidden_size"}
        architecture.module.read_config(fields)


def test_clause_4_checkpoints_load_both_ways(architecture: Architecture, tmp_path: Path) -> None:
    """Clause 4: transformers' folder loads strictly here, and ours there without a missing or surplus key."""
    import transformers

    case = base(architecture)
    case.theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", torch.float64)
    ids = some_ids(case)
    with torch.no_grad():
        assert relative(model.logits(model(ids)), case.ours().logits(case.ours()(ids))) == 0, "clause 4: other weights"
    save_weights(model, tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    _, report = load(tmp_path / "ours", output_loading_info=True)
    problems = {kind: keys for kind, keys in report.items() if keys}
    assert not problems, f"clause 4: transformers reports {problems}"


def tree_and_sequences(vocabulary: int) -> tuple[TokenTree, list[Tokens]]:
    """Return a tree of 9 sequences: a header of 11 tokens, three questions, three answers each."""
    draws = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (count,), generator=draws).tolist())

    header, sequences = ids(11), []
    for question in (ids(6), ids(1), ids(4)):
        for length in (5, 2, 9):
            prompt, answer = (*header, *question), ids(length)
            sequences.append(Tokens((*prompt, *answer), (0,) * len(prompt) + (1,) * length))
    return build_tree(sequences), sequences


def test_clause_5_a_tree_equals_its_sequences(case: Case) -> None:
    """Clause 5: log-probs and gradients of a token tree are those of its sequences one at a time, windows included."""
    model = case.ours()
    weights = list(model.parameters())
    tree, sequences = tree_and_sequences(model.config.vocab_size)
    cap = model.config.final_logit_softcapping
    limits = [one.same_until for one in getattr(model.config, "rotary", ()) if one is not None and one.same_until]
    if min(limits, default=99) < 27:
        pytest.skip("these sequences are longer than the context that this configuration keeps to")

    def alone(sequence: Tokens) -> Tensor:
        ids = torch.tensor(sequence.ids)
        (at,) = torch.nonzero(torch.tensor(sequence.mask), as_tuple=True)
        return token_logps(model(ids[None])[0, at - 1], model.head_weight, ids[at], cap)

    expected = torch.cat([alone(sequence) for sequence in sequences])
    gradients = torch.autograd.grad(expected.sum(), weights)
    attends: list[Attend] = [Branches(tree), Masked(tree), Varlen(tree, torch.device("cpu"))]
    for attend in attends:
        hidden_TD = model(tree.ids_T[None], tree.positions_T[None], attend)[0]
        logps = token_logps(hidden_TD[tree.source_S], model.head_weight, tree.target_S, cap)
        name = type(attend).__name__
        assert relative(logps, expected) < EXACT, f"clause 5: log-probs of {name} differ"
        found = torch.autograd.grad(logps.sum(), weights)
        worst = max(relative(one, two) for one, two in zip(found, gradients, strict=True))
        assert worst < EXACT, f"clause 5: gradients of {name} differ by {worst:.1e}"


@pytest.mark.slow
def test_clause_5_on_flex_attention(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clause 5 for the backend of CUDA: flex attention under the tree's mask, uncompiled, equals the dense mask."""
    from matryoshka.core.models import attention

    monkeypatch.setattr(attention, "_compiled", lambda *_: attention.attend_flex)
    model = base(architecture).ours()
    tree, _ = tree_and_sequences(model.config.vocab_size)
    tree = tree.padded(attention.BLOCK)
    with torch.no_grad():
        one, two = (
            model(tree.ids_T[None], tree.positions_T[None], attend)
            for attend in (Flex(tree, torch.device("cpu")), Masked(tree))
        )
    assert relative(one, two) < EXACT, "clause 5: flex attention differs"


@pytest.mark.parametrize("prefix", [0, 13])
def test_clause_6_cached_decoding_is_the_full_pass(case: Case, prefix: int) -> None:
    """Clause 6: hidden states from the sampler's cache, token by token and beyond every window, are the full pass's."""
    model = case.ours()
    config, ids = model.config, some_ids(case, rows=2, tokens=28)
    ids = ids[:, : min(28, config.max_position_embeddings)]
    if prefix >= ids.shape[1]:
        pytest.skip("the context of this configuration is shorter than the prefix")
    ids[1, :prefix] = ids[0, :prefix]

    def cache(shared: Prefix | None, rows: int) -> CachedAttention:
        sizes = config.num_hidden_layers, rows, config.num_key_value_heads, config.head_dim
        return CachedAttention(shared, *sizes, model.head_weight)

    with torch.no_grad():
        expected, shared = model(ids), None
        if prefix:
            first = cache(None, 1)
            first.begin(prefix)
            model(ids[:1, :prefix], attend=first)
            keys, values = ([x[:, :, :prefix] for x in part] for part in (first.keys, first.values))
            shared = Prefix(tuple(ids[0, :prefix].tolist()), keys, values)
        tail, found, at = cache(shared, 2), [], prefix
        while at < ids.shape[1]:
            step = 4 if at == prefix else 1  # a prompt at once, then one token after the other
            new = ids[:, at : at + step]
            tail.begin(new.shape[1])
            positions = torch.arange(at, at + new.shape[1]).expand_as(new)
            found.append(model(new, positions, tail))
            tail.lengths_B = tail.lengths_B + new.shape[1]
            at += new.shape[1]
    worst = relative(torch.cat(found, 1), expected[:, prefix:])
    assert worst < EXACT, f"clause 6: cached hidden states differ by {worst:.1e}"


def add_random_adapter(model: LanguageModel, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Give the model an active adapter that changes its output, and return its parameters."""
    add_adapter(model, "policy", config, seed=0)
    parameters = trainable_parameters(model, "policy")
    with torch.no_grad():
        for index, weight in enumerate(parameters.values()):
            if weight.dim() == 2:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    set_active(model, "policy")
    return parameters


@pytest.mark.parametrize("config", [LoraConfig(8), LoraConfig(8, dora=True)], ids=["lora", "dora"])
def test_clause_7_adapters_are_pefts(architecture: Architecture, config: LoraConfig, tmp_path: Path) -> None:
    """Clauses 7, 8: an adapter on LORA_TARGETS, written here, gives the same logits in PEFT, read again, and merged."""
    import peft

    case, ids = base(architecture), some_ids(base(architecture))
    model = case.ours()
    config = dataclasses.replace(config, targets=tuple(architecture.module.LORA_TARGETS))
    add_random_adapter(model, config)
    save_adapter(model, "policy", tmp_path / "adapter", "base")
    with torch.no_grad():
        plain = case.ours()
        ours, without = model.logits(model(ids)), plain.logits(plain(ids))
        with float64():
            theirs = peft.PeftModel.from_pretrained(case.theirs, tmp_path / "adapter").eval()
            expected = theirs(ids).logits
            theirs.unload()
    assert relative(ours, without) > 1e-3, "clause 7: the adapter changes nothing"
    assert relative(ours, expected) < EXACT, f"clause 7: PEFT's logits differ by {relative(ours, expected):.1e}"
    other = case.ours()
    load_adapter(other, "read", tmp_path / "adapter")
    set_active(other, "read")
    with torch.no_grad():
        assert torch.equal(other.logits(other(ids)), ours), "clause 7: another adapter was read than was written"
        merge(model, "policy")
        worst = relative(model.logits(model(ids)), ours)
    assert worst < EXACT, f"clause 8: merged logits differ by {worst:.1e}"


def test_clause_9_bf16_errs_no_more_than_transformers(architecture: Architecture) -> None:
    """Clause 9: the root mean square error of bf16 logits against float64 ones of the same weights is at most 1.5 times
    that of eager transformers in bf16."""
    case = base(architecture)
    ids, ours = some_ids(case, rows=4), case.ours().to(torch.bfloat16)
    theirs = copy.deepcopy(case.theirs).to(torch.bfloat16)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items()}, strict=False)
    with torch.no_grad():
        low, reference = ours.logits(ours(ids)), theirs(ids).logits
        wide = ours.double()
        truth = wide.logits(wide(ids))
    errors = [(x.double() - truth).square().mean().sqrt().item() for x in (low, reference)]
    assert 0 < errors[0] <= 1.5 * errors[1], f"clause 9: error {errors[0]:.1e}, transformers' is {errors[1]:.1e}"


RANKS_CASES = (
    ranks.Case("dpo", preference=True, steps=2, batch_size=4),
    ranks.Case("shard sft", layout="shard"),
    ranks.Case("shard full sft", layout="shard", full=True, max_grad_norm=0.1),
)


@pytest.mark.slow
def test_clause_10_two_ranks_equal_one(architecture: Architecture, tmp_path: Path) -> None:
    """Clause 10: training on two ranks (gloo), adapters replicated, adapters over a sharded base and all weights
    sharded, gives the losses, gradients and weights of one process with the whole batch in one micro-batch."""
    folder = base(architecture).save(tmp_path / "model", vocab_size=256)
    found = ranks.launch(list(RANKS_CASES), 2, folder, tmp_path / "two")
    for case in RANKS_CASES:
        alone = dataclasses.replace(case, layout="replicate", micro_batch_tokens=10**6)
        ranks.check_equal(found[case.name], ranks.run(alone, folder, tmp_path / "one"), case.steps)


def test_clause_11_four_bits_compute_what_dense_weights_do(architecture: Architecture) -> None:
    """Clause 11: every linear layer but the head is packed; logits and gradients of an adapter over NF4 weights are
    those over the same weights made dense by the twin."""
    pytest.importorskip("bitsandbytes")
    case, found = base(architecture), []
    packed, plain, ids = case.ours(), case.ours(), some_ids(case)
    quantize_linears(packed)
    layers = {path: layer for path, layer in packed.named_modules() if isinstance(layer, QuantizedLinear)}
    assert {path.rpartition(".")[2] for path in layers} == set(architecture.module.LORA_TARGETS)
    with torch.no_grad():
        for path, layer in layers.items():
            plain.get_parameter(f"{path}.weight").copy_(dense_twin(layer.weight, layer.scales, torch.float64))
    for model in (packed, plain):
        parameters = list(add_random_adapter(model, LoraConfig(4)).values())
        logits = model.logits(model(ids))
        found.append((logits, *torch.autograd.grad(loss(logits, ids), parameters)))
    worst = max(relative(one, two) for one, two in zip(*found, strict=True))
    assert worst < EXACT, f"clause 11: logits or gradients differ by {worst:.1e}"
