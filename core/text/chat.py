"""Renders chats by their template: messages become token ids and the mask of the tokens that are trained on.

Templates run in the sandbox that Hugging Face uses, so benign messages give the ids that transformers gives, except
that ids are never merged across the end of a generation prompt. There are two invariants. The ids of a generation
prompt are a prefix of the ids that training sees for the same turn. Only the template writes special tokens; a message
never does. As in transformers, BOS is written by the template, and none is added to its text.

Two kinds of template need more. Qwen 3's rewrites earlier answers: it takes their thoughts out. A rewritten answer is
context, and only answers that stand as they were generated are trained on. Gemma 2's has no system role: the system
text goes to the beginning of the first user turn, with an empty line after it, as Gemma 3's template does.
"""

import datetime
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from matryoshka.core.json_input import shown
from matryoshka.core.records import Messages
from matryoshka.core.text.bounded_template import FAILURES, BoundedEnvironment
from matryoshka.core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

LLAMA3_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The date that Llama 3's own templates fall back to. A template never sees the clock: prompts would change overnight.
DEFAULT_DATE = datetime.date(2024, 7, 26)
PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation; mask[i] is 1 where ids[i] is trained on: assistant content and its closing token."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


class ChatFormat:
    """Renders one template over one vocabulary.

    names: the values of bos_token, eos_token, ... in the template. stop_ids: the ids that end a turn by the model's
    files. date: the template gets it as `date_string` and through `strftime_now`. thinking: `enable_thinking` in the
    template; None leaves it undefined. eos_id is the special token that the template puts after an assistant message
    (for Llama 3 <|eot_id|>), even if the files call another one eos_token.
    """

    def __init__(
        self,
        source: str,
        vocabulary: Vocabulary,
        names: Mapping[str, str],
        stop_ids: Sequence[int],
        date: datetime.date = DEFAULT_DATE,
        thinking: bool | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._where = vocabulary.where.parent
        self._template = _compile(source, f"{self._where}: chat template", date)
        self._variables: dict[str, Any] = {"tools": None, "documents": None, **names}
        self._variables.setdefault("date_string", date.strftime("%d %b %Y"))
        if thinking is not None:
            self._variables["enable_thinking"] = thinking
        self._ids = vocabulary.special_ids
        contents = self._contents = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        self._starts = re.compile(f"(?={self._special.pattern})(.)", re.DOTALL)
        # A token with lstrip or rstrip takes the whitespace beside it along.
        self._swallowing = re.compile("|".join(map(self._pattern, contents)) or "(?!)")
        self._reserved = set(source).union(*contents)
        self.eos_id = self._closing_id()
        self._has_system_role = self._keeps_system_text()
        self._has_told = False
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop_ids)))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendered:
        """Return the ids and mask of `messages`; a generation prompt at their end begins an assistant turn.

        The mask is 1 on every answer that stands in the text as it was generated. An earlier answer that the template
        rewrites is context. Raises ValueError when the template refuses the messages, rewrites the last answer or a
        generation prompt (so that training would see other ids than the sampler), or closes an assistant turn without a
        stop token.
        """
        messages = self._folded(messages)
        ids: list[int] = []
        mask: list[int] = []
        chat, revealed = self._disguise(messages)
        prefix = self._vocabulary.prefix
        for segment, trained_chars in self._segments(messages, chat, add_generation_prompt):
            for at, piece, id in self._pieces(segment):
                if id is None:
                    new = self._vocabulary.encode(piece.translate(revealed), prefix)
                    prefix = ""
                else:
                    new = [id]
                    prefix = self._vocabulary.special_prefix
                ids += new
                mask += [int(at < trained_chars)] * len(new)
        return Rendered(tuple(ids), tuple(mask))

    def _segments(
        self, messages: Messages, chat: list[dict[str, str]], add_generation_prompt: bool
    ) -> Iterator[tuple[str, int]]:
        """Yield the rendered text, cut at the end of each generation prompt, and how many characters are trained on."""
        whole = self._text(chat, add_generation_prompt)
        cut = trained_chars = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, closed = self._text(chat[:i], True), self._text(chat[: i + 1], False)
            if i < len(messages) - 1 and closed.startswith(prompt) and not whole.startswith(closed):
                continue  # the template rewrites it, so it is context for the answers after it
            if not (closed.startswith(prompt) and whole.startswith(closed) and len(prompt) >= cut):
                raise ValueError(f"{self._where}: the chat template rewrites the generation prompt or the text of "
                                 f"message {i} ({_difference(prompt, closed, whole)}), so training would not see what "
                                 f"was generated; use a template that only appends")
            yield whole[cut : len(prompt)], trained_chars
            cut, trained_chars = len(prompt), self._trained_chars(closed[len(prompt) :])
        yield whole[cut:], trained_chars

    def _keeps_system_text(self) -> bool:
        """Return whether the template takes a system message and writes its text."""
        probe = "the text of a system message"
        chat = [{"role": "system", "content": probe}, {"role": "user", "content": "user"}]
        try:
            return probe in self._text(chat, True)
        except ValueError:
            return False

    def _folded(self, messages: Messages) -> Messages:
        """Return the messages; without a system role the system text moves to the beginning of the first user turn."""
        if self._has_system_role or len(messages) < 2 or [m.role for m in messages[:2]] != ["system", "user"]:
            return messages
        if not self._has_told:
            self._has_told = True
            logger.warning("%s: the chat template has no system role; system texts begin the first user turn",
                           self._where)  # fmt: skip
        system, user, *rest = messages
        return replace(user, content=f"{system.content}\n\n{user.content}"), *rest

    def _trained_chars(self, completion: str) -> int:
        for at, piece, id in self._pieces(completion):
            if id in self.stop_ids:
                return at + len(piece)
        raise ValueError(f"{self._where}: the chat template closes an assistant turn with none of the stop tokens "
                         f"{list(self.stop_ids)}: {completion[-60:]!r}")

    def _closing_id(self) -> int:
        content = "content"
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        prompt, closed = self._text(chat[:1], True), self._text(chat, False)
        before, found, after = closed.removeprefix(prompt).partition(content)
        ids = [id for _, _, id in self._pieces(after) if id is not None]
        if not closed.startswith(prompt) or not found or not ids or self._special.search(before):
            raise ValueError(f"{self._where}: the chat template must put an assistant message right after the "
                             f"generation prompt and close it with a special token; got {shown(prompt)} and "
                             f"then {shown(closed)}")
        return ids[0]

    def _pieces(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Yield (offset, piece, id of the special token or None for plain text) over the whole of `text`."""
        end = 0
        for match in self._swallowing.finditer(text):
            if match.start() > end:
                yield end, text[end : match.start()], None
            content = next(content for content in self._contents if content in match.group())
            yield match.start(), match.group(), self._ids[content]
            end = match.end()
        if end < len(text):
            yield end, text[end:], None

    def _disguise(self, messages: Messages) -> tuple[list[dict[str, str]], dict[int, str]]:
        """Return the messages with no special string left in them, and the table that restores their text.

        The first character of each special string, overlapping ones too, becomes a private-use character that occurs
        nowhere else; the template handles it like any other letter.
        """
        parts = [part for message in messages for part in (message.role, message.content)]
        firsts = sorted({match[1] for part in parts for match in self._starts.finditer(part)})
        used = self._reserved.union(*parts)
        # Only as many as are needed: a list of all 6,400 would take longer than the rest of rendering.
        free = list(islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), len(firsts)))
        if len(free) < len(firsts):
            raise ValueError("render: the messages use up all private-use characters; expected at most 6000 of them")
        masks = dict(zip(firsts, free, strict=False))

        def hide(text: str) -> str:
            return self._starts.sub(lambda match: masks[match[1]], text)

        chat = [{"role": hide(message.role), "content": hide(message.content)} for message in messages]
        return chat, {ord(mask): first for first, mask in masks.items()}

    def _text(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        environment = self._template.environment
        assert isinstance(environment, BoundedEnvironment)
        environment.start(sum(len(message["content"]) for message in chat))
        try:
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **self._variables)
        except jinja2.TemplateError as err:
            roles = [message["role"] for message in chat]
            raise ValueError(f"{self._where}: the chat template refuses the roles {roles}: {err!s:.300}") from err
        except FAILURES as err:
            raise ValueError(f"{self._where}: the chat template fails ({type(err).__name__}: {err!s:.200})") from err

    def _pattern(self, content: str) -> str:
        token = self._vocabulary.specials[content]
        return (r"\s*" if token.lstrip else "") + re.escape(content) + (r"\s*" if token.rstrip else "")


class _Generation(Extension):
    """Renders {% generation %} ... {% endgeneration %}, which marks assistant text for other tools, as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, where: str, date: datetime.date) -> jinja2.Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = date.strftime
    try:
        return environment.bounded(source)
    except jinja2.TemplateSyntaxError as err:
        raise ValueError(f"{where}, line {err.lineno}: {err.message}; expected a Jinja template") from err
    except (jinja2.TemplateError, *FAILURES) as err:
        raise ValueError(f"{where}: {str(err) or type(err).__name__}; expected a Jinja template") from err


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _difference(prompt: str, closed: str, whole: str) -> str:
    later = whole if closed.startswith(prompt) else closed
    earlier = closed if closed.startswith(prompt) else prompt
    at = len(os.path.commonprefix([earlier, later]))
    return f"at character {at}: {earlier[at : at + 40]!r}, then {later[at : at + 40]!r}"
