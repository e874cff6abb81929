"""`matryoshka bench NAME [flags] [--json]`: runs one benchmark and prints what it measured.

BENCHES names the modules of this package; each is imported only when it runs.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from matryoshka.benchmarks.result import BenchResult
from matryoshka.core.config import nearest

# Module of this package -> one line of help. The module has `Config` and `run(config: Config) -> BenchResult`.
BENCHES: dict[str, str] = {
    "compute": "first losses of every objective, samples against the trainer, four-bit weights: is it computed right?",
    "head": "log-probs of chosen tokens, forward and backward: ours against eager, liger, cce, trl",
    "step": "preference training steps on PAL prompts: token tree against padded batches and trl",
    "scale": "preference training on more and more ranks of this machine, and what they send each other",
    "qlora": "preference training steps over a base in four bits against the same base as it is",
    "load": "a checkpoint into memory: ours against transformers",
    "rollout": "episodes against a slow black box: overlap by Little's law, faults, memory, HTTP clients",
    "lamp": "LaMP's files into prompts on one core, and the memory that a large file takes",
    "ranks": "training steps on gloo ranks: bytes, peak memory and time against what `matryoshka plan` predicts",
    "serve": "tokens a second of our sampler and of vLLM at 1, 8 and 32 concurrent requests",
    "sandbox": "generated programs: runs a second, start-up and cost of the boundary, and what a long soak leaves",
    "env": "household games on one core: our ALFWorld engine against the stock environment",
}


def bench(arguments: Sequence[str], read_config: Callable[[Any, Sequence[str], str], Any]) -> None:
    """Run the bench that `arguments` name and print its tables, or with --json its object as the last line.

    read_config: (class, flags, program) -> configuration. Raises ValueError for an unknown bench.
    """
    name, *flags = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in BENCHES:
        raise ValueError(f"bench: unknown benchmark {name!r}; {nearest(name, BENCHES)}")
    module = importlib.import_module(f"matryoshka.benchmarks.{name}")
    as_json = "--json" in flags
    config = read_config(module.Config, [flag for flag in flags if flag != "--json"], f"matryoshka bench {name}")
    result: BenchResult = module.run(config)
    if as_json:
        print(result.to_json())
    else:
        show(result, Console())


def show(result: BenchResult, console: Console) -> None:
    """Print the rows and the verdict of `result` to `console`; what all rows have in common stands in the title."""
    first, *others = [row.details for row in result.rows] or [{}]
    same = {name: detail for name, detail in first.items() if others and all(o.get(name) == detail for o in others)}
    title = f"bench {result.bench}" + (f"; in all rows: {_listed(same)}" if same else "")
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for heading, justify in (("row", "left"), ("value", "right"), ("unit", "left"), ("details", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in result.rows:
        value = "not measured" if row.value is None else f"{row.value:,.4g}"
        details = {name: detail for name, detail in row.details.items() if name not in same}
        table.add_row(Text(row.name), value, Text(row.unit), Text(_listed(details)))
    console.print(table)
    if result.ratio is not None:
        target = "" if result.target is None else f", target {result.target:g}: {'holds' if result.holds else 'MISSED'}"
        console.print(f"ours against the best other: {result.ratio:.2f}x{target}")


def _listed(details: Mapping[str, Any]) -> str:
    shown = {name: f"{detail:.4g}" if isinstance(detail, float) else detail for name, detail in details.items()}
    return ", ".join(f"{name} {detail}" for name, detail in shown.items())


def _usage() -> str:
    width = max(map(len, BENCHES), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in BENCHES.items()]
    usage = "usage: matryoshka bench NAME [flags] [--json]"
    return "\n".join([usage, "", *lines, "", "matryoshka bench NAME --help lists its flags."])
