"""The tokenizer inside a GGUF file's metadata, written as tokenizer.json and tokenizer_config.json.

Byte-level BPE of the families in SPLITS, and sentencepiece models (`tokenizer.ggml.model` "llama"), whose merges are
rebuilt from the tokens' scores. Any other tokenizer is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matryoshka.core.files import write_atomic

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
