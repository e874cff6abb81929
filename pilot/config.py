"""The configuration of a pilot run: one TOML file, every value with its default, unknown keys refused."""

from dataclasses import dataclass, field
from typing import Literal

from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.inference.llama_cpp import LlamaConfig
from matryoshka.inference.vllm_server import VllmConfig
from matryoshka.lora.linear import LoraConfig
from matryoshka.tasks.sandbox_backends import MIN_MEMORY_BYTES, Isolation


@dataclass(frozen=True)
class ControllerConfig:
    """The white-box model. path: a Hugging Face folder. threads: torch's on CPU, 0 for as many as there are cores.

    quantization "nf4": the base in four bits (QLoRA; the extra `cuda`). max_rows: rows the sampler decodes together.
    deterministic: one request at a time, bit for bit repeatable. engine: what samples, our own sampler or vLLM as
    [controller.vllm] says; training is ours in either case. tune "full": all weights are trained, in float32, and a
    policy is a model folder, as large as the model; [lora] is not used, and vLLM is started again for every policy.
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
    vllm: VllmConfig = VllmConfig()

    def __post_init__(self) -> None:
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
    """The name of one of the task's scripted generators, which then answers in this process; [generator] is not used.
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
class AlfworldConfig:
    """Households. data: a folder of games, ALFWorld's own layout or <split>.jsonl.xz; "" makes our own from the seed.

    train_split (warm-up and validation too), test_split, held_out_split: where the games of [task] come from. size:
    of our own. types: of tasks, () for all six. mode: the generator writes programs, or acts itself ("react").
    backend: our engine or the package textworld. verbs: "old" is ALFWorld before 0.4.0. max_steps: commands in one
    household. asks: questions that one program may ask.
    """

    data: str = ""
    train_split: str = "train"
    test_split: str = "valid_seen"
    held_out_split: str = "valid_unseen"
    size: Literal["small", "medium", "large"] = "medium"
    types: tuple[str, ...] = ()
    mode: Literal["program", "react"] = "program"
    backend: Literal["engine", "textworld"] = "engine"
    verbs: Literal["current", "old"] = "current"
    max_steps: int = 50
    asks: int = 5
    games_seed: int = -1
    """The seed that draws the games; -1 is the run's own seed. Runs of several seeds over the same games set it."""


@dataclass(frozen=True)
class LampConfig:
    """Which LaMP task, and what of a user's history is shown.

    entries: profile entries retrieved, 0 for the published number. prompt_tokens: the controller's whole prompt in its
    own tokens. entry_characters: of one entry. show_question: put the question into the controller's prompt, which the
    published one leaves out. retrieved: entries that the generator sees besides the summary. retrieval "recency" needs
    dated entries, "dense" an OpenAI-compatible embeddings endpoint (embeddings_cache: a file that keeps what it
    answered, "" for none). meteor: score headlines by METEOR too (WordNet).
    """

    task: Literal["1", "2N", "2M", "3", "4"] = "2N"
    retrieval: Literal["bm25", "recency", "dense"] = "bm25"
    entries: int = 0
    prompt_tokens: int = 4000
    entry_characters: int = 2000
    show_question: bool = False
    retrieved: int = 0
    meteor: bool = False
    embeddings_url: str = ""
    embeddings_model: str = ""
    embeddings_key_env: str = "OPENAI_API_KEY"
    embeddings_cache: str = "data/embeddings.sqlite"

    def __post_init__(self) -> None:
        for name, least in (("entries", 0), ("prompt_tokens", 1), ("entry_characters", 1), ("retrieved", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class TaskConfig:
    """The problems. name "words": made from the seed; "gsm8k": read from JSONL files; "alfworld": see [task.alfworld];
    "lamp": made from the seed, or read from the questions files train_file and test_file, see [task.lamp].

    warmup, train, validation, test, held_out: how many of each ("words": any number; "gsm8k": warm-up and validation
    are cut from the training file). Training rewards come from `train`; choices are made on `validation`.
    timeout_s, memory_mb: limits of one generated program. isolation: the kernel's boundary around generated programs
    (SECURITY.md). "auto" takes what this machine has and says what is missing, "required" refuses to start without
    Landlock and seccomp, "none" keeps limits alone. sandbox_command: a command that programs run through instead, such
    as docker run --rm -i --network=none python:3.12-slim; () for none.
    """

    name: Literal["words", "gsm8k", "alfworld", "lamp"] = "words"
    prompts: Literal["brief", "compact", "full"] = "compact"
    warmup: int = 48
    train: int = 120
    validation: int = 60
    test: int = 160
    held_out: int = 0
    train_file: str = ""
    test_file: str = ""
    timeout_s: float = 5.0
    memory_mb: int = 512
    isolation: Isolation = "auto"
    sandbox_command: tuple[str, ...] = ()
    alfworld: AlfworldConfig = AlfworldConfig()
    lamp: LampConfig = LampConfig()

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("train", 1), ("validation", 1), ("test", 1), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"task: {name} {getattr(self, name)} must be at least {least}")
        if self.memory_mb * 2**20 < MIN_MEMORY_BYTES:
            raise ValueError(f"task: memory_mb {self.memory_mb} must be at least {MIN_MEMORY_BYTES // 2**20}")


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
