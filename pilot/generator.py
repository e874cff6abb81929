"""The black box of a run: which one a name means, and how it is opened, by all ranks together, each with its part."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matryoshka.core.config import load_toml
from matryoshka.core.protocols import Generator
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.llama_cpp import file_digest
from matryoshka.inference.spending import Budget, total
from matryoshka.lora.files import adapter_hash
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.problems import scripted_generator
from matryoshka.pilot.serving import started

if TYPE_CHECKING:
    from matryoshka.pilot.context import Run


def named(config: RunConfig, name: str) -> tuple[GeneratorConfig, ServeConfig]:
    """Return the [generator] and [serve] of another black box: a TOML file with [generator]'s keys, else one beside the
    present one.

    That is another scripted generator of the task, where [serve] names one, or another model at [generator]. Raises
    ValueError where [serve] starts a model.
    """
    if name.endswith(".toml"):
        return load_toml(GeneratorConfig, name), ServeConfig()
    if config.serve.scripted:
        return config.generator, replace(config.serve, scripted=name)
    if config.serve.model:
        raise ValueError(f"generator {name!r}: [serve] starts one model alone; name others by TOML files")
    return replace(config.generator, model=name), config.serve


def _served_identity(serve: ServeConfig) -> str:
    """Return what the answers of a server of our own are kept under, which changes with its weights."""
    model = Path(serve.model)
    if serve.engine == "llama.cpp":
        return f"{model.name}+{file_digest(model)[:16]}"
    return f"{model.name}+{adapter_hash(Path(serve.adapter)) if serve.adapter else 'base'}"


def open_generator(run: "Run", config: GeneratorConfig, serve: ServeConfig) -> Generator:
    """Return the black box, checked; a server of our own is started where [serve] names a model. It ends with the run.

    Raises ValueError, GeneratorError for one that cannot work.
    """
    if serve.scripted:
        return scripted_generator(run.config.task, serve.scripted)
    ranks, world, stack = run.ranks, run.world, run.stack
    if serve.model:
        url = ""
        with ranks.together():
            if world.local_rank == 0:  # one server for all ranks of a machine
                log = run.folder / ("generator.log" if ranks.node == 0 else f"generator.node-{ranks.node}.log")
                url = stack.enter_context(started(serve, run.config.controller.deterministic, log))
        url = ranks.texts(url)[world.rank - world.local_rank]
        config = replace(config, base_url=url, model=serve.name, identity=_served_identity(serve))
    with ranks.together():
        cache = ResponseCache(run.cache)
        stack.callback(cache.close)
    budget = Budget(run.config.budget_usd, run.config.budget_tokens)
    if ranks.num_nodes > 1 and budget != Budget():
        spent = [json.loads(text) for text in ranks.texts(json.dumps(total(cache)))]
        budget = budget.part(ranks.node, spent[:: world.local_size])
    with ranks.together():
        part = config.part(world.rank, world.size)
        generator = OpenAIGenerator(part, cache, run.config.seed, budget)
        stack.callback(lambda: run.runner.run(generator.aclose()))
        run.runner.run(generator.check())
    return generator
