"""core/models/activations.py: the oracle is the policy "none"; every other must give its gradients to the bit."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka.core.models import activations as module
from matryoshka.core.models.activations import POLICIES, CompiledBlocks, activations, recomputed, run_block
from matryoshka.core.models.attention import Causal, tree_attention
from matryoshka.core.models.layer_attention import Attend
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens, build_tree
from matryoshka.lora.linear import LoraConfig, add_adapter, layers_with, set_active, trainable_parameters

CPU = torch.device("cpu")
TREE = build_tree(
    [
        Tokens((1, 2, 3, 4, 5, 6, 7), (0, 0, 0, 1, 1, 1, 1)),
        Tokens((1, 2, 3, 9, 8), (0, 0, 0, 1, 1)),
        Tokens((50, 51, 52), (0, 1, 1)),
    ]
)


def adapted(folder: Path, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """Return the tiny model with a random trainable adapter, in training mode."""
    model: Any = load_model(folder, dtype)
    add_adapter(model, "policy", LoraConfig(rank=2, **config), seed=0)
    for layer in layers_with(model, "policy"):
        nn.init.normal_(layer.lora_B["policy"], std=0.3, generator=torch.Generator().manual_seed(1))
    set_active(model, "policy")
    return model.train()


def gradients(
    model: Any, policy: str, compiled: CompiledBlocks | None = None, attend: Attend | None = None
) -> dict[str, Tensor]:
    """Return hidden states and the gradients of all that is trainable; the backward pass runs outside of the policy."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    with activations(policy, compiled):
        hidden = model(TREE.ids_T[None], TREE.positions_T[None], attend or tree_attention(TREE, CPU))
    loss = hidden.square().sum()
    del hidden
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True)) | {"loss": loss.detach()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [{}, {"dropout": 0.5}, {"dora": True}, {"targets": ("v_proj", "down_proj")}], ids=str
)
def test_gradients_do_not_depend_on_the_policy(tiny_dir: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Oracle: policy "none", to the bit; with dropout too, whose masks are drawn again."""
    model = adapted(tiny_dir, dtype, **config)
    trainable_parameters(model, "policy")
    expected = gradients(model, "none")
    assert all(grad.any() for grad in expected.values())
    for policy in POLICIES[1:]:
        same(gradients(model, policy), expected)


def test_full_fine_tuning_does_not_depend_on_the_policy(tiny_dir: Path) -> None:
    """Oracle: as above; norms and embedding are trained too, and causal attention stands for the tree's."""
    model: Any = load_model(tiny_dir, torch.float64)
    expected = gradients(model, "none", attend=Causal())
    assert len(expected) == len(list(model.parameters())) + 1
    for policy in POLICIES[1:]:
        same(gradients(model, policy, attend=Causal()), expected)


def test_what_a_block_keeps(tiny_dir: Path) -> None:
    """Oracle: by hand, names of the tensors between the passes: the pair's memory is freed with the graph."""
    model = adapted(tiny_dir)
    trainable_parameters(model, "policy")
    made: list[str] = []
    norm, block = model.model.layers[0].input_layernorm, model.model.layers[0]

    def note(name: str) -> Callable[..., None]:
        return lambda *ignored: made.append(name)

    norm.register_forward_hook(note("norm"))
    block.register_forward_hook(note("block"))
    # Forward, then what backward runs again. One norm serves q, k and v, together or one by one.
    for policy, expected in (
        ("none", ["norm", "block"]),
        ("selective", ["norm", "block", "norm"]),
        ("full", ["norm", "block", "norm"]),  # the block's hook comes too late: its run ends with the last need
    ):
        made.clear()
        gradients(model, policy)
        assert made[: len(expected)] == expected and len(made) <= len(expected) + 1, (policy, made)
    made.clear()
    with torch.no_grad(), activations("full"):
        model(TREE.ids_T[None])
    assert made == ["norm", "block"]


def test_a_dropped_tensor_is_made_once_for_all_who_kept_it() -> None:
    """Oracle: counts by hand; two consumers share one, a second backward pass makes it again."""
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x.detach()

    x = torch.arange(3.0)
    w = torch.ones(3, requires_grad=True)
    with activations("selective"):
        y = recomputed(double, x)
        loss = (w * y).sum() + (w * y).sum()
    del y
    assert calls == 1
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert calls == 2 and w.grad is not None and w.grad.tolist() == [0.0, 4.0, 8.0]
    loss.backward()  # type: ignore[no-untyped-call]
    assert calls == 3 and w.grad.tolist() == [0.0, 8.0, 16.0]


def test_only_the_very_tensor_is_made_again() -> None:
    """Oracle: by hand. A slice of it, and another tensor that got its memory, are kept as they are."""
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x.detach()

    x, w = torch.arange(4.0), torch.ones(2, requires_grad=True)
    with activations("selective"):
        loss = (w * recomputed(double, x)[:2]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert calls == 1 and w.grad is not None and w.grad.tolist() == [0.0, 2.0]

    recipes = module._Recipes()
    output = double(x)
    recipes.note(double, (x,), output)
    assert isinstance(recipes.pack(output.detach()), module._Recipe)
    alive = output.detach()
    del output
    assert recipes.pack(alive) is alive


def test_contexts_nest_and_end_with_their_block_and_thread() -> None:
    """Oracle: invariants; an error inside restores the policy of before, and other threads keep theirs."""
    seen: list[str] = []
    with pytest.raises(KeyError), activations("full"):
        with activations("selective"):
            assert module._now.get().policy == "selective"
        assert module._now.get().policy == "full" and module._now.get().recipes is None
        thread = threading.Thread(target=lambda: seen.append(module._now.get().policy))
        thread.start()
        thread.join()
        raise KeyError
    assert module._now.get().policy == "none" and seen == ["none"]
    with pytest.raises(ValueError, match=r"policy 'most' is unknown; choose from \('none', 'selective', 'full',"):
        activations("most").__enter__()


def test_offload_moves_the_inputs_of_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand; of two tensors that a block takes the first goes through the hooks, the others stay."""
    moved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        moved.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(
        module, "save_on_cpu", lambda pin_memory: torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    )

    class Scale(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x * by

    x, by = torch.ones(2, 3, requires_grad=True), torch.full((3,), 2.0)
    with activations("offload"):
        out = run_block(Scale(), run_block(Scale(), x, by), by)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert moved == [(2, 3), (2, 3)] and x.grad is not None and x.grad.tolist() == [[4.0] * 3] * 2


@pytest.mark.slow
def test_compiled_blocks(tiny_dir: Path) -> None:
    """Oracle: eager blocks, float64, 1e-10; and counts: no graph is made for a further length, layer or policy."""
    model = adapted(tiny_dir)
    trainable_parameters(model, "policy")
    compiled = CompiledBlocks("aot_eager")
    expected = gradients(model, "none")
    counts = []
    for policy in ("none", "full"):
        found = gradients(model, policy, compiled)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
        counts.append(compiled.num_graphs)
    for tokens in (5, 9, 14, 23):
        ids = torch.arange(tokens)[None]
        with activations("none", compiled):
            out = model(ids)
        torch.testing.assert_close(out, model(ids), rtol=1e-10, atol=1e-10)
        out.sum().backward()
        counts.append(compiled.num_graphs)
    assert counts[0] == counts[1] > 0
    assert len(set(counts[3:])) == 1  # the graph after the attention learns from the second length that it varies
