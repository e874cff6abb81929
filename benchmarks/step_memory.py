"""The peak memory of one training step of ours: predicted from shapes by `core/training/memory.py`, and measured."""

from collections.abc import Sequence
from functools import partial

import torch

from matryoshka.benchmarks.measure import MIB, peak_bytes
from matryoshka.benchmarks.result import Row
from matryoshka.benchmarks.training import Recipe, new_adapter, tree_block
from matryoshka.core.models.attention import bucket
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import tree_size
from matryoshka.core.training.memory import plan_memory, state_bytes
from matryoshka.core.training.packing import Item, plan
from matryoshka.dpo.head import extra_bytes


def memory_row(model: LanguageModel, batch: Sequence[Item], recipe: Recipe) -> Row:
    """Return the measured peak of one optimizer step on `batch` beyond the weights, the predicted one beside it."""
    on_gpu = torch.device(recipe.device).type == "cuda"
    with new_adapter(model, recipe) as parameters:
        adapter = sum(parameter.nbytes for parameter in parameters.values())
        config = recipe.train
        memory = plan_memory(config.activations, model, parameters, config.micro_batch_tokens, config.compile_blocks)
        steps = []
        for items in plan(batch, recipe.micro_batch_tokens).micro_batches:
            sequences = [sequence for item in items for sequence in item.sequences]
            scored = sum(sum(sequence.mask) for sequence in sequences)
            tokens = tree_size(sequences)
            if on_gpu:
                tokens = bucket(tokens, recipe.micro_batch_tokens)
            vocabulary, hidden = model.head_weight.shape
            head = extra_bytes(scored, hidden, vocabulary, model.head_weight.dtype, on_gpu, training=True)
            steps.append(memory.footprint.step_bytes(tokens, memory.policy_for(tokens), head))
        predicted = state_bytes(parameters) + max(steps)
    measured = peak_bytes(partial(tree_block, model, batch, recipe), recipe.device) - adapter
    details = {"predicted_mib": predicted / MIB, "over_predicted": measured / predicted}
    return Row("peak memory of a step of ours", measured / MIB, "MiB", details)
