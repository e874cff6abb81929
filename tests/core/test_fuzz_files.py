"""Files that somebody else wrote, made by hypothesis: a reader returns, or raises one clear error that names the file.

Oracle: the type of the error, its message, and the memory of the process. Half of the inputs are good files with some
values replaced, which reach deep into a reader; half are good files with some bytes replaced, cut or repeated.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka.core.config import load_toml, to_toml
from matryoshka.core.files import read_jsonl
from matryoshka.core.models.load import architecture_files, empty_model, load_model
from matryoshka.core.records import Message
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.data import read_conversations, read_preferences
from matryoshka.dpo.objectives import Preference
from matryoshka.lora.files import CONFIG, WEIGHTS, load_adapter, read_config, save_adapter
from matryoshka.lora.linear import LoraConfig, adapter_names, add_adapter, remove_adapter

pytestmark = pytest.mark.slow

NUMBERS: list[Any] = [0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, 5e-324, -0.0]
TEXTS = ["", "4", "1e-05", "null", "../x", "/etc/passwd", "\x00", "\ud800", "a" * 3000, "<s>", "{{ 1 }}", "q_proj"]
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
HOSTILE = [b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"1e999", b"\x00"]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(inner, (*path, key))


@st.composite
def altered(draw: st.DrawFn, good: Any) -> bytes:
    """Return JSON that is `good` with some values replaced, removed or added, or with its bytes damaged."""
    data = json.loads(json.dumps(good))
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            *above, last = draw(st.sampled_from([path for path in paths_of(data) if path] or [("",)]))
            owner = data
            for key in above:
                owner = owner[key]
            kind = draw(st.sampled_from(["replace", "remove", "add"]))
            if kind == "replace":
                owner[last] = draw(values)
            elif kind == "remove" and isinstance(owner, dict):
                owner.pop(last, None)
            elif isinstance(owner, dict):
                owner[draw(st.text(max_size=5))] = draw(values)
        return json.dumps(data).encode()
    return draw(damaged(json.dumps(data).encode()))


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Return `good` with bytes replaced, cut out, or repeated, or with something hostile put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([0, 1, 8, 10**6])))))
        data[start:stop] = draw(st.binary(max_size=8) | st.sampled_from(HOSTILE) | st.just(bytes(data[start:stop]) * 2))
    return bytes(data)


@contextmanager
def only_clear_errors(folder: Path) -> Iterator[None]:
    """Let ValueError and FileNotFoundError pass if they name a file in `folder`, within half a gigabyte of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except (ValueError, FileNotFoundError) as err:
        assert str(folder) in str(err), f"{err!r} names no file"
        assert len(str(err)) < 3000, "the message repeats the input"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def fuzz(examples: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    wanted = os.environ.get("MATRYOSHKA_FUZZ")  # a number of fresh examples; without it they are the same in every run
    number = int(wanted or examples)
    return settings(max_examples=number, deadline=None, suppress_health_check=checks, derandomize=not wanted)


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4,
    "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "rank_pattern": {}, "use_rslora": False, "use_dora": False, "modules_to_save": None,
}  # fmt: skip


@fuzz(3000)
@given(data=altered(ADAPTER))
def test_adapter_configurations(tmp_path: Path, data: bytes) -> None:
    """Oracle: as above; the result is a LoraConfig."""
    (tmp_path / CONFIG).write_bytes(data)
    with only_clear_errors(tmp_path):
        assert isinstance(read_config(tmp_path), LoraConfig)


CHATS: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1}], "id": 1},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "completion": "Yo", "system": "Be"},
    {"prompt": "Hi", "completion": "Yo"},
]
PAIRS: list[Any] = [
    {"prompt": "Hi", "chosen": "a", "rejected": "b", "score": 0.5},
    {"chosen": [*CHATS[0]["messages"][:1], {"role": "assistant", "content": "a"}],
     "rejected": [*CHATS[0]["messages"][:1], {"role": "assistant", "content": "b"}]},
    {"prompt": [], "prompt_ids": [1], "chosen": {"text": "a", "token_ids": [1]}, "provenance": {}, "example_id": "e",
     "rejected": {"text": "b", "token_ids": [2]}, "chosen_reward": 1.0, "rejected_reward": 0.0},
]  # fmt: skip


@fuzz(1500)
@given(data=st.sampled_from(CHATS).flatmap(altered))
def test_rows_of_conversations(tiny_dir: Path, tmp_path: Path, data: bytes) -> None:
    """Oracle: as above."""
    (tmp_path / "rows.jsonl").write_bytes(data + b"\n")
    with only_clear_errors(tmp_path):
        read_conversations(tmp_path / "rows.jsonl", tokenizer_of(tiny_dir))


@fuzz(1500)
@given(data=st.sampled_from(PAIRS).flatmap(altered))
def test_rows_of_pairs(tiny_dir: Path, tmp_path: Path, data: bytes) -> None:
    """Oracle: as above."""
    (tmp_path / "rows.jsonl").write_bytes(data + b"\n")
    with only_clear_errors(tmp_path):
        read_preferences(tmp_path / "rows.jsonl", tokenizer_of(tiny_dir))


LOADED: dict[Path, Tokenizer] = {}


def tokenizer_of(folder: Path) -> Tokenizer:
    if folder not in LOADED:
        LOADED[folder] = Tokenizer.load(folder)
    return LOADED[folder]


@fuzz(3000)
@given(data=damaged(b"".join(json.dumps(row).encode() + b"\n" for row in (*CHATS, *PAIRS))))
def test_jsonl(tmp_path: Path, data: bytes) -> None:
    """Oracle: as above; the results are objects."""
    (tmp_path / "rows.jsonl").write_bytes(data)
    with only_clear_errors(tmp_path):
        assert all(isinstance(row, dict) for row in read_jsonl(tmp_path / "rows.jsonl"))


@dataclass(frozen=True)
class Settings:
    name: str = "n"
    folder: Path = Path("runs")
    stops: tuple[str, ...] = ("a", "b")
    note: str | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=2))
    dpo: Preference = Preference()
    rows: tuple[LoraConfig, ...] = (LoraConfig(), LoraConfig(rank=2))


TOML_BITS = [b"[[rows]]\n", b"[train]\n", b"epochs = 2024-01-01\n", b"a.b.c = 1\n", b"x = " + b"[" * 50_000, b"nan"]


@fuzz(2000)
@given(data=damaged(to_toml(Settings()).encode()) | st.lists(st.sampled_from(TOML_BITS)).map(b"".join))
def test_toml(tmp_path: Path, data: bytes) -> None:
    """Oracle: as above; the result is the dataclass, and writing and reading it gives the same one."""
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with only_clear_errors(tmp_path):
        config = load_toml(Settings, path)
        path.write_text(to_toml(config))
        assert load_toml(Settings, path) == config


@fuzz(1000)
@given(data=st.data())
def test_tokenizer_files(tiny_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Oracle: as above; a tokenizer that loads encodes a text, or says why not."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_dir / name, folder)
    name = data.draw(st.sampled_from([
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
        "added_tokens.json", "chat_template.jinja", "tokenizer.model",
    ]))  # fmt: skip
    good: Any = {"eos_token_id": [1], "bos_token": "<|im_start|>", "additional_special_tokens": ["<|endoftext|>"]}
    if (folder / name).is_file():
        good = json.loads((folder / name).read_text())
        if name == "tokenizer.json":  # the interesting parts are few beside the vocabulary
            part = data.draw(st.sampled_from(["added_tokens", "pre_tokenizer", "post_processor", "decoder", "model"]))
            (folder / name).write_text(json.dumps({**good, part: data.draw(values)}))
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    if name != "tokenizer.json" or data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(altered(good)))
    with only_clear_errors(folder):
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode("Hi there"))
        tokenizer.render((Message("user", "Hi"), Message("assistant", "Yo")))


@fuzz(1000)
@given(data=st.data())
def test_configurations_of_a_model(tiny_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Oracle: as above; a model that is built has the layers that its file says."""
    good = json.loads((tiny_dir / "config.json").read_text())
    good |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 8, "attention_bias": False}
    good["model_type"] = data.draw(st.sampled_from(sorted(architecture_files())))
    content = data.draw(altered(good))
    (tmp_path / "config.json").write_bytes(content)
    with only_clear_errors(tmp_path):
        assert len(empty_model(tmp_path).blocks) == json.loads(content)["num_hidden_layers"]


@fuzz(1000)
@given(data=st.data())
def test_safetensors_of_a_model(tiny_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Oracle: as above, for weights whose header or bytes are damaged, and for an index of shards."""
    folder = tmp_path / "model"
    if not folder.is_dir():
        shutil.copytree(tiny_dir, folder)
    good = (tiny_dir / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    if data.draw(st.booleans()):
        header = data.draw(altered(json.loads(good[8 : 8 + size])))
        length = data.draw(st.sampled_from([len(header), 0, 1, 2**40, 2**63, 2**64 - 1, len(header) + 8]))
        content = length.to_bytes(8, "little") + header + good[8 + size :]
    else:
        content = data.draw(damaged(good[: 8 + size])) + good[8 + size :]
    (folder / "model.safetensors").unlink(missing_ok=True)
    if data.draw(st.booleans()):
        (folder / "model.safetensors").write_bytes(content)
    else:
        (folder / "a.safetensors").write_bytes(good)
        weight_map = {key: "a.safetensors" for key in json.loads(good[8 : 8 + size]) if key != "__metadata__"}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_bytes(data.draw(altered(index)))
    with only_clear_errors(folder):
        load_model(folder)


@fuzz(1000)
@given(data=st.data())
def test_safetensors_of_an_adapter(tiny_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Oracle: as above; a refused adapter leaves the model without it."""
    model = load_model(tiny_dir) if tiny_dir not in MODELS else MODELS[tiny_dir]
    MODELS[tiny_dir] = model
    if not (tmp_path / "good").is_dir():
        add_adapter(model, "good", LoraConfig(rank=1, targets=("q_proj",)), 0)
        save_adapter(model, "good", tmp_path / "good", "base")
        remove_adapter(model, "good")
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
    good = (tmp_path / "good" / WEIGHTS).read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = data.draw(altered(json.loads(good[8 : 8 + size])))
    (tmp_path / "bad" / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + good[8 + size :])
    with only_clear_errors(tmp_path):
        load_adapter(model, "bad", tmp_path / "bad")
        remove_adapter(model, "bad")
    assert adapter_names(model) == set()


MODELS: dict[Path, Any] = {}
