"""Prices of a model's tokens: the table in prices.toml, with a user's own file laid over it.

Prices are list prices in US dollars for a million tokens. Discounts (cached prompts, batches) are not in them, so a
cost is an upper bound of the bill; a model that no table names has no cost, never a cost of zero.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from matryoshka.core.records import Usage

PRICES = Path(__file__).with_name("prices.toml")
# Suffixes by which providers name a snapshot of a model: a date, a revision, "latest".
_SNAPSHOT = re.compile(r"((-\d{4}-\d{2}-\d{2})|(-\d{2}-\d{2})|(-\d{3,8})|(-latest)|(:latest))$")


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens read (input) and written (output)."""

    input: float
    output: float

    def usd(self, usage: Usage) -> float:
        """Return what `usage` costs."""
        return (usage.prompt_tokens * self.input + usage.completion_tokens * self.output) / 1e6


def load_prices(own: Path | None = None) -> dict[str, Price]:
    """Return model -> price: prices.toml, and over it the table of the user's file `own`.

    Raises FileNotFoundError, and ValueError naming file and model if it is not a table of prices.
    """
    prices: dict[str, Price] = {}
    for path in (PRICES, own) if own is not None else (PRICES,):
        if not path.is_file():
            raise FileNotFoundError(f"prices: {path}: no such file; expected TOML as in {PRICES}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise ValueError(f"prices: {path}: not valid TOML: {err}") from err
        prices |= {model: _price(path, model, row) for model, row in table.items()}
    return prices


def price_of(prices: dict[str, Price], model: str) -> Price | None:
    """Return the price of `model` (without "models/" or a snapshot's date if it is not there with it), None if none."""
    name = model.removeprefix("models/")
    while name not in prices and (shorter := _SNAPSHOT.sub("", name)) != name:
        name = shorter
    return prices.get(name)


def is_same_model(asked: str, answered: str) -> bool:
    """Return whether an answer that names model `answered` is one of `asked`: the same, or a snapshot of it."""
    names = [name.strip().lower().rpartition("/")[2] for name in (asked, answered)]
    if names[0] != names[1]:  # the newest snapshot was asked for, and says which one it is
        names[0] = re.sub("[-:]latest$", "", names[0])
    while names[1] != names[0] and (shorter := _SNAPSHOT.sub("", names[1])) != names[1]:
        names[1] = shorter
    return names[0] == names[1]


def _price(path: Path, model: str, row: object) -> Price:
    expected = f"expected [{model!r}] with input and output in US dollars for a million tokens"
    if not isinstance(row, dict) or set(row) != {"input", "output"}:
        raise ValueError(f"prices: {path}: {model}: {expected}")
    for value in row.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"prices: {path}: {model}: {value!r} is no price; {expected}")
    return Price(float(row["input"]), float(row["output"]))
