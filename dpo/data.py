"""Training items from records and from users' own files, with one rule for what does not fit the context.

Token ids that a sampler drew go into training as they are. Text is tokenised once: the prompt through the chat template
with its generation prompt, the completion after it, so that training sees the ids that generation would have seen.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matryoshka.core.files import read_jsonl
from matryoshka.core.json_input import Fields, shown
from matryoshka.core.models.tree import Tokens
from matryoshka.core.records import Message, Messages, Preference, Sample, content_key, from_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item
from matryoshka.dpo.row_forms import OURS, FieldNames, in_our_form

Row = TypeVar("Row", bound=Item | None)
logger = logging.getLogger(__name__)
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Keys that describe a row and change nothing of its training.
DESCRIPTIVE = (
    "id", "prompt_id", "example_id", "source", "dataset", "category", "language", "split", "url", "metadata", "score",
    "score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_reward", "rejected_reward",
    "chosen_rating", "rejected_rating", "chosen_model", "rejected_model",
)  # fmt: skip


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


def read_preferences(
    path: Path, tokenizer: Tokenizer, names: FieldNames = OURS, counts: Counter[str] | None = None
) -> list[Item]:
    """Return one item for each row of a preference file: TRL's {prompt, chosen, rejected}, or a record of a pilot.

    prompt, chosen and rejected are texts or lists of {role, content}; as lists, `prompt` may be left out (what both
    sides begin with). `system` is put before a chat prompt. A pilot's preferences.jsonl has the ids that its sampler
    drew, which are trained on as they are. Every other key that has a meaning is refused by name, so that nothing is
    dropped without a word; those in DESCRIPTIVE are read over. Other trainers' rows: `dpo/row_forms.py`.
    names: of the fields, where they are others. A row whose sides are equal says nothing and is left out; counts takes
    their number as "equal".
    Raises FileNotFoundError, ValueError naming file, line and key.
    """
    items = _read(path, lambda row: _preference_row(in_our_form(row, names), tokenizer))
    equal = sum(item is None for item in items)
    if equal:
        logger.warning("%s: %d rows have two equal sides and are left out", path, equal)
    if counts is not None:
        counts["equal"] += equal
    return [item for item in items if item is not None]


def read_conversations(path: Path, tokenizer: Tokenizer, names: FieldNames = OURS) -> list[Item]:
    """Return one item for each row of an SFT file: {prompt, completion} (or {prompt, response}), or {messages}.

    `messages`: a chat in which every assistant turn is trained on, but for those with "weight": 0. Other keys and
    errors as in `read_preferences`.
    """
    return _read(path, lambda row: _conversation_row(in_our_form(row, names), tokenizer))


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


def _read(path: Path, convert: Callable[[dict[str, Any]], Row]) -> list[Row]:
    items = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            items.append(convert(row))
        except ValueError as err:
            raise ValueError(f"{path}:{number}: {err}") from err
    return items


def _preference_row(row: dict[str, Any], tokenizer: Tokenizer) -> Item | None:
    """Return the item of a row, None if its sides are equal."""
    if isinstance(row.get("chosen"), dict) and "from" not in row["chosen"]:  # a pilot's own record
        return preference_items([from_json(Preference, row)])[0]
    if missing := sorted({"chosen", "rejected"} - row.keys()):
        expected = "expected prompt, chosen and rejected"
        if {"messages", "completion", "response"} & row.keys():
            expected += " (rows without a worse side are for `matryoshka sft`)"
        raise ValueError(f"field {missing[0]!r} is missing; {expected}; got {shown(sorted(row))}")
    _check_keys(row, ("prompt", "chosen", "rejected", "system"))
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
        return None
    prompt = _with_system(row, prompt)
    sides = tuple(_tokens(tokenizer, prompt, side) for side in (chosen, rejected))
    return Item(sides, content_key(prompt))


def _conversation_row(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    if "messages" in row:
        return _messages_row(row, tokenizer)
    name = "response" if "response" in row and "completion" not in row else "completion"
    if missing := sorted({"prompt", name} - row.keys()):
        expected = "expected prompt and completion, or messages"
        if "chosen" in row:
            expected += " (preference pairs are for `matryoshka dpo`)"
        raise ValueError(f"field {missing[0]!r} is missing; {expected}; got {shown(sorted(row))}")
    _check_keys(row, ("prompt", name, "system"))
    prompt = _with_system(row, _text_or_chat(row, "prompt"))
    return Item((_tokens(tokenizer, prompt, _text_or_chat(row, name)),), content_key(prompt))


def _messages_row(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    _check_keys(row, ("messages", "system", "prompt"))
    if not isinstance(row["messages"], list):
        raise ValueError(f"field 'messages' is {shown(row['messages'])}; expected a list of {{role, content}}")
    weighted = [_message(message, f"messages[{i}]", True) for i, message in enumerate(row["messages"])]
    users = [message.content for message, _ in weighted if message.role == "user"]
    if row.get("prompt") not in (None, *users[:1]):  # some files repeat the first question there
        raise ValueError("fields 'prompt' and 'messages' both have a prompt, and they differ; leave one of them out")
    chat = tuple(message for message, _ in weighted)
    rendered = tokenizer.render(_with_system(row, chat))
    trained = [weight for message, weight in weighted if message.role == "assistant"]
    mask = rendered.mask if all(trained) else _without_turns(rendered.mask, trained)
    opening = itertools.takewhile(lambda message: message.role != "assistant", _with_system(row, chat))
    return Item((Tokens(rendered.ids, mask),), content_key(*opening))


def _without_turns(mask: Sequence[int], trained: Sequence[bool]) -> tuple[int, ...]:
    """Return the mask of a chat without the assistant turns whose entry in `trained` is false."""
    turn_of = list(itertools.accumulate(int(here and not before) for before, here in itertools.pairwise((0, *mask))))
    if turn_of[-1:] != [len(trained)]:
        raise ValueError(f"the chat template joins the {len(trained)} assistant turns into {turn_of[-1]} stretches of "
                         "trained tokens, so that 'weight' cannot leave one of them out; give each a row of its own")
    return tuple(int(here and trained[turn - 1]) for here, turn in zip(mask, turn_of, strict=True))


def _check_keys(row: dict[str, Any], known: Sequence[str]) -> None:
    for key, value in row.items():
        if key not in known and key not in DESCRIPTIVE and value not in (None, "", [], {}):
            raise ValueError(
                f"key {shown(key)} is {shown(value)} and would be dropped: it is not supported beside "
                f"{', '.join(known)}. Remove it, or move it under 'metadata' if it only describes the row"
            )


def _with_system(row: dict[str, Any], prompt: str | Messages) -> Any:
    """Return the prompt behind the row's system message, if it has one."""
    system = row.get("system")
    if system in (None, ""):
        return prompt
    if not isinstance(system, str):
        raise ValueError(f"key 'system' is {shown(system)}; expected a text")
    if isinstance(prompt, str):
        raise ValueError("key 'system' stands beside a prompt that is plain text, which has no system message; write "
                         "prompt as a list of {role, content}")
    if prompt and prompt[0].role == "system":
        raise ValueError("key 'system' stands beside messages that begin with a system message; leave one of them out")
    return (Message("system", system), *prompt)


def _tokens(tokenizer: Tokenizer, prompt: str | Messages, answer: str | Messages) -> Tokens:
    """Return prompt and answer. A text prompt is continued as plain text; a chat prompt goes through the template."""
    if not isinstance(answer, str):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise ValueError(f"an answer must be one assistant message; got {str([m.role for m in answer]):.200}")
        if isinstance(prompt, str):
            raise ValueError("the prompt is plain text and an answer is a chat, so that it is open whether the chat "
                             "template is meant; write both as texts, or both as lists of {role, content}")
        answer = answer[0].content
    if not isinstance(prompt, str):
        if prompt and prompt[-1].role == "assistant":
            raise ValueError("the prompt ends with an assistant message, and the answer would begin another one; put "
                             "the beginning of an answer into the answer, and leave it out of the prompt")
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
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is {shown(value)}; expected a text or a list of {{role, content}}")
    return tuple(_message(message, f"{name}[{i}]", False)[0] for i, message in enumerate(value))


def _message(data: Any, where: str, weighted: bool) -> tuple[Message, bool]:
    """Return a message, and whether it is trained on if it is the assistant's. weighted: it may have a weight."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {shown(data)}; expected {{role, content}}")
    _refuse_keys(data, ("role", "content", "weight"), where)
    fields = Fields(data, where)
    content = data.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        for part in content:
            _refuse_keys(part, ("type", "text"), f"{where}.content")
        content = "".join(Fields(part, f"{where}.content[{i}]").text("text") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.error("content", "a text, or a list of {type: 'text', text}")
    message, weight = Message(fields.text("role"), content), data.get("weight")
    if message.role not in ROLES:
        raise fields.error("role", f"one of {', '.join(ROLES)}")
    if weight is not None:
        if type(weight) not in (int, float) or weight not in (0, 1):
            raise fields.error("weight", "0 or 1")
        if not weighted or (weight and message.role != "assistant"):
            raise fields.error("weight", "no weight here: only assistant turns of 'messages' can have one")
    return message, weight != 0


def _refuse_keys(data: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key, value in data.items():
        if key not in known and value not in (None, "", [], {}):
            raise ValueError(f"{where}: key {shown(key)} is {shown(value)} and would be dropped: it is not supported; "
                             "write its text into the content, or remove it")
