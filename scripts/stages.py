"""The subcommands that work on a run directory or on a user's own files; each is thin over `run.py` and `pilot.py`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka.core.distributed import open_world
from matryoshka.core.parallel.layout import ParallelConfig
from matryoshka.core.protocols import RunStopped
from matryoshka.core.records import to_json
from matryoshka.core.training.train import Interrupted, TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot import finetune
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.evaluate import evaluate as evaluate_run
from matryoshka.pilot.loop import run_pilot
from matryoshka.pilot.run_report import write_run_report, write_transfer
from matryoshka.pilot.stages import collected, warm_up, write_pairs
from matryoshka.tasks.find import task_class

RUNS = Path("runs")
STOPPED = 143  # what a shell reports of a process that SIGTERM ended
SPENT = 3


@dataclass(frozen=True)
class DpoCommand:
    """Preference training on a user's own rows (prompt, chosen, rejected, as TRL has them), one JSON object a line.

    data: the JSONL file. model: a Hugging Face folder. out: where the adapter (PEFT layout), metrics and checkpoints
    go; an unfinished run found there is continued. adapter: an adapter folder to start from, which then is the
    reference; default a fresh adapter, the base model being the reference. quantization "nf4": the frozen base in four
    bits (QLoRA; the extra `cuda`). overlong: "error" or "skip" (counted).
    tensorboard: write the metrics as TensorBoard events too (the extra `track`). reference_cache: a file that keeps
    reference log-probs, so that later epochs and runs need no reference pass; default none. tune: "adapter", or "full"
    for all weights, which are written to out/model; the model as it comes is then the reference, whose log-probs are
    computed before training (default file: out/reference.sqlite). Under torchrun, [parallel] says how the model lies on
    the ranks.
    """

    data: Path
    model: Path
    out: Path
    adapter: Path | None = None
    overlong: str = "error"
    dtype: str = "float32"
    quantization: str = "none"
    device: str = "cpu"
    threads: int = 0
    tensorboard: bool = False
    reference_cache: Path | None = None
    tune: str = "adapter"
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    objective: Preference = Preference()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class SftCommand:
    """Supervised training on a user's own rows ({prompt, completion} or {messages}); fields as in `dpo`."""

    data: Path
    model: Path
    out: Path
    adapter: Path | None = None
    overlong: str = "error"
    dtype: str = "float32"
    quantization: str = "none"
    device: str = "cpu"
    threads: int = 0
    tensorboard: bool = False
    tune: str = "adapter"
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-5, epochs=3))


@contextmanager
def stoppable() -> Iterator[None]:
    """End the process with one line when the run was stopped in order: by a signal (STOPPED), by its budget (SPENT)."""
    try:
        yield
    except Interrupted as err:
        print(f"{err}; the same command continues", file=sys.stderr)
        sys.exit(STOPPED)
    except RunStopped as err:
        print(err, file=sys.stderr)
        sys.exit(SPENT)


@stoppable()
def pilot(config: RunConfig) -> None:
    """Run or continue the whole job; the last line printed is its summary as JSON, or the part that the task chose."""
    with open_world(config.controller.device) as world:
        summary = run_pilot(config, RUNS, world)
    if world.is_first:
        _say(summary)
        if headline := task_class(config.task.name).headline:
            _say({name: summary[name] for name in headline})


@stoppable()
def sft(config: SftCommand) -> None:
    """Train an adapter on conversations."""
    finetune.finetune(config, None)


@stoppable()
def dpo(config: DpoCommand) -> None:
    """Train an adapter on preference pairs."""
    finetune.finetune(config, config.objective, config.reference_cache)


@stoppable()
def collect(config: RunConfig) -> None:
    """Warm up and collect the episodes of every round that can be collected: those whose policy is trained."""
    with open_world(config.controller.device) as world, open_run(config, RUNS, world=world) as run:
        warm_up(run)
        episodes = len(collected(run))
        if world.is_first:
            _say({"episodes": episodes})


def pairs(config: RunConfig) -> None:
    """Make preferences.jsonl from the episodes collected so far."""
    with open_run(config, RUNS, trains=False) as run:
        _, counts = write_pairs(run, collected(run))
        _say(counts.as_dict())


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """The configuration of a pilot, to evaluate its policies.

    generators: other black boxes to evaluate them with instead, separated by commas: names of models at [generator], or
    of scripted generators where [serve] names one, or TOML files with the keys of [generator].
    """

    generators: str = ""


@stoppable()
def evaluate(config: EvaluateConfig) -> None:
    """Evaluate every policy that is trained, print its scores and write the report, or transfer.json."""
    pilot_config = RunConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})
    device = config.controller.device
    with open_world(device) as world, open_run(pilot_config, RUNS, world=world, trains=False) as run:
        rows: list[dict[str, Any]] = []
        if config.generators:
            names = [name.strip() for name in config.generators.split(",")]
            if not all(names):
                raise ValueError(f"generators {config.generators!r}: expected names or TOML files, separated by commas")
            found = write_transfer(run, names)
            rows = [{"generator": name, **row} for name, row in found.items()]
        else:
            conditions = evaluate_run(run)
            rows = [{condition.name: to_json(run.task.score(condition.trajectories))} for condition in conditions]
            rows.append(write_run_report(run, conditions, {}))
        for row in rows if world.is_first else ():
            _say(row)


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value))
