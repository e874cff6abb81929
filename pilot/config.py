"""The configuration of a pilot run: one TOML file, every value with its default, unknown keys refused."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from matryoshka.core.config import check_least, parse, to_toml
from matryoshka.core.models.load import model_folder
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.protocols import Controller, Generator
from matryoshka.core.records import RolloutSettings, Sampling
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.inference.llama_cpp import LlamaConfig
from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.lora.linear import LoraConfig
from matryoshka.tasks.find import NoOptions, options_class, own_class, task_class

SPLITS = ("warmup", "train", "validation", "test", "held_out")


@dataclass(frozen=True)
class ControllerConfig:
    """The white-box model that is trained to guide the generator."""

    path: str
    """A Hugging Face folder, or the hub id (OWNER/NAME) of a model in the local hub cache."""
    adapter: str = ""
    """An adapter folder to start from: it is the untrained policy, and the reference of the first training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the base model's weights."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4" holds the frozen base in four bits (QLoRA; the extra `cuda`)."""
    device: str = "cpu"
    """Where the model computes: "cpu" or "cuda"."""
    threads: int = 0
    """CPU threads of torch, 0 for as many as there are cores."""
    max_rows: int = 64
    """Rows that our sampler decodes together."""
    deterministic: bool = False
    """Run one request at a time, so that a run is repeatable bit for bit."""
    engine: Literal["local", "vllm"] = "local"
    """The controller's sampler: our own, or vLLM as [controller.vllm] says. Training is ours in either case.
    """
    tune: Literal["adapter", "full"] = "adapter"
    """The trained part: an adapter, or all weights in float32 ("full"). A policy is then a model folder, as large as
    the model; [lora] is not used, and vLLM is started again for every policy."""
    scheme: str = ""
    """A control scheme of your own, FILE.py:CLASS or PACKAGE.MODULE:CLASS, which is made of every policy and gives
    guidance in its place (examples/own_scheme.py)."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM serves the controller."""

    @property
    def folder(self) -> Path:
        """The folder of the model. Raises FileNotFoundError for an id that the hub cache does not have."""
        return model_folder(self.path)

    def __post_init__(self) -> None:
        check_least(self, "controller: ", threads=0, max_rows=1)
        if self.scheme:
            own_class(self.scheme, "scheme", Controller, 1)
        if self.engine == "vllm" and self.deterministic:
            raise ValueError("deterministic is of the local engine; what vLLM draws depends on its batches' rounding")
        if self.tune != "full":
            return
        if self.adapter:
            raise ValueError(f"tune = 'full': adapter {self.adapter!r} is for a frozen base; merge it into the model")
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


# The adapter that makes SmolLM2-135M-Instruct the demo's generator.
EMBEDDED_ADAPTER = Path(__file__).resolve().parents[1] / "inference" / "demo_generator"


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
    """The engine: our own sampler, or llama.cpp (the extra `llama`)."""
    adapter: str = ""
    """An adapter folder for the model, or "embedded" for the demo's, which this package carries; engine local only."""
    name: str = "demo-generator"
    """The name under which the model is served."""
    threads: int = 1
    """CPU threads of the server, 0 for as many as there are cores."""
    copies: int = 1
    """Servers of the same model side by side, between which requests are shared out. Where other programs use the same
    cores, several servers of one thread are faster than one of several threads, which wait for one another."""
    max_rows: int = 64
    """Rows that engine local decodes together."""
    llama: LlamaConfig = LlamaConfig()
    """Slots, context and prompt cache of engine llama.cpp."""

    def __post_init__(self) -> None:
        check_least(self, "serve: ", copies=1, threads=0, max_rows=1)
        if ":" in self.scripted:
            own_class(self.scripted, "serve: scripted", Generator)
        if self.engine == "llama.cpp" and self.adapter:
            raise ValueError(
                f"serve: engine llama.cpp serves a GGUF file as it is, but adapter {self.adapter!r} is given; merge it"
            )

    @property
    def adapter_folder(self) -> Path | None:
        """The folder that `adapter` names, None where there is none."""
        if self.adapter == "embedded":
            return EMBEDDED_ADAPTER
        return Path(self.adapter) if self.adapter else None


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
        check_least(self, "task: ", warmup=0, train=1, validation=1, test=1, held_out=0)
        kind = options_class(task_class(self.name))
        given = {} if self.options is None else self.options
        if given and kind is NoOptions:
            what = f"the task {self.name!r} has no options; a task of your own has those of the dataclass that"
            raise ValueError(f"task.options: {what} annotates its attribute `options` (docs/own_task.md)")
        if isinstance(given, Mapping):
            object.__setattr__(self, "options", parse(kind, given, f"the task {self.name!r}", prefix="options"))
        elif type(given) is not kind:
            raise ValueError(f"task: the options of {self.name!r} are {kind.__name__}; got {type(given).__name__}")

    @property
    def sizes(self) -> dict[str, int]:
        """Problems by split."""
        return {split: getattr(self, split) for split in SPLITS}

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process cannot import the class of a user's own options, but it can find the task by its file, in
        # whatever folder it runs.
        file, colon, attribute = self.name.rpartition(":")
        name = f"{Path(file).resolve()}:{attribute}" if colon and file.endswith(".py") else self.name
        return _task_config, (name, self.sizes, to_toml(self.options))


def _task_config(name: str, sizes: dict[str, int], options: str) -> TaskConfig:
    return TaskConfig(name, **sizes, options=tomllib.loads(options))


@dataclass(frozen=True)
class WarmupConfig:
    """The warm-up: supervised training before the first round."""

    source: Literal["gold", "file", "generator", "adapter", "none"] = "gold"
    """The source of the warm-up: "gold", the examples' own guidance; "file", your rows in `data`; "generator", what the
    generator itself proposed in episodes that succeeded. "adapter" takes [controller] adapter as the policy of the
    warm-up, and the base model is then the untrained policy. "none" leaves the warm-up out."""
    data: str = ""
    """A JSONL file of conversations, for source "file"."""
    samples: int = 4
    """Episodes for each example at the collection temperature, for source "generator"."""
    wins_per_example: int = 2
    """How many successful texts of an example are kept, for source "generator"."""
    seed: int = -1
    """Seed of the episodes for source "generator"; -1 is the run's own. Runs of several seeds that share these episodes
    set it."""
    gold_per_group: int = 0
    """For source "generator": where fewer texts than this succeeded in a group of examples (as the task groups them, by
    type), gold guidance of examples that none succeeded in makes up the number. 0 takes no gold guidance."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))
    """How the warm-up trains."""

    def __post_init__(self) -> None:
        check_least(self, "warmup: ", samples=1, wins_per_example=1, gold_per_group=0)
        if self.source == "file" and not self.data:
            raise ValueError("warmup: source = 'file', but data names no file; give a JSONL file of conversations")


EPISODE_LEAST = {"temperature": 0, "guidance_tokens": 1, "code_tokens": 1, "inner_attempts": 1, "outer_turns": 1}


def check_top_p(top_p: float | None) -> None:
    """Raise ValueError for a share that no sampler takes."""
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1]; 1 truncates nothing")


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes run."""

    samples: int = 8
    """K: sampled episodes for each training example in a round. Evaluation runs one greedy episode."""
    examples: int = 0
    """Training examples that one round samples, 0 for all of them. Each round takes the next ones of the split and, at
    its end, the first ones again."""
    bootstrap: int = 0
    """Episodes that the generator guides itself, for each training example that no sample solved (reward above .5,
    which is a ROUGE-L on LaMP-4: few headlines reach it)."""
    replans: int = 0
    """New plans that are sampled in one and the same state, after a failed first plan of each training example that has
    one. Without several of them no pair teaches re-planning, since every episode fails in a state of its own. It needs
    outer_turns of at least 2."""
    temperature: float = 1.0
    """Temperature of the controller in collection; evaluation is greedy."""
    top_p: float = 1.0
    """Nucleus of the controller's sampling in collection."""
    guidance_tokens: int = 256
    """Most tokens of one guidance."""
    code_tokens: int = 512
    """Most tokens of one answer of the generator."""
    protocol: Literal["label_free", "oracle"] = "label_free"
    """"label_free": retries see execution errors only. "oracle": retries also see whether the answer was wrong."""
    inner_attempts: int = 1
    """Attempts of the generator under one guidance."""
    outer_turns: int = 1
    """Guidances in one episode: the first plan and re-plans after failures."""
    limit: int = 256
    """Episodes in flight in one process."""
    max_failed_share: float = 0.2
    """The run stops when more than this share of the episodes fail because calls of the generator failed for good
    (judged from 20 episodes on)."""

    def __post_init__(self) -> None:
        least = {"samples": 1, "examples": 0, "bootstrap": 0, "replans": 0, "limit": 1, "max_failed_share": 0}
        check_least(self, "rollout: ", **least, **EPISODE_LEAST)
        check_top_p(self.top_p)


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of [rollout] that are different in collection or in evaluation; a key left out is as in [rollout]."""

    temperature: float | None = None
    """Temperature of the controller; evaluation is greedy where this is left out."""
    top_p: float | None = None
    """Nucleus of the controller's sampling; evaluation has none where this is left out."""
    guidance_tokens: int | None = None
    """Most tokens of one guidance."""
    code_tokens: int | None = None
    """Most tokens of one answer of the generator."""
    protocol: Literal["label_free", "oracle"] | None = None
    """The feedback of retries: execution errors only, or also whether the answer was wrong."""
    inner_attempts: int | None = None
    """Attempts of the generator under one guidance."""
    outer_turns: int | None = None
    """Guidances in one episode: the first plan and re-plans after failures."""

    def __post_init__(self) -> None:
        check_least(self, "", **EPISODE_LEAST)
        check_top_p(self.top_p)


@dataclass(frozen=True)
class DpoConfig:
    """Preference training in each round."""

    objective: Preference = Preference(beta=0.1, label_smoothing=0.1)
    """The preference loss."""
    train: TrainConfig = TrainConfig()
    """How a round trains."""
    learning_rates: tuple[float, ...] = ()
    """Rates that are tried in turn and chosen from on validation problems; none: train.learning_rate alone."""
    pairs_per_example: int = 4
    """Most pairs of one example over all rounds."""
    reference_cache: bool = False
    """Keep reference log-probs in the run's folder, so that later epochs and further learning rates need no reference
    pass. With tune = "full" they are always kept, in the round's folder."""

    def __post_init__(self) -> None:
        check_least(self, "dpo: ", pairs_per_example=1)
        for rate in self.learning_rates:
            replace(self.train, learning_rate=rate)  # which refuses one that no training takes


@dataclass(frozen=True)
class RunConfig:
    """A pilot run: warm-up, rounds of collection and training, evaluation."""

    name: str
    """The run's folder under `runs/`."""
    controller: ControllerConfig
    """The white-box model."""
    generator: GeneratorConfig
    """The black-box model."""
    seed: int = 0
    """Seed of problems, adapters and sampling."""
    rounds: int = 2
    """Rounds of collect, pair and train."""
    star: bool = True
    """Also train the STaR control: SFT on round 1's winners."""
    wrong: bool = True
    """Also evaluate the gold guidance of another problem, which shows whether the generator reads its guidance."""
    overlong: Literal["error", "skip"] = "error"
    """The treatment of a problem or item that does not fit the context: "skip" leaves it out and counts it.
    """
    tensorboard: bool = False
    """Write every stage's metrics as TensorBoard events, too (the extra `track`)."""
    budget_usd: float = 0.0
    """Most dollars that the run may spend on [generator] over all its restarts, 0 for no limit. The run stops before
    the limit is crossed, and a larger budget continues it."""
    budget_tokens: int = 0
    """Most tokens that the run may spend on [generator] over all its restarts, 0 for no limit."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model lies on the ranks that torchrun starts. Our own sampler needs all of it on each rank, so that
    "shard" and "hybrid" need the engine vLLM."""
    executor: Literal["local", "ray"] = "local"
    """Where episodes run: "local" in this process or those of torchrun, "ray" as tasks of a Ray cluster (the extra
    `cluster`). Both give the same episodes."""
    ray_tasks: int = 0
    """Tasks of the Ray cluster, 0 for one for each GPU or, on CPUs, for each machine."""
    serve: ServeConfig = ServeConfig()
    """A generator of our own to start beside the run."""
    task: TaskConfig = TaskConfig()
    """The problems."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained."""
    warmup: WarmupConfig = WarmupConfig()
    """The warm-up."""
    rollout: RolloutConfig = RolloutConfig()
    """How episodes run."""
    collect: EpisodeConfig = EpisodeConfig()
    """How collection differs from [rollout]."""
    evaluate: EpisodeConfig = EpisodeConfig()
    """How evaluation and the choice on validation problems differ from [rollout]."""
    dpo: DpoConfig = DpoConfig()
    """Preference training."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_least(self, "", rounds=0, ray_tasks=0, budget_usd=0, budget_tokens=0)
        if self.warmup.source == "adapter" and not self.controller.adapter:
            raise ValueError("[warmup] source = 'adapter', but [controller] adapter names no folder; name the adapter")
        if self.rollout.replans and rollout_settings(self, greedy=False).outer_turns < 2:
            raise ValueError(f"[rollout] replans {self.rollout.replans} needs outer_turns of at least 2 in collection")
        ratios = {self.warmup.train.lora_plus_ratio, self.dpo.train.lora_plus_ratio}
        if self.controller.tune == "full" and ratios != {1.0}:
            raise ValueError(f"tune = 'full' trains no adapter, but lora_plus_ratio is {max(ratios):g}; leave it at 1")
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


def check_name(name: str) -> None:
    """Raise ValueError for a name that is no folder below the one that keeps runs."""
    path = Path(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"name {name!r} must name a folder below runs/, such as 'mine' or 'today/mine'")


def run_part(config: RunConfig) -> RunConfig:
    """Return the configuration of the run alone, without the fields that the configuration of a command adds."""
    return RunConfig(**{field.name: getattr(config, field.name) for field in fields(RunConfig)})


def rollout_settings(config: RunConfig, greedy: bool) -> RolloutSettings:
    """Return the settings of an episode: of evaluation (`greedy`, unless [evaluate] has a temperature) or collection.

    The generator is always greedy.
    """
    table = config.evaluate if greedy else config.collect
    own = {name: value for name, value in vars(table).items() if value is not None}
    if greedy:
        own = {"temperature": 0.0, "top_p": 1.0, **own}
    rollout = replace(config.rollout, **own)
    return RolloutSettings(
        controller=Sampling(
            temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=rollout.guidance_tokens
        ),
        generator=Sampling(max_tokens=rollout.code_tokens),
        protocol=rollout.protocol,
        inner_attempts=rollout.inner_attempts,
        outer_turns=rollout.outer_turns,
        overlong=config.overlong,
    )
