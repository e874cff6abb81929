"""One parsed household game of ALFWorld: its places, the names that the player reads, and the goal.

A `Game` is immutable and holds no text of its problem, so that thousands fit in memory and any number of engines share
one. Loading checks every assumption that the engine makes about a problem.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matryoshka.tasks.alfworld.pddl import Fact, Formula, ground, parse_problem

# Facts that an action of the domain can add or remove, as far as a goal or an observation shows them.
CHANGING = (
    *("atlocation", "objectatlocation", "inreceptacle", "holds", "holdsany"),
    *("opened", "isclean", "ishot", "iscool", "issliced", "istoggled"),
)
# Further facts that they change. No goal of ALFWorld asks for them; a goal that does is refused.
HIDDEN = ("checked", "ison")
# The predicates that say what can be done with an object or a receptacle; they never change.
TRAITS = (
    *("openable", "pickupable", "toggleable", "sliceable", "cleanable", "heatable", "coolable"),
    "isreceptacleobject",
)
NAMED = ("object", "receptacle", "location")
KNIVES = frozenset({"knifetype", "butterknifetype"})


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """A household and its task. Ids are the problem's in lower case; names are what the player reads, "mug 1".

    task: the sentence without its full stop; walkthrough: commands that win, in the current verbs; receptacles and
    objects: names in the order in which lists run. What follows is keyed by id.
    """

    id: str
    task_type: str
    task: str
    walkthrough: tuple[str, ...]
    receptacles: tuple[str, ...]
    objects: tuple[str, ...]
    names: Mapping[str, str]
    location: Mapping[str, str]  # receptacle -> its location, in id order
    kind: Mapping[str, str]  # receptacle -> its type
    fits: Mapping[str, frozenset[str]]  # receptacle type -> the objects that it can hold
    traits: Mapping[str, frozenset[str]]  # "openable", "pickupable", ... -> the ids that have the property
    inside: Mapping[str, tuple[str, ...]]  # object that holds others -> those, for good
    knives: frozenset[str]
    agent: str
    start: str
    facts: frozenset[Fact]
    goal: Formula


def load_game(row: Mapping[str, Any]) -> Game:
    """Return the game of `row`: {game, task_type, task, walkthrough, pddl_problem}.

    Raises ValueError naming the game and what is wrong with it.
    """
    keys = ("game", "task_type", "task", "walkthrough", "pddl_problem")
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"game {row.get('game', '?')}: the row has no {missing[0]!r}; it has {', '.join(row)}")
    try:
        return _load(*(row[key] for key in keys))
    except ValueError as err:
        raise ValueError(f"game {row['game']}: {err}") from err


def in_verbs(command: str, verbs: str) -> str:
    """Return `command` with "move X to Y" or "put X in/on Y" worded as `verbs` ("current" or "old") has it."""
    for opening, between in (("move ", " to "), ("put ", " in/on ")):
        thing, found, receptacle = command.removeprefix(opening).partition(between)
        if command.startswith(opening) and found:
            return f"put {thing} in/on {receptacle}" if verbs == "old" else f"move {thing} to {receptacle}"
    return command


def _named(ids: Iterable[str]) -> dict[str, str]:
    """Return the names of `ids`: type and number, where the first id of a type in sort order has the highest number."""
    stems = {}
    for identifier in sorted(ids):
        stem, bar, _ = identifier.partition("_bar_")
        stems[identifier] = (stem + "basin" if "basin" in identifier else stem) if bar else ""
    counts = Counter(stems.values())
    names = {}
    for identifier, stem in stems.items():
        names[identifier] = f"{stem} {counts[stem]}" if stem else f"{identifier} "
        counts[stem] -= 1
    return names


def _pairs(facts: Mapping[str, list[Fact]], predicate: str) -> dict[str, str]:
    """Return first -> second argument of a predicate that gives each first one second, in the order of ids."""
    pairs: dict[str, str] = {}
    for first, second in sorted(facts.get(predicate, [])):
        if pairs.setdefault(first, second) != second:
            raise ValueError(f"{first} has two facts ({predicate} {first} ...); expected one")
    return pairs


def _load(game_id: str, task_type: str, task: str, walkthrough: Iterable[str], text: str) -> Game:
    problem = parse_problem(text)
    facts = problem.facts
    location, kind = _pairs(facts, "receptacleatlocation"), _pairs(facts, "receptacletype")
    if untyped := [receptacle for receptacle in location if receptacle not in kind]:
        raise ValueError(f"receptacle {untyped[0]} has no fact (receptacleType {untyped[0]} ...)")
    starts = facts.get("atlocation", [])
    if len(starts) != 1 or len(starts[0]) != 2:
        raise ValueError(f"{len(starts)} facts (atLocation agent location); expected one")
    if "holds" in facts or "holdsany" in facts:
        raise ValueError("the agent starts with an object in hand; expected empty hands")
    names = _named({argument for found in facts.values() for fact in found for argument in fact})
    otypes: dict[str, set[str]] = {}
    for thing, otype in facts.get("objecttype", []):
        otypes.setdefault(otype, set()).add(thing)
    fits: dict[str, set[str]] = {rtype: set() for rtype in kind.values()}
    for rtype, otype in facts.get("cancontain", []):
        if rtype in fits:
            fits[rtype] |= otypes.get(otype, set())
    inside: dict[str, list[str]] = {}
    for inner, outer in sorted(facts.get("inreceptacleobject", [])):
        inside.setdefault(outer, []).append(names[inner])
    return Game(
        id=game_id.removesuffix("/game.tw-pddl"),
        task_type=task_type,
        task=task,
        walkthrough=tuple(in_verbs(command, "current") for command in walkthrough),
        receptacles=tuple(names[receptacle] for receptacle in location),
        objects=tuple(name for thing, name in names.items() if problem.types.get(thing) == "object"),
        names={thing: name for thing, name in names.items() if problem.types.get(thing) in NAMED},
        location=location,
        kind=kind,
        fits={rtype: frozenset(things) for rtype, things in fits.items()},
        traits={trait: frozenset(fact[0] for fact in facts.get(trait, [])) for trait in TRAITS},
        inside={outer: tuple(inner) for outer, inner in inside.items()},
        knives=frozenset(thing for otype in KNIVES for thing in otypes.get(otype, ())),
        agent=starts[0][0],
        start=starts[0][1],
        facts=frozenset((predicate, *fact) for predicate in CHANGING for fact in facts.get(predicate, [])),
        goal=ground(problem, CHANGING, HIDDEN),
    )
