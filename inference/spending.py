"""A run's budget: every request holds the most that it can cost before it is sent, so that the budget is not crossed.

Spending and holds are in the response cache's file, so they survive a kill and are one account for all processes
that share the file, and for all generators that are asked through it. The invariant: spent + held never exceeds the
budget, as long as a request costs no more than `chat_api.most_tokens` says. Servers that bill thinking beside the
answer break that bound, so the first request of a process goes alone, and later ones hold twice the largest excess seen
so far.
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matryoshka.core.protocols import RunStopped
from matryoshka.core.records import Usage
from matryoshka.inference.accounts import Spending, add
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.prices import Price

POLL_S = 0.5  # other processes' requests end without telling us


@dataclass(frozen=True)
class Budget:
    """The most that may be spent on all generators, in US dollars and in tokens read and written; 0 is no limit."""

    usd: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.usd < float("inf")) or self.tokens < 0:
            raise ValueError(f"budget: {self.usd} USD and {self.tokens} tokens must not be negative; 0 is no limit")

    def part(self, index: int, spent: Sequence[tuple[float, int]]) -> "Budget":
        """Return the budget of machine `index`, which keeps accounts of its own: the rest is shared evenly.

        spent: dollars and tokens by machine so far.
        """
        usd, tokens = spent[index]
        left_usd = max(0.0, self.usd - sum(dollars for dollars, _ in spent)) / len(spent)
        left_tokens = max(0, self.tokens - sum(count for _, count in spent)) // len(spent)
        # Nothing left is not "no limit".
        return Budget(
            max(usd + left_usd, sys.float_info.min) if self.usd else 0.0,
            max(tokens + left_tokens, 1) if self.tokens else 0,
        )


def total(cache: ResponseCache) -> tuple[float, int]:
    """Return the dollars (at known prices) and tokens that are spent and held, over all generators."""
    return _cost(cache.committed(), {name: Price(*pair) for name, pair in cache.prices().items()})


def _cost(usages: Mapping[str, Usage], prices: Mapping[str, Price]) -> tuple[float, int]:
    usd = sum(prices[name].usd(usage) for name, usage in usages.items() if name in prices)
    return usd, sum(usage.prompt_tokens + usage.completion_tokens for usage in usages.values())


class GeneratorAccount:
    """The account of one generator under the budget over all. One object lives in one event loop."""

    def __init__(self, generator: str, cache: ResponseCache | None, price: Price | None, budget: Budget) -> None:
        """Raises ValueError for a budget that could not be kept: one without a cache, or in dollars without a price."""
        if budget != Budget() and cache is None:
            raise ValueError("budget: spending is accounted for in the response cache; give the generator one")
        if budget.usd and price is None:
            raise ValueError(
                f"budget: no price of {generator} is known, so a limit of {budget.usd:g} USD cannot be kept; add the "
                "model to a file of prices ([generator] prices), say which model it is ([generator] served_model), or "
                "limit the tokens (--budget-tokens)"
            )
        self._generator = generator
        self._cache = cache
        self.price = price
        self._budget = budget
        self._prices: dict[str, Price] = {}
        if cache is not None:
            if price is not None:
                cache.set_price(generator, price.input, price.output)
            self._prices = {name: Price(*pair) for name, pair in cache.prices().items()}
        self._settled = asyncio.Event()
        self._first = ""  # the key of the request that goes alone: does the server bill more than the bound?
        self._excess: Usage | None = None  # the largest excess over the bound, None before the first answer

    def spending(self) -> Spending:
        """Return the spending so far, in earlier processes too; nothing without a cache."""
        return Spending() if self._cache is None else self._cache.spending(self._generator)

    def usd(self) -> float | None:
        """Return the dollars spent so far, at most; None where the price is not known."""
        return None if self.price is None else self.price.usd(self.spending().spent)

    def shown(self) -> str:
        """Return the cost so far for a line of progress: dollars, or tokens where the price is not known."""
        if (usd := self.usd()) is not None:
            return f"{usd:.4f} USD"
        spent = self.spending().spent
        return f"{spent.prompt_tokens + spent.completion_tokens:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """Return the account for a report. attempts_perhaps_billed brought no answer, or one that does not say what it
        cost, and count as their upper bound."""
        known = self.spending()
        return {
            "generator": self._generator,
            "answers": known.answers,
            "prompt_tokens": known.usage.prompt_tokens,
            "completion_tokens": known.usage.completion_tokens,
            "attempts_perhaps_billed": known.lost,
            "usd_at_most": self.usd(),
        }

    async def hold(self, key: str, most: Usage) -> None:
        """Hold `most` for the request `key`, waiting while others that are on their way may cost less than they hold.

        Raises RunStopped when nothing is on its way and the request could cross the budget.
        """
        if self._cache is None or self._budget == Budget():
            return
        while self._excess is None and self._first not in ("", key):
            await self._change()
        if self._excess is None:
            self._first = key
        excess = self._excess or Usage()
        most = add(most, add(excess, excess))  # an answer may take twice the thought of any before
        try:
            while (held := self._cache.hold(key, self._generator, most, self._fits)) is not None:
                if held == Usage():
                    raise RunStopped(self._reason(most))
                await self._change()
        except BaseException:
            self._release_first(key)
            raise

    def settle(self, key: str, cost: Usage) -> None:
        """End the hold of a request that brought no answer, or none that says what it cost, and may have cost `cost`.
        """
        if self._cache is not None and (cost != Usage() or self._budget != Budget()):
            self._cache.end_hold(key, self._generator, cost)
        self._release_first(key)

    def answered(self, key: str, most: Usage, usage: Usage) -> None:
        """Note that an answer that cost `usage` was kept, which ended its hold; `most` was its bound."""
        old = self._excess or Usage()
        self._excess = Usage(
            max(old.prompt_tokens, usage.prompt_tokens - most.prompt_tokens),
            max(old.completion_tokens, usage.completion_tokens - most.completion_tokens),
        )
        self._release_first(key)

    async def _change(self) -> None:
        """Return when a request of this process ended, or after POLL_S."""
        self._settled.clear()
        try:
            async with asyncio.timeout(POLL_S):
                await self._settled.wait()
        except TimeoutError:
            pass

    def _release_first(self, key: str) -> None:
        if self._first == key:
            self._first = ""
        self._settled.set()

    def _fits(self, usages: Mapping[str, Usage]) -> bool:
        usd, tokens = _cost(usages, self._prices)
        if self._budget.tokens and tokens > self._budget.tokens:
            return False
        return not self._budget.usd or usd <= self._budget.usd

    def _reason(self, most: Usage) -> str:
        assert self._cache is not None
        committed, lost = self._cache.committed(), self.spending().lost
        usd, tokens = _cost(committed, self._prices)
        limits = [f"{self._budget.usd:g} USD"] * bool(self._budget.usd)
        limits += [f"{self._budget.tokens:,} tokens"] * bool(self._budget.tokens)
        cost = f"{tokens:,} tokens" + (f", {usd:.4f} USD" if self.price is not None else "")
        tried = f" (of these {lost} attempts that brought no answer, or none that says what it cost)" if lost else ""
        return (
            f"budget: {' and '.join(sorted({*committed, self._generator}))} used {cost}{tried}, and the next request, "
            f"of at most {most.prompt_tokens + most.completion_tokens:,} tokens, could cross the budget of "
            f"{' or '.join(limits)}. All answers are kept: raise the budget and run the same command to go on"
        )
