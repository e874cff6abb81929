"""The policies of a run, on disk, in the model and for the sampler: adapters of the controller, or all its weights.

A policy is named by its stage: "" is the model that the run was given; "warmup", "star", "round-2", "round-2/lr-1e-05"
are folders of the run. Folders appear atomically and never change, so an existing folder means that training finished.
All ranks call every method in the same order.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from matryoshka.core.distributed import World
from matryoshka.core.models.activations import POLICIES
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import empty_model, fill_model, load_model
from matryoshka.core.models.weights import weights_hash
from matryoshka.core.protocols import Controller
from matryoshka.core.records import stable_seed
from matryoshka.core.training.train import Item, TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.local_controller import LocalController, TokenSampler
from matryoshka.inference.vllm import Vllm
from matryoshka.lora import files as adapters
from matryoshka.lora.linear import active, adapter_names, add_adapter, remove_adapter, with_targets
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.training import (
    DTYPES,
    POLICY,
    QUANTIZATIONS,
    REFERENCE,
    Base,
    Training,
    load_base,
    save_model,
    train_policy,
    train_weights,
)


class Adapters:
    """Policies that are adapters of one base model: `<stage>/adapter` in PEFT's layout.

    model: the base with the adapters in use. Where vLLM samples, the ranks hold it as [parallel] says; our own sampler
    needs all of it on every rank. Where it computes nothing, since vLLM samples or all is recorded, it has no weights.
    """

    def __init__(self, config: RunConfig, root: Path, world: World, trains: bool, samples: bool = True) -> None:
        """root: the run's folder. trains, samples: whether anything will be trained or sampled.

        Raises as `load_model` and `load_base`.
        """
        self._config, self._root, self.world = config, root, world
        self._base = config.controller.folder
        self._first = Path(config.controller.adapter) if config.controller.adapter else None
        if config.warmup.source == "adapter":  # it is the warm-up's policy, so that "" is the base model
            self._first = None
        self.model = _load(config, world, trains, samples)
        if trains and self._first is None:  # before episodes are paid for that no adapter can be trained on
            with_targets(self.model, config.lora)
        # Not the device of the model's weights, which may lie in the host's memory while it computes on a GPU.
        self._device = torch.device("cpu") if self.model.head_weight.is_meta else world.device

    def folder(self, stage: str) -> Path:
        """Return the folder that the policy of `stage` has once it is trained.

        stage: also the path of an adapter folder from elsewhere, or of a stage of another run. "" has a folder only
        where [controller] adapter names one.
        """
        if not stage and self._first is not None:
            return self._first
        folder = self._root / stage
        return folder if (folder / adapters.CONFIG).is_file() else folder / "adapter"

    def _has_adapter(self, stage: str) -> bool:
        return bool(stage) or self._first is not None

    def name(self, stage: str) -> str:
        """Return the name of a trained policy, which changes with its weights."""
        if not self._has_adapter(stage):
            return self._base.name
        return f"{self._base.name}+{adapters.adapter_hash(self.folder(stage))}"

    def controller(self, stage: str, sampler: TokenSampler) -> Controller:
        """Make `sampler` draw from the policy of `stage` and return the controller that asks it."""
        if isinstance(sampler, Vllm):
            place = self.folder(stage) if self._has_adapter(stage) else self.folder(self._neutral())
            return LocalController(sampler, sampler.use(place), self.name(stage))
        if self._has_adapter(stage):
            self._load_policy(stage)
        return LocalController(sampler, POLICY if self._has_adapter(stage) else None, self.name(stage))

    def computing(self, stage: str) -> AbstractContextManager[None]:
        """Return a context in which the model computes the policy of `stage`."""
        self._load_policy(stage)
        return active(self.model, POLICY)

    def keep(self, before: str, stage: str) -> None:
        """Save the policy of `before` unchanged as `stage`'s."""
        self._load_policy(before)
        self.world.barrier()  # every rank has asked by now whether it is trained
        if self.world.is_first:
            adapters.save_adapter(self.model, POLICY, self.folder(stage), str(self._base))
        self.world.barrier()

    def train(
        self, stage: str, start: str, items: Sequence[Item], config: TrainConfig, preference: Preference | None
    ) -> None:
        """Train from the policy of `start`, which is the reference, and save the result as `stage`'s; None is SFT."""
        self._load_policy(start)
        cache = self._root / "reference.sqlite" if self._config.dpo.reference_cache else None
        training = Training(
            self.model, self._base, items, config, preference, self._root / stage, stage, cache,
            self._config.tensorboard, self.world,
        )  # fmt: skip
        train_policy(training, fresh=not self._has_adapter(start))

    def _load_policy(self, stage: str) -> None:
        """Make POLICY the adapter of `stage` (a fresh one for the base model), alone in the model."""
        for name in {POLICY, REFERENCE} & adapter_names(self.model):
            remove_adapter(self.model, name)
        if self._has_adapter(stage):
            adapters.load_adapter(self.model, POLICY, self.folder(stage), self._device, self._base)
        else:
            seed = stable_seed("lora", self._config.seed)
            add_adapter(self.model, POLICY, self._config.lora, seed, self._device)

    def _neutral(self) -> str:
        """Return a stage whose adapter changes nothing, which vLLM serves as the base model (see `Vllm.generate`)."""
        if not self.folder("untrained").exists():
            self.keep("", "untrained")
        return "untrained"


class Weights:
    """Policies that are all weights of the model: `<stage>/model`, an ordinary Hugging Face folder.

    model: holds one policy at a time; the weights of another policy are read from its folder when it is needed.
    """

    def __init__(self, config: RunConfig, root: Path, world: World, trains: bool, samples: bool = True) -> None:
        """Take the arguments of `Adapters`. Raises as `load_model`."""
        self._config, self._root, self.world = config, root, world
        self._base, self._dtype = config.controller.folder, DTYPES[config.controller.dtype]
        if trains or (samples and config.controller.engine == "local"):
            self.model = load_model(self._base, self._dtype, world.device)
        else:
            self.model = empty_model(self._base)
        self._loaded: str | None = ""  # the stage whose weights the model holds; None while it is trained
        self._names = {"": self._base.name}

    def folder(self, stage: str) -> Path:
        """Return the folder that the policy of `stage` has once it is trained."""
        folder = self._root / stage
        return (folder if (folder / "config.json").is_file() else folder / "model") if stage else self._base

    def name(self, stage: str) -> str:
        """Return the name of a trained policy, which changes with its weights; it reads them once."""
        if stage not in self._names:
            self._names[stage] = f"{self._base.name}+{weights_hash(self.folder(stage))}"
        return self._names[stage]

    def controller(self, stage: str, sampler: TokenSampler) -> Controller:
        """Make `sampler` draw from the policy of `stage` and return the controller that asks it."""
        if isinstance(sampler, Vllm):
            sampler.use_model(self.folder(stage))
        elif not self.model.head_weight.is_meta:
            self._load_policy(stage)
        return LocalController(sampler, None, self.name(stage))

    def computing(self, stage: str) -> AbstractContextManager[None]:
        """Return a context in which the model computes the policy of `stage`."""
        self._load_policy(stage)
        return nullcontext()

    def keep(self, before: str, stage: str) -> None:
        """Save the policy of `before` unchanged as `stage`'s."""
        self._load_policy(before)
        self.world.barrier()  # every rank has asked by now whether it is trained
        save_model(self.model, self.folder(before), self.folder(stage), self._dtype, self.world)

    def train(
        self, stage: str, start: str, items: Sequence[Item], config: TrainConfig, preference: Preference | None
    ) -> None:
        """Train from the policy of `start`, which is the reference, and save the result as `stage`'s; None is SFT.

        The reference's log-probs are computed before training and kept in a file of the round, for all its learning
        rates. Their keys cover the weight files of `start`, so that another policy's are never used.
        """
        self._load_policy(start)
        self._loaded = None
        reference = self._root / stage.partition("/")[0] / "reference.sqlite"
        training = Training(
            self.model, self.folder(start), items, config, preference, self._root / stage, stage, reference,
            self._config.tensorboard, self.world,
        )  # fmt: skip
        train_weights(training, self._dtype)

    def _load_policy(self, stage: str) -> None:
        if self._loaded != stage:
            self._loaded = None
            fill_model(self.model, self.folder(stage), self._dtype, self.world.device)
            self._loaded = stage


Policies = Adapters | Weights


def open_policies(config: RunConfig, root: Path, world: World, trains: bool, samples: bool = True) -> Policies:
    """Return the policies of the run in `root` as [controller] tune says; arguments and errors are those of both."""
    return (Weights if config.controller.tune == "full" else Adapters)(config, root, world, trains, samples)


def _load(config: RunConfig, world: World, trains: bool, samples: bool) -> LanguageModel:
    controller, path = config.controller, config.controller.folder
    dtype = DTYPES[controller.dtype]
    if controller.engine == "local" and (trains or samples):
        return load_model(path, dtype, world.device, QUANTIZATIONS[controller.quantization])
    if not trains:
        return empty_model(path)
    base = Base(path, dtype, controller.quantization, False, config.lora, config.parallel)
    return load_base(base, None, _heaviest(config), world)


def _heaviest(config: RunConfig) -> TrainConfig:
    """Return the settings that the model's layout is planned for: the most demanding of the run's trainings."""
    used = [config.dpo.train]
    if config.star or config.warmup.source != "none":
        used.append(config.warmup.train)
    return replace(
        used[0],
        micro_batch_tokens=max(train.micro_batch_tokens for train in used),
        activations=min((train.activations for train in used), key=(*POLICIES, "auto").index),
        optimizer=next((train.optimizer for train in used if train.optimizer == "adamw"), used[0].optimizer),
        compile_blocks=any(train.compile_blocks for train in used),
    )
