"""weights.py: oracles are the tensors that were written, safetensors' own files, and the kernel's memory count."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka.core.models import weights
from matryoshka.core.models.load import load_model
from matryoshka.core.models.weights import load_weights, sampled_digest, save_weights, write_tensors


class Body(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(6, 4), "proj": nn.Linear(4, 3)})
        self.model.register_buffer("scratch", torch.arange(2.0), persistent=False)
        if not tied:
            self.lm_head = nn.Linear(4, 6, bias=False)


def meta_body(tied: bool = False) -> Body:
    with torch.device("meta"):
        return Body(tied)


def checkpoint(tied: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in Body(tied).state_dict().items()}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def assert_holds(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Oracle: bitwise equality with the tensors that were written, cast by torch."""
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert state[key].dtype == dtype
        assert torch.equal(state[key], tensor.to(dtype)), key


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_what_was_saved_comes_back_bitwise(tmp_path: Path, max_shard_bytes: int) -> None:
    """Oracle: the tensors themselves; one file, two shards (96 + 60, 96 bytes), or one shard a tensor."""
    tensors = checkpoint()
    save_weights(tensors, tmp_path, max_shard_bytes)
    names = sorted(path.name for path in tmp_path.iterdir())
    if max_shard_bytes == 10**9:
        assert names == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
        count = 3 if max_shard_bytes == 100 else 4
        expected = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
        assert set(index["weight_map"].values()) == expected
        assert names == sorted([*expected, "model.safetensors.index.json"])
        for key, name in index["weight_map"].items():
            assert torch.equal(load_file(tmp_path / name)[key], tensors[key])
    model = meta_body()
    load_weights(model, tmp_path, None, "cpu")
    assert_holds(model, tensors)


def test_a_module_is_saved_as_its_state_dict(tmp_path: Path) -> None:
    """Oracle: safetensors' own reader. A non-contiguous tensor is stored as it reads, permissions follow the umask."""
    model = Body(tied=False)
    model.lm_head.weight = nn.Parameter(torch.arange(24.0).view(4, 6).T)
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in model.state_dict().items())
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_cast(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None) -> None:
    """Oracle: torch's own cast of the stored tensors; None keeps the stored dtype."""
    tensors = {key: tensor.to(stored) for key, tensor in checkpoint().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = meta_body()
    load_weights(model, tmp_path, dtype, "cpu")
    assert_holds(model, tensors, dtype or stored)


def test_integer_buffers_keep_their_dtype(tmp_path: Path) -> None:
    """Oracle: BatchNorm counts batches in int64; only floating tensors are cast."""
    batch_norm: Any = nn.BatchNorm1d(3)  # its buffers are annotated as optional
    batch_norm.num_batches_tracked += 7
    save_weights(batch_norm, tmp_path)
    with torch.device("meta"):
        loaded: Any = nn.BatchNorm1d(3)
    load_weights(loaded, tmp_path, torch.float64, "cpu")
    assert loaded.num_batches_tracked.dtype == torch.int64 and loaded.num_batches_tracked.item() == 7
    assert not isinstance(loaded.running_mean, nn.Parameter)
    assert loaded.weight.dtype == loaded.running_mean.dtype == torch.float64


def test_requires_grad_stays_and_other_buffers_stay(tmp_path: Path) -> None:
    """Invariant: parameters stay parameters with their flag; a non-persistent buffer is the very same object."""
    save_weights(checkpoint(), tmp_path)
    model = meta_body()
    model.model["proj"].requires_grad_(False)
    scratch = model.model.scratch
    load_weights(model, tmp_path, None, "cpu")
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert flags == {key: "proj" not in key for key in checkpoint()}
    assert model.model.scratch is scratch


def test_parameters_outlive_their_file(tmp_path: Path) -> None:
    """Oracle: the tensors as written, whether the file is replaced or removed; and it never sees what training writes.
    """
    tensors = checkpoint()
    save_weights(tensors, tmp_path)
    model = meta_body()
    load_weights(model, tmp_path, torch.float32, "cpu")
    path = tmp_path / "model.safetensors"
    (tmp_path / "other").write_bytes(b"\xff" * path.stat().st_size)
    (tmp_path / "other").rename(path)
    assert_holds(model, tensors)
    path.unlink()
    assert_holds(model, tensors)
    save_weights(tensors, tmp_path)
    content = path.read_bytes()
    load_weights(model, tmp_path, torch.float32, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_holds(model, {key: tensor + 1.0 for key, tensor in tensors.items()})
    assert path.read_bytes() == content


def test_tied_head(tmp_path: Path) -> None:
    """Oracle: by hand. An equal lm_head is accepted where the model has none; a different one is never dropped."""
    tensors = checkpoint(tied=True)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    model = meta_body(tied=True)
    load_weights(model, tmp_path, None, "cpu")
    assert_holds(model, tensors)
    save_file({**tensors, "lm_head.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        load_weights(meta_body(tied=True), tmp_path, None, "cpu")


def test_a_head_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    """Oracle: the message; a number has no rows to compare."""
    save_file({**checkpoint(tied=True), "lm_head.weight": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head.weight differs from model.embed_tokens.weight"):
        load_weights(meta_body(tied=True), tmp_path, None, "cpu")


def test_a_full_disk_is_explained_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message that safetensors raised on a full tmpfs of 1 MiB; it is of no kind that a disk's errors are.

    Nothing is left of the file, and the error says how much is free.
    """
    def full(*arguments: Any) -> None:
        arguments[1].write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors: No space left on device; .* MiB are free there") as caught:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_legacy_rope_buffers_are_accepted(tmp_path: Path) -> None:
    """Oracle: by hand. Old Llama checkpoints carry them; a key that only looks alike is unexpected."""
    tensors = checkpoint()
    legacy = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **legacy}, tmp_path / "model.safetensors")
    model = meta_body()
    load_weights(model, tmp_path, None, "cpu")
    assert_holds(model, tensors)
    save_file({**tensors, "model.rotary_emb.inv_freq_2": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected model.rotary_emb.inv_freq_2"):
        load_weights(meta_body(), tmp_path, None, "cpu")


def test_keys_and_shapes_are_strict(tmp_path: Path) -> None:
    """Oracle: by hand; each message names the place, the key, the value that came and the expected one."""
    path = tmp_path / "model.safetensors"
    tensors = checkpoint()
    save_file({key: tensor for key, tensor in tensors.items() if key != "model.proj.bias"}, path)
    with pytest.raises(ValueError, match=r"missing model\.proj\.bias, unexpected nothing"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    save_file({**tensors, "model.proj.scale": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"missing nothing, unexpected model\.proj\.scale"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    save_file({**tensors, **{f"extra.{i}": torch.ones(1) for i in range(9)}}, path)
    with pytest.raises(ValueError, match=r"extra\.4 and 4 more"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    save_file({**tensors, "model.proj.weight": torch.ones(4, 3)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.proj\.weight has shape \(4, 3\).*\(3, 4\)"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    save_file({**tensors, "model.proj.weight": torch.ones(3, 4, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match=r"model\.proj\.weight is stored as I8.*unquantised"):
        load_weights(meta_body(), tmp_path, None, "cpu")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    """Oracle: by hand; the message names the path. Truncation is tried at the header, in the data, and to nothing."""
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder"):
        load_weights(meta_body(), tmp_path / "absent", None, "cpu")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    save_weights(checkpoint(), tmp_path, max_shard_bytes=1)
    shard = tmp_path / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    for broken in (b"", whole[:5], whole[:20], whole[:-1], whole + b"x", b"version https://git-lfs.github.com/spec/v1\n"):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"model-00002-of-00004\.safetensors: truncated.*\b{len(broken)} bytes"):
            load_weights(meta_body(), tmp_path, None, "cpu")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00004\.safetensors: this shard is missing"):
        load_weights(meta_body(), tmp_path, None, "cpu")


ELSEWHERE = {
    "a folder above": "../model.safetensors", "an absolute path": "/etc/passwd", "a folder below": "a/b.safetensors",
    "a path of another system": "..\\model.safetensors", "the folder itself": ".", "the one above": "..", "nothing": "",
    "a number": 7, "a list": ["model.safetensors"], "a zero byte": "a\0b", "a name of 5000 letters": "a" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_an_index_names_files_of_its_own_folder_only(tiny_dir: Path, tmp_path: Path, name: Any) -> None:
    """Oracle: the message, also where the file that is named exists and is the right one."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: 'model.norm.weight' lies in .*; expected the name of a file"):
        load_model(tmp_path / "model")


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    """Oracle: by hand; a key looked for in the wrong shard, and an index that is none."""
    save_weights(checkpoint(), tmp_path, max_shard_bytes=1)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.proj.bias"] = index["weight_map"]["model.proj.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not in the shard model\.proj\.bias, not in the index nothing"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    del index["weight_map"]["model.proj.bias"]
    path.write_text(json.dumps(index))
    shard = tmp_path / index["weight_map"]["model.proj.weight"]
    save_file({**load_file(shard), "model.proj.bias": torch.zeros(3)}, shard)
    with pytest.raises(ValueError, match=r"not in the shard nothing, not in the index model\.proj\.bias"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    for broken in (b"{", b"[]", b"{}", b'{"weight_map": []}', b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"index\.json: (malformed JSON|expected a JSON|weight_map is|not UTF-8)"):
            load_weights(meta_body(), tmp_path, None, "cpu")


def test_save_refuses_and_resumes(tmp_path: Path) -> None:
    """Invariant: a folder never mixes two models; a killed save is refused, and saving again mends it."""
    tensors = checkpoint()
    save_weights(tensors, tmp_path, max_shard_bytes=1)
    with pytest.raises(ValueError, match="holds weights already .*index.json"):
        save_weights(tensors, tmp_path, max_shard_bytes=1)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        load_weights(meta_body(), tmp_path, None, "cpu")
    with pytest.raises(ValueError, match="holds weights already .*model-00001-of-00004"):
        save_weights(tensors, tmp_path)
    save_weights(tensors, tmp_path, max_shard_bytes=1)
    model = meta_body()
    load_weights(model, tmp_path, None, "cpu")
    assert_holds(model, tensors)
    with pytest.raises(ValueError, match="on the meta device model.embed_tokens.weight"):
        save_weights(meta_body(), tmp_path / "other")
    with pytest.raises(ValueError, match="0 tensors"):
        save_weights({}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from matryoshka.core.models.weights import load_weights

torch.set_num_threads(1)
dtype = {"None": None, "bfloat16": torch.bfloat16}[sys.argv[2]]

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

with torch.device("meta"):
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 3072, bias=False) for _ in range(8)])
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
load_weights(model, Path(sys.argv[1]), dtype, "cpu")
done = True
thread.join()
print(anonymous() - before, max(peak, anonymous()) - before)
"""


def test_sampled_digest(tmp_path: Path) -> None:
    """Oracle: the same numbers in other files give the same digest; another number, name, shape or dtype another."""
    tensors = {**checkpoint(), "scalar": torch.tensor(1.0), "empty": torch.empty(0, 3)}
    name = next(iter(tensors))
    changed = {
        "number": {**tensors, name: tensors[name].clone().index_fill_(0, torch.tensor([len(tensors[name]) - 1]), 9.0)},
        "scalar": {**tensors, "scalar": torch.tensor(2.0)},
        "name": {("other" if key == name else key): tensor for key, tensor in tensors.items()},
        "shape": {**tensors, "empty": torch.empty(0, 4)},
        "dtype": {**tensors, "empty": torch.empty(0, 3, dtype=torch.float64)},
    }
    save_weights(tensors, tmp_path / "one")
    save_weights(tensors, tmp_path / "cut", max_shard_bytes=100)
    first = sampled_digest(tmp_path / "one")
    assert sampled_digest(tmp_path / "cut") == first
    for what, other in changed.items():
        save_weights(other, tmp_path / what)
        assert sampled_digest(tmp_path / what) != first, what


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """8 tensors of 24 MiB in fp32: 201 MB in four shards."""
    folder = tmp_path_factory.mktemp("big")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(3072, 2048, generator=generator) for i in range(8)}
    save_weights(tensors, folder, max_shard_bytes=60 * 10**6)
    assert len(list(folder.glob("*.safetensors"))) == 4
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("dtype", "width"), [("None", 0), ("bfloat16", 2)])
def test_peak_memory_is_the_model_and_one_tensor(big_checkpoint: Path, dtype: str, width: int) -> None:
    """Oracle: the kernel's count of anonymous memory. Weights that are cast lie there, others stay in the file's map.

    Slack 8 MB: the thread, the allocator, the headers. Reading a shard (50 MB), or two tensors, at once would break it.
    """
    tensor = 3072 * 2048
    model_bytes = 8 * tensor * width
    command = [sys.executable, "-c", MEASURE, str(big_checkpoint), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    final, peak = map(int, run.stdout.split())
    assert model_bytes * 0.99 < final < model_bytes + 8e6
    assert peak < model_bytes + tensor * 4 + 8e6
