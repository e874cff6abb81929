"""Makes households of our own in ALFWorld's problem format, so that tests and the demo need no download.

A household is a room with furniture, things in it and one task of the six types; rows are those of `games`. Each comes
with a walkthrough that follows from how it was built and that has been played and won before the row is returned. They
are far smaller than ALFWorld's rooms, and their ids carry no coordinates. Otherwise they have the same form. Contents
of rooms are in `households.toml`.

A good plan depends on where things tend to be, so each kind of thing has its usual places. Tasks over one in five
pairs of thing and target appear in valid_unseen alone; train and valid_seen share the others in different households.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matryoshka.core.records import stable_seed
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import Game, load_game
from matryoshka.tasks.alfworld.games import SPLITS, TASK_TYPES, Row


@dataclass(frozen=True)
class Room:
    """A room: receptacles that it always has or may have, and its kinds of things. number: in the games' ids."""

    number: int
    always: Sequence[str]
    more: Sequence[str]
    kinds: Sequence[str]


_DATA = tomllib.loads(Path(__file__).with_name("households.toml").read_text(encoding="utf-8"))
ROOMS = tuple(Room(**room) for room in _DATA["rooms"])
THINGS, PLACES, TRAITS, OPENABLE = (_DATA[name] for name in ("things", "places", "traits", "openable"))
SIMPLE, LOOK, CLEAN, HEAT, COOL, TWO = TASK_TYPES
UNSEEN_SHARE = 5
START = "loc_bar_00"  # in the middle of the room, beside no receptacle
# Task -> (what its thing must be, the verb that makes it so, with which receptacle).
TREATMENT = {
    CLEAN: (TRAITS["cleanable"], "clean", "SinkBasin"),
    HEAT: (TRAITS["heatable"], "heat", "Microwave"),
    COOL: (TRAITS["coolable"], "cool", "Fridge"),
}
SENTENCES = {
    SIMPLE: ("put a {} in {}", "put some {} on {}"),
    LOOK: ("look at {} under the {}", "examine the {} with the {}"),
    CLEAN: ("put a clean {} in {}", "clean some {} and put it in {}"),
    HEAT: ("put a hot {} in {}", "heat some {} and put it in {}"),
    COOL: ("put a cool {} in {}", "cool some {} and put it in {}"),
    TWO: ("put two {} in {}", "find two {} and put them in {}"),
}


@dataclass(frozen=True)
class Size:
    """Number of receptacles and things in a household. Those that its task needs are added if they are missing."""

    receptacles: int
    things: int


SIZES = {"small": Size(7, 6), "medium": Size(14, 16), "large": Size(26, 32)}


@dataclass(frozen=True)
class Goal:
    """The subject of a task: the thing's kind and type, and the receptacle type (or lamp) where it must go."""

    room: Room
    kind: str
    thing: str
    target: str


def households(split: str, n: int, seed: int, size: str = "small", types: Sequence[str] = TASK_TYPES) -> list[Row]:
    """Return n households of `split`, their task types in turn; the first n are the same whatever n is.

    size: "small" (7 receptacles, 6 things), "medium" (14, 16) or "large" (26, 32). Raises ValueError for a split, size
    or type that does not exist.
    """
    for what, value, known in (("split", split, SPLITS), ("size", size, tuple(SIZES))):
        if value not in known:
            raise ValueError(f"households: {what} {value!r} is unknown; choose from {', '.join(known)}")
    if not types or (unknown := [name for name in types if name not in TASK_TYPES]):
        named = unknown[0] if types else ""
        raise ValueError(f"households: task type {named!r} is unknown; choose from {', '.join(TASK_TYPES)}")
    return [_household(split, index, seed, size, types[index % len(types)]) for index in range(n)]


@cache
def goals(task_type: str, split: str) -> tuple[Goal, ...]:
    """Return what tasks of this type can be about in `split`."""
    unseen = split == "valid_unseen"
    return tuple(
        goal
        for goal in _all_goals(task_type)
        if (stable_seed("unseen pair", goal.thing, goal.target) % UNSEEN_SHARE == 0) == unseen
    )


def _all_goals(task_type: str) -> Iterator[Goal]:
    fit, _, appliance = TREATMENT.get(task_type, (None, "", ""))
    for room in ROOMS:
        furniture = {*room.always, *room.more}
        if appliance and appliance not in furniture:
            continue
        for kind in room.kinds:
            if kind == "lamp":
                continue
            places = [place for place in PLACES[kind] if place in furniture]
            targets = places if task_type != LOOK else [*THINGS["lamp"]] * ("lamp" in room.kinds)
            for thing in THINGS[kind]:
                for target in targets:
                    # The thing must be somewhere else at first, and the target must not be the place of the treatment.
                    if (fit is None or thing in fit) and target != appliance and set(places) - {target}:
                        yield Goal(room, kind, thing, target)


@dataclass(frozen=True)
class _Household:
    """receptacles: id -> type; location: id -> place; things: id -> type; inside: thing -> receptacle, by id."""

    receptacles: dict[str, str]
    location: dict[str, str]
    things: dict[str, str]
    inside: dict[str, str]


def _household(split: str, index: int, seed: int, size: str, task_type: str) -> Row:
    rng = random.Random(stable_seed("household", split, seed, size, task_type, index))
    goal = rng.choice(goals(task_type, split))
    house = _build(goal, task_type, SIZES[size], rng)
    name = f"household_{size}_{seed}_{index}"
    row: Row = {
        "game": f"{split}/{task_type}-{goal.thing}-None-{goal.target}-{goal.room.number}/{name}",
        "task_type": task_type,
        "task": rng.choice(SENTENCES[task_type]).format(goal.thing.lower(), goal.target.lower()),
        "walkthrough": [],
        "pddl_problem": _problem(name, house, _condition(goal, task_type)),
    }
    game = load_game(row)
    row["walkthrough"] = _walkthrough(goal, task_type, house, game, rng)
    engine = Engine(game)
    won = [engine.observation.won, *(engine.step(command).won for command in row["walkthrough"])]
    if won != [False] * len(row["walkthrough"]) + [True]:
        raise RuntimeError(f"households: {row['game']} is not won by the end of {row['walkthrough']}, or earlier")
    return row


def _build(goal: Goal, task_type: str, size: Size, rng: random.Random) -> _Household:
    """Return a household in which the task can be done and is not done yet."""
    room = goal.room
    furniture = {*room.always, *room.more}
    wanted = [*room.always]
    elsewhere = [place for place in PLACES[goal.kind] if place in furniture and place != goal.target]
    if goal.target not in THINGS["lamp"] and goal.target not in wanted:
        wanted.append(goal.target)
    if not set(elsewhere) & set(wanted):
        wanted.append(rng.choice(elsewhere))
    while len(wanted) < size.receptacles:
        wanted.append(rng.choice(room.more))
    receptacles = {_id(name, number): name for number, name in enumerate(sorted(wanted), start=1)}
    location: dict[str, str] = {}
    for receptacle, name in receptacles.items():
        below = [place for other, place in location.items() if receptacles[other] == name]
        # Some drawers and cabinets stand one above the other, so that one position serves both.
        stacked = below and name in ("Drawer", "Cabinet") and rng.random() < 0.25
        location[receptacle] = below[-1] if stacked else f"loc_bar_{len(location) + 1:02d}"

    copies = (2 if task_type == TWO else 1) + (rng.random() < 0.3)
    chosen = [(goal.kind, goal.thing)] * copies + [("lamp", name) for name in THINGS["lamp"] if task_type == LOOK]
    portable = [kind for kind in room.kinds if kind != "lamp"]
    while len(chosen) < size.things:
        kind = rng.choice(portable)
        chosen.append((kind, rng.choice(THINGS[kind])))
    things, inside = {}, {}
    for number, (kind, name) in enumerate(sorted(chosen), start=1):
        places = [r for r, place in receptacles.items() if place in PLACES[kind]]
        if name == goal.thing:
            places = [receptacle for receptacle in places if receptacles[receptacle] != goal.target]
        usual = [4 if receptacles[receptacle] in PLACES[kind][:2] else 1 for receptacle in places]
        thing = f"{name}_bar_{number:02d}"
        things[thing] = name
        inside[thing] = rng.choices(places, usual)[0]
    return _Household(receptacles, location, things, inside)


def _id(name: str, number: int) -> str:
    # A basin is a part of its sink: its id names both, and the player reads "sinkbasin 1".
    return f"Sink_bar_{number:02d}_bar_SinkBasin" if name == "SinkBasin" else f"{name}_bar_{number:02d}"


def _condition(goal: Goal, task_type: str) -> str:
    """Return the task's goal in PDDL."""
    if task_type == LOOK:
        return f"""(and
    (exists (?ot - object ?r - receptacle ?a - agent ?l - location)
        (and (objectType ?ot {goal.target}Type) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l)
             (atLocation ?a ?l) (inReceptacle ?ot ?r)))
    (exists (?o - object ?a - agent) (and (objectType ?o {goal.thing}Type) (holds ?a ?o))))"""
    made = {
        CLEAN: "(cleanable ?o) (isClean ?o) ",
        HEAT: "(heatable ?o) (isHot ?o) ",
        COOL: "(coolable ?o) (isCool ?o) ",
    }
    one = f"(objectType ?o {goal.thing}Type) {made.get(task_type, '')}(inReceptacle ?o ?r)"
    if task_type == TWO:
        one += f"""
        (exists (?o2 - object) (and (not (= ?o ?o2)) (objectType ?o2 {goal.thing}Type) (inReceptacle ?o2 ?r)))"""
    return f"(exists (?r - receptacle) (exists (?o - object) (and (receptacleType ?r {goal.target}Type) {one})))"


def _problem(name: str, house: _Household, condition: str) -> str:
    """Return the household as a PDDL problem of ALFWorld's domain."""
    rtypes = sorted({*house.receptacles.values(), "SinkBasin", "Microwave", "Fridge"})
    otypes = sorted({*house.things.values(), "Knife", "ButterKnife", "Sink"})
    places = sorted({*house.location.values(), START})
    objects = ["agent1 - agent", *(f"{thing} - object" for thing in house.things)]
    objects += [f"{receptacle} - receptacle" for receptacle in house.receptacles]
    objects += [f"{name}Type - rtype" for name in rtypes] + [f"{name}Type - otype" for name in otypes]
    objects += [f"{place} - location" for place in places]
    facts = [f"atLocation agent1 {START}"]
    for receptacle, kind in house.receptacles.items():
        facts += [f"receptacleType {receptacle} {kind}Type"] + [f"openable {receptacle}"] * (kind in OPENABLE)
        facts += [f"receptacleAtLocation {receptacle} {house.location[receptacle]}"]
    for thing, kind in house.things.items():
        facts += [f"objectType {thing} {kind}Type"]
        facts += [f"{trait} {thing}" for trait, kinds in TRAITS.items() if kind in kinds]
        facts += [f"{'toggleable' if kind in THINGS['lamp'] else 'pickupable'} {thing}"]
        facts += [f"inReceptacle {thing} {house.inside[thing]}"]
        facts += [f"objectAtLocation {thing} {house.location[house.inside[thing]]}"]
    fits = {
        f"canContain {place}Type {name}Type"
        for kind, names in THINGS.items()
        for name in names
        for place in PLACES[kind]
        if place in house.receptacles.values() and name in house.things.values()
    }
    lines = ["(define (problem " + name + ")", "(:domain alfred)", "(:objects", *objects, ")", "(:init"]
    lines += [f"({fact})" for fact in [*facts, *sorted(fits)]] + [")", f"(:goal {condition})", ")"]
    return "\n".join(lines) + "\n"


def _walkthrough(goal: Goal, task_type: str, house: _Household, game: Game, rng: random.Random) -> list[str]:
    """Return commands that do the task, for a player who knows where everything is."""
    name = {identifier: game.names[identifier.lower()] for identifier in (*house.receptacles, *house.things)}
    commands: list[str] = []
    opened: set[str] = set()
    here = START

    def go(receptacle: str, inside: bool = True) -> None:
        nonlocal here
        if house.location[receptacle] != here:
            commands.append(f"go to {name[receptacle]}")
            here = house.location[receptacle]
        if inside and house.receptacles[receptacle] in OPENABLE and receptacle not in opened:
            commands.append(f"open {name[receptacle]}")
            opened.add(receptacle)

    wanted = [thing for thing, kind in house.things.items() if kind == goal.thing]
    rng.shuffle(wanted)
    ends = [receptacle for receptacle, kind in house.receptacles.items() if kind == goal.target]
    end = rng.choice(ends) if ends else ""
    for thing in wanted[: 2 if task_type == TWO else 1]:
        go(house.inside[thing])
        commands.append(f"take {name[thing]} from {name[house.inside[thing]]}")
        if task_type in TREATMENT:
            _, verb, appliance = TREATMENT[task_type]
            at = next(receptacle for receptacle, kind in house.receptacles.items() if kind == appliance)
            go(at, inside=False)
            commands.append(f"{verb} {name[thing]} with {name[at]}")
        if task_type == LOOK:
            lamp = next(lamp for lamp, kind in house.things.items() if kind == goal.target)
            go(house.inside[lamp], inside=False)
            commands.append(f"use {name[lamp]}")
        else:
            go(end)
            commands.append(f"move {name[thing]} to {name[end]}")
    return commands
