"""memory.py: oracles are the allocator's own peaks, bytes counted by saved-tensor hooks, and sums by hand."""

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka.benchmarks.measure import peak_bytes
from matryoshka.core.models.activations import POLICIES, CompiledBlocks, activations, run_block
from matryoshka.core.models.attention import blocks, tree_attention
from matryoshka.core.models.llama import Model, read_config
from matryoshka.core.models.load import model_architecture
from matryoshka.core.models.norm_rope_swiglu import rope_tables
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree
from matryoshka.core.training import memory
from matryoshka.core.training import train as training
from matryoshka.core.training.memory import GIB, Footprint, free_bytes, plan_memory, state_bytes
from matryoshka.core.training.packing import Item, batch_at
from matryoshka.core.training.train import TrainConfig, train
from matryoshka.dpo.head import extra_bytes, token_logps
from matryoshka.dpo.objectives import SFT
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters
from matryoshka.lora.quantized import quantize_linears

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
LONG = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 12}
WINDOWS = WIDE | {"sliding_window": 50, "query_pre_attn_scalar": 32}  # five layers with, one without
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": WINDOWS | {"model_type": "gemma3_text"},
    "gemma2": WINDOWS | {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
    "phi3": WIDE | {"model_type": "phi3", "pad_token_id": 0},
    "olmo2": WIDE | {"model_type": "olmo2"},
}
LLAMA3_8B = read_config(
    {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
)


def trained(config: dict[str, Any], dtype: torch.dtype, **lora: Any) -> tuple[Any, Any]:
    """Return a random model with an adapter, and its trainable parameters, which have their gradients already."""
    architecture = model_architecture({"model_type": "llama", **config}, Path("tiny"))
    model = architecture.Model(architecture.read_config(config))
    draws = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.05, generator=draws)
    model = model.to(dtype)
    add_adapter(model, "policy", LoraConfig(**{"rank": 8, **lora}), seed=0)
    set_active(model, "policy")
    parameters = trainable_parameters(model, "policy")
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return model, parameters


def forest(header: int, questions: int, question: int, answers: int, answer: int, vocabulary: int) -> TokenTree:
    """Return a header shared by all, questions under it, answers under those; answers are scored."""
    draws = random.Random(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(vocabulary) for _ in range(count))

    top, sequences = some(header), []
    for _ in range(questions):
        prompt = (*top, *some(question))
        sequences += [Tokens((*prompt, *some(answer)), (0,) * len(prompt) + (1,) * answer) for _ in range(answers)]
    return build_tree(sequences)


def step(model: Any, tree: TokenTree, policy: str) -> None:
    """Run forward and backward as training does."""
    device = model.head_weight.device
    with activations(policy):
        attend = tree_attention(tree, device)
        hidden = model(tree.ids_T.to(device)[None], tree.positions_T.to(device)[None], attend)[0]
        picked = hidden[tree.source_S.to(device)]
        del hidden
        loss = token_logps(picked, model.head_weight, tree.target_S.to(device)).sum()
        del picked
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("config", "dtype", "lora"),
    [
        (WIDE, torch.float32, {}),
        (WIDE, torch.bfloat16, {}),
        (WIDE, torch.float32, {"dora": True, "rank": 32}),
        (LONG, torch.float64, {}),
        *((family, torch.float32, {}) for family in FAMILIES.values()),
    ],
    ids=["wide", "wide bf16", "dora", "deep float64", *FAMILIES],
)
def test_predicted_peaks_are_the_allocators(config: dict[str, Any], dtype: torch.dtype, lora: dict[str, Any]) -> None:
    """Oracle: what torch's CPU allocator says that it held at the highest point of a step; within 10%.

    A host has nowhere to move tensors to: there "offload" takes what "full" takes.
    """
    model, _ = trained(config, dtype, **lora)
    tree = forest(200, 3, 30, 4, 20, config["vocab_size"])
    tokens, scored = len(tree.ids_T), len(tree.source_S)
    assert tokens == 200 + 3 * (30 + 4 * 19)  # the last token of an answer is only predicted
    windows = {layer.window for layer in model.config.attention}
    scores = max((b.stop - b.start) * len(b.keys_K) for window in windows for b in blocks(tree, window))
    footprint = Footprint(model.config, dtype, lora.get("rank", 8), lora.get("dora", False))
    head = extra_bytes(scored, config["hidden_size"], config["vocab_size"], dtype, gpu=False, training=True)
    measured = {}
    for policy in POLICIES:
        step(model, tree, policy)
        measured[policy] = peak_bytes(lambda policy=policy: step(model, tree, policy), "cpu")  # type: ignore[misc]
        predicted = footprint.step_bytes(tokens, "full" if policy == "offload" else policy, head, scores)
        assert predicted == pytest.approx(measured[policy], rel=0.1), policy
    assert measured["none"] > 1.1 * measured["selective"] > 2 * measured["full"]


@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=["lora", "dora"])
def test_kept_bytes_are_those_that_the_graph_holds(lora: dict[str, Any]) -> None:
    """Oracle: saved-tensor hooks around the blocks, each storage counted once, parameters and tables left out; exact.

    LoRA's products through the rank are in it: 7 x 8 numbers a token.
    """
    model, _ = trained(WIDE, torch.float64, **lora)
    tree = forest(20, 2, 5, 3, 6, 300)
    tokens = len(tree.ids_T)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    tables = rope_tables(tree.positions_T[None], model.config.rotary[0].frequencies(), torch.float64)
    attend = tree_attention(tree, CPU)
    x = torch.zeros(1, tokens, 96, dtype=torch.float64).normal_().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = x
        for layer, block in zip(model.config.attention, model.model.layers, strict=True):
            out = run_block(block, out, *tables, attend, layer)
    for tensor in (*model.parameters(), *tables):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    small = 0
    if lora:  # DoRA's scales, an output's width a projection: they do not grow with the tokens
        sizes = {tokens * size * 8 for size in (1, 8, 16, 24, 32, 96, 256)}
        scales = [pointer for pointer, size in held.items() if size not in sizes]
        small = sum(held.pop(pointer) for pointer in scales)
        assert small < 0.1 * sum(held.values())
    kept = Footprint(model.config, torch.float64, 8, bool(lora)).kept_bytes(tokens, "none")
    assert sum(held.values()) == kept


def test_llama3_8b_by_hand() -> None:
    """Oracle: sums by hand, bf16, no adapter: per token and block 4 D + 2 N H + 2 G H + 3 F numbers and two in fp32."""
    footprint = Footprint(LLAMA3_8B, torch.bfloat16)
    none = 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336) + 8
    assert footprint.kept_bytes(1000, "none") == 32 * 1000 * none
    assert footprint.kept_bytes(1000, "selective") == 32 * 1000 * (none - 2 * (2 * 4096 + 14336))
    assert footprint.kept_bytes(1000, "full") == 32 * 1000 * 2 * 4096
    assert footprint.kept_bytes(1000, "offload") == 0
    # About 3 MB a token without recomputation: 19,500 tokens in 59 GB.
    assert 19500 * 32 * (none - 2 * (2 * 4096 + 14336)) / 59e9 == pytest.approx(1.0, abs=0.02)
    # The step: SwiGLU's gradient on top, or the head where it takes more; rotary tables of 2 x 128 fp32 numbers.
    beyond = 2 * (2 * 14336 + 4096) + 4 * 2 * 128
    assert footprint.step_bytes(1000, "none") == 1000 * (32 * none + beyond)
    assert footprint.step_bytes(1000, "none", 10**9) == 1000 * (32 * none + 1024 + 3 * 2 * 4096) + 10**9
    for policies in zip(POLICIES, POLICIES[1:], strict=False):
        more, less = (footprint.step_bytes(1000, policy) for policy in policies)
        assert more > less
    with pytest.raises(ValueError, match="policy 'auto' is unknown; choose from"):
        footprint.kept_bytes(1, "auto")


def test_auto_takes_the_fastest_that_fits() -> None:
    """Oracle: by hand; with room for a policy's need it is taken, with a byte less the next leaner one."""
    model, parameters = trained(WIDE, torch.float32)
    tight = plan_memory("auto", model, parameters, 100, free=GIB)
    state = state_bytes(parameters)
    assert state == 3 * 4 * sum(p.numel() for p in parameters.values())
    needs = [tight.peak_bytes(4000, policy) for policy in POLICIES[:-1]]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 3
    for need, policy, leaner in zip(needs, POLICIES, ("selective", "full", None), strict=False):
        free = (need + state) / (1 - memory.MARGIN)
        assert plan_memory("auto", model, parameters, 4000, free=int(free) + 2).policy_for(4000) == policy
        if leaner is not None:
            plan = plan_memory("auto", model, parameters, 4000, free=int(free) - 2)
            assert plan.policy_for(4000) == leaner and plan.policy_for(10) == "none"
    message = r"a micro-batch of 4000 tokens needs 0\.\d\d GiB even with activations = 'full', 0\.\d\d GiB are free"
    with pytest.raises(ValueError, match=message):
        plan_memory("auto", model, parameters, 4000, free=int((needs[-1] + state) / (1 - memory.MARGIN)) - 2)
    assert plan_memory("none", model, parameters, 10**9, free=0).policy_for(10**9) == "none"  # asked for by name


@pytest.mark.parametrize(("model_type", "all_have_windows"), [("mistral", True), ("gemma3_text", False)])
def test_windows_lower_the_plan_where_every_layer_has_one(model_type: str, all_have_windows: bool) -> None:
    """Oracle: the blocks that attention makes of one long chain, and the plan of the same model without windows."""
    ids = tuple(index % 300 for index in range(3001))
    tree = build_tree([Tokens(ids, (0,) * 3000 + (1,))])
    plans = []
    for window in (50, 5000):
        model, parameters = trained(WINDOWS | {"model_type": model_type, "sliding_window": window}, torch.float32)
        plans.append(plan_memory("full", model, parameters, 3000, free=GIB))
        windows = {layer.window for layer in model.config.attention}
        most = max(len(block.keys_K) for one in windows for block in blocks(tree, one if one != 5000 else None))
        assert plans[-1].most_keys(3000) >= most > 0.9 * plans[-1].most_keys(3000)
    with_windows, without = (plan.peak_bytes(3000, "full") for plan in plans)
    assert with_windows < without if all_have_windows else with_windows == without


def test_a_quantised_base_by_hand() -> None:
    """Oracle: the allocator's peak within 10%, the largest weight being dense for a while; and moments in 8 bits.

    Few tokens and a wide feed-forward layer: the dense weight, 256 x 2048 fp32 numbers, is a third of the peak.
    """
    pytest.importorskip("bitsandbytes")
    config = WIDE | {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2}
    model, plain = trained(config, torch.float32)
    assert plan_memory("none", model, plain, 10, free=GIB).scratch == 0
    packed = Model(read_config(config))
    quantize_linears(packed)
    add_adapter(packed, "policy", LoraConfig(rank=8), seed=0)
    set_active(packed, "policy")
    parameters = trainable_parameters(packed, "policy")
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    plan = plan_memory("none", packed, parameters, 10, free=GIB, optimizer="adamw8bit")
    assert plan.scratch == 256 * 2048 * 4
    tree = forest(60, 2, 10, 2, 10, config["vocab_size"])
    tokens = len(tree.ids_T)
    scores = max((block.stop - block.start) * len(block.keys_K) for block in blocks(tree))
    head = extra_bytes(len(tree.source_S), 256, config["vocab_size"], torch.float32, gpu=False, training=True)
    step(packed, tree, "none")
    measured = peak_bytes(lambda: step(packed, tree, "none"), "cpu")
    predicted = plan.footprint.step_bytes(tokens, "none", head, scores) + plan.scratch
    assert predicted == pytest.approx(measured, rel=0.1)
    assert GIB * (1 - memory.MARGIN) - plan.room == pytest.approx(state_bytes(parameters, "adamw8bit"), abs=1)
    expected = 0
    for parameter in parameters.values():
        numbers = parameter.numel()
        small = 4 * numbers if numbers < 4096 else numbers + 4 * math.ceil(numbers / 256)
        expected += 4 * numbers + 2 * small
    assert state_bytes(parameters, "adamw8bit") == expected < state_bytes(parameters) / 1.5


def test_full_fine_tuning_has_no_rank(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: by hand; and the plan is logged."""
    model, parameters = trained(WIDE, torch.float32, dora=True, rank=5)
    assert plan_memory("auto", model, parameters, 10).footprint == Footprint(model.config, torch.float32, 5, True)
    weights = {name: p for name, p in model.named_parameters() if "lora" not in name}
    with caplog.at_level(logging.INFO, "matryoshka.core.training.memory"):
        plan = plan_memory("selective", model, weights, 10, compile_blocks=True)
    assert plan.footprint == Footprint(model.config, torch.float32) and plan.compiled is not None
    assert "activations: selective for 10 tokens, 0." in caplog.text


def test_free_memory_of_this_machine() -> None:
    """Oracle: the value lies between the memory that a running test needs and the memory of the machine."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 50 * 2**20 < free_bytes(CPU) < total


def test_training_runs_each_micro_batch_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: training without any recomputation, to the bit; and, by hand, which policy each length gets.

    There is room for 70 tokens that are kept whole. A run that was broken off goes on under another policy.
    """
    draws = random.Random(3)
    items = []
    for length in (6, 90, 7, 80):
        ids = tuple(draws.randrange(300) for _ in range(length))
        items.append(Item((Tokens(ids, (0, 0) + (1,) * (length - 2)),), f"{length}"))
    config = TrainConfig(learning_rate=1e-2, batch_size=1, micro_batch_tokens=100, activations="none", save_every=1)

    def run(config: TrainConfig, folder: str, steps: int) -> dict[str, Tensor]:
        model, parameters = trained(WIDE, torch.float32)
        training = train(model, parameters, items, config, SFT(), token_logps, tmp_path / folder)
        for _ in range(steps):
            next(training)
        training.close()  # type: ignore[attr-defined]
        return {name: weight.detach() for name, weight in parameters.items()}

    expected = run(config, "none", 4)
    model, parameters = trained(WIDE, torch.float32)
    room = plan_memory("auto", model, parameters, 1, free=GIB).peak_bytes(70, "none") + state_bytes(parameters)
    monkeypatch.setattr(training, "free_bytes", lambda device: int(room / (1 - memory.MARGIN)) + 2)
    used: dict[int, str] = {}

    def noted(policy: str, compiled: CompiledBlocks | None = None) -> Any:
        used[len(used)] = policy
        return activations(policy, compiled)

    monkeypatch.setattr(memory, "activations", noted)
    auto = run(replace(config, activations="auto"), "auto", 4)
    lengths = [len(batch_at(items, step, 1, config.seed)[1][0].sequences[0].ids) for step in range(4)]
    assert [used[step] for step in range(4)] == ["none" if length <= 70 else "selective" for length in lengths]
    run(replace(config, activations="full"), "resumed", 2)
    resumed = run(replace(config, activations="selective"), "resumed", 2)
    for name, weight in expected.items():
        assert torch.equal(auto[name], weight) and torch.equal(resumed[name], weight), name
    with pytest.raises(ValueError, match=r"activations 'most' is unknown; choose from \['auto', 'none', 'selective',"):
        TrainConfig(activations="most")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_predicted_peaks_on_a_gpu(policy: str) -> None:
    """Oracle: the CUDA allocator's peak over a step of four Llama-3-8B blocks, bf16; within 10%."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    config = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        model: Any = Model(read_config(config)).to(torch.bfloat16)
    model = model.to_empty(device=device)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    add_adapter(model, "policy", LoraConfig(rank=8), seed=0)
    set_active(model, "policy")
    for parameter in trainable_parameters(model, "policy").values():
        parameter.grad = torch.zeros_like(parameter)
    tree = forest(1000, 8, 60, 8, 40, 32000)
    tree = tree.padded(-(-len(tree.ids_T) // 128) * 128)
    tokens, scored = len(tree.ids_T), len(tree.source_S)
    head = extra_bytes(scored, 4096, 32000, torch.bfloat16, gpu=True, training=True)
    for _ in range(2):  # the first compiles and takes workspaces
        step(model, tree, policy)
    measured = peak_bytes(lambda: step(model, tree, policy), "cuda")
    predicted = Footprint(model.config, torch.bfloat16, 8).step_bytes(tokens, policy, head)
    assert predicted == pytest.approx(measured, rel=0.1)
