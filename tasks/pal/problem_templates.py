"""The families of the embedded word problems as data: number ranges, clauses, gold steps and expressions.

A wording is an opening, an event and a question; `synthetic_problems.py` gives every combination to one split. P, Q, R
and S are a problem's numbers. A step is a short sub-question that names its numbers; step i is program line i, and a,
b, c stand for the results of lines 1, 2, 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NAMES = (
    "Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ian", "Jo", "Kim", "Leo", "Mia", "Ned", "Olga", "Pia",
)  # fmt: skip
ITEMS = (
    "apples", "pens", "cards", "shells", "books", "eggs", "coins", "roses", "plums", "stamps", "beads", "nuts", "balls",
    "cakes", "toys", "pears",
)  # fmt: skip
HELD_OUT = ("exchange", "keep_and_share")
SMALL, MIDDLE, LARGE, NOTES = range(2, 10), range(3, 20), range(20, 60), (50, 80, 90, 100)

GROUPS = (
    "{name} has {P} boxes of {Q} {item}.",
    "There are {P} boxes with {Q} {item} each.",
    "{name} packs {Q} {item} into each of {P} boxes.",
    "{P} bags hold {Q} {item} each.",
    "On {P} shelves stand {Q} {item} each.",
)
TWO_PARTS = (
    "{name} has {P} red and {Q} blue {item}.",
    "{name} picks {P} {item} and {other} picks {Q}.",
    "There are {P} old and {Q} new {item}.",
    "{P} {item} come on Monday and {Q} on Friday.",
)
KITS = (
    "A kit has {P} {item} and {Q} {second}.",
    "Each child gets {P} {item} and {Q} {second}.",
    "Every table carries {P} {item} and {Q} {second}.",
    "One bag holds {P} {item} and {Q} {second}.",
)
PRICES = (
    "{name} buys {P} {item} at {Q} dollars each.",
    "{P} {item} cost {Q} dollars each.",
    "{name} takes {P} {item}, {Q} dollars apiece.",
    "{name} wants {P} {item} for {Q} dollars each.",
)
EARNINGS = (
    "{name} earns {Q} dollars a day for {P} days.",
    "{name} works {P} hours at {Q} dollars an hour.",
    "{name} sells {P} {item} for {Q} dollars each.",
    "{name} mows {P} lawns, and each brings {Q} dollars.",
)
STOCK = (
    "{name} has {P} {item}.",
    "There are {P} {item} in a box.",
    "A shop has {P} {item}.",
    "{name} baked {P} {item}.",
)
LOSE = ("{R} {item} are sold.", "{other} takes {R} of them.", "Then {R} get lost.", "{R} {item} are eaten.")
GAIN = (
    "{R} more {item} arrive.",
    "{other} brings {R} more.",
    "Then {name} finds another {R}.",
    "{R} loose {item} lie beside them.",
)
DIVIDE = (
    "They are shared equally among {R} friends.",
    "{R} children divide them evenly.",
    "{R} people split them equally.",
    "They are dealt out to {R} players.",
)
REPEAT = ("There are {R} of them.", "{name} counts {R} of them.", "It is the same for all {R}.", "{name} needs {R}.")
PAY = (
    "{name} pays with {R} dollars.",
    "{name} had {R} dollars.",
    "{name} hands over {R} dollars.",
    "{name} brought {R} dollars.",
)
SPEND = (
    "Then {name} spends {R} dollars.",
    "{R} dollars go for lunch.",
    "The bus costs {R} dollars.",
    "{name} gives {R} dollars to {other}.",
)
SECOND_KIND = (
    "{R} {second} cost {S} dollars each.",
    "Then come {R} {second} at {S} dollars each.",
    "So are {R} {second}, {S} dollars apiece.",
    "{other} adds {R} {second} for {S} dollars each.",
)
LOSE_TWICE = (
    "{other} takes {Q} and {R} get lost.",
    "{Q} are sold in the morning and {R} at noon.",
    "{Q} go to {other} and {R} to the school.",
    "First {Q} break, then {R} more.",
)
EXCHANGE = ("{Q} are sold and {R} new ones are bought.", "{other} takes {Q} and brings {R} back.")
KEEP_AND_SHARE = (
    "{name} keeps {Q} and shares the others among {R} friends.",
    "{Q} are lost and {R} children divide the rest.",
)
HOW_MANY_LEFT = (
    "How many {item} are left?",
    "How many {item} remain?",
    "How many {item} are there now?",
    "What is the number of {item} now?",
)
HOW_MANY = ("How many {item} are there?", "How many {item} are there in all?", "What is the number of {item} now?")
HOW_MANY_EACH = ("How many {item} does each get?", "How many {item} is that each?", "What is the share of each?")
HOW_MANY_THINGS = ("How many things is that in all?", "How many things are there?", "What is the number of things?")
MONEY_LEFT = ("How much money is left?", "How many dollars remain?", "How many dollars are left?", "What is left?")
COST = ("What does it cost in all?", "How much is that together?", "What is the bill?")

BOXES, PRICE = "How many {item} in {P} boxes of {Q}?", "How much for {P} at {Q} dollars?"
TOGETHER, FIRST_LOSS = "How many are {P} and {Q} together?", "How many of {P} are left after losing {Q}?"
LOSING, MORE = "How many are left after losing {R}?", "How many with {R} more?"
EACH, TIMES = "How many for each of {R}?", "How many for {R} times that?"


@dataclass(frozen=True)
class Family:
    """ranges: choices of each number; fits: which of them make sense; clauses: opening, event, question."""

    name: str
    ranges: Mapping[str, Sequence[int]]
    clauses: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    steps: tuple[str, ...]
    expressions: tuple[str, ...]
    fits: Callable[[Mapping[str, int]], bool] = lambda v: True


def _numbers(p: Sequence[int], q: Sequence[int], r: Sequence[int]) -> dict[str, Sequence[int]]:
    return {"P": p, "Q": q, "R": r}


FAMILIES = (
    Family(
        "sold",
        _numbers(SMALL, SMALL, MIDDLE),
        (GROUPS, LOSE, HOW_MANY_LEFT),
        (BOXES, LOSING),
        ("{P} * {Q}", "a - {R}"),
        lambda v: v["P"] * v["Q"] > v["R"],
    ),
    Family(
        "found",
        _numbers(SMALL, SMALL, MIDDLE),
        (GROUPS, GAIN, HOW_MANY),
        (BOXES, MORE),
        ("{P} * {Q}", "a + {R}"),
    ),
    Family(
        "regroup",
        _numbers(SMALL, SMALL, SMALL),
        (GROUPS, DIVIDE, HOW_MANY_EACH),
        (BOXES, EACH),
        ("{P} * {Q}", "a / {R}"),
        lambda v: v["P"] * v["Q"] % v["R"] == 0 and v["R"] not in (v["P"], v["Q"]),
    ),
    Family(
        "share",
        _numbers(range(5, 40), range(5, 40), SMALL),
        (TWO_PARTS, DIVIDE, HOW_MANY_EACH),
        (TOGETHER, EACH),
        ("{P} + {Q}", "a / {R}"),
        lambda v: (v["P"] + v["Q"]) % v["R"] == 0,
    ),
    Family(
        "refill",
        _numbers(range(5, 40), range(5, 40), MIDDLE),
        (TWO_PARTS, LOSE, HOW_MANY_LEFT),
        (TOGETHER, LOSING),
        ("{P} + {Q}", "a - {R}"),
        lambda v: v["P"] + v["Q"] > v["R"],
    ),
    Family(
        "gifts",
        _numbers(SMALL, SMALL, MIDDLE),
        (KITS, REPEAT, HOW_MANY_THINGS),
        (TOGETHER, TIMES),
        ("{P} + {Q}", "a * {R}"),
    ),
    Family(
        "change",
        _numbers(SMALL, SMALL, NOTES),
        (PRICES, PAY, MONEY_LEFT),
        (PRICE, "How much is left from {R} dollars?"),
        ("{P} * {Q}", "{R} - a"),
        lambda v: v["P"] * v["Q"] < v["R"],
    ),
    Family(
        "wages",
        _numbers(SMALL, range(5, 15), MIDDLE),
        (EARNINGS, SPEND, MONEY_LEFT),
        (PRICE, "How much is left after spending {R}?"),
        ("{P} * {Q}", "a - {R}"),
        lambda v: v["P"] * v["Q"] > v["R"],
    ),
    Family(
        "two_kinds",
        {"P": SMALL, "Q": SMALL, "R": SMALL, "S": SMALL},
        (PRICES, SECOND_KIND, COST),
        (PRICE, "How much for {R} at {S} dollars?", "How much are both together?"),
        ("{P} * {Q}", "{R} * {S}", "a + b"),
    ),
    Family(
        "twice_lost",
        _numbers(LARGE, MIDDLE, MIDDLE),
        (STOCK, LOSE_TWICE, HOW_MANY_LEFT),
        (FIRST_LOSS, LOSING),
        ("{P} - {Q}", "a - {R}"),
        lambda v: v["P"] > v["Q"] + v["R"],
    ),
    Family(
        "exchange",
        _numbers(LARGE, MIDDLE, MIDDLE),
        (STOCK, EXCHANGE, HOW_MANY),
        (FIRST_LOSS, MORE),
        ("{P} - {Q}", "a + {R}"),
        lambda v: v["P"] > v["Q"],
    ),
    Family(
        "keep_and_share",
        _numbers(range(30, 90), range(5, 30), SMALL),
        (STOCK, KEEP_AND_SHARE, HOW_MANY_EACH),
        (FIRST_LOSS, EACH),
        ("{P} - {Q}", "a / {R}"),
        lambda v: v["P"] > v["Q"] and (v["P"] - v["Q"]) % v["R"] == 0,
    ),
)
