"""The two trainers of `bench step` that are ours: the product's token-tree loop, and the plain padded batch beside it.

Both train the same model object with the same LoRA layers, head, optimizer and order of items, score response tokens
only and compute the reference with the adapter off; they differ in how a batch is laid out, and in nothing else. The
padded batch is the ordinary one: every sequence a row, padded on the right to the longest of its micro-batch, causal
attention (so that nothing sees the padding, and no mask is needed).

Shapes: B rows, T tokens, D hidden, S scored tokens, P pairs.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.benchmarks.measure import synchronize
from matryoshka.core.models.attention import tree_attention
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import packed_sequences
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, batch_at, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    remove_adapter,
    set_active,
    trainable_parameters,
)

POLICY = "policy"
BETA = 0.1
LossOf = Callable[[LanguageModel, Sequence[Item], "Recipe", int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Recipe:
    """The settings that all trainers of the comparison share. preference: DPO, else SFT; batch_size counts items.

    padded_items: micro-batch of the padded path. activations, compile_blocks: of the token tree alone (`TrainConfig`).
    """

    preference: bool
    batch_size: int
    learning_rate: float
    micro_batch_tokens: int
    padded_items: int
    lora: LoraConfig
    seed: int
    device: str
    activations: str = "auto"
    compile_blocks: bool = False

    @property
    def train(self) -> TrainConfig:
        """One epoch at a constant rate, which every trainer can do exactly."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            warmup_ratio=0.0,
            min_lr_ratio=1.0,
            seed=self.seed,
            activations=self.activations,
            compile_blocks=self.compile_blocks,
        )

    def batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Return the items of each optimizer step in the product's own order."""
        steps = range(len(items) // self.batch_size)
        return [batch_at(items, step, self.batch_size, self.seed)[1] for step in steps]


@dataclass(frozen=True)
class Block:
    """One training run from the untrained adapter: seconds and loss of each step, highest allocation, and how many CPU
    seconds of this process a step took on average, the set-up of the run included."""

    seconds: list[float]
    losses: list[float]
    peak_bytes: int | None
    tokens: int
    cpu_seconds: float = 0.0


def tree_block(model: LanguageModel, items: Sequence[Item], recipe: Recipe) -> Block:
    """Train with the product's own loop."""
    objective = Preference(beta=BETA) if recipe.preference else SFT()
    start_peak(recipe.device)
    with new_adapter(model, recipe) as parameters, tempfile.TemporaryDirectory() as folder:
        steps = train(
            model,
            parameters,
            items,
            recipe.train,
            objective,
            token_logps,
            Path(folder),
            TrainContext(partial(active, model, None), objective.first_loss)
            if isinstance(objective, Preference)
            else TrainContext(),
        )
        rows = list(steps)
        peak = stop_peak(recipe.device)
    tokens = sum(int(row["tokens"]) for row in rows)
    return Block([row["seconds"] for row in rows], [row["loss"] for row in rows], peak, tokens)


def packed_block(model: LanguageModel, items: Sequence[Item], recipe: Recipe) -> Block:
    """Train on sequences packed one after the other, without padding and without sharing a prefix."""
    return _plain_block(model, items, recipe, _packed_loss)


def padded_block(model: LanguageModel, items: Sequence[Item], recipe: Recipe) -> Block:
    """Train on padded batches."""
    return _plain_block(model, items, recipe, _padded_loss)


def _plain_block(model: LanguageModel, items: Sequence[Item], recipe: Recipe, loss_of: LossOf) -> Block:
    """Train with an ordinary loop; loss_of: the summed loss of some items over a total, and the tokens computed."""
    config = recipe.train
    seconds, losses, tokens = [], [], 0
    start_peak(recipe.device)
    with new_adapter(model, recipe) as parameters:
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0
        )
        for batch in recipe.batches(items):
            synchronize(recipe.device)
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            scored = sum(sum(sequence.mask) for item in batch for sequence in item.sequences)
            total = 0.0
            for micro in in_parts(batch, recipe.padded_items):
                loss, size = loss_of(model, micro, recipe, len(batch) if recipe.preference else scored)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
                tokens += size
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            synchronize(recipe.device)
            seconds.append(time.perf_counter() - began)
            losses.append(total)
        peak = stop_peak(recipe.device)
    return Block(seconds, losses, peak, tokens)


@contextmanager
def new_adapter(model: LanguageModel, recipe: Recipe) -> Iterator[dict[str, nn.Parameter]]:
    """Give the model an untrained policy inside the block, and take it away after it."""
    add_adapter(model, POLICY, recipe.lora, recipe.seed)
    try:
        set_active(model, POLICY)
        yield trainable_parameters(model, POLICY)
    finally:
        remove_adapter(model, POLICY)


def in_parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def start_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        gc.collect()  # a trainer that is done, or that failed, lies in cycles
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def stop_peak(device: str) -> int | None:
    """Return the highest allocation, weights included, since `start_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else None


def _padded_loss(model: LanguageModel, items: Sequence[Item], recipe: Recipe, total: int) -> tuple[Tensor, int]:
    """Return the summed loss of these items divided by `total`, and the number of padded tokens."""
    sequences = [sequence for item in items for sequence in item.sequences]
    width = max(len(sequence.ids) for sequence in sequences)
    ids_BT = torch.tensor([[*s.ids, *(0,) * (width - len(s.ids))] for s in sequences]).to(recipe.device)
    scored = [(row, at) for row, s in enumerate(sequences) for at, is_scored in enumerate(s.mask) if is_scored]
    row_S, at_S = torch.tensor(scored).to(recipe.device).unbind(1)

    def forward() -> Tensor:
        hidden_BTD = model(ids_BT)
        softcap = model.config.final_logit_softcapping
        return token_logps(hidden_BTD[row_S, at_S - 1], model.head_weight, ids_BT[row_S, at_S], softcap)

    return _loss(model, forward, row_S, len(sequences), recipe) / total, ids_BT.numel()


def _packed_loss(model: LanguageModel, items: Sequence[Item], recipe: Recipe, total: int) -> tuple[Tensor, int]:
    """Return the summed loss of these items divided by `total`, and the number of packed tokens."""
    sequences = [sequence for item in items for sequence in item.sequences]
    device = torch.device(recipe.device)
    packed = packed_sequences(sequences)
    attend = tree_attention(packed, device, "varlen" if device.type == "cuda" else "auto")
    ids_T, positions_T = packed.ids_T.to(device), packed.positions_T.to(device)
    source_S, target_S, row_S = (x.to(device) for x in (packed.source_S, packed.target_S, packed.sequence_S))

    def forward() -> Tensor:
        hidden_TD = model(ids_T[None], positions_T[None], attend)[0]
        softcap = model.config.final_logit_softcapping
        return token_logps(hidden_TD[source_S], model.head_weight, target_S, softcap)

    return _loss(model, forward, row_S, len(sequences), recipe) / total, len(ids_T)


def _loss(
    model: LanguageModel, forward: Callable[[], Tensor], row_S: Tensor, num_sequences: int, recipe: Recipe
) -> Tensor:
    """Return the summed loss of sequences; row_S: which one each log-prob of `forward` belongs to."""
    if not recipe.preference:
        return -forward().sum()
    with torch.no_grad(), active(model, None):
        reference_S = forward()
    policy_S = forward()
    ratio_B = policy_S.new_zeros(num_sequences).index_add(0, row_S, policy_S - reference_S)
    margin_P = ratio_B[0::2] - ratio_B[1::2]
    return -F.logsigmoid(BETA * margin_P).sum()
