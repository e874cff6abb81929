"""dpo/data.py: ids and masks worked out by hand on a tokenizer that speaks bytes in ChatML."""

import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.models.tree import Tokens
from matryoshka.core.records import Message, Preference, Sample, to_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item
from matryoshka.dpo.data import (
    completion,
    distinct,
    fitting,
    preference_items,
    read_conversations,
    read_preferences,
    text_completion,
)

USER, SYSTEM = Message("user", "Hi"), Message("system", "Be")


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_dir)


def chatml(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text in which <s> and <e> stand for the two ChatML tokens; independent of `render`."""
    vocabulary = {"<s>": tokenizer.bos_id, "<e>": tokenizer.eos_id}
    ids: list[int] = []
    for piece in text.replace("<s>", "\0<s>\0").replace("<e>", "\0<e>\0").split("\0"):
        special = vocabulary.get(piece)
        ids += [special] if special is not None else tokenizer.encode(piece)
    return tuple(ids)


def item(tokenizer: Tokenizer, *sides: tuple[str, str]) -> tuple[Tokens, ...]:
    """Return one sequence a side, (what is not scored, what is)."""
    rows = [(chatml(tokenizer, before), chatml(tokenizer, after)) for before, after in sides]
    return tuple(Tokens((*a, *b), (*(0,) * len(a), *(1,) * len(b))) for a, b in rows)


def write(path: Path, *rows: Any) -> Path:
    texts = (row if isinstance(row, str | bytes) else json.dumps(row) for row in rows)
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return path


def test_drawn_ids_go_in_as_they_are() -> None:
    """Oracle: by hand; a mask of the sample's own is kept, and nothing is tokenised."""
    assert completion((5, 6), Sample("x", "stop", (7, 8))) == Tokens((5, 6, 7, 8), (0, 0, 1, 1))
    assert completion((5,), Sample("x", "stop", (7, 8, 9), mask=(1, 0, 1))) == Tokens((5, 7, 8, 9), (0, 1, 0, 1))
    with pytest.raises(ValueError, match="the sample has no token ids"):
        completion((5,), Sample("x"))
    pair = Preference((USER,), (5, 6), Sample("a", "stop", (7,)), Sample("b", "stop", (8, 9)), 1.0, 0.0, "e1")
    assert preference_items([pair]) == [Item((Tokens((5, 6, 7), (0, 0, 1)), Tokens((5, 6, 8, 9), (0, 0, 1, 1))), "e1")]
    with pytest.raises(ValueError, match="pair of example e2 has no prompt ids"):
        preference_items([Preference((USER,), None, pair.chosen, pair.rejected, 1.0, 0.0, "e2")])


def test_text_is_put_where_the_model_would_have_written_it(tokenizer: Tokenizer) -> None:
    """Oracle: ChatML by hand; the generation prompt is not scored, the end of turn is."""
    prompt = "<s>system\nBe<e>\n<s>user\nHi<e>\n<s>assistant\n"
    assert (text_completion(tokenizer, (SYSTEM, USER), "Yo"),) == item(tokenizer, (prompt, "Yo<e>"))
    hostile = text_completion(tokenizer, (USER,), "<|im_end|>")
    assert hostile.ids.count(tokenizer.eos_id) == 2 and sum(hostile.mask) == len("<|im_end|>") + 1


CHAT = "<s>user\nHi<e>\n<s>assistant\n"
AS_USER = [{"role": "user", "content": "Hi"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q: 1?\nA:", "chosen": " a", "rejected": " b"}, "Q: 1?\nA:"),
        ({"prompt": AS_USER, "chosen": " a", "rejected": " b"}, CHAT),
        ({"prompt": AS_USER, "chosen": said(" a"), "rejected": said(" b")}, CHAT),
        ({"chosen": AS_USER + said(" a"), "rejected": AS_USER + said(" b")}, CHAT),
        ({"prompt": AS_USER, "chosen": said(" a"), "rejected": " b", "score": 3}, CHAT),
    ],
)
def test_preference_rows_in_every_form_of_trl(
    tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any], prompt: str
) -> None:
    """Oracle: the same two sequences by hand, whichever way the row is written."""
    (read,) = read_preferences(write(tmp_path / "rows.jsonl", row), tokenizer)
    assert read.sequences == item(tokenizer, (prompt, " a<e>"), (prompt, " b<e>"))


def test_rows_of_one_prompt_are_one_group(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: by hand, across the forms; SFT conversations group by what comes before the first answer."""
    other = [{"role": "user", "content": "Other"}]
    rows = [
        {"prompt": AS_USER, "chosen": "a", "rejected": "b"},
        {"chosen": AS_USER + said("c"), "rejected": AS_USER + said("d")},
        {"prompt": other, "chosen": "a", "rejected": "b"},
    ]
    groups = [read.group for read in read_preferences(write(tmp_path / "p.jsonl", *rows), tokenizer)]
    assert groups[0] == groups[1] != groups[2]
    system = [{"role": "system", "content": "Be"}]
    chats = [system + AS_USER + said("a"), system + AS_USER + said("b"), system + other + said("a")]
    path = write(tmp_path / "c.jsonl", *({"messages": chat} for chat in chats))
    groups = [read.group for read in read_conversations(path, tokenizer)]
    assert groups[0] == groups[1] != groups[2]


def test_conversations_train_every_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: the supervised tokens by hand."""
    turns = [*AS_USER, *said("Yo"), {"role": "user", "content": "No"}, *said("So")]
    rows = [
        {"messages": turns},
        {"prompt": AS_USER, "completion": "Yo"},
        {"prompt": AS_USER, "response": said("Yo")},
        {"prompt": "Hi", "completion": "Yo"},
    ]
    several, chat, response, plain = read_conversations(write(tmp_path / "rows.jsonl", *rows), tokenizer)
    (sequence,) = several.sequences
    scored = [id for id, is_scored in zip(sequence.ids, sequence.mask, strict=True) if is_scored]
    assert tuple(scored) == chatml(tokenizer, "Yo<e>So<e>")
    assert chat.sequences == response.sequences == item(tokenizer, (CHAT, "Yo<e>"))
    assert plain.sequences == item(tokenizer, ("Hi", "Yo<e>"))


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "malformed JSON"),
        ("", "the row is empty"),
        (b'{"prompt": "\xff"}', r"not UTF-8 \(byte 13\)"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({**GOOD, "chosen": 3}, "field 'chosen' is 3; expected a text or a list"),
        ({**GOOD, "prompt": [{"role": "user"}]}, r"prompt\[0\]: content is missing; expected a text"),
        ({**GOOD, "chosen": AS_USER}, r"an answer must be one assistant message; got \['user'\]"),
        ({**GOOD, "prompt": AS_USER, "chosen": said("a") + AS_USER}, "an answer must be one assistant message"),
    ],
)
def test_a_malformed_preference_names_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str
) -> None:
    """Oracle: the second line's number in the message."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}"):
        read_preferences(write(tmp_path / "rows.jsonl", GOOD, row), tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p"}, "field 'completion' is missing; expected prompt and completion, or messages"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference pairs are for `matryoshka dpo`"),
        ({"messages": [{"role": "usr", "content": "u"}]}, r"messages\[0\]: role is 'usr' .*; expected one of system"),
        ({"completion": "c"}, "field 'prompt' is missing"),
        ({"prompt": "", "completion": "c"}, "the prompt is empty and this tokenizer starts a text with no token"),
        ({"messages": "text"}, "field 'messages' is 'text'; expected a list"),
        ({"messages": AS_USER}, "a sequence of .* has no scored token"),
        ({"messages": []}, "has no scored token"),
    ],
)
def test_a_malformed_conversation_names_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str
) -> None:
    """Oracle: the second line's number in the message."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}"):
        read_conversations(write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}, row), tokenizer)


def chat(**changes: Any) -> dict[str, Any]:
    """Return an SFT row of one question and one answer, whose answer has the keys in `changes` besides."""
    return {"messages": [*AS_USER, {"role": "assistant", "content": "Yo", **changes}]}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
# Name of the input -> a row of an SFT file, and what the error says of it.
CONVERSATIONS_REFUSED = {
    "a tool call in an answer": (chat(tool_calls=[CALL]), r"messages\[1\]: key 'tool_calls' is .* would be dropped"),
    "a tool call in place of an answer": (chat(content=None, tool_calls=[CALL]), "key 'tool_calls'"),
    "an old function call": (chat(function_call={"name": "f"}), "key 'function_call'"),
    "reasoning beside an answer": (chat(reasoning_content="2 + 2"), "key 'reasoning_content' is '2 . 2'"),
    "reasoning by another name": (chat(reasoning="2 + 2"), "key 'reasoning'"),
    "thinking": (chat(thinking="so"), "key 'thinking'"),
    "a name": (chat(name="alice"), "key 'name' is 'alice'"),
    "a refusal": (chat(refusal="no"), "key 'refusal'"),
    "a prefix to continue": (chat(prefix=True), "key 'prefix' is True"),
    "training switched off": (chat(train=False), "key 'train' is False"),
    "LLaMA-Factory's switch": (chat(loss=False), "key 'loss' is False"),
    "axolotl's switch": (chat(train_on_turn=False), "key 'train_on_turn' is False"),
    "the call that a tool answers": (
        {"messages": [*AS_USER, {"role": "tool", "content": "4", "tool_call_id": "x"}, *said("Yo")]}, "'tool_call_id'",
    ),
    "Gemma's role": ({"messages": [*AS_USER, {"role": "model", "content": "Yo"}]}, "role is 'model'"),
    "a chat in a text": ({"messages": json.dumps(AS_USER)}, "field 'messages' is .*; expected a list"),
    "a system text in parts": ({**chat(), "system": [{"type": "text", "text": "Be"}]}, "'system' is .* expected a t"),
    "a worse answer beside a chat": ({**chat(), "rejected_response": "No"}, "key 'rejected_response'"),
    "a worse answer beside ShareGPT's chat": (
        {"conversations": [{"from": "human", "value": "Hi"}], "rejected": {"from": "gpt", "value": "b"}},
        "key 'rejected' is .* would be dropped",
    ),
    "half a weight": (chat(weight=0.5), r"messages\[1\]: weight is 0.5 \(float\); expected 0 or 1"),
    "a weight in text": (chat(weight="0"), "weight is '0'"),
    "a weight that is true": (chat(weight=True), "weight is True"),
    "a weight on a question": (
        {"messages": [{"role": "user", "content": "Hi", "weight": 1}, *said("Yo")]}, "only assistant turns",
    ),
    "all weights zero": (chat(weight=0), "has no scored token"),
    "a picture": (chat(content=[{"type": "image_url", "image_url": {}}]), r"content is \[.* expected a text"),
    "a part with a key of its own": (
        chat(content=[{"type": "text", "text": "Yo", "cache_control": {"type": "ephemeral"}}]), "key 'cache_control'",
    ),
    "a number as content": (chat(content=4), "content is 4"),
    "no content": (chat(content=None), "content is None"),
    "a number as role": (chat(role=1), "role is 1"),
    "a text as message": ({"messages": ["Hi"]}, r"messages\[0\] is 'Hi'; expected {role, content}"),
    "tools beside a chat": ({**chat(), "tools": [CALL]}, "key 'tools' is .* would be dropped"),
    "functions beside a chat": ({**chat(), "functions": [CALL]}, "key 'functions'"),
    "settings of the template": ({**chat(), "chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kw"),
    "pictures beside a chat": ({**chat(), "images": ["a.png"]}, "key 'images'"),
    "a weight of the row": ({**chat(), "weight": 0}, "key 'weight' is 0"),
    "a label": ({"prompt": "p", "completion": "c", "label": False}, "key 'label' is False"),
    "a second answer": ({"prompt": "p", "completion": "c", "response": "d"}, "key 'response'"),
    "another prompt beside a chat": ({**chat(), "prompt": "Ho"}, "fields 'prompt' and 'messages' both have a prompt"),
    "a system text beside plain text": ({"prompt": "p", "completion": "c", "system": "Be"}, "no system message"),
    "two system texts": (
        {"messages": [{"role": "system", "content": "Be"}, *chat()["messages"]], "system": "Be"}, "begin with a system",
    ),
    "a number as system": ({**chat(), "system": 3}, "key 'system' is 3; expected a text"),
    "a key that comes twice": ('{"prompt": "p", "prompt": "q", "completion": "c"}', "the key 'prompt' comes twice"),
    "an integer of 5000 digits": ('{"prompt": "p", "completion": "c", "id": %s}' % ("1" * 5000), "malformed JSON"),
    "nesting 100000 deep": ('{"metadata": ' + "[" * 100_000, "nested more than 100 deep"),
    "a prompt that begins the answer": (
        {"prompt": [*AS_USER, *said("Yo")], "completion": "u"}, "the prompt ends with an assistant message",
    ),
    "a speaker that is a list": ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "with from one of system"),
    "a speaker that is an object": ({"conversations": [{"from": {"a": 1}, "value": "Hi"}]}, "with from one of system"),
    "two prompts": ({"instruction": "i", "output": "o", "prompt": "p"}, "field 'prompt' is 'p' beside another form"),
    "two chats": ({**chat(), "conversations": AS_USER}, "field 'messages' is .* beside another form"),
    "nesting 101 deep": ('{"metadata": ' + "[" * 101 + "]" * 101 + "}", "nested more than 100 deep"),
    "not a number": ('{"prompt": "p", "completion": "c", "score": NaN}', "NaN is not a JSON number"),
    "half a surrogate pair": ('{"prompt": "p", "completion": "\\ud83d"}', "lone surrogate"),
}  # fmt: skip
PREFERENCES_REFUSED = {
    "tools": ({**GOOD, "tools": [CALL]}, "key 'tools'"),
    "a margin": ({**GOOD, "margin": 0.5}, "key 'margin' is 0.5"),
    "an answer with a weight": ({**GOOD, "prompt": AS_USER, "chosen": [{**said("a")[0], "weight": 0}]}, "weight is 0"),
    "an answer with a tool call": (
        {**GOOD, "prompt": AS_USER, "chosen": [{**said("a")[0], "tool_calls": [CALL]}]}, "key 'tool_calls'",
    ),
    "a prompt that begins the answer": ({**GOOD, "prompt": [*AS_USER, *said("Y")]}, "ends with an assistant message"),
    "a chat beside the sides": ({**GOOD, "messages": AS_USER}, "key 'messages'"),
    "a text before answers that are chats": (
        {"prompt": "Hi", "chosen": said("a"), "rejected": said("b")}, "prompt is plain text and an answer is a chat",
    ),
    "log-probs of a reference": ({**GOOD, "reference_chosen_logps": -3.0}, "key 'reference_chosen_logps'"),
    "a weight of the row": ({**GOOD, "weight": 0.2}, "key 'weight'"),
    "an answer that is rated": ({"prompt": "p", "completion": "c", "label": True}, "field 'chosen' is missing"),
    "a prompt that differs from both chats'": (
        {"prompt": "Ho", "chosen": AS_USER + said("a"), "rejected": AS_USER + said("b")}, "one assistant message",
    ),
    "chats that differ in an early answer": (
        {"chosen": AS_USER + said("a") + AS_USER + said("c"), "rejected": AS_USER + said("b") + AS_USER + said("c")},
        "one assistant message",
    ),
    "a system prompt by another name": ({**GOOD, "system_prompt": "Be"}, "key 'system_prompt'"),
    "half a pilot's record": ({"prompt": [], "chosen": {"text": "a"}, "rejected": {}}, "field .* is missing"),
}


@pytest.mark.parametrize(("row", "problem"), CONVERSATIONS_REFUSED.values(), ids=CONVERSATIONS_REFUSED.keys())
def test_a_key_of_a_chat_that_would_be_dropped_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str
) -> None:
    """Oracle: the message, which names file, line and key."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}"):
        read_conversations(write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}, row), tokenizer)


@pytest.mark.parametrize(("row", "problem"), PREFERENCES_REFUSED.values(), ids=PREFERENCES_REFUSED.keys())
def test_a_key_of_a_pair_that_would_be_dropped_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str
) -> None:
    """Oracle: the message, which names file, line and key."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}"):
        read_preferences(write(tmp_path / "rows.jsonl", GOOD, row), tokenizer)


def test_keys_with_a_meaning_are_honoured(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: the same conversation written without the key; scored tokens by hand for weights."""
    two = [*AS_USER, *said("Yo"), {"role": "user", "content": "No"}, *said("So")]
    second_only = [two[0], {**two[1], "weight": 0}, two[2], {**two[3], "weight": 1}]
    system = [{"role": "system", "content": "Be"}]
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    rows = [
        {"messages": second_only},
        {"messages": two},
        {"messages": two, "system": "Be"},
        {"messages": system + two},
        {"messages": [{"role": "user", "content": parts, "name": None, "tool_calls": []}, *two[1:]], "tools": None},
        {"messages": two, "prompt": "Hi", "metadata": {"any": 1}, "id": 7, "score": 0.5},
    ]
    items = read_conversations(write(tmp_path / "rows.jsonl", *rows), tokenizer)
    (weighted,), (plain,), with_system = (items[0].sequences, items[1].sequences, items[2])
    scored = [id for id, is_scored in zip(weighted.ids, weighted.mask, strict=True) if is_scored]
    assert tuple(scored) == chatml(tokenizer, "So<e>") and weighted.ids == plain.ids
    assert with_system == items[3] and items[4] == items[5] == items[1]
    pair = {"prompt": AS_USER, "chosen": "a", "rejected": "b"}
    rows = [{**pair, "system": "Be"}, {**pair, "prompt": system + AS_USER}]
    one, other = read_preferences(write(tmp_path / "pairs.jsonl", *rows), tokenizer)
    assert one == other


def test_a_pilots_pairs_are_trained_on_as_they_were_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: `preference_items` of the records that were written."""
    pair = Preference((USER,), (5, 6), Sample("a", "stop", (7,)), Sample("b", "stop", (8, 9)), 1.0, 0.0, "e1")
    assert read_preferences(write(tmp_path / "p.jsonl", to_json(pair)), tokenizer) == preference_items([pair])


def test_files_that_are_not_there_or_empty(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Oracle: by hand."""
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        read_preferences(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(ValueError, match=r"rows\.jsonl: the file is empty"):
        read_conversations(write(tmp_path / "rows.jsonl"), tokenizer)


def test_what_does_not_fit_is_an_error_or_counted() -> None:
    """Oracle: lengths by hand; exactly the context fits, one more does not, and nothing is cut."""
    def of(*lengths: int) -> Item:
        return Item(tuple(Tokens((1,) * n, (*(0,) * (n - 1), 1)) for n in lengths), "g")

    items = [of(4, 5), of(5, 6), of(2), of(9)]
    assert fitting(items, 5, "skip") == ([items[0], items[2]], 2)
    assert fitting(items, 9, "error") == (items, 0)
    assert fitting([], 9, "error") == ([], 0)
    with pytest.raises(ValueError, match=r"2 of 4 items exceed the context of 5 tokens \(the longest has 9\)"):
        fitting(items, 5, "error")
    with pytest.raises(ValueError, match="overlong 'cut' is unknown"):
        fitting(items, 5, "cut")


def test_repeated_pairs_are_merged_and_counted() -> None:
    """Oracle: by hand: token ids and masks decide, the first one stays in its place, whatever its group."""
    def of(group: str, mask: int, *ids: int) -> Item:
        return Item((Tokens(ids, (0, mask, 1)), Tokens((*ids[:2], 9), (0, 0, 1))), group)

    items = [of("a", 0, 1, 2, 3), of("b", 0, 1, 2, 3), of("a", 1, 1, 2, 3), of("a", 0, 1, 2, 4), of("a", 0, 1, 2, 3)]
    assert distinct(items) == ([items[0], items[2], items[3]], 2)
    swapped = Item(items[0].sequences[::-1], "a")  # the opposite preference is another pair
    assert distinct([items[0], swapped]) == ([items[0], swapped], 0)
    assert distinct([]) == ([], 0)
