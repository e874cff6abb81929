"""SFT and preference training on a user's own file, of an adapter or of all weights: `matryoshka sft | dpo --data`."""

import logging
import math
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka.core.config import check_least
from matryoshka.core.distributed import World, open_world
from matryoshka.core.files import folder_lock
from matryoshka.core.machine import usable_cores
from matryoshka.core.models.load import empty_model, model_folder
from matryoshka.core.models.tree import Tokens
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.records import stable_seed
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Evaluation, Item, TrainConfig
from matryoshka.dpo.data import distinct, fitting, read_conversations, read_preferences
from matryoshka.dpo.objectives import Preference
from matryoshka.dpo.row_forms import FieldNames
from matryoshka.lora.files import load_adapter
from matryoshka.lora.files import read_config as adapter_config
from matryoshka.lora.linear import LoraConfig, add_adapter
from matryoshka.pilot.ranks import Ranks
from matryoshka.pilot.training import DTYPES, POLICY, Base, Training, load_base, train_policy, train_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SftCommand:
    """Supervised training on your own rows ({prompt, completion} or {messages}), one JSON object a line."""

    data: Path
    """The JSONL file of rows, in one of the forms that docs/own_data.md lists."""
    model: Path
    """A Hugging Face folder, or the hub id (OWNER/NAME) of a model in the local hub cache."""
    out: Path
    """Takes the adapter (PEFT layout), metrics and checkpoints; an unfinished training found there is continued."""
    adapter: Path | None = None
    """An adapter folder to start from, which is then the reference, too; by default a fresh adapter is trained."""
    more_data: tuple[Path, ...] = ()
    """Further JSONL files of rows, which are trained on together with `data`."""
    weights: tuple[float, ...] = ()
    """How often the rows of each file are taken, `data` first: 1 once (the default), 2 twice, 0.25 a quarter of them,
    drawn by train.seed."""
    fields: FieldNames = FieldNames()
    """Names of the rows' fields, where they are others."""
    max_samples: int = 0
    """Most rows to train on, drawn by train.seed from all files; 0 takes all."""
    max_length: int = 0
    """Most tokens of a row; 0 is the model's context. `overlong` says what becomes of longer ones; none is ever cut."""
    overlong: Literal["error", "skip"] = "error"
    """The treatment of a row that is too long: "skip" leaves it out and counts it."""
    eval_data: Path | None = None
    """A JSONL file of rows whose loss is computed every eval_every steps and after the last one."""
    eval_share: float = 0.0
    """Share of the rows that is held out in place of eval_data, drawn by train.seed; equal prompts stay together."""
    eval_every: int = 0
    """Steps between two evaluations; 0 is once an epoch."""
    early_stop: int = 0
    """Training ends after so many evaluations in a row without a new lowest loss, and the policy with the lowest one is
    kept, which `best_step` names. 0: training never ends early, and the last policy is kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the base model's weights."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4" holds the frozen base in four bits (QLoRA; the extra `cuda`)."""
    device: str = "cpu"
    """Where to train: "cpu" or "cuda"."""
    threads: int = 0
    """CPU threads of torch, 0 for as many as there are cores."""
    tensorboard: bool = False
    """Write the metrics as TensorBoard events, too (the extra `track`)."""
    wandb: str = ""
    """A project of Weights & Biases that takes the metrics through its own library (the extra `wandb`); "" for none."""
    tune: Literal["adapter", "full"] = "adapter"
    """The trained part: an adapter, or all weights ("full"), which are written to out/model."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model lies on the ranks that torchrun starts."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))
    """How to train."""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != 1 + len(self.more_data):
            raise ValueError(f"weights: {len(self.weights)} for {1 + len(self.more_data)} files; give each file one")
        if min((*self.weights, 1.0)) <= 0:
            raise ValueError(f"weights {list(self.weights)} must be above 0")
        check_least(self, "", max_samples=0, max_length=0, eval_every=0, early_stop=0, threads=0)
        if not 0 <= self.eval_share < 1 or (self.eval_share and self.eval_data):
            raise ValueError(f"eval_share {self.eval_share} must lie in [0, 1), and be 0 beside eval_data")
        if (self.early_stop or self.eval_every) and not (self.eval_share or self.eval_data):
            raise ValueError("early_stop and eval_every need rows to evaluate on; give eval_data or eval_share")


@dataclass(frozen=True)
class DpoCommand(SftCommand):
    """Preference training on your own rows (prompt, chosen, rejected, as TRL has them), one JSON object a line."""

    train: TrainConfig = TrainConfig()
    """How to train."""
    objective: Preference = Preference()
    """The preference loss."""
    reference_cache: Path | None = None
    """A file that keeps reference log-probs, so that later epochs and runs need no reference pass; none by default.

    With tune = "full" they are always kept: the model as it comes is the reference, whose log-probs are computed before
    training (by default in out/reference.sqlite).
    """


def finetune(settings: SftCommand) -> dict[str, Any] | None:
    """Train an adapter and write it to `out/adapter`, or all weights and write the model to `out/model`.

    A `DpoCommand` trains on preferences, any other command is SFT. Returns counts, the path written and the last
    metrics on the first rank, None on the others: processes that torchrun started share every batch. Pairs that repeat
    an earlier one are left out and counted. Raises ValueError, FileNotFoundError for settings that exclude
    each other, malformed data, a model that does not fit, and a folder in which another process trains.
    """
    if settings.tune == "full" and settings.adapter:
        raise ValueError(f"adapter {settings.adapter}: there is none where all weights are trained; merge it first")
    if settings.tune == "full" and settings.quantization != "none":
        raise ValueError(f"quantization {settings.quantization!r} is for a frozen base; train an adapter on it")
    with ExitStack() as stack:
        world = stack.enter_context(open_world(settings.device, settings.train.rank_timeout_s))
        return _finetune(settings, world, stack)


def _finetune(settings: SftCommand, world: World, stack: ExitStack) -> dict[str, Any] | None:
    preference, reference_cache = None, None
    if isinstance(settings, DpoCommand):
        preference, reference_cache = settings.objective, settings.reference_cache
    torch.set_num_threads(settings.threads or max(1, usable_cores() // world.local_size))
    model_path = model_folder(settings.model)
    tokenizer, context = Tokenizer.load(model_path), empty_model(model_path).config.max_position_embeddings
    rows = load_rows(settings, tokenizer, context, preference is not None)
    items, evaluation = rows.items, None
    if rows.held_out:
        every = settings.eval_every or math.ceil(len(items) / settings.train.batch_size)
        evaluation = Evaluation(rows.held_out, every, settings.early_stop)
    full, dtype = settings.tune == "full", DTYPES[settings.dtype]
    lora = adapter_config(settings.adapter) if settings.adapter else settings.lora
    base = Base(model_path, dtype, settings.quantization, full, lora, settings.parallel)
    model = load_base(base, items, settings.train, world)
    with Ranks(world).all_or_none():  # the lock makes the folder, so what is refused above leaves none
        if world.is_first:
            stack.enter_context(folder_lock(settings.out))
    training = Training(
        model=model,
        base=model_path,
        items=items,
        config=settings.train,
        objective=preference,
        folder=settings.out,
        title="sft" if preference is None else "dpo",
        reference_cache=reference_cache,
        tensorboard=settings.tensorboard,
        world=world,
        evaluation=evaluation,
        wandb=settings.wandb,
    )
    if full:
        last = train_weights(training, dtype)
    else:
        if settings.adapter:
            load_adapter(model, POLICY, settings.adapter, world.device, model_path)
        else:
            add_adapter(model, POLICY, lora, settings.train.seed, world.device)
        last = train_policy(training, fresh=settings.adapter is None)
    written = "model" if full else "adapter"
    counts = {"items": len(items), **rows.counts}
    return {**counts, written: str(settings.out / written), **last} if world.is_first else None


@dataclass(frozen=True)
class Rows:
    """The items of a command's files. counts: rows that are left out, by reason, and those held out."""

    items: list[Item]
    held_out: list[Item]
    counts: dict[str, int]


def load_rows(settings: SftCommand, tokenizer: Tokenizer, context: int, pairs: bool) -> Rows:
    """Return the items to train on and those held out, as the command's options about data say.

    pairs: the files hold preference pairs, of which one that repeats an earlier one is left out. Raises ValueError,
    FileNotFoundError for malformed and missing files, for rows that are too long, and where no row is left.
    """
    counts: Counter[str] = Counter(skipped=0, repeated=0, equal=0)
    longest = min(settings.max_length or context, context)

    def read(path: Path) -> list[Item]:
        if pairs:
            found = read_preferences(path, tokenizer, settings.fields, counts)
        else:
            found = read_conversations(path, tokenizer, settings.fields)
        found, skipped = fitting(found, longest, settings.overlong)
        if skipped:
            logger.warning("%s: %d rows exceed %d tokens and are left out", path, skipped, longest)
        counts["skipped"] += skipped
        return found

    files = [read(path) for path in (settings.data, *settings.more_data)]
    if pairs:
        seen: set[tuple[Tokens, ...]] = set()
        for number, found in enumerate(files):
            files[number], repeated = distinct([item for item in found if item.sequences not in seen])
            counts["repeated"] += len(found) - len(files[number])
            seen.update(item.sequences for item in found)
        if counts["repeated"]:
            logger.warning("%d rows repeat an earlier pair and are left out", counts["repeated"])
    draws = random.Random(stable_seed("rows", settings.train.seed))
    held_out = read(settings.eval_data) if settings.eval_data else []
    if settings.eval_share:
        groups = sorted({item.group for found in files for item in found})
        chosen = set(draws.sample(groups, max(1, round(settings.eval_share * len(groups)))))
        held_out = [item for found in files for item in found if item.group in chosen]
        files = [[item for item in found if item.group not in chosen] for found in files]
    weights = settings.weights or (1.0,) * len(files)
    items = [item for found, weight in zip(files, weights, strict=True) for item in _weighted(found, weight, draws)]
    if settings.max_samples and settings.max_samples < len(items):
        kept = sorted(draws.sample(range(len(items)), settings.max_samples))
        counts["not_taken"] = len(items) - len(kept)
        items = [items[place] for place in kept]
    if held_out:
        counts["held_out"] = len(held_out)
    if not items:
        left_out = ", ".join(f"{number} {reason}" for reason, number in counts.items() if number) or "none"
        raise ValueError(f"{settings.data}: no row is left to train on; rows left out: {left_out}")
    return Rows(items, held_out, dict(counts))


def _weighted(items: list[Item], weight: float, draws: random.Random) -> list[Item]:
    """Return the items `weight` times: whole times all of them, and of the rest a drawn share in file order."""
    share = round((weight - int(weight)) * len(items))
    return items * int(weight) + [items[place] for place in sorted(draws.sample(range(len(items)), share))]
