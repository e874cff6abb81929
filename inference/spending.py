"""The line that a run's spending does not cross: every request holds the most that it can cost before it is sent.

What is spent and held stands in the response cache's file, so it survives a kill and is one account for all processes
that share the file. The invariant: spent + held never exceeds the budget, as long as no server bills more tokens than
`chat_api.most_tokens` says it can.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from matryoshka.core.protocols import RunStopped
from matryoshka.core.records import Usage
from matryoshka.inference.accounts import Spending
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.prices import Price

POLL_S = 0.5  # other processes' requests end without telling us


@dataclass(frozen=True)
class Budget:
    """The most that may be spent on a generator, in US dollars and in tokens read and written; 0 is no limit."""

    usd: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.usd < float("inf")) or self.tokens < 0:
            raise ValueError(f"budget: {self.usd} USD and {self.tokens} tokens must not be negative; 0 is no limit")


class Purse:
    """The account of one generator. One object lives in one event loop."""

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
        self._settled = asyncio.Event()

    def spending(self) -> Spending:
        """Return what was spent so far, in earlier processes too; nothing without a cache."""
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
        """Return the account for a report; attempts_perhaps_billed brought no answer and count as their upper bound."""
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

        Raises RunStopped when nothing is on its way and the request could cross the line.
        """
        if self._cache is None or self._budget == Budget():
            return
        while (held := self._cache.hold(key, self._generator, most, self._fits)) is not None:
            if held == Usage():
                raise RunStopped(self._reason(most))
            self._settled.clear()
            try:
                async with asyncio.timeout(POLL_S):
                    await self._settled.wait()
            except TimeoutError:
                pass

    def settle(self, key: str, cost: Usage) -> None:
        """End the hold of a request that brought no answer to keep and cost `cost` at most."""
        if self._cache is not None and (cost != Usage() or self._budget != Budget()):
            self._cache.unhold(key, self._generator, cost)
        self._settled.set()

    def settled(self) -> None:
        """Note that an answer was kept, which ended its hold."""
        self._settled.set()

    def _fits(self, usage: Usage) -> bool:
        tokens = usage.prompt_tokens + usage.completion_tokens
        if self._budget.tokens and tokens > self._budget.tokens:
            return False
        return self.price is None or not self._budget.usd or self.price.usd(usage) <= self._budget.usd

    def _reason(self, most: Usage) -> str:
        spent = self.spending()
        tokens = spent.spent.prompt_tokens + spent.spent.completion_tokens
        limits = [f"{self._budget.usd:g} USD"] * bool(self._budget.usd)
        limits += [f"{self._budget.tokens:,} tokens"] * bool(self._budget.tokens)
        cost = f"{tokens:,} tokens" + (f", {usd:.4f} USD" if (usd := self.usd()) is not None else "")
        lost = f" (of these {spent.lost} attempts that brought no answer but may be billed)" if spent.lost else ""
        return (
            f"budget: {self._generator} has used {cost}{lost}, and the next request, of at most "
            f"{most.prompt_tokens + most.completion_tokens:,} tokens, could cross the budget of {' or '.join(limits)}. "
            "All answers are kept: raise the budget and run the same command to go on"
        )
