"""`matryoshka cache stats|prune|export`: looks into a run's file of black-box answers, shortens it, or exports it."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from matryoshka.core.files import write_atomic
from matryoshka.core.records import to_json
from matryoshka.core.redaction import to_redacted_json
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.prices import Price, load_prices, price_of

DAY_S = 86400.0


def cache(
    action: Annotated[Literal["stats", "prune", "export"], tyro.conf.Positional],
    path: Annotated[Path, tyro.conf.Positional],
    generator: str = "",
    older_than_days: float | None = None,
    out: Path | None = None,
    prices: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Look into a cache of black-box answers, shorten it, or write it out.

    stats: answers, tokens and cost by generator. prune: delete answers; their cost stays counted. export: one JSON
    object a line (key, generator, created, sample), oldest first.

    Args:
        action: What to do.
        path: A run's folder, or its cache.sqlite.
        generator: Only the answers of this one (MODEL@URL, as stats shows it).
        older_than_days: What prune deletes: answers at least so old; 0 for all.
        out: The file that export writes.
        prices: A TOML file of your own prices, for stats; default: the prices that the run used.
        as_json: stats as one JSON object.
    """
    file = path / "cache.sqlite" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"cache: {file}: no such file; give a run's folder or its cache.sqlite")
    for flag, value, owner in (("older-than-days", older_than_days, "prune"), ("out", out, "export")):
        if (value is None) == (action == owner):
            remedy = f"{action} needs --{flag}" if action == owner else f"--{flag} belongs to {owner}, not to {action}"
            raise ValueError(f"cache: {remedy}")
    if older_than_days is not None and not older_than_days >= 0:
        raise ValueError(f"cache: older-than-days {older_than_days} must not be negative; 0 deletes all")
    answers = ResponseCache(file)
    try:
        if generator and generator not in (names := answers.generators()):
            raise ValueError(f"cache: {file} has no answers of {generator!r}; it has those of {', '.join(names)}")
        if older_than_days is not None:
            count = answers.prune(time.time() - older_than_days * DAY_S, generator or None)
            print(json.dumps({"pruned": count, "bytes": file.stat().st_size}))
        elif out is not None:
            print(json.dumps({"exported": _export(answers, generator, out), "file": str(out)}))
        else:
            rows = [row for row in _stats(answers, prices) if generator in ("", row["generator"])]
            if as_json:
                print(json.dumps({"file": str(file), "bytes": file.stat().st_size, "generators": rows}))
            else:
                _show(rows, Console())
    finally:
        answers.close()


def _stats(answers: ResponseCache, own_prices: Path | None) -> Iterator[dict[str, Any]]:
    prices, totals = load_prices(own_prices), answers.totals()
    used = {} if own_prices else {name: Price(*pair) for name, pair in answers.prices().items()}
    for name in answers.generators():
        known, kept = answers.spending(name), totals.get(name)
        price = used.get(name) or price_of(prices, name.partition("@")[0])
        yield {
            "generator": name,
            "answers": kept.answers if kept else 0,
            "ever_answered": known.answers,
            "prompt_tokens": known.usage.prompt_tokens,
            "completion_tokens": known.usage.completion_tokens,
            "attempts_perhaps_billed": known.lost,
            "usd_at_most": None if price is None else price.usd(known.spent),
            "first": _time(kept.first) if kept else None,
            "last": _time(kept.last) if kept else None,
        }


def _export(answers: ResponseCache, generator: str, out: Path) -> int:
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8") as handle:
            for key, name, created, sample in answers.rows(generator or None):
                row = {"key": key, "generator": name, "created": _time(created), "sample": to_json(sample)}
                handle.write(to_redacted_json(row, ensure_ascii=False) + "\n")
                count += 1

    write_atomic(out, write)
    return count


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    headings = ("generator", "answers", "tokens in", "tokens out", "perhaps billed", "USD at most", "first", "last")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "generator" else "right", overflow="fold")
    for row in rows:
        usd = "no price" if row["usd_at_most"] is None else f"{row['usd_at_most']:,.4f}"
        counts = (row["answers"], row["prompt_tokens"], row["completion_tokens"], row["attempts_perhaps_billed"])
        table.add_row(Text(row["generator"]), *(f"{n:,}" for n in counts), usd, row["first"] or "", row["last"] or "")
    console.print(table)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
