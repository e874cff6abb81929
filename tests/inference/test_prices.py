"""Prices: the table that is shipped, a user's own over it, and which name means which model."""

from pathlib import Path

import pytest

from matryoshka.core.records import Usage
from matryoshka.inference.prices import Price, is_same_model, load_prices, price_of


def test_cost_by_hand(tmp_path: Path) -> None:
    """Oracle: 2 million tokens read at 0.15 and 1 million written at 0.60 are 0.90 dollars."""
    prices = load_prices()
    mini = price_of(prices, "gpt-4o-mini")
    assert mini is not None and mini.usd(Usage(2_000_000, 1_000_000)) == pytest.approx(0.90)
    assert price_of(prices, "gpt-4o-mini-2024-07-18") == mini != price_of(prices, "gpt-4o")
    assert price_of(prices, "gpt-3.5-turbo-0125") != price_of(prices, "gpt-3.5-turbo-1106")
    assert price_of(prices, "models/gemini-1.5-flash-002") == Price(0.075, 0.30)
    assert price_of(prices, "my-model") is None


def test_a_users_file_is_laid_over(tmp_path: Path) -> None:
    """Oracle: the file's own two lines; all other prices stay."""
    own = tmp_path / "p.toml"
    own.write_text('"gpt-4o" = { input = 1, output = 2.5 }\n["org/mine"]\ninput = 0\noutput = 0\n')
    prices = load_prices(own)
    assert prices["gpt-4o"] == Price(1.0, 2.5) and prices["org/mine"].usd(Usage(9, 9)) == 0
    assert prices["gpt-4o-mini"] == load_prices()["gpt-4o-mini"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("m = 3", "m: expected .* input and output"),
        ("m = { input = 1 }", "m: expected"),
        ("m = { input = 1, output = -2 }", "-2 is no price"),
        ("m = { input = 1, output = nan }", "nan is no price"),
        ("m = { input = 1, output = '2' }", "'2' is no price"),
        ("m = ", "not valid TOML"),
    ],
)
def test_a_wrong_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    """Oracle: the message for each table, by hand; it names the file."""
    own = tmp_path / "p.toml"
    own.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_prices(own)
    assert str(own) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_prices(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "asked, answered, same",
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4o-mini", "openai/gpt-4o-mini", True),
        ("gpt-3.5-turbo", "gpt-3.5-turbo-0125", True),
        ("gpt-3.5-turbo-0125", "gpt-3.5-turbo", False),
        ("gemini-1.5-flash", "models/gemini-1.5-flash-002", True),
        ("claude-sonnet-4-5", "claude-sonnet-4-5-20250929", True),
        ("llama3", "llama3:latest", True),
        ("Llama-3-8B", "llama-3-8b", True),
        ("chatgpt-4o-latest", "chatgpt-4o-latest", True),
        ("claude-3-5-haiku-latest", "claude-3-5-haiku-20241022", True),
        ("claude-3-5-haiku-latest", "claude-3-5-sonnet-20241022", False),
        ("m", "other", False),
    ],
)
def test_which_names_are_one_model(asked: str, answered: str, same: bool) -> None:
    """Oracle: the providers' names for snapshots of the requested models."""
    assert is_same_model(asked, answered) is same
