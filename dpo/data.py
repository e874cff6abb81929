"""Training items from records and from users' own files, with one rule for what does not fit the context.

Token ids that a sampler drew go into training as they are. Text is tokenised once: the prompt through the chat template
with its generation prompt, the completion after it, so that training sees the ids that generation would have seen.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.models.tree import Tokens
from matryoshka.core.records import Message, Messages, Preference, Sample, content_key
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item


def completion(prompt_ids: Sequence[int], sample: Sample) -> Tokens:
    """Return prompt and drawn ids; the drawn ones are scored (or those that `sample.mask` names)."""
    if sample.token_ids is None:
        raise ValueError("data: the sample has no token ids; only a white-box controller's samples can be trained on")
    mask = sample.mask or (1,) * len(sample.token_ids)
    return Tokens((*prompt_ids, *sample.token_ids), (*(0,) * len(prompt_ids), *mask))


def text_completion(tokenizer: Tokenizer, prompt: Messages, text: str) -> Tokens:
    """Return the chat prompt's ids (not scored), then `text` and the end of turn (scored)."""
    ids = tokenizer.render(prompt, add_generation_prompt=True).ids
    answer = (*tokenizer.encode(text), tokenizer.eos_id)
    return Tokens((*ids, *answer), (*(0,) * len(ids), *(1,) * len(answer)))


def preference_items(preferences: Sequence[Preference]) -> list[Item]:
    """Return one item (chosen, rejected) a pair, grouped by example. Raises ValueError without token ids."""
    items = []
    for pair in preferences:
        if pair.prompt_ids is None:
            raise ValueError(f"data: the pair of example {pair.example_id} has no prompt ids; it was not sampled by us")
        sides = (completion(pair.prompt_ids, pair.chosen), completion(pair.prompt_ids, pair.rejected))
        items.append(Item(sides, pair.example_id))
    return items


def read_preferences(path: Path, tokenizer: Tokenizer) -> list[Item]:
    """Return one item for each row of a TRL-format JSONL file: {prompt, chosen, rejected}.

    Each is a text or a list of {role, content}; as lists, `prompt` may be left out (what both sides begin with).
    Raises FileNotFoundError, ValueError naming file and line.
    """
    return _read(path, lambda row: _preference_row(row, tokenizer))


def read_conversations(path: Path, tokenizer: Tokenizer) -> list[Item]:
    """Return one item for each row of an SFT file: {prompt, completion} (or {prompt, response}), or {messages}.

    `messages`: a chat in which every assistant turn is trained on. Raises as `read_preferences`.
    """
    return _read(path, lambda row: _conversation_row(row, tokenizer))


def fitting(items: Sequence[Item], context_length: int, overlong: str) -> tuple[list[Item], int]:
    """Return the items whose every sequence fits the context, and how many were left out.

    overlong: "error" raises ValueError at the first that does not fit, "skip" leaves it out and counts it. Nothing is
    ever truncated; the sampler refuses such prompts by the same comparison.
    """
    if overlong not in ("error", "skip"):
        raise ValueError(f"data: overlong {overlong!r} is unknown; choose 'error' or 'skip'")
    kept = [item for item in items if max(len(s.ids) for s in item.sequences) <= context_length]
    if overlong == "error" and len(kept) < len(items):
        longest = max(len(s.ids) for item in items for s in item.sequences)
        raise ValueError(
            f"data: {len(items) - len(kept)} of {len(items)} items exceed the context of {context_length} tokens "
            f"(the longest has {longest}); shorten them or set overlong = 'skip'"
        )
    return kept, len(items) - len(kept)


def distinct(items: Sequence[Item]) -> tuple[list[Item], int]:
    """Return the items without those whose sequences an earlier one has, and how many were left out.

    For preference pairs: the same pair twice says nothing new, and its weight would depend on how often it was drawn.
    Rows of an SFT file that repeat are kept: repeating is how a user gives them weight.
    """
    first: dict[tuple[Tokens, ...], Item] = {}
    for item in items:
        first.setdefault(item.sequences, item)
    return list(first.values()), len(items) - len(first)


def _read(path: Path, convert: Callable[[dict[str, Any]], Item]) -> list[Item]:
    items = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            items.append(convert(row))
        except ValueError as err:
            raise ValueError(f"{path}:{number}: {err}") from err
    return items


def _preference_row(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    if missing := sorted({"chosen", "rejected"} - row.keys()):
        raise ValueError(f"field {missing[0]!r} is missing; expected prompt, chosen and rejected; got {sorted(row)}")
    chosen, rejected = _text_or_chat(row, "chosen"), _text_or_chat(row, "rejected")
    if "prompt" in row:
        prompt = _text_or_chat(row, "prompt")
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("field 'prompt' is missing; it can be left out only where chosen and rejected are chats")
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal; a pair needs two different answers")
    sides = tuple(_tokens(tokenizer, prompt, side) for side in (chosen, rejected))
    return Item(sides, content_key(prompt))


def _conversation_row(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    if "messages" in row:
        chat = _text_or_chat(row, "messages")
        if isinstance(chat, str):
            raise ValueError("field 'messages' is a text; expected a list of {role, content}")
        rendered = tokenizer.render(chat)
        opening = itertools.takewhile(lambda message: message.role != "assistant", chat)
        return Item((Tokens(rendered.ids, rendered.mask),), content_key(*opening))
    name = "completion" if "completion" in row else "response"
    if missing := sorted({"prompt", name} - row.keys()):
        expected = "expected prompt and completion, or messages"
        raise ValueError(f"field {missing[0]!r} is missing; {expected}; got {sorted(row)}")
    prompt = _text_or_chat(row, "prompt")
    return Item((_tokens(tokenizer, prompt, _text_or_chat(row, name)),), content_key(prompt))


def _tokens(tokenizer: Tokenizer, prompt: str | Messages, answer: str | Messages) -> Tokens:
    """Return prompt and answer. A text prompt is continued as plain text; a chat prompt goes through the template."""
    if not isinstance(answer, str):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise ValueError(f"an answer must be one assistant message; got {[m.role for m in answer]}")
        answer = answer[0].content
    if not isinstance(prompt, str):
        return text_completion(tokenizer, prompt, answer)
    ids, rest = tokenizer.encode_prompt(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]
    if not ids:
        raise ValueError("the prompt is empty and this tokenizer starts a text with no token of its own, so that "
                         "nothing stands before the answer; write a prompt")
    return Tokens((*ids, *rest), (*(0,) * len(ids), *(1,) * len(rest)))


def _text_or_chat(row: dict[str, Any], name: str) -> str | Messages:
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise ValueError(f"field {name!r} must be a text or a list of {{role, content}}; got {value!r:.60}")
    return tuple(Message(m["role"], m["content"]) for m in value)
