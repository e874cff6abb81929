"""The families of the embedded word problems: number ranges, wordings per split, gold steps and expressions. Data only.

P, Q, R and S are a problem's numbers. A step is a short sub-question that names its numbers; step i is program line i,
and a, b, c stand for the results of lines 1, 2, 3.
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
HELD_OUT = ("bus", "reading")


@dataclass(frozen=True)
class Family:
    name: str
    ranges: Mapping[str, Sequence[int]]
    fits: Callable[[Mapping[str, int]], bool]
    steps: tuple[str, ...]
    expressions: tuple[str, ...]
    wordings: Mapping[str, tuple[str, ...]]


def _family(
    name: str,
    ranges: Mapping[str, Sequence[int]],
    steps: tuple[str, ...],
    expressions: tuple[str, ...],
    train: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
    fits: Callable[[Mapping[str, int]], bool] = lambda v: True,
) -> Family:
    return Family(name, ranges, fits, steps, expressions, {"train": train, "validation": validation, "test": test})


SMALL, MIDDLE, LARGE = range(2, 10), range(3, 20), range(20, 60)

FAMILIES = (
    _family(
        "sold",
        {"P": SMALL, "Q": SMALL, "R": MIDDLE},
        ("How many {item} in {P} boxes of {Q}?", "How many are left after losing {R}?"),
        ("{P} * {Q}", "a - {R}"),
        (
            "{name} has {P} boxes of {Q} {item} and sells {R} of them. How many {item} are left?",
            "There are {P} boxes with {Q} {item} each. {R} {item} are sold. How many {item} remain?",
            "{name} packs {P} boxes with {Q} {item} in each and then gives {R} {item} to {other}. How many are left?",
            "{P} crates with {Q} {item} in each arrive. {name} throws {R} {item} away. How many {item} are left?",
            "{name} sets {P} rows of {Q} {item}. Later {R} of the {item} are taken. How many {item} stay?",
        ),
        ("{P} bags hold {Q} {item} each. {name} eats {R}. How many {item} are there now?",),
        (
            "{name} fills {P} bowls with {Q} {item} apiece, but {R} get lost. How many {item} are still there?",
            "After buying {P} packs of {Q} {item}, {name} drops {R} {item}. How many {item} are still good?",
        ),
        lambda v: v["P"] * v["Q"] > v["R"],
    ),
    _family(
        "found",
        {"P": SMALL, "Q": SMALL, "R": MIDDLE},
        ("How many {item} in {P} boxes of {Q}?", "How many with {R} more?"),
        ("{P} * {Q}", "a + {R}"),
        (
            "{name} has {P} boxes of {Q} {item} and finds {R} more. How many {item} does {name} have?",
            "There are {P} trays with {Q} {item} each and {R} loose {item}. How many {item} are there?",
            "{name} buys {P} packs of {Q} {item}. {other} brings {R} more {item}. How many {item} are there in all?",
            "{P} crates with {Q} {item} in each arrive. {name} had {R} {item} before. How many {item} are there now?",
            "{name} sets {P} rows of {Q} {item} and puts {R} {item} beside them. How many {item} is that?",
        ),
        ("{P} bags hold {Q} {item} each, and {R} {item} lie beside them. How many {item} are there?",),
        (
            "On {P} shelves stand {Q} {item} each. {name} adds another {R} {item}. What is the number of {item} now?",
            "{name} got {R} {item} from {other} and owns {P} jars of {Q} {item}. How many {item} does {name} own?",
        ),
    ),
    _family(
        "share",
        {"P": range(5, 40), "Q": range(5, 40), "R": SMALL},
        ("How many are {P} and {Q} together?", "How many for each of {R}?"),
        ("{P} + {Q}", "a / {R}"),
        (
            "{name} has {P} red and {Q} blue {item} and shares them among {R} friends. How many {item} does each get?",
            "{P} {item} and {Q} {second} are packed into {R} equal bags. How many things are in a bag?",
            "{name} brings {P} {item}, {other} brings {Q}. They share them among {R} children. How many does each get?",
            "{P} {item} and then {Q} more {item} are put on {R} plates, the same on each. How many are on a plate?",
            "{R} friends split {P} sweet and {Q} sour {item} equally. How many does one friend get?",
        ),
        ("{name} picked {P} {item}, {other} picked {Q}. They fill {R} baskets equally. How many are in a basket?",),
        (
            "A class collects {P} {item} on Monday and {Q} on Friday for {R} tables. How many per table?",
            "{P} old and {Q} new {item} are divided equally over {R} boxes. How many {item} does one box hold?",
        ),
        lambda v: (v["P"] + v["Q"]) % v["R"] == 0,
    ),
    _family(
        "change",
        {"P": SMALL, "Q": SMALL, "R": (50, 80, 90, 100)},
        ("How much for {P} at {Q} dollars?", "How much is left from {R} dollars?"),
        ("{P} * {Q}", "{R} - a"),
        (
            "{name} buys {P} {item} at {Q} dollars each and pays with {R} dollars. How much change does {name} get?",
            "A toy costs {Q} dollars. {name} has {R} dollars and buys {P} toys. How many dollars are left?",
            "{name} has {R} dollars and buys {P} {item} for {Q} dollars each. How much money is left?",
            "{P} {item} at {Q} dollars each are paid with {R} dollars. How many dollars come back?",
            "From {R} dollars {name} pays for {P} {item}, {Q} dollars each. How many dollars remain?",
        ),
        ("With {R} dollars {name} pays for {P} {item} that cost {Q} dollars each. What is left?",),
        (
            "One ticket costs {Q} dollars. {name} hands over {R} dollars for {P} tickets. How many dollars come back?",
            "{name} owns {R} dollars. Then {P} {item} are bought, {Q} dollars apiece. What is still there?",
        ),
        lambda v: v["P"] * v["Q"] < v["R"],
    ),
    _family(
        "two_kinds",
        {"P": SMALL, "Q": SMALL, "R": SMALL, "S": SMALL},
        (
            "How much for {P} at {Q} dollars?",
            "How much for {R} at {S} dollars?",
            "How much are both together?",
        ),
        ("{P} * {Q}", "{R} * {S}", "a + b"),
        (
            "{name} buys {P} {item} at {Q} dollars each and {R} {second} at {S} dollars each. What does {name} pay?",
            "{item} cost {Q} dollars and {second} cost {S} dollars. How much are {P} {item} and {R} {second}?",
            "{name} sells {P} {item} for {Q} dollars each and {R} {second} for {S} dollars each. What comes in?",
            "{name} pays {Q} dollars for each of {P} {item} and {S} dollars for each of {R} {second}. What is that?",
            "The shop sold {P} {item} at {Q} dollars and {R} {second} at {S} dollars. How much money is that?",
        ),
        ("What is the price of {P} {item} at {Q} dollars and {R} {second} at {S} dollars?",),
        (
            "For {Q} dollars each {name} gets {P} {item}, and for {S} dollars each {R} {second}. What is the bill?",
            "{P} {item} are sold at {Q} dollars apiece and {R} {second} at {S} dollars apiece. What comes in?",
        ),
    ),
    _family(
        "twice_lost",
        {"P": LARGE, "Q": MIDDLE, "R": MIDDLE},
        ("How many of {P} are left after losing {Q}?", "How many are left after losing {R}?"),
        ("{P} - {Q}", "a - {R}"),
        (
            "{name} has {P} {item}, gives {Q} to {other} and loses {R}. How many {item} are left?",
            "There were {P} {item}. {Q} were eaten on Monday and {R} on Tuesday. How many {item} remain?",
            "A shop has {P} {item}. It sells {Q} in the morning and {R} at noon. How many {item} are left?",
            "{name} baked {P} {item}. {other} ate {Q}, and {R} fell down. How many {item} are there now?",
            "Of {P} {item}, {Q} go to {other} and {R} go to the school. How many {item} does {name} have left?",
        ),
        ("From {P} {item}, {name} takes {Q} and {other} takes {R}. How many are left?",),
        (
            "{name} picked {P} {item}. {Q} of them were bad and {R} were given away. How many {item} does {name} keep?",
            "Of the {P} {item} in a box, {Q} break and {R} get lost. How many {item} are still in the box?",
        ),
        lambda v: v["P"] > v["Q"] + v["R"],
    ),
    _family(
        "wages",
        {"P": SMALL, "Q": range(5, 15), "R": MIDDLE},
        ("How much for {P} at {Q} dollars?", "How much is left after spending {R}?"),
        ("{P} * {Q}", "a - {R}"),
        (
            "{name} earns {Q} dollars a day for {P} days and spends {R} dollars. How much money is left?",
            "{name} works {P} hours at {Q} dollars an hour and then spends {R} dollars. How many dollars remain?",
            "{name} sells {P} {item} for {Q} dollars each and pays {R} dollars for the stall. How much is left?",
            "{name} fixes {P} bikes for {Q} dollars each and buys food for {R} dollars. How much is left?",
            "Each of {P} trips brings {Q} dollars. The fuel costs {R} dollars. How many dollars are left?",
        ),
        ("In {P} weeks {name} saves {Q} dollars a week, then spends {R} dollars. What is left?",),
        (
            "{name} gets {Q} dollars for each lawn and mows {P} lawns. A lunch costs {name} {R} dollars. What remains?",
            "For {P} days {name} was paid {Q} dollars daily. The bus cost {R} dollars in all. How many dollars remain?",
        ),
        lambda v: v["P"] * v["Q"] > v["R"],
    ),
    _family(
        "regroup",
        {"P": SMALL, "Q": SMALL, "R": SMALL},
        ("How many {item} in {P} boxes of {Q}?", "How many for each of {R}?"),
        ("{P} * {Q}", "a / {R}"),
        (
            "{name} has {P} boxes of {Q} {item} and shares them equally among {R} friends. How many does each get?",
            "{P} packs with {Q} {item} each are divided among {R} children. How many {item} does each child get?",
            "{name} empties {P} bags of {Q} {item} and fills {R} jars equally. How many {item} are in a jar?",
            "{R} friends divide {P} bowls of {Q} {item} equally. How many {item} does one friend get?",
            "{name} takes {P} crates with {Q} {item} each and makes {R} equal piles. How many {item} are in a pile?",
        ),
        ("{P} rows of {Q} {item} are shared by {R} people. How many {item} does one person get?",),
        (
            "{R} cousins split {P} bundles of {Q} {item} evenly. What is the share of one cousin?",
            "The {item} from {P} baskets with {Q} apiece go onto {R} plates, as many on each. How many per plate?",
        ),
        lambda v: v["P"] * v["Q"] % v["R"] == 0 and v["R"] not in (v["P"], v["Q"]),
    ),
    _family(
        "gifts",
        {"P": SMALL, "Q": SMALL, "R": MIDDLE},
        ("How many are {P} and {Q} together?", "How many for {R} times that?"),
        ("{P} + {Q}", "a * {R}"),
        (
            "Each of {R} children gets {P} {item} and {Q} {second}. How many things are given out?",
            "{name} puts {P} {item} and {Q} {second} into each of {R} bags. How many things are packed?",
            "Every day {name} eats {P} {item} and {Q} {second}. How many does {name} eat in {R} days?",
            "{R} boxes are filled with {P} {item} and {Q} {second} each. How many things are in the boxes?",
            "{name} sells {P} {item} and {Q} {second} a day. How many things are sold in {R} days?",
        ),
        ("{R} guests take {P} {item} and {Q} {second} each. How many things are taken?",),
        (
            "A kit has {P} {item} and {Q} {second}. {name} makes {R} kits. How many pieces does {name} need?",
            "{R} tables carry {P} {item} and {Q} {second} apiece. How many things stand on the tables?",
        ),
    ),
    _family(
        "refill",
        {"P": range(5, 40), "Q": range(5, 40), "R": MIDDLE},
        ("How many are {P} and {Q} together?", "How many are left after losing {R}?"),
        ("{P} + {Q}", "a - {R}"),
        (
            "{name} has {P} {item}, gets {Q} from {other} and loses {R}. How many {item} does {name} have?",
            "A shop has {P} {item}, receives {Q} more and sells {R}. How many {item} are there now?",
            "{name} picks {P} {item} and {other} picks {Q}. They eat {R}. How many {item} are left?",
            "{P} {item} lie in a bowl. {name} puts {Q} in and {other} takes {R} out. How many {item} are in the bowl?",
            "{name} collects {P} {item}, then {Q} more, and gives {R} to {other}. How many {item} does {name} keep?",
        ),
        ("{P} {item} and {Q} {second} are on a table. {name} takes {R} things. How many are left?",),
        (
            "{name} baked {P} {item} on Monday and {Q} on Tuesday. {R} of them burned. How many {item} are good?",
            "To {P} {item} in a drawer {name} adds {Q}. Then {other} borrows {R}. How many {item} are in the drawer?",
        ),
        lambda v: v["P"] + v["Q"] > v["R"],
    ),
    _family(
        "bus",
        {"P": LARGE, "Q": MIDDLE, "R": MIDDLE},
        ("How many of {P} are left after losing {Q}?", "How many with {R} more?"),
        ("{P} - {Q}", "a + {R}"),
        (),
        (),
        (
            "{P} people are on a bus. {Q} get off and {R} get on. How many people are on the bus?",
            "{name} had {P} {item}, sold {Q} and bought {R} new ones. How many {item} does {name} have now?",
        ),
        lambda v: v["P"] > v["Q"],
    ),
    _family(
        "reading",
        {"P": range(30, 90), "Q": range(5, 30), "R": SMALL},
        ("How many of {P} are left after losing {Q}?", "How many for each of {R}?"),
        ("{P} - {Q}", "a / {R}"),
        (),
        (),
        (
            "A book has {P} pages. {name} has read {Q} and reads the rest in {R} days. How many pages is that a day?",
            "{name} has {P} {item}, keeps {Q} and shares the others among {R} friends. How many does each friend get?",
        ),
        lambda v: (v["P"] - v["Q"]) % v["R"] == 0 and v["P"] > v["Q"],
    ),
)
