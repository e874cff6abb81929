"""The configuration of a pilot run: one TOML file, every value with its default, unknown keys refused."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from matryoshka.core.config import parse, to_toml
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.inference.llama_cpp import LlamaConfig
from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.lora.linear import LoraConfig
from matryoshka.tasks.find import options_class, own_class, task_class

SPLITS = ("warmup", "train", "validation", "test", "held_out")


@dataclass(frozen=True)
class ControllerConfig:
    """The white-box model. path: a Hugging Face folder. threads: torch's on CPU, 0 for as many as there are cores.

    quantization "nf4": the base in four bits (QLoRA; the extra `cuda`). max_rows: rows the sampler decodes together.
    deterministic: one request at a time, bit for bit repeatable. engine: what samples, our own sampler or vLLM as
    [controller.vllm] says; training is ours in either case. tune "full": all weights are trained, in float32, and a
    policy is a model folder, as large as the model; [lora] is not used, and vLLM is started again for every policy.
    scheme: a control scheme of your own, FILE.py:CLASS or PACKAGE.MODULE:CLASS, which is made of every policy and
    gives guidance in its place (examples/own_scheme.py).
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4"] = "none"
    device: str = "cpu"
    threads: int = 0
    max_rows: int = 64
    deterministic: bool = False
    engine: Literal["local", "vllm"] = "local"
    tune: Literal["adapter", "full"] = "adapter"
    scheme: str = ""
    vllm: VllmConfig = VllmConfig()

    def __post_init__(self) -> None:
        if self.scheme:
            own_class(self.scheme, "scheme")
        if self.engine == "vllm" and self.deterministic:
            raise ValueError("deterministic is of the local engine; what vLLM draws depends on its batches' rounding")
        if self.tune != "full":
            return
        if self.quantization != "none":
            what = f"quantization {self.quantization!r} is for a frozen base"
            raise ValueError(f"tune = 'full': {what}; leave it out, or train an adapter")
        if self.engine == "vllm" and self.vllm.base_url:
            raise ValueError(
                "tune = 'full': vLLM takes weights when it starts, so it is started again for every policy; leave "
                "base_url out, or train an adapter"
            )
        if self.dtype != "float32":
            raise ValueError(
                f"tune = 'full': {self.dtype} is too coarse for small steps, and nothing finer is kept beside it here; "
                "take dtype = 'float32', or train an adapter"
            )


@dataclass(frozen=True)
class ServeConfig:
    """A generator of our own to start beside the run, which ends with the run."""

    scripted: str = ""
    """One of the task's scripted generators, or your own as FILE.py:CLASS, which answers in this process in place of
    [generator].
    """
    model: str = ""
    """A model folder or, for engine llama.cpp, a GGUF file; "" starts none: the endpoint of [generator] is used."""
    engine: Literal["local", "llama.cpp"] = "local"
    """What computes: our own sampler, or llama.cpp (the extra `llama`)."""
    adapter: str = ""
    """An adapter folder for the model; engine local only."""
    name: str = "demo-generator"
    """What the model is served as."""
    threads: int = 1
    """CPU threads of the server, 0 for as many as there are cores."""
    max_rows: int = 64
    """Rows that engine local decodes together."""
    llama: LlamaConfig = LlamaConfig()
    """Slots, context and prompt cache of engine llama.cpp."""

    def __post_init__(self) -> None:
        if self.engine == "llama.cpp" and self.adapter:
            raise ValueError(
                f"serve: engine llama.cpp serves a GGUF file as it is, but adapter {self.adapter!r} is given; merge it"
            )


@dataclass(frozen=True)
class TaskConfig:
    """The task, how many of its problems the run takes, and the task's own options."""

    name: str = "pal"
    """A task of `matryoshka.tasks`, or your own as FILE.py:CLASS or PACKAGE.MODULE:CLASS."""
    warmup: int = 48
    """Problems of the warm-up."""
    train: int = 120
    """Training problems, whose episodes make the preference pairs."""
    validation: int = 60
    """Validation problems, by which the learning rate and the round are chosen."""
    test: int = 160
    """Test problems, which are used for the report alone."""
    held_out: int = 0
    """Further test problems of kinds that no other split has, on tasks that have some."""
    options: object = None
    """Options of the chosen task."""

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("train", 1), ("validation", 1), ("test", 1), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"task: {name} {getattr(self, name)} must be at least {least}")
        kind = options_class(task_class(self.name))
        given = {} if self.options is None else self.options
        if isinstance(given, Mapping):
            object.__setattr__(self, "options", parse(kind, given, f"the task {self.name!r}", prefix="options"))
        elif type(given) is not kind:
            raise ValueError(f"task: the options of {self.name!r} are {kind.__name__}; got {type(given).__name__}")

    @property
    def sizes(self) -> dict[str, int]:
        """Problems by split."""
        return {split: getattr(self, split) for split in SPLITS}

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a user's own options cannot be imported by its name in another process, the task's can be found.
        return _task_config, (self.name, self.sizes, to_toml(self.options))


def _task_config(name: str, sizes: dict[str, int], options: str) -> TaskConfig:
    return TaskConfig(name, **sizes, options=tomllib.loads(options))


@dataclass(frozen=True)
class WarmupConfig:
    """The warm-up SFT. source: "gold" (the examples' own steps), "file" (`data`, an SFT file), "none" (no warm-up), or
    "generator": what the black box itself proposed in episodes that succeeded.

    samples: such episodes an example, at the collection's temperature; wins_per_example: how many texts that won stay.
    """

    source: Literal["gold", "file", "generator", "none"] = "gold"
    data: str = ""
    samples: int = 4
    wins_per_example: int = 2
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes run. samples (K) per example and temperature are of collection; evaluation is greedy.

    bootstrap: guidances asked of the generator itself for a training example that none of the samples solved (with a
    reward above .5, which is a ROUGE-L on LaMP-4: few headlines reach that).
    limit: episodes in flight. max_failed_share: more episodes than this, whose black-box calls failed for good, stop
    the run (from 20 episodes on).
    """

    samples: int = 8
    bootstrap: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_tokens: int = 256
    code_tokens: int = 512
    protocol: Literal["label_free", "oracle"] = "label_free"
    inner_attempts: int = 1
    outer_turns: int = 1
    limit: int = 256
    max_failed_share: float = 0.2


@dataclass(frozen=True)
class DpoConfig:
    """Preference training. learning_rates: tried in turn, chosen on validation ((): train.learning_rate alone).

    pairs_per_example caps the pairs of one example over all rounds. reference_cache: keep reference log-probs in the
    run's folder, so that later epochs and further learning rates need no reference pass; with tune = "full" they are
    always kept, in the round's.
    """

    objective: Preference = Preference(beta=0.1, label_smoothing=0.1)
    train: TrainConfig = TrainConfig()
    learning_rates: tuple[float, ...] = ()
    pairs_per_example: int = 4
    reference_cache: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A pilot run. name: its folder under `runs/`. star: also train the STaR control (SFT on round 1's winners).

    overlong: what happens to a training item or problem that does not fit the context, "error" or "skip" (counted).
    tensorboard: also write every stage's metrics as TensorBoard events into its folder (the extra `track`).
    budget_usd, budget_tokens: the most that the run may spend on [generator], over all its restarts; 0 is no limit. The
    run stops before the line is crossed, and a larger budget continues it.
    parallel: how the model lies on the ranks that torchrun starts; our own sampler needs all of it on each, so that
    "shard" and "hybrid" go with the engine vLLM.
    executor: where episodes run: in this process, or torchrun's, or as ray_tasks tasks of a Ray cluster (the extra
    `cluster`; 0: one for each GPU or, on CPUs, for each machine), which gives the same episodes.
    """

    name: str
    controller: ControllerConfig
    generator: GeneratorConfig
    seed: int = 0
    rounds: int = 2
    star: bool = True
    overlong: Literal["error", "skip"] = "error"
    tensorboard: bool = False
    budget_usd: float = 0.0
    budget_tokens: int = 0
    parallel: ParallelConfig = ParallelConfig()
    executor: Literal["local", "ray"] = "local"
    ray_tasks: int = 0
    serve: ServeConfig = ServeConfig()
    task: TaskConfig = TaskConfig()
    lora: LoraConfig = LoraConfig()
    warmup: WarmupConfig = WarmupConfig()
    rollout: RolloutConfig = RolloutConfig()
    dpo: DpoConfig = DpoConfig()

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds {self.rounds} must not be negative")
        is_cut = self.parallel.layout in ("shard", "hybrid")
        if is_cut and self.controller.tune == "full":
            raise ValueError(
                f"[parallel] layout {self.parallel.layout!r}: with tune = 'full' every rank of a pilot has the whole "
                "model; take layout 'replicate', or train an adapter"
            )
        if is_cut and self.controller.engine == "local":
            raise ValueError(
                f"[parallel] layout {self.parallel.layout!r}: the local sampler needs the whole model on every rank "
                "(layout 'replicate'); a model that does not fit is sampled by the vLLM engine"
            )
        if self.ray_tasks < 0:
            raise ValueError(f"ray_tasks {self.ray_tasks} must not be negative; 0 is one for each GPU or machine")
