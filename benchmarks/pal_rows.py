"""Preference items like those of a PAL run, without a run: few-shot header + question, and pairs of other rows' texts.

Speed does not ask whether a text is a good plan, only how long it is and what it shares. So each question's pairs are
2 x K different plans of other rows, and no two siblings are equal. Rows come from the embedded word problems, or from a
user's JSONL: {question, answer} (GSM8K), where a plan is the questions that two other rows ask, or {prompt, response}
(a file for `matryoshka sft`), whose prompts bring their own few-shot header.
"""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matryoshka.core.files import read_jsonl
from matryoshka.core.records import Message, Messages, content_key, stable_seed
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item
from matryoshka.dpo.data import text_completion
from matryoshka.tasks.pal import synthetic_problems as words
from matryoshka.tasks.pal.task import open_prompts
from matryoshka.tasks.prompt_files import PromptFile

STYLES = {name: open_prompts(name) for name in ("full", "compact")}
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def pal_items(
    tokenizer: Tokenizer, questions: int, pairs: int, style: str, data: Path | None, seed: int
) -> list[Item]:
    """Return `pairs` items for each of `questions` prompts, a pure function of the arguments and the file.

    Raises ValueError for a file with too few rows or of another form, FileNotFoundError.
    """
    if style not in STYLES:
        raise ValueError(f"bench step: style {style!r} is unknown; choose from {list(STYLES)}")
    needed = max(questions, 2 * pairs + 1)
    if data is None:
        rows = _word_problems(2 * needed, STYLES[style], seed)
    else:
        rows = list(_file_rows(data, STYLES[style]))
    if len({plan for _, plan in rows}) <= 2 * pairs or len(rows) < questions:
        where = data or "word problems"
        raise ValueError(f"{where}: {len(rows)} rows; {questions} questions with {pairs} pairs each need more")
    items = []
    for index, (prompt, own) in enumerate(rows[:questions]):
        plans = sorted({plan for _, plan in rows} - {own})
        drawn = random.Random(stable_seed("siblings", seed, index)).sample(plans, 2 * pairs)
        sides = [text_completion(tokenizer, prompt, plan) for plan in drawn]
        group = content_key(prompt)
        items += [Item((sides[2 * k], sides[2 * k + 1]), group) for k in range(pairs)]
    return items


def _word_problems(n: int, style: PromptFile, seed: int) -> list[tuple[Messages, str]]:
    problems = words.problems("train", n, seed)
    return [(style.render("guidance", question=problem.question), _plan(style, problem.steps)) for problem in problems]


def _file_rows(path: Path, style: PromptFile) -> Iterable[tuple[Messages, str]]:
    rows = read_jsonl(path)
    asked = [_asked(row["question"]) for row in rows if isinstance(row.get("question"), str)]
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get("question"), str):
            steps = [asked[(number - 1) % len(asked)], asked[number % len(asked)]]
            yield style.render("guidance", question=row["question"]), _plan(style, steps)
        elif "prompt" in row and "response" in row:
            try:
                yield _messages(row["prompt"]), _messages(row["response"])[-1].content
            except (TypeError, KeyError, IndexError) as err:
                raise ValueError(f"{path}:{number}: prompt and response must be lists of {{role, content}}") from err
        else:
            raise ValueError(f"{path}:{number}: the row has {sorted(row)}; expected question, or prompt and response")


def _asked(question: str) -> str:
    """Return the last sentence that asks, or the last one."""
    sentences = SENTENCE_END.split(question.strip())
    return next((s for s in reversed(sentences) if s.endswith("?")), sentences[-1])


def _plan(style: PromptFile, steps: Sequence[str]) -> str:
    header = style.values.get("header")
    return "\n".join([header, *steps] if header else steps)


def _messages(rows: Any) -> Messages:
    return tuple(Message(row["role"], row["content"]) for row in rows)
