"""How much memory a training step takes, from shapes alone, and the fastest activation policy that fits.

The count is of what torch's allocator holds at its peak beyond the weights: gradients and moments of the trained
parameters, the tensors that the blocks keep (`activations.py`), and those that the backward pass of the last
feed-forward layer adds while all of these are still kept. It leaves out scratch space inside libraries and the
allocator's own slack, for which `MARGIN` stays free. Blocks keep the tensors that Llama's keep in eager mode with LoRA
on all projections, and those that the architecture's `extra_kept` adds; compiled blocks keep less.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from matryoshka.core.distributed import local_part
from matryoshka.core.machine import available_memory
from matryoshka.core.models.activations import POLICIES, CompiledBlocks, activations
from matryoshka.core.models.attention import PIECE
from matryoshka.core.models.language_model import LanguageModel, ModelConfig
from matryoshka.core.models.norm_rope_swiglu import at_least_fp32
from matryoshka.core.training.optimizer import moment_bytes

logger = logging.getLogger(__name__)

GIB = 2**30
MARGIN = 0.1  # of the free memory
HEAD_WORKSPACE = {"cuda": 400 * 2**20}  # the most that the head's tiles take
HEAD_WORKSPACE_ELSEWHERE = 32 * 2**20


@dataclass(frozen=True)
class Footprint:
    """The memory of a token in a model's blocks. rank, dora: of the adapter that is trained; rank 0: there is none."""

    config: ModelConfig
    dtype: torch.dtype
    rank: int = 0
    dora: bool = False

    def block_bytes(self, recompute: bool) -> int:
        """Return what one block keeps of one token, its input included; recompute: as policy "selective" does."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        numbers = 2 * hidden  # inputs of the two norms
        numbers += 2 * queries + 2 * keys  # queries and keys, rotated, values, and what o_proj reads
        numbers += 2 * inner  # gate and up
        numbers += 7 * self.rank + config.extra_kept
        if not recompute:
            numbers += 2 * hidden + inner + config.extra_recomputed  # outputs of the two norms and of SwiGLU
        if self.dora:
            numbers += queries + 2 * keys + 2 * inner + 2 * hidden  # outputs of all projections, before the scale
        return numbers * self.dtype.itemsize + 2 * at_least_fp32(self.dtype).itemsize

    def kept_bytes(self, tokens: int, policy: str) -> int:
        """Return how much the blocks keep from forward to backward pass. Raises ValueError for an unknown policy."""
        if policy not in POLICIES:
            raise ValueError(f"activations: policy {policy!r} is unknown; choose from {POLICIES}")
        if policy == "offload":
            return 0
        per_token = self.config.hidden_size * self.dtype.itemsize
        if policy != "full":
            per_token = self.block_bytes(recompute=policy == "selective")
        return self.config.num_hidden_layers * tokens * per_token

    def step_bytes(self, tokens: int, policy: str, head_bytes: int = 0, scores: int = 0) -> int:
        """Return the peak of forward and backward over `tokens` tokens, beyond weights, gradients and moments.

        head_bytes: what log-probs and loss hold at their highest beyond the hidden states. scores: queries times keys
        of the largest block of attention scores that is held at a time, 0 where a kernel holds none. The peak is
        reached in the head or in the last block's backward pass, in its feed-forward layer or in its attention; what
        the block kept beyond them is gone by then. Raises ValueError for an unknown policy.
        """
        config, size, wide = self.config, self.dtype.itemsize, at_least_fp32(self.dtype).itemsize
        hidden, inner = tokens * config.hidden_size * size, tokens * config.intermediate_size * size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        queries, keys = tokens * heads * config.head_dim, tokens * groups * config.head_dim
        kept = self.kept_bytes(tokens, policy) + tokens * 2 * config.head_dim * wide  # rotary tables
        again = policy in ("full", "offload")  # the last block runs again, from an input that is kept or has come back
        block = tokens * self.block_bytes(recompute=policy == "selective")
        if again:
            kept += block - (hidden if policy == "full" else 0)
        # Gradients of SwiGLU's output, of gate and up, and a product in between; SwiGLU's output is gone.
        feed_forward = kept + 3 * inner + hidden - (0 if policy == "selective" else inner)
        attention = kept - block + (1 if policy == "selective" else 2) * hidden + (queries + 2 * keys) * size
        # Gradients of the outputs of block and attention, and of q, k and v; a copy of k and v (in low precision also
        # of q and the gradient) in what is computed with; scores and probabilities of two blocks.
        attention += hidden + queries * size + (queries + 2 * keys + 4 * heads * scores) * wide
        attention += 2 * (keys + (0 if size == wide else queries)) * wide
        head = kept - (block - (hidden if policy == "full" else 0) if again else 0) + 3 * hidden + head_bytes
        return max(feed_forward, attention if scores else 0, head)


def state_bytes(parameters: Mapping[str, nn.Parameter], optimizer: str = "adamw") -> int:
    """Return the size of gradients and both moments, of parameters that are cut up over ranks this rank's; paged ones
    count as 8-bit ones, though they may move out."""
    parts = [local_part(parameter) for parameter in parameters.values()]
    return sum(part.numel() * part.itemsize + 2 * moment_bytes(part, optimizer) for part in parts)


def scratch_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the size of the largest weight that is stored packed, two numbers in a uint8, once it is dense."""
    packed = (parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.uint8)
    return 2 * max(packed, default=0) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Return how many more bytes tensors on `device` can take, on a GPU with the cache of torch's allocator."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory()


@dataclass(frozen=True)
class MemoryPlan:
    """Which policy a micro-batch runs under, by its length.

    policy: one for all lengths, or "auto": the fastest that `room` bytes hold. compiled: as `activations` takes it.
    scratch: bytes of a quantised weight while it is dense.
    """

    policy: str
    footprint: Footprint
    room: int
    device_type: str = "cpu"
    compiled: CompiledBlocks | None = None
    scratch: int = 0

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies that "auto" chooses from; a CPU has no other memory to offload to."""
        return POLICIES if self.device_type == "cuda" else POLICIES[:-1]

    def peak_bytes(self, tokens: int, policy: str) -> int:
        """Return the predicted peak of a micro-batch of `tokens` tokens, all of them scored."""
        workspace = HEAD_WORKSPACE.get(self.device_type, HEAD_WORKSPACE_ELSEWHERE)
        hidden = tokens * self.footprint.config.hidden_size * at_least_fp32(self.footprint.dtype).itemsize
        scores = 0 if self.device_type == "cuda" else min(tokens, PIECE) * self.most_keys(tokens)
        return self.footprint.step_bytes(tokens, policy, 2 * hidden + workspace, scores) + self.scratch

    def most_keys(self, tokens: int) -> int:
        """Return how many keys a block of queries sees at most: all, unless every layer has a window."""
        windows = [layer.window for layer in self.footprint.config.attention]
        return min(tokens, max(tokens if window is None else window + PIECE for window in windows))

    def policy_for(self, tokens: int) -> str:
        """Return the policy for `tokens` tokens; "auto" takes the leanest where none fits."""
        if self.policy != "auto":
            return self.policy
        return next((p for p in self.policies if self.peak_bytes(tokens, p) <= self.room), self.policies[-1])

    @contextmanager
    def activations(self, tokens: int) -> Iterator[None]:
        """Run a forward pass over `tokens` tokens inside the block as planned."""
        with activations(self.policy_for(tokens), self.compiled):
            yield


def plan_memory(
    policy: str,
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    max_tokens: int,
    compile_blocks: bool = False,
    free: int | None = None,
    optimizer: str = "adamw",
) -> MemoryPlan:
    """Return the plan for training `parameters` with micro-batches of at most `max_tokens` tokens.

    Call it with the weights in place and before the optimizer has its state. free: bytes, by default those that are
    free on the device. Raises ValueError where policy is "auto" and max_tokens tokens fit under none.
    """
    device = model.device
    rank = max((len(p) for name, p in parameters.items() if ".lora_A." in name), default=0)
    dora = any(".lora_magnitude_vector." in name for name in parameters)
    footprint = Footprint(model.config, model.dtype, rank, dora)
    free = free_bytes(device) if free is None else free
    room = int(free * (1 - MARGIN)) - state_bytes(parameters, optimizer) - model.gathered_bytes
    scratch = scratch_bytes(model, footprint.dtype)
    plan = MemoryPlan(policy, footprint, room, device.type, CompiledBlocks() if compile_blocks else None, scratch)
    chosen = plan.policy_for(max_tokens)
    peak = plan.peak_bytes(max_tokens, chosen)
    if policy == "auto" and peak > room:
        raise ValueError(
            f"train: a micro-batch of {max_tokens} tokens needs {peak / GIB:.2f} GiB even with activations = "
            f"{chosen!r}, {max(room, 0) / GIB:.2f} GiB are free on {device}; lower micro_batch_tokens"
        )
    sizes = peak / GIB, room / GIB
    logger.info("activations: %s for %d tokens, %.2f GiB predicted, %.2f GiB free", chosen, max_tokens, *sizes)
    return plan
