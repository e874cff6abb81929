"""Reads a tokenizer's vocabulary from one of three file formats. It turns plain text into ids, and ids into bytes.

The package `tokenizers` reads `tokenizer.json`, and sentencepiece reads `tokenizer.model`. Meta's `tokenizer.model`
(base64 tokens with their ranks) is rebuilt as a BPE of `tokenizers`. There are no chat templates here, and a special
string inside a text is plain text. Invariant: the bytes of `encode(text)` are the UTF-8 of `text`, or `encode` raises;
files whose own normalizer rewrites text (lower case, NFC) are the exception.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from matryoshka.core.json_input import Fields, read_json, shown

SPACE = "\u2581"  # what sentencepiece writes for a space
PROBE = "a b\nc"
LONG_TEXT = 10_000  # characters, some 30 ms
ALL_BYTES = bytes(range(256))
UNPRINTABLE = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
# Byte-level BPE writes a printable byte as that character and the n-th other byte as U+0100 + n.
BYTE_TO_CHAR = {b: chr(256 + UNPRINTABLE.index(b)) if b in UNPRINTABLE else chr(b) for b in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

LLAMA3_RANKS = 128_000
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary. lstrip, rstrip: it swallows the whitespace before or after it."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """Turns text into ids, and knows the bytes of each id, special tokens included.

    prefix: the text ("" or one space) that the tokenizer puts before a text; special_prefix: the same after a special
    token. start_ids, end_ids: the special tokens that it puts around a text that stands alone.
    """

    where: Path
    raw_encode: Callable[[str], list[int]] = field(repr=False)
    token_bytes: Mapping[int, bytes] = field(repr=False)
    specials: Mapping[str, AddedToken] = field(repr=False)
    known_bytes: bytes = field(default=ALL_BYTES, repr=False)
    space_ids: tuple[int, ...] = ()
    prefix: str = ""
    special_prefix: str = ""
    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    default_bos: str | None = None
    default_eos: str | None = None

    @cached_property
    def special_ids(self) -> dict[str, int]:
        return {content: token.id for content, token in self.specials.items()}

    @cached_property
    def special_set(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    def encode(self, text: str, prefix: str = "") -> list[int]:
        """Return the ids of `prefix + text` as it stands, without BOS; special strings in it are plain text.

        Raises ValueError for a lone surrogate, and for a character without a token: other tokenizers drop it silently.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as err:
            raise ValueError(f"{self.where}: character {err.start} of the text is a lone surrogate "
                             f"({text[err.start]!r}), expected Unicode text; decode its source as UTF-8") from err
        if missing := data.translate(None, self.known_bytes):
            at = next(i for i, char in enumerate(text) if missing[0] in char.encode())
            raise ValueError(f"{self.where}: character {at} of the text, U+{ord(text[at]):04X}, has no token in this "
                             f"vocabulary (byte 0x{missing[0]:02X}); remove it from the text")
        if self.space_ids and SPACE in text:
            # The character that stands for a space is spelled in bytes, or it would come back as a space.
            first, *rest = (self.raw_encode(part) for part in (prefix + text).split(SPACE))
            ids = first + [id for part in rest for id in (*self.space_ids, *part)]
        else:
            ids = self.raw_encode(prefix + text)
        if found := self.special_set.intersection(ids):
            names = [content for content, id in self.special_ids.items() if id in found]
            what = f"plain text became the special token {names[0]!r:.60} (a character that the vocabulary cannot write"
            raise ValueError(f"{self.where}: {what}, or a faulty merge); remove it from the text: {text!r:.80}")
        return ids


def load_vocabulary(folder: Path, added: Iterable[AddedToken], special: Iterable[str], legacy: bool) -> Vocabulary:
    """Return the vocabulary of `folder`: its tokenizer.json, else its tokenizer.model.

    added: tokens that tokenizer_config.json lists; special: strings it names as special tokens; legacy: sentencepiece
    models put their space after special tokens too.

    Raises:
        FileNotFoundError: the folder has neither file.
        ValueError: a file is malformed, of an unknown kind, or contradicts `added` or `special`.
    """
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.is_file():
        return _from_json(json_path, added, special)
    if not model_path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model; expected one of them")
    data, tokens = model_path.read_bytes(), list(added)
    if ordinary := [token.content for token in tokens if not token.special]:
        raise ValueError(f"{folder}: the added token {ordinary[0]!r} is not special, expected special ones only beside "
                         f"tokenizer.model; save the tokenizer as tokenizer.json")
    is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data)
    vocabulary = (_from_tiktoken if is_tiktoken else _from_sentencepiece)(model_path, data, tokens, legacy)
    if unknown := [content for content in special if content not in vocabulary.specials]:
        what = f"the folder names the special token {unknown[0]!r:.60}"
        raise ValueError(f"{model_path}: {what}, which is not in the file")
    return vocabulary


def _from_json(path: Path, added: Iterable[AddedToken], special: Iterable[str]) -> Vocabulary:
    data = read_json(path, "a tokenizer.json")
    entries: dict[int, dict[str, Any]] = {}
    for index, found in enumerate(_list(path, data, "added_tokens")):
        fields = Fields(found if isinstance(found, dict) else {}, f"{path}: added_tokens[{index}]")
        flags = {name: fields.boolean(name, False) for name in ("special", "lstrip", "rstrip", "normalized")}
        id = fields.integer("id", low=0)
        if id in entries:
            raise fields.error("id", f"an id of its own; {shown(entries[id]['content'])} has this one")
        entries[id] = {**fields.data, "content": fields.text("content"), **flags}
    for token in added:
        entry = entries.setdefault(token.id, vars(token) | {"normalized": False, "single_word": False})
        if entry["content"] != token.content:
            raise ValueError(f"{path}: added token {token.id} is {entry['content']!r}, but {token.content!r} in "
                             f"tokenizer_config.json; the two files belong to different tokenizers")
        entry["special"] = token.special
    special = set(special)
    for entry in entries.values():
        entry["special"] |= entry["content"] in special
    try:
        prefix, special_prefix = _take_prefix(data)
    except (AttributeError, KeyError, TypeError) as err:
        raise ValueError(f"{path}: its normalizer or pre_tokenizer is malformed ({err!r:.80})") from err
    if dropout := data["model"].get("dropout") if isinstance(data.get("model"), dict) else None:
        raise ValueError(f"{path}: model.dropout is {shown(dropout)}, so a text has other ids every time; set it to 0")
    data |= {"added_tokens": [entries[id] for id in sorted(entries)], "truncation": None, "padding": None}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as err:  # tokenizers raises no narrower class
        raise ValueError(f"{path}: not a tokenizer.json ({err!s:.300})") from err
    backend.encode_special_tokens = True  # special strings in text are plain text

    tokens = {}
    for id, entry in entries.items():
        token = AddedToken(entry["content"], id, entry["special"], entry["lstrip"], entry["rstrip"])
        if backend.token_to_id(token.content) != id:
            raise ValueError(f"{path}: added token {token.content!r} has id {id} in the folder's files but "
                             f"{backend.token_to_id(token.content)} in the vocabulary")
        tokens[token.content] = token
    for content in special - set(tokens):
        found = backend.token_to_id(content)
        if found is None:
            what = f"the folder names the special token {content!r:.60}"
            raise ValueError(f"{path}: {what}, which is not in the vocabulary")
        tokens[content] = AddedToken(content, found)

    vocab = backend.get_vocab(with_added_tokens=True)
    kinds = {str(part.get("type")) for part in _parts(data.get("decoder"))}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        what = f"decoder {str(sorted(kinds)):.200} is not supported"
        known = "byte-level BPE (ByteLevel) or a sentencepiece model (ByteFallback or Metaspace)"
        raise ValueError(f"{path}: {what}; expected {known}")
    around = _ids_around_text(backend, path)
    byte_level = "ByteLevel" in kinds
    spell = _spell_byte_level if byte_level else _spell_sentencepiece
    token_bytes = {id: content.encode() if content in tokens else spell(content) for content, id in vocab.items()}
    known_bytes = bytes(b for b, char in BYTE_TO_CHAR.items() if char in vocab) if byte_level else ALL_BYTES
    read = b"".join(token_bytes[id] for id in _plain(backend)(PROBE)) if byte_level else b""
    if byte_level and read != PROBE.encode().translate(None, bytes(set(ALL_BYTES) - set(known_bytes))):
        raise ValueError(f"{path}: its pre_tokenizer or normalizer loses text: {PROBE!r} comes back as {read!r}; get "
                         "the file again")
    return Vocabulary(
        path, _plain(backend),
        token_bytes=token_bytes,
        specials={content: token for content, token in tokens.items() if token.special},
        known_bytes=known_bytes,
        space_ids=() if byte_level else _byte_ids(vocab, SPACE), prefix=prefix, special_prefix=special_prefix,
        start_ids=around[0], end_ids=around[1],
    )


def _ids_around_text(backend: tokenizers.Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the file's post-processor puts before and after a text."""
    try:
        encoding = backend.encode("a")
    except Exception as err:  # tokenizers raises no narrower class
        raise ValueError(f"{path}: its post-processor cannot encode the text 'a' ({err!s:.300})") from err
    added = [index for index, special in enumerate(encoding.special_tokens_mask) if special]
    own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special] or [len(added)]
    before, after = ([index for index in added if side(index)] for side in (own[0].__gt__, own[-1].__lt__))
    return tuple(encoding.ids[i] for i in before), tuple(encoding.ids[i] for i in after)


def _from_sentencepiece(path: Path, data: bytes, added: list[AddedToken], legacy: bool) -> Vocabulary:
    try:
        model = _sentencepiece().SentencePieceProcessor(model_proto=data)
    except RuntimeError as err:
        raise ValueError(f"{path}: neither a sentencepiece model nor Meta's lines of base64 token and rank") from err
    vocab = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    control = {c: AddedToken(c, id) for c, id in vocab.items() if model.is_control(id) or model.is_unknown(id)}
    tokens = control | {token.content: token for token in added}
    token_bytes = {id: _spell_sentencepiece(content) for content, id in vocab.items()}
    token_bytes |= {token.id: token.content.encode() for token in tokens.values()}
    # sentencepiece cannot be told to leave its leading space out. A private-use character in front ends the space and
    # merges with nothing, so the ids after it are those of the bare text.
    guard = model.encode("\ue000")
    width = len(guard)
    prefix = " " if model.id_to_piece(guard[0]) == SPACE else ""
    if any(not (model.is_byte(id) or model.is_unknown(id)) for id in guard[len(prefix) :]):
        raise ValueError(f"{path}: U+E000 has a token of its own; expected a model without private-use characters")
    return Vocabulary(
        path, lambda text: list(model.encode("\ue000" + text)[width:]), token_bytes, tokens,
        space_ids=_byte_ids(vocab, SPACE), prefix=prefix, special_prefix=prefix if legacy else "",
        default_bos=model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else None,
        default_eos=model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else None,
    )


def _from_tiktoken(path: Path, data: bytes, added: list[AddedToken], legacy: bool) -> Vocabulary:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as err:
            raise ValueError(f"{path}:{number}: expected a base64 token and its rank, got {line[:60]!r}") from err
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise ValueError(f"{path}: got {len(ranks)} ranked tokens, expected Llama 3's ranks 0 to {LLAMA3_RANKS - 1}; "
                         f"how another vocabulary splits text is not in the file, get its tokenizer.json")
    spelled = {token: token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ranks}
    # Any two neighbours whose concatenation is a token may merge, and the lowest rank goes first.
    merges = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], spelled[token[:cut]], spelled[token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    model = models.BPE(
        vocab={spelled[token]: rank for token, rank in ranks.items()},
        merges=[merge[3:] for merge in sorted(merges)],
        ignore_merges=True,  # a word that is itself a token is that token, whatever the merges say
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    tokens = {LLAMA3_RANKS + i: AddedToken(content, LLAMA3_RANKS + i) for i, content in enumerate(LLAMA3_SPECIALS)}
    tokens |= {token.id: token for token in added}
    token_bytes = {rank: token for token, rank in ranks.items()}
    token_bytes |= {id: token.content.encode() for id, token in tokens.items()}
    return Vocabulary(
        path, _plain(backend), token_bytes, {token.content: token for token in tokens.values()},
        start_ids=(LLAMA3_RANKS,),  # as Meta's own code does
        default_bos="<|begin_of_text|>", default_eos="<|end_of_text|>",
    )


def _list(path: Path, data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{path}: not a tokenizer.json ({name} is {shown(value)}, expected a list)")
    return value


def _take_prefix(data: dict[str, Any]) -> tuple[str, str]:
    """Take the prefixes of a text, and of text after a special token, out of a tokenizer.json's `data`; return them."""
    prefix = special_prefix = ""
    if any(part.get("type") == "Prepend" for part in _parts(data.get("normalizer"))):
        prefix = special_prefix = " "
        rest = [part for part in _parts(data.get("normalizer")) if part["type"] not in ("Sequence", "Prepend")]
        data["normalizer"] = {"type": "Sequence", "normalizers": rest}
    for part in _parts(data.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            prefix = "" if scheme == "never" else " "
            special_prefix = " " if scheme == "always" else ""
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            prefix = special_prefix = " "
            part["add_prefix_space"] = False
    return prefix, special_prefix


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return a normalizer, pre-tokenizer or decoder and everything inside it; nothing for what is no object."""
    if not isinstance(component, dict):
        return []
    inner = [item for value in component.values() if isinstance(value, list) for item in value]
    return [component, *(deep for item in inner if isinstance(item, dict) for deep in _parts(item))]


def _plain(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        if len(text) < LONG_TEXT:
            return list(backend.encode(text, add_special_tokens=False).ids)
        # A megabyte takes three seconds. `encode` holds Python's lock meanwhile, and a server's event loop would stand
        # still; the batch function gives the lock back, for the price of waking its threads.
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    return encode


def _spell_byte_level(content: str) -> bytes:
    known = all(char in CHAR_TO_BYTE for char in content)
    return bytes(CHAR_TO_BYTE[char] for char in content) if known else content.encode()


def _spell_sentencepiece(content: str) -> bytes:
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", content):
        return bytes.fromhex(byte[1])
    return content.replace(SPACE, " ").encode()


def _byte_ids(vocab: Mapping[str, int], text: str) -> tuple[int, ...]:
    """Return the byte-fallback ids that spell `text`, or () when the vocabulary has no byte tokens."""
    pieces = [f"<0x{byte:02X}>" for byte in text.encode()]
    return tuple(vocab[piece] for piece in pieces) if all(piece in vocab for piece in pieces) else ()


def _sentencepiece() -> ModuleType:
    try:
        import sentencepiece
    except ImportError as err:
        raise ValueError("a sentencepiece tokenizer.model needs the package sentencepiece; install the extra: "
                         "pip install 'matryoshka-pilot[sentencepiece]'") from err
    module: ModuleType = sentencepiece
    return module
