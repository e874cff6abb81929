"""`matryoshka serve` as a process of its own: the openai client against it, its names, and how it ends."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from matryoshka.core.config import load_toml
from matryoshka.core.models.from_gguf import smollm2_gguf
from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import sampled_digest
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.local_controller import LocalController, LocalEngine
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.files import load_adapter
from matryoshka.pilot.config import RunConfig, ServeConfig
from matryoshka.pilot.generator import RecordedGenerator, open_generator
from matryoshka.pilot.ranks import Ranks
from matryoshka.pilot.serving import running_server
from matryoshka.scripts import cli
from matryoshka.scripts.serve import ServeCommand, serve
from matryoshka.tests.pilot.conftest import command, environment

ROOT = Path(__file__).resolve().parents[2]
PROMPT = (Message("user", "Name a number."),)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    process = subprocess.Popen(
        command("serve", "--port", "0", "--threads", "1", "--with-parent", *arguments),
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def ask(url: str, model: str, key: str = "none", **more: Any) -> str | None:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PROMPT[0].content}], max_tokens=12, **more
        )
    text: str | None = answer.choices[0].message.content
    return text


def test_the_openai_client_gets_what_the_sampler_draws(tiny_dir: Path, adapter_dir: Path) -> None:
    """Oracle: the sampler in this process, base and adapter by name; the server ends when its standard input closes."""
    with serving("--model", str(tiny_dir), "--adapter", f"loud={adapter_dir}", "--deterministic") as (process, url):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        with openai.OpenAI(base_url=url, api_key="none") as client:
            assert [model.id for model in client.models.list().data] == [tiny_dir.name, "loud"]
        said = {name: ask(url, name, temperature=0.0) for name in (tiny_dir.name, "loud")}
        drawn = [ask(url, "loud", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        with pytest.raises(openai.NotFoundError, match="lout"):
            ask(url, "lout")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 0
    model = load_model(tiny_dir)
    load_adapter(model, "loud", adapter_dir)
    with Sampler(model, Tokenizer.load(tiny_dir), deterministic=True) as sampler:
        for name, adapter in ((tiny_dir.name, None), ("loud", "loud")):
            controller = LocalController(sampler, adapter, name)
            (sample,) = asyncio.run(controller.propose(PROMPT, 1, Sampling(max_tokens=12)))
            assert sample.text == said[name]
    assert said["loud"] != said[tiny_dir.name]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_adapter_folder_under_two_names(tiny_dir: Path, adapter_dir: Path) -> None:
    """Oracle: both names answer alike, and unlike the base model; a flag for each, and a name with a dot, are taken."""
    flags = ("--adapter", f"loud-v1.0={adapter_dir}", "--adapter", f"training={adapter_dir}", f"keys={adapter_dir}")
    with serving("--model", str(tiny_dir), "--name", "base", *flags) as (_, url):
        names = ("base", "loud-v1.0", "training", "keys")
        with openai.OpenAI(base_url=url, api_key="none") as client:
            assert tuple(model.id for model in client.models.list().data) == names
        said = {name: ask(url, name, temperature=0.0) for name in names}
    assert said["loud-v1.0"] == said["training"] == said["keys"] != said["base"]


def test_a_key_is_asked_for_and_sigterm_ends_it(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 401 without the key, an answer with it, status 0 after SIGTERM."""
    monkeypatch.setenv("MATRYOSHKA_TEST_SERVE_KEY", "secret")
    flags = ("--model", str(tiny_dir), "--name", "tiny", "--api-key-env", "MATRYOSHKA_TEST_SERVE_KEY")
    with serving(*flags) as (process, url):
        with pytest.raises(openai.AuthenticationError):
            ask(url, "tiny")
        assert isinstance(ask(url, "tiny", "secret"), str)
        process.terminate()
        assert process.wait(120) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "absent"], "absent: no such folder"),
        (["--model", "MODEL", "--adapter", "loud"], "adapter 'loud'; expected NAME=FOLDER"),
        (["--model", "MODEL", "--name", "a", "--adapter", "a=folder"], "with a name that is not taken"),
        (["--model", "MODEL", "--adapter", "a=absent"], "absent/adapter_config.json: no such file"),
        (["--model", "MODEL", "--host", "0.0.0.0"], "can be reached from other machines, and no API key is set"),
        (["--model", "MODEL", "--engine", "vllm", "--host", "0.0.0.0"], "and no API key is set"),
        (["--model", "MODEL", "--api-key-env", "MATRYOSHKA_TEST_NO_SUCH_KEY"], "MATRYOSHKA_TEST_NO_SUCH_KEY is empty"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], problem: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2 and the message, before anything listens."""
    given = [str(tiny_dir) if argument == "MODEL" else argument for argument in arguments]
    assert cli.main(["serve", "--port", "0", "--threads", "1", *given]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err and captured.out == ""


def test_a_server_beside_a_run_outlives_ctrl_c_and_dies_with_it(
    tiny_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """Oracle: after a terminal's SIGINT, which goes to the whole group of the run, it still answers those in flight;
    after kill -9 of the process that started it, its port refuses. Nobody told the server.
    """
    config = f"ServeConfig(model={str(tiny_dir)!r}, adapter={str(adapter_dir)!r}, name='loud')"
    code = (
        "import signal, time; from pathlib import Path; from matryoshka.pilot.config import ServeConfig\n"
        "from matryoshka.pilot.serving import running_server\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"with running_server({config}, True, log) as url: print(url, flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(0.5)
    assert isinstance(ask(url, "loud", temperature=0.0), str)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 120
    with pytest.raises(openai.APIConnectionError):
        while time.monotonic() < deadline:
            ask(url, "loud", temperature=0.0)
            time.sleep(0.05)


def test_controller_and_engine_draw_the_same(tiny_dir: Path) -> None:
    """Oracle: n answers are the draws one by one, and the engine's for the same ids; ids are the template's."""
    tokenizer = Tokenizer.load(tiny_dir)
    sampling = Sampling(temperature=1.0, max_tokens=6, seed=5, draw=2)
    with Sampler(load_model(tiny_dir), tokenizer, deterministic=True) as sampler:
        controller, engine = LocalController(sampler, None, "tiny"), LocalEngine(sampler, {"tiny": None})
        ids = tokenizer.render(PROMPT, add_generation_prompt=True).ids
        assert controller.prompt_ids(PROMPT) == ids and controller.count_tokens(PROMPT) == len(ids)
        assert (engine.models(), engine.context_length, engine.tokenizer) == (["tiny"], 512, tokenizer)

        async def draw() -> tuple[list[Sample], list[Sample]]:
            together = await controller.propose(PROMPT, 3, sampling)
            apart = [await engine.generate(ids, replace(sampling, draw=2 + i), "tiny") for i in range(3)]
            return together, apart

        together, apart = asyncio.run(draw())
    assert together == apart and len({sample.text for sample in together}) == 3
    assert all(sample.token_ids and sample.logprobs for sample in together)


def test_serving_through_vllm(tiny_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Oracle: the stand-in has the adapter, its URL is printed once it answers, and SIGTERM ends both processes."""
    fake = Path(__file__).parents[1] / "inference" / "fake_vllm.py"
    process = subprocess.Popen(
        command("serve", "--engine", "vllm", "--vllm.command", f"{sys.executable} {fake}", "--port", "0",
                "--model", str(tiny_dir), "--adapter", f"loud={adapter_dir}", "--lora-rank", "9"),
        env=environment() | {"FAKE_ARGUMENTS": str(tmp_path / "arguments")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [tiny_dir.name]
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[-4:] == ["--host", "127.0.0.1", "--lora-modules", f"loud={adapter_dir}"]
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"  # the smallest that vLLM has for 9
    process.terminate()
    assert process.wait(120) == 0
    process.stdout.close()
    with pytest.raises(openai.APIConnectionError), openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        client.models.list()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--deterministic"], "deterministic are of engine local"),
        (["--adapter", "nameless"], "expected NAME=FOLDER"),
        (["--vllm.command", "no-such-vllm serve"], "no program 'no-such-vllm'"),
    ],
)
def test_what_vllm_cannot_do_is_refused(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    """Oracle: status 2 and the message for each flag, by hand."""
    assert cli.main(["serve", "--engine", "vllm", "--model", str(tiny_dir), "--port", "0", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_starts_and_ends_llama_cpp(tmp_path: Path) -> None:
    """Oracle: the real wheel over the embedded model's GGUF file lists the name that it was given, answers greedily as
    before (its first words, when it is cut earlier), counts tokens, stops at max_tokens, and is gone after the block.
    """
    config = ServeConfig(model=str(smollm2_gguf()), engine="llama.cpp", name="embedded", threads=1)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with running_server(config, deterministic=True, log=tmp_path / "log") as url:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list().data] == ["embedded"]
            answer = client.chat.completions.create(
                model="embedded", messages=question, max_tokens=12, temperature=0.0  # type: ignore[arg-type]
            )
            short = client.chat.completions.create(
                model="embedded", messages=question, max_tokens=2, temperature=0.0  # type: ignore[arg-type]
            )
        words, first = answer.choices[0].message.content, short.choices[0].message.content
        assert words and first and words.startswith(first) and len(first) < len(words)
        assert answer.usage is not None and answer.usage.prompt_tokens > 10 and answer.usage.completion_tokens == 12
        assert short.usage is not None and short.usage.completion_tokens == 2
        assert short.choices[0].finish_reason == "length"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=5) as client:
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_settings_of_another_engine_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the message names the setting; nothing is started."""
    with pytest.raises(ValueError, match="engine llama.cpp has no adapter, lora_rank or max_rows"):
        serve(ServeCommand(tmp_path / "model.gguf", engine="llama.cpp", lora_rank=8))
    with pytest.raises(ValueError, match="adapter 'folder' is given; merge it"):
        ServeConfig(model="model.gguf", engine="llama.cpp", adapter="folder")
    with pytest.raises(FileNotFoundError, match="no such file; engine llama.cpp serves a model's .gguf file"):
        absent = ServeConfig(model=str(tmp_path / "absent.gguf"), engine="llama.cpp")
        with running_server(absent, False, tmp_path / "log"):
            pass
    assert capsys.readouterr().out == ""


def test_a_served_model_is_known_by_its_weights(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: a copy has the same name in the cache of answers; other weights in a folder of that name have another."""
    for place in ("one", "copy", "other"):
        shutil.copytree(tiny_dir, tmp_path / place / "model")
    path = tmp_path / "other" / "model" / "model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
    config = load_toml(RunConfig, ROOT / "configs" / "demo.toml")

    def name(place: str, adapter: str) -> str:
        serving = ServeConfig(model=str(tmp_path / place / "model"), adapter=adapter)
        return RecordedGenerator(replace(config, serve=serving)).name

    for adapter in ("", "embedded"):
        assert name("one", adapter) == name("copy", adapter) != name("other", adapter)
    assert name("one", "") != name("one", "embedded")


@pytest.mark.slow
def test_copies_of_a_server_share_the_requests(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the generator has two endpoints with names of the same model while it is open, all requests are answered,
    nothing answers at either address afterwards, and answers are kept under the model's name, not under a port.
    """
    serving = ServeConfig(model=str(tiny_dir), name="tiny", copies=2)
    config = load_toml(RunConfig, ROOT / "configs" / "demo.toml")
    config = replace(config, serve=serving, generator=replace(config.generator, concurrency=1))

    async def answers(generator: OpenAIGenerator) -> list[Sample]:
        asked = [(Message("user", f"Name number {number}."),) for number in range(8)]
        return await asyncio.gather(*(generator.complete(prompt, Sampling(max_tokens=4)) for prompt in asked))

    with asyncio.Runner() as runner:
        with open_generator(config, tmp_path, Ranks(), runner, tmp_path / "cache.sqlite") as generator:
            assert isinstance(generator, OpenAIGenerator) and len(generator.endpoints) == 2
            assert generator.name == f"tiny@{tiny_dir.name}+{sampled_digest(tiny_dir)[:16]}"
            assert len(runner.run(answers(generator))) == 8
            urls = [endpoint.base_url for endpoint in generator.endpoints]
    log = (tmp_path / "generator.log").read_text()
    for url in urls:
        assert ask_is_refused(url), log


def ask_is_refused(url: str) -> bool:
    """Return whether nothing answers at `url` any more."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=5) as client:
        try:
            client.models.list()
        except openai.APIConnectionError:
            return True
    return False
