"""The generator of a run: which one a name means, and how all ranks open it together, each with its part of the limits.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from matryoshka.core.config import load_toml
from matryoshka.core.files import file_digest
from matryoshka.core.models.weights import sampled_digest
from matryoshka.core.protocols import Generator
from matryoshka.core.records import Messages, Sample, Sampling
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.generator_config import EndpointConfig
from matryoshka.inference.generators import GeneratorConfig, OpenAIGenerator
from matryoshka.inference.spending import Budget, total
from matryoshka.lora.files import adapter_hash
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.ranks import Ranks
from matryoshka.pilot.serving import running_server
from matryoshka.tasks.find import check_named, own_class, task_class


def with_generator(config: RunConfig, name: str) -> RunConfig:
    """Return `config` with another generator: URL#MODEL, a TOML file with the keys of [generator], or a name.

    A name is another scripted generator of the task, where [serve] names one, or another model at [generator].
    Raises ValueError where [serve] starts a model.
    """
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        other = GeneratorConfig(url, model, api_key_env="")
        return replace(config, generator=other, serve=ServeConfig())
    if name.endswith(".toml"):
        return replace(config, generator=load_toml(GeneratorConfig, name), serve=ServeConfig())
    if config.serve.scripted:
        return replace(config, serve=replace(config.serve, scripted=name))
    if config.serve.model:
        raise ValueError(f"generator {name!r}: [serve] starts one model alone; name other generators by TOML files")
    return replace(config, generator=replace(config.generator, model=name))


def _served_identity(serve: ServeConfig) -> str:
    """Return the name that answers of our own server are cached under; it changes with the model's weights."""
    model = Path(serve.model)
    if serve.engine == "llama.cpp":
        return f"{model.name}+{file_digest(model)[:16]}"
    served = f"{model.name}+{sampled_digest(model)[:16]}"
    return f"{served}+{adapter_hash(serve.adapter_folder)}" if serve.adapter_folder else served


def scripted_generator(config: RunConfig) -> Generator:
    """Return the generator that [serve] scripted names: one of the task's, or a class of the user's own."""
    name = config.serve.scripted
    if ":" in name:
        generator: Generator = own_class(name, "[serve] scripted")()
        check_named(generator, f"[serve] scripted {name!r}")
        return generator
    return task_class(config.task.name).scripted_generator(name)


class RecordedGenerator:
    """Stands for the generator of a run of which nothing but the record is read: it has its name and is never asked."""

    def __init__(self, config: RunConfig) -> None:
        client = config.generator
        if config.serve.model:
            client = replace(client, model=config.serve.name, identity=_served_identity(config.serve))
        self.name = scripted_generator(config).name if config.serve.scripted else client.name

    async def complete(self, prompt: Messages, sampling: Sampling) -> Sample:
        """Raise RuntimeError."""
        raise RuntimeError(f"{self.name}: asked although the run is only read")


@contextmanager
def open_generator(
    config: RunConfig, folder: Path, ranks: Ranks, runner: asyncio.Runner, cache: Path
) -> Iterator[Generator]:
    """Open the generator that `config` describes, check that it answers, and close it at the end of the block.

    Servers of our own are started where [serve] names a model; they end with the block. folder: the run's, for the
    server's log. cache: the file of answers. Raises ValueError, GeneratorError for a generator that cannot work.
    """
    if config.serve.scripted:
        yield scripted_generator(config)
        return
    world, client = ranks.world, config.generator
    with ExitStack() as stack:
        if config.serve.model:
            urls: list[str] = []
            with ranks.all_or_none():
                if world.local_rank == 0:  # the same servers for all ranks of a machine
                    log = folder / ("generator.log" if ranks.node == 0 else f"generator.node-{ranks.node}.log")
                    for _ in range(config.serve.copies):
                        server = running_server(config.serve, config.controller.deterministic, log)
                        urls.append(stack.enter_context(server))
            url, *more = ranks.texts(" ".join(urls))[world.rank - world.local_rank].split()
            client = replace(client, base_url=url, model=config.serve.name, identity=_served_identity(config.serve))
            client = replace(client, endpoints=tuple(EndpointConfig(base_url=copy) for copy in more))
        with ranks.all_or_none():
            answers = ResponseCache(cache)
            stack.callback(answers.close)
        budget = Budget(config.budget_usd, config.budget_tokens)
        if ranks.num_nodes > 1 and budget != Budget():
            spent = [json.loads(text) for text in ranks.texts(json.dumps(total(answers)))]
            budget = budget.part(ranks.node, spent[:: world.local_size])
        with ranks.all_or_none():
            generator = OpenAIGenerator(client.part(world.rank, world.size), answers, config.seed, budget)
            stack.callback(lambda: runner.run(generator.aclose()))
            runner.run(generator.check())
        yield generator
