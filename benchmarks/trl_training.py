"""TRL's DPO trainer on the items of `bench step`: the same token ids in the same order, LoRA through peft.

The configuration is the fastest that is still the same computation: no gradient checkpointing unless asked for, no
truncation, the reference being the model with its adapter off, nothing logged or saved, any micro-batch size, on a GPU
Liger's layer kernels. The weights are not a second copy: transformers' model is built around our tensors. Scoring is
TRL's own: on a GPU its fused head takes response tokens only, on a CPU it projects every position.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshka.benchmarks.measure import peer, synchronize
from matryoshka.benchmarks.training import BETA, POLICY, Block, Recipe, in_parts, start_peak, stop_peak
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import padded_size
from matryoshka.core.training.train import Item


def transformers_model(model: LanguageModel, config: dict[str, Any], device: str) -> Any:
    """Return transformers' model of the `config.json` fields `config` around the base weights of `model`, not copied.

    Raises ValueError when the two do not have the same parameters.
    """
    transformers = peer("transformers")
    settings = transformers.AutoConfig.for_model(**config)
    dtype = model.head_weight.dtype
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    missing, unexpected = theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    if unexpected or any(parameter.is_meta for parameter in theirs.parameters()):
        raise ValueError(f"bench step: transformers' model has other parameters: {[*missing, *unexpected][:5]}")
    # Its tables of angles are buffers that no state dict holds.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=settings).to(device)
    return theirs


@dataclass(frozen=True)
class TrlSettings:
    """How TRL computes the steps: pairs in a micro-batch, gradient checkpointing, Liger's layer kernels."""

    micro_pairs: int
    checkpointing: bool
    liger: bool


def trl_block(
    model: LanguageModel,
    config: dict[str, Any],
    tokenizer_folder: str,
    items: Sequence[Item],
    recipe: Recipe,
    settings: TrlSettings,
    initial: dict[str, Tensor],
) -> Block:
    """Train with TRL from the adapter `initial` (our names) and return seconds and losses of each optimizer step.

    config: the fields of config.json. Raises ValueError when micro-batches do not add up to the batch.
    """
    micro_pairs = settings.micro_pairs
    datasets, transformers, peft, trl = map(peer, ("datasets", "transformers", "peft", "trl"))
    if recipe.batch_size % micro_pairs:
        raise ValueError(f"bench step: --trl-pairs {micro_pairs} does not divide the batch of {recipe.batch_size}")
    losses: list[list[Tensor]] = []
    seconds: list[float] = []

    class Trainer(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        """Takes the ids as they are and keeps the losses."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses[-1].append(loss.detach())
            return loss

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            losses.append([])
            synchronize(recipe.device)
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(recipe.device)
            seconds.append(time.perf_counter() - self.began)

    on_gpu = torch.device(recipe.device).type == "cuda"
    train = recipe.train
    start_peak(recipe.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=None,
            per_device_train_batch_size=micro_pairs,
            gradient_accumulation_steps=recipe.batch_size // micro_pairs,
            gradient_checkpointing=settings.checkpointing,
            use_liger_kernel=settings.liger,
            learning_rate=train.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=train.beta1,
            adam_beta2=train.beta2,
            weight_decay=0.0,
            max_grad_norm=train.max_grad_norm,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            bf16=on_gpu and model.head_weight.dtype == torch.bfloat16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=recipe.seed,
        )
        trainer = Trainer(
            model=transformers_model(model, config, recipe.device),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(_rows(recipe.batches(items))),
            processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
            peft_config=peft.LoraConfig(
                r=recipe.lora.rank,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=0.0,
                target_modules=list(recipe.lora.targets or model.lora_targets),
                task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        _set_adapter(trainer.model, initial)
        trainer.train()
    peak = stop_peak(recipe.device)
    micro_batches = [part for batch in recipe.batches(items) for part in in_parts(batch, micro_pairs)]
    tokens = sum(padded_size([sequence for item in part for sequence in item.sequences]) for part in micro_batches)
    return Block(seconds, [torch.stack(step).mean().item() for step in losses], peak, tokens)


def _rows(batches: Sequence[Sequence[Item]]) -> list[dict[str, list[int]]]:
    rows = []
    for item in (item for batch in batches for item in batch):
        chosen, rejected = item.sequences
        prompt = chosen.mask.index(1)
        sides = {"chosen_ids": chosen.ids[prompt:], "rejected_ids": rejected.ids[prompt:]}
        rows.append({name: list(ids) for name, ids in {"prompt_ids": chosen.ids[:prompt], **sides}.items()})
    return rows


def _set_adapter(theirs: Any, initial: dict[str, Tensor]) -> None:
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in initial.items():
            parameters[f"base_model.model.{name.removesuffix(POLICY)}default.weight"].copy_(value)
