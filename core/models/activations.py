"""Activations that are kept for the backward pass: one policy for the whole model, with bitwise equal gradients.

none       keeps every tensor that the gradients need;
selective  computes norms and SwiGLU again in the backward pass: element-wise work, and a third of the memory less;
full       keeps the inputs of the blocks alone and runs each block again;
offload    as full, with the inputs of the blocks in the host's memory.

An architecture takes part by calling its blocks through `run_block` and its cheap functions through `recomputed`.
`core/training/memory.py` predicts which policy fits.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

POLICIES = ("none", "selective", "full", "offload")  # from the fastest to the leanest


class _Recipe:
    """How to compute a dropped tensor again: once for all graph nodes that need it, not once for each."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.function = function
        self.inputs = tuple(tensor.detach() for tensor in inputs)
        self.output = weakref.ref(output)  # while it lives, no other tensor has its memory
        self.layout = _layout(output)
        self.kept = self.waiting = 0  # how many nodes keep it, and how many of them have not asked for it yet
        self.value: Tensor | None = None

    def make(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.function(*self.inputs)
        value = self.value
        self.waiting -= 1
        if self.waiting == 0:
            self.value, self.waiting = None, self.kept  # a graph that is retained asks again
        return value


class _Recipes:
    """The recipes of one forward pass, by the memory that their outputs lie in."""

    def __init__(self) -> None:
        self.by_storage: dict[int, _Recipe] = {}

    def note(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.by_storage[output.untyped_storage().data_ptr()] = _Recipe(function, inputs, output)

    def pack(self, tensor: Tensor) -> Tensor | _Recipe:
        recipe = self.by_storage.get(tensor.untyped_storage().data_ptr())
        if recipe is None or recipe.output() is None or recipe.layout != _layout(tensor):
            return tensor
        recipe.kept += 1
        recipe.waiting += 1
        return recipe

    @staticmethod
    def unpack(packed: Tensor | _Recipe) -> Tensor:
        return packed.make() if isinstance(packed, _Recipe) else packed


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


class CompiledBlocks:
    """Blocks as torch.compile makes them, one for all layers and lengths; num_graphs says how often it had to."""

    def __init__(self, backend: str = "inductor") -> None:
        global _outside_of_graphs
        # Here and not at import, since it loads the whole compiler.
        _outside_of_graphs = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]
        self.num_graphs = 0
        self._backend = backend
        self._blocks: dict[nn.Module, Callable[..., Tensor]] = {}

    def __call__(self, block: nn.Module, *args: object) -> Tensor:
        """Return block(*args); dimension 1 of every tensor is the length, for which no graph is made anew."""
        if block not in self._blocks:
            self._blocks[block] = torch.compile(block, backend=self._compile)
        for tensor in args:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self._blocks[block](*args)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.num_graphs += 1
        return torch._dynamo.lookup_backend(self._backend)(graph, inputs)


@dataclass(frozen=True)
class _Now:
    """The setting of the forward pass that runs now."""

    policy: str = "none"
    recipes: _Recipes | None = None
    compiled: CompiledBlocks | None = None


_now: ContextVar[_Now] = ContextVar("activations", default=_Now())  # noqa: B039 (it is frozen)


@contextmanager
def activations(policy: str, compiled: CompiledBlocks | None = None) -> Iterator[None]:
    """Run forward passes inside the block under `policy`; the backward pass may come after it.

    compiled: runs the blocks, where given; the caller keeps it from one forward pass to the next.
    Raises ValueError for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"activations: policy {policy!r} is unknown; choose from {POLICIES}")
    recipes = _Recipes() if policy == "selective" else None
    before = _now.set(_Now(policy, recipes, compiled))
    try:
        with saved_tensors_hooks(recipes.pack, recipes.unpack) if recipes is not None else nullcontext():
            yield
    finally:
        _now.reset(before)
        if recipes is not None:
            recipes.by_storage.clear()  # the graph holds its hooks to the end; a recipe is freed with its own node


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), which policy "selective" makes again instead of keeping it.

    function: cheap, and pure in its tensors: the same inputs give the same bits.
    """
    output = function(*inputs)
    if torch.compiler.is_compiling():  # the compiler decides which tensors of a block it computes again
        return output
    if torch.is_grad_enabled() and (recipes := _now.get().recipes) is not None:
        recipes.note(function, inputs, output)
    return output


def run_block(block: nn.Module, x: Tensor, *rest: object) -> Tensor:
    """Return block(x, *rest); policies "full" and "offload" keep x alone and run the block again in backward."""
    now = _now.get()
    run = block if now.compiled is None else partial(now.compiled, block)
    output: Tensor
    if now.policy not in ("full", "offload") or not torch.is_grad_enabled():
        output = run(x, *rest)
        return output
    # Only x goes through the hooks of save_on_cpu: the tensors in `rest` are common to all blocks and stay in place.
    with save_on_cpu(pin_memory=x.is_cuda) if now.policy == "offload" else nullcontext():
        output = checkpoint(lambda x: run(x, *rest), x, use_reentrant=False)
    return output


def run_attention(attend: Callable[..., Tensor], layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attend(layer, q, k, v), kept out of compiled blocks: it is another object in every micro-batch."""
    if torch.compiler.is_compiling():
        return _outside_of_graphs(attend, layer, q, k, v)
    return attend(layer, q, k, v)


def _attention(attend: Callable[..., Tensor], layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(layer, q, k, v)


_outside_of_graphs = _attention  # `CompiledBlocks` replaces it by one that the compiler does not trace
