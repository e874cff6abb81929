"""The configuration of a pilot run: one TOML file, every value with its default, unknown keys refused."""

from dataclasses import dataclass, field
from typing import Literal

from matryoshka.core.train import TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.lora.linear import LoraConfig


@dataclass(frozen=True)
class ControllerConfig:
    """The white-box model. path: a Hugging Face folder. threads: torch's on CPU, 0 for as many as there are cores.

    max_rows: rows the sampler decodes together. deterministic: one request at a time, bit for bit repeatable.
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: int = 0
    max_rows: int = 64
    deterministic: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """A generator of our own to start beside the run: a model folder, an adapter folder, and the name it is served as.

    model "" starts none: the endpoint of [generator] is somebody else's. threads as in [controller].
    """

    model: str = ""
    adapter: str = ""
    name: str = "demo-generator"
    threads: int = 1
    max_rows: int = 64


@dataclass(frozen=True)
class TaskConfig:
    """The problems. name "words": made from the seed; "gsm8k": read from JSONL files.

    warmup, train, validation, test, held_out: how many of each ("words": any number; "gsm8k": warm-up and validation
    are cut from the training file). Training rewards come from `train`; choices are made on `validation`.
    """

    name: Literal["words", "gsm8k"] = "words"
    prompts: Literal["compact", "full"] = "compact"
    warmup: int = 48
    train: int = 120
    validation: int = 60
    test: int = 160
    held_out: int = 0
    train_file: str = ""
    test_file: str = ""
    timeout_s: float = 5.0
    memory_mb: int = 512

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("train", 1), ("validation", 1), ("test", 1), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"task: {name} {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class WarmupConfig:
    """The warm-up SFT. source: "gold" (the examples' own steps), "file" (`data`, an SFT file), "none" (no warm-up)."""

    source: Literal["gold", "file", "none"] = "gold"
    data: str = ""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes run. samples (K) per example and temperature are of collection; evaluation is greedy.

    limit: episodes in flight.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_tokens: int = 256
    code_tokens: int = 512
    protocol: Literal["label_free", "oracle"] = "label_free"
    inner_attempts: int = 1
    outer_turns: int = 1
    limit: int = 256


@dataclass(frozen=True)
class DpoConfig:
    """Preference training. learning_rates: tried in turn, chosen on validation ((): train.learning_rate alone).

    pairs_per_example caps the pairs of one example over all rounds.
    """

    objective: Preference = Preference(beta=0.1, label_smoothing=0.1)
    train: TrainConfig = TrainConfig()
    learning_rates: tuple[float, ...] = ()
    pairs_per_example: int = 4


@dataclass(frozen=True)
class RunConfig:
    """A pilot run. name: its folder under `runs/`. star: also train the STaR control (SFT on round 1's winners).

    overlong: what happens to a training item or problem that does not fit the context, "error" or "skip" (counted).
    tensorboard: also write every stage's metrics as TensorBoard events into its folder (the extra `track`).
    """

    name: str
    controller: ControllerConfig
    generator: GeneratorConfig
    seed: int = 0
    rounds: int = 2
    star: bool = True
    overlong: Literal["error", "skip"] = "error"
    tensorboard: bool = False
    serve: ServeConfig = ServeConfig()
    task: TaskConfig = TaskConfig()
    lora: LoraConfig = LoraConfig()
    warmup: WarmupConfig = WarmupConfig()
    rollout: RolloutConfig = RolloutConfig()
    dpo: DpoConfig = DpoConfig()

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds {self.rounds} must not be negative")
