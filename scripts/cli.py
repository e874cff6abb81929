"""The `matryoshka` command. A subcommand is a function whose parameters are its flags, or whose one parameter is a
configuration dataclass.
"""

import dataclasses
import importlib
import inspect
import itertools
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from matryoshka.core.config import load_toml, nearest
from matryoshka.core.protocols import GeneratorError, RunStopped
from matryoshka.core.redaction import redact, redact_output
from matryoshka.core.signals import Interrupted
from matryoshka.core.terminal import printable

DEBUG = "MATRYOSHKA_DEBUG"
INTERRUPTED = 143  # a shell's status for a process that SIGTERM ended
STOPPED = 3


# Name -> one line of help. The function of that name is in the module of that name in this package.
COMMANDS: dict[str, str] = {
    "doctor": "what this machine has: hardware, kernels, servers, data, keys",
    "demo": "the main job on small models that packages carry: no download, no GPU, no key",
    "init": "a recipe as a commented configuration in the current folder: matryoshka init demo",
    "check": "a configuration without models and calls: files, splits, prompts, tokens, price",
    "pilot": "the main job: warm-up, rounds of collect, pair and train, evaluation, report",
    "sft": "supervised training of an adapter on your own conversations",
    "collect": "a pilot's episodes, or with --out those of any policy in a folder of their own",
    "pairs": "preference pairs from collected episodes, in our form, TRL's or the original's",
    "dpo": "preference training of an adapter on your own pairs",
    "round": "one round of a pilot alone: matryoshka round 2 --config FILE",
    "evaluate": "every policy of a pilot on the held-out problems, and the report",
    "score": "predictions made elsewhere by a task's own measure: matryoshka score FILE --task.name pal",
    "report": "the report of a run again, from its record alone: matryoshka report runs/demo-0",
    "compare": "runs and evaluations with one another, problem by problem where these are equal",
    "curve": "a pilot over several seeds, and what its policies gain stage by stage",
    "estimate": "what a pilot will cost, from 20 training examples that are really run",
    "plan": "memory, communication and speed of training on a cluster, predicted, and the layout to take",
    "cache": "the answers that a run has paid for: stats, prune, export",
    "data": "a benchmark's own files, checked and resumable: matryoshka data gsm8k, gsm-hard, alfworld, lamp",
    "serve": "a model and its adapters behind an OpenAI-compatible HTTP server",
    "gateway": "an OpenAI-compatible endpoint that records an agent's calls to the controller, to train it on them",
    "train-from": "the next policy of a gateway, trained on the episodes that have ended: matryoshka train-from RUN",
    "parity": "log-probs of the same tokens from trainer, sampler and vLLM, with and without an adapter",
    "merge": "an adapter folded into its model, as a Hugging Face folder",
    "export": "the policy of a run's stage: an adapter in PEFT layout, or a model folder",
    "convert": "a GGUF file, or the embedded controller, as a Hugging Face folder",
    "bench": "measurements of this machine against other software: matryoshka bench --help lists them",
}


def load_command(name: str) -> Callable[..., None]:
    """Return the function of a command; its module is imported only now, so that the others cost nothing."""
    attribute = name.replace("-", "_")
    module = "matryoshka.benchmarks.command" if name == "bench" else f"matryoshka.scripts.{attribute}"
    function: Callable[..., None] = getattr(importlib.import_module(module), attribute)
    return function


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0, or 2 for a user's error, which is one line on stderr.

    130 is a second Ctrl-C, INTERRUPTED an orderly stop by a signal, STOPPED one by the run itself (its budget). Of
    several ranks (torchrun), an error names the one that it happened on, and torchrun's own report has the traceback.
    With MATRYOSHKA_DEBUG=1 errors keep their traceback.
    """
    redact_output()
    # Before torch is imported: OpenMP threads that spin while they wait starve the other processes of this machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        if name not in COMMANDS:
            raise ValueError(f"matryoshka: unknown command {name!r}; {nearest(name, COMMANDS)}")
        _run(name, rest)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough; Python must not flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get(DEBUG) == "1":
            raise
        print("stopped at once; what was recorded is kept, and the same command continues", file=sys.stderr)
        return 130
    except (Interrupted, RunStopped) as err:
        print(f"{err}; the same command continues" if isinstance(err, Interrupted) else err, file=sys.stderr)
        return INTERRUPTED if isinstance(err, Interrupted) else STOPPED
    except Exception as err:
        _tell_torchrun(err)
        if not isinstance(err, ValueError | OSError | GeneratorError) or os.environ.get(DEBUG) == "1":
            raise
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        text = "; ".join([str(err), *getattr(err, "__notes__", [])])
        lines = (printable(line) for line in text.splitlines())  # a server's answer or a file may be quoted in it
        print(f"{rank}error: " + "\n".join(lines), file=sys.stderr)
        return 2
    return 0


def _tell_torchrun(err: Exception) -> None:
    """Leave `err` and its traceback where torchrun looks for them: its last message has both, and the rank."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(err)
        file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        file.write_text(redact(file.read_text()))


def read_config(cls: Any, arguments: Sequence[str], program: str) -> Any:
    """Return the `cls` that `--config FILE`, where given, and then the flags describe.

    The task's name is read first, since it decides which flags `--task.options.*` there are.
    """
    rest = list(arguments)
    from_file: dict[str, Any] = {}
    task = _task_flag(arguments) if any(f.name == "task" for f in dataclasses.fields(cls)) else {}
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            if not equals and index + 1 == len(arguments):
                raise ValueError("--config: expected a TOML file after it")
            from_file["default"] = load_toml(cls, value if equals else arguments[index + 1], task)
            del rest[index : index + (1 if equals else 2)]
            break
    description = f"{inspect.getdoc(cls)}\n\n--config FILE reads it from TOML first."
    if from_file or not task:
        return tyro.cli(cls, prog=program, args=rest, description=description, **from_file)
    kind: Any = typing.get_type_hints(cls)["task"]
    chosen = ("task", kind, dataclasses.field(default=kind(task["task.name"])))
    parser: Any = dataclasses.make_dataclass(cls.__name__, [chosen], bases=(cls,), frozen=True)
    found = tyro.cli(parser, prog=program, args=rest, description=description)
    return cls(**{f.name: getattr(found, f.name) for f in dataclasses.fields(cls)})


def _task_flag(arguments: Sequence[str]) -> dict[str, str]:
    """Return {"task.name": NAME} for the flag `--task.name NAME`, {} without it."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        if option == "--task.name":
            return {"task.name": value if equals else following}
    return {}


def _run(name: str, arguments: Sequence[str]) -> None:
    function, program = load_command(name), f"matryoshka {name}"
    if name == "bench":  # each benchmark has a configuration of its own
        function(arguments, read_config)
        return
    kinds = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]):
        function(read_config(kinds[0], arguments, program))
    else:
        tyro.cli(function, prog=program, args=list(arguments))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: matryoshka COMMAND [flags]",
            "",
            *lines,
            "",
            "matryoshka COMMAND --help lists its flags; a command with a configuration takes --config FILE.toml, and",
            f"flags override the file. {DEBUG}=1 shows tracebacks.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
