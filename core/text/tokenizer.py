"""Reads the tokenizer of a model folder. It turns texts and chats into ids, and ids into text, also while they stream.

Vocabulary, special tokens, chat template and stop ids come from a Hugging Face or Meta folder; there are no settings of
our own. `encode` never adds BOS and never makes a special token of text; only `render` writes special tokens.
Invariant: decode(encode(text)) == text, or encode raises.
"""

import codecs
import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matryoshka.core.files import check_model_folder
from matryoshka.core.json_input import Fields, read_json, shown
from matryoshka.core.records import Messages
from matryoshka.core.text.chat import DEFAULT_DATE, LLAMA3_TEMPLATE, ChatFormat, Rendered
from matryoshka.core.text.vocabulary import AddedToken, Vocabulary, load_vocabulary

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REQUIRED = ("bos_token", "eos_token")
EXTRA, EXTRA_5 = "additional_special_tokens", "extra_special_tokens"  # the second since transformers 5, also by name
MAX_ID = 2**31 - 1


class Tokenizer:
    """Turns texts and chats into ids, and back.

    vocab_size: largest id + 1. bos_id: None where the folder names none. eos_id: the special token that closes an
    assistant turn (for Llama 3 <|eot_id|>, not the <|end_of_text|> of its base model). stop_ids: eos_id, then the stop
    ids that the folder's files list. special_ids: special strings and their ids. prefix: the text ("" or one space)
    that sentencepiece puts before a text; decoding takes it off again.
    """

    def __init__(
        self, vocabulary: Vocabulary, bos_id: int | None, eos_id: int, stop_ids: Iterable[int], chat: ChatFormat | None
    ) -> None:
        self.vocab_size = max(vocabulary.token_bytes) + 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
        self.special_ids = vocabulary.special_ids
        self.prefix = vocabulary.prefix
        self._specials = vocabulary.special_set
        self._vocabulary = vocabulary
        self._chat = chat

    @classmethod
    def load(cls, folder: Path | str, date: datetime.date = DEFAULT_DATE) -> "Tokenizer":
        """Return the tokenizer of `folder`.

        Vocabulary: tokenizer.json, else tokenizer.model (sentencepiece, or Meta's tiktoken lines). Template:
        chat_template.jinja, else tokenizer_config.json, else Llama 3's header format where the vocabulary has it.
        `enable_thinking` of tokenizer_config.json switches thoughts on or off if the template has them.
        Stop ids: eos_token_id of generation_config.json, else of config.json, else eos_token. `date` is the date that a
        template writes as today's; the clock is never read.

        Raises:
            FileNotFoundError: the folder or its tokenizer files are missing.
            ValueError: a file is malformed or the files contradict each other.
        """
        folder = Path(folder)
        check_model_folder(folder)
        config_path = folder / "tokenizer_config.json"
        config = _read(folder / "special_tokens_map.json") | _read(config_path)
        names = {name: _content(config_path, name, config[name]) for name in NAMED if config.get(name) is not None}
        special = [names[name] for name in REQUIRED if name in names]
        special += [_content(config_path, EXTRA, value) for value in _typed(config_path, config, EXTRA, list)]
        more = config.get(EXTRA_5)
        more = list(more.values()) if isinstance(more, dict) else _typed(config_path, config, EXTRA_5, list)
        special += [_content(config_path, EXTRA_5, value) for value in more]
        decoder = _typed(config_path, config, "added_tokens_decoder", dict)
        added = [_added_token(config_path, id, entry) for id, entry in decoder.items()]
        if not added and not (folder / "tokenizer.json").is_file():
            older = Fields(_read(folder / "added_tokens.json"), str(folder / "added_tokens.json"))
            added = [AddedToken(content, older.integer(content, low=0, high=MAX_ID), content in special)
                     for content in older.data]
        vocabulary = load_vocabulary(folder, added, special, bool(config.get("legacy", False)))
        if not vocabulary.token_bytes:
            raise ValueError(f"{vocabulary.where}: the vocabulary is empty; get the tokenizer again")
        for name, content in (("bos_token", vocabulary.default_bos), ("eos_token", vocabulary.default_eos)):
            if name not in config and content is not None:
                names[name] = content

        ids = vocabulary.special_ids
        if not (folder / "tokenizer.json").is_file():
            # A tokenizer.json has its own rule in its post-processor, and transformers then ignores these settings.
            start, end = (
                ((ids[names[name]],) if config[setting] else ())
                if config.get(setting) is not None and name in names
                else as_it_is
                for setting, name, as_it_is in (
                    ("add_bos_token", "bos_token", vocabulary.start_ids),
                    ("add_eos_token", "eos_token", vocabulary.end_ids),
                )
            )
            vocabulary = dataclasses.replace(vocabulary, start_ids=start, end_ids=end)
        stop_ids = _stop_ids(folder) or ([ids[names["eos_token"]]] if "eos_token" in names else [])
        source = _template(folder, config)
        if source is None and "<|start_header_id|>" in ids:
            source = LLAMA3_TEMPLATE
        thinking = config.get("enable_thinking")
        if thinking is not None and not isinstance(thinking, bool):
            raise ValueError(f"{config_path}: enable_thinking is {thinking!r}, expected true or false")
        chat = ChatFormat(source, vocabulary, names, stop_ids, date, thinking) if source is not None else None
        if chat is None and not stop_ids:
            raise ValueError(f"{folder}: nothing says which token ends a text; expected eos_token in "
                             f"tokenizer_config.json or eos_token_id in generation_config.json or config.json")
        eos_id = chat.eos_id if chat else ids[names["eos_token"]] if "eos_token" in names else stop_ids[0]
        return cls(vocabulary, ids[names["bos_token"]] if "bos_token" in names else None, eos_id, stop_ids, chat)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS; special strings in it are plain text.

        Raises ValueError for text that the vocabulary cannot write.
        """
        return self._vocabulary.encode(text, self.prefix) if text else []

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a plain text that a model continues: those of `encode`, after BOS if the tokenizer adds it.

        The tokenizer's files decide that: the post-processor of tokenizer.json, else `add_bos_token` of
        tokenizer_config.json; with Meta's tiktoken files BOS is always added. Training and every server use this one
        function, and transformers and vLLM follow the same rule.
        Raises ValueError as `encode` does, and for a tokenizer that ends every text, so that no model can continue it.
        """
        if self._vocabulary.end_ids:
            raise ValueError(f"{self._vocabulary.where}: this tokenizer ends every text with the tokens "
                             f"{list(self._vocabulary.end_ids)}, so that a model cannot continue it; write the prompt "
                             "as a chat, or set add_eos_token to false and save the tokenizer again")
        return [*self._vocabulary.start_ids, *self.encode(text)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        text = b"".join(self.bytes_of(id, skip_special) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(self.prefix)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendered:
        """Return the ids and training mask of `messages`; see ChatFormat.render. Raises ValueError without template."""
        if self._chat is None:
            raise ValueError(f"{self._vocabulary.where.parent}: no chat template; expected chat_template.jinja, "
                             f"chat_template in tokenizer_config.json, or Llama 3's <|start_header_id|> as a token")
        return self._chat.render(messages, add_generation_prompt)

    def bytes_of(self, id: int, skip_special: bool = True) -> bytes:
        """Return the bytes of one id, none for a skipped special token. Raises ValueError for an unknown id."""
        if skip_special and id in self._specials:
            return b""
        try:
            return self._vocabulary.token_bytes[id]
        except KeyError:
            raise ValueError(f"{self._vocabulary.where}: id {id} is not in the vocabulary of {self.vocab_size} ids; "
                             f"a model's embedding may be padded, sample from the tokenizer's ids only") from None


class TextStream:
    """Decodes ids that arrive one by one. Special tokens add nothing, and half a character waits for its other half.

    Invariant: `text` is decode(ids so far) without an unfinished character at the end. A push decodes one token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._prefix = tokenizer.prefix
        self._parts: list[str] = []

    def push(self, id: int) -> str:
        """Return the text that `id` adds, "" in the middle of a character. Raises ValueError for an unknown id."""
        new = self._decoder.decode(self._tokenizer.bytes_of(id))
        if new:
            new, self._prefix = new.removeprefix(self._prefix), ""
            self._parts.append(new)
        return new

    @property
    def text(self) -> str:
        """The whole text so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "a JSON object") if path.is_file() else {}


def _typed(path: Path, config: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """Return the list or object under `name`, empty where there is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path}: {name} is {shown(value)}, expected a JSON {'list' if kind is list else 'object'}")
    return value if value is not None else kind()


def _content(path: Path, name: str, value: Any) -> str:
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise ValueError(f"{path}: {name} is {shown(value)}, expected a string")
    return content


def _added_token(path: Path, id: str, entry: Any) -> AddedToken:
    if not isinstance(entry, Mapping) or not (id.isascii() and id.isdecimal()) or int(id[:20]) > MAX_ID:
        raise ValueError(f"{path}: added_tokens_decoder[{id[:20]!r}] is {shown(entry)}, expected an id and its token")
    fields = Fields(entry, f"{path}: added_tokens_decoder[{id!r}]")
    flags = (fields.boolean(flag, False) for flag in ("special", "lstrip", "rstrip"))
    return AddedToken(fields.text("content"), int(id), *flags)


def _stop_ids(folder: Path) -> list[int]:
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _read(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(id) is not int or not 0 <= id <= MAX_ID for id in ids):
            raise ValueError(f"{path}: eos_token_id is {shown(value)}, expected an id or a list of ids")
        if ids:
            return ids
    return []


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path, where = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")  # some editors put a BOM first, which would begin every prompt
        except UnicodeDecodeError as err:
            raise ValueError(f"{path}: not UTF-8 (byte {err.start + 1}); save it in UTF-8") from err
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        entries = [Fields(entry if isinstance(entry, dict) else {}, f"{where}: chat_template") for entry in template]
        template = {entry.text("name"): entry.text("template") for entry in entries}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{where}: chat_template is {shown(template)}, expected a string")
    return template
