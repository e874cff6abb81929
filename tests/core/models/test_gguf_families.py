"""GGUF files of each family that has a layout: a tiny file written here, read back, and by transformers' own loader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka.core.models.from_gguf import convert_gguf
from matryoshka.core.models.load import architecture_files, load_model, model_architecture
from matryoshka.core.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the extra demo is not installed")

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN, FEED_FORWARD = 2, 4, 2, 8, 32, 64
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["\u0120", "\u010a"]
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "ab"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = sorted(
    (module.GGUF.architecture, model_type)
    for model_type in architecture_files()
    if hasattr(module := model_architecture({"model_type": model_type}, Path()), "GGUF")
)


def write_tiny(path: Path, architecture: str, layout: Any, sentencepiece: bool) -> dict[str, Tensor]:
    """Write a tiny GGUF file as llama.cpp would and return its weights under their Hugging Face names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(7)
    tokens, kinds = VOCABULARY, [3] * 3 + [1] * (len(VOCABULARY) - 3)
    if sentencepiece:
        pieces = ["\u2581", "a", "b", "ab", "\u2581ab", "<0x0A>"]
        tokens, kinds = ["<unk>", *VOCABULARY[:3], *pieces], [2, 3, 3, 3, 1, 1, 1, 1, 1, 6]
        writer.add_token_scores([0.0] * 4 + [-1.0, -2.0, -3.0, -4.0, -5.0, 0.0])
        writer.add_unk_token_id(0)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(sentencepiece)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    draws, weights = torch.Generator().manual_seed(0), {}

    def add(name: str, key: str, shape: tuple[int, ...]) -> None:
        tensor = torch.randn(shape, generator=draws)
        weights[key] = tensor
        array = tensor.numpy() + (layout.norm_offset if key.endswith("norm.weight") else 0.0)
        for projection, heads in (("attn_q.", HEADS), ("attn_k.", KEY_HEADS)):
            if layout.permuted and projection in name:
                array = array.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, array.astype("float32"))

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    sizes = {"attn_q": HEADS * HEAD_DIM, "attn_k": KEY_HEADS * HEAD_DIM, "attn_v": KEY_HEADS * HEAD_DIM}
    shapes = {name: (size, HIDDEN) for name, size in sizes.items()} | {"attn_output": (HIDDEN, HEADS * HEAD_DIM)}
    shapes |= {"ffn_gate": (FEED_FORWARD, HIDDEN), "ffn_up": (FEED_FORWARD, HIDDEN), "ffn_down": (HIDDEN, FEED_FORWARD)}
    for layer in range(LAYERS):
        for name, key in layout.layer.items():
            norm = (HEAD_DIM,) if name.endswith(("q_norm", "k_norm")) else (HIDDEN,)
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{key}.weight", shapes.get(name, norm))
            if name in layout.biases:
                add(f"blk.{layer}.{name}.bias", f"model.layers.{layer}.{key}.bias", (sizes[name],))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize(("architecture", "model_type"), FAMILIES)
def test_weights_come_back(architecture: str, model_type: str, tmp_path: Path) -> None:
    """Oracle: the weights that went in, under their names, to fp32's rounding of the norms' offset; the folder loads
    strictly, and its configuration has the sizes of the metadata."""
    layout = model_architecture({"model_type": model_type}, tmp_path).GGUF
    weights = write_tiny(tmp_path / "tiny.gguf", architecture, layout, sentencepiece=architecture == "gemma3")
    out = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(stored[key], tensor, rtol=0, atol=5e-7 if layout.norm_offset else 0.0)
    config = load_model(out).config
    assert (config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == (HEAD_DIM, KEY_HEADS, 128)
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    if architecture == "gemma3":
        assert [layer.window for layer in config.attention] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "model_type"), FAMILIES)
def test_transformers_reads_the_same_weights(architecture: str, model_type: str, tmp_path: Path) -> None:
    """Oracle: transformers' own GGUF loader, tensor by tensor."""
    import transformers

    if architecture == "qwen3":
        pytest.skip("transformers 5.23 does not read the head length of a qwen3 GGUF file and takes 128 instead of 8")
    layout = model_architecture({"model_type": model_type}, tmp_path).GGUF
    write_tiny(tmp_path / "tiny.gguf", architecture, layout, sentencepiece=architecture == "gemma3")
    out = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for key, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=5e-7 if layout.norm_offset else 0.0)


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Oracle: by hand. Of "ab ab" the pair a b merges (score -4) and then the space before it; a newline is a byte; BOS
    begins a plain text."""
    layout = model_architecture({"model_type": "gemma3_text"}, tmp_path).GGUF
    write_tiny(tmp_path / "tiny.gguf", "gemma3", layout, sentencepiece=True)
    tokenizer = Tokenizer.load(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out"))
    ids = tokenizer.encode("ab ab\n")
    assert [tokenizer.bytes_of(id) for id in ids] == [b"ab", b" ab", b"\n"]
    assert tokenizer.decode(ids) == "ab ab\n"
    assert tokenizer.encode_prompt("a") == [tokenizer.bos_id, *tokenizer.encode("a")]
