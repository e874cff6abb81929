"""Plays ALFWorld's household games: the same observations, admissible commands, score and end as TextWorld.

A `Game` is a parsed problem, immutable and shared by any number of engines; an `Engine` is one play of it. ALFWorld's
games differ in their problem alone, so the actions, their conditions and their wording are written here by hand and no
planner or grammar is interpreted. The state is the set of facts that an action can change, as in TextWorld. There, a
fact that an action removed leaves its negation behind, which `look` reads; `left` keeps those negations.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from matryoshka.tasks.alfworld.game import Game, in_verbs
from matryoshka.tasks.alfworld.pddl import Fact

VERBS = ("current", "old")
NOTHING = "Nothing happens."
# verb -> (what the object must be, the type that the receptacle must have, the fact it adds, the fact it takes back)
APPLIANCES = {
    "clean": ("cleanable", "sinkbasintype", "isclean", ""),
    "heat": ("heatable", "microwavetype", "ishot", "iscool"),
    "cool": ("coolable", "fridgetype", "iscool", "ishot"),
}
# How `examine` words the marks of an object: the first line whose facts all hold.
MARKS = (
    (("isclean", "ishot", "issliced"), "This is a hot and clean sliced {}."),
    (("isclean", "iscool", "issliced"), "This is a cool and clean sliced {}."),
    (("isclean", "issliced"), "This is a clean sliced {}."),
    (("ishot", "issliced"), "This is a hot sliced {}."),
    (("iscool", "issliced"), "This is a cool sliced {}."),
    (("isclean", "ishot"), "This is a hot and clean {}."),
    (("isclean", "iscool"), "This is a cool and clean {}."),
    (("ishot",), "This is a hot {}."),
    (("isclean",), "This is a clean {}."),
    (("iscool",), "This is a cold {}."),
    (("istoggled",), "This {} is on."),
    (("issliced",), "This is a sliced {}."),
    ((), "There's nothing special about {}."),
)
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of a command. score: 1.0 where the goal holds, else 0.0; done and won: the goal holds.

    admissible: the commands that would now do something, sorted.
    """

    text: str
    admissible: tuple[str, ...]
    score: float
    done: bool
    won: bool


class Snapshot(NamedTuple):
    """A moment of play, for engines of the same game and verbs; plain data that can be kept or pickled."""

    game_id: str
    facts: frozenset[Fact]
    left: frozenset[tuple[str, str]]
    location: str
    holding: str
    observation: Observation


class _Action(NamedTuple):
    """A verb and what it acts on, by id. "slice" names the thing that is cut; the knife is the object in hand."""

    verb: str
    thing: str = ""
    receptacle: str = ""


class Engine:
    """One play of a game. It starts reset; commands after the end still work, as in TextWorld.

    verbs: "current" (ALFWorld from 0.4.0: `move X to Y`), or "old", which published prompts use (`put X in/on Y`, "You
    arrive at loc N.", no `help`). There is no limit on steps. observation: what was returned last.
    """

    def __init__(self, game: Game, verbs: str = "current") -> None:
        if verbs not in VERBS:
            raise ValueError(f"engine: verbs {verbs!r} are unknown; choose 'current' or 'old'")
        self.game = game
        self.verbs = verbs
        self.observation = self.reset()

    @property
    def task(self) -> str:
        """The task's sentence."""
        return self.game.task

    def reset(self) -> Observation:
        """Return the first screen of the game, started afresh."""
        game = self.game
        self._facts = set(game.facts)
        self._left: set[tuple[str, str]] = set()
        self._location, self._holding = game.start, ""
        room = f"You are in the middle of a room. Looking quickly around you, you see {_listed(game.receptacles)}."
        look = self._look() if self._here() else room
        return self._observe(f"-= Welcome to TextWorld, ALFRED! =-\n\n{look}\n\nYour task is to: {game.task}.")

    def step(self, command: str) -> Observation:
        """Return what `command` does; one that is not admissible does nothing."""
        action = self._choices.get(command.strip())
        if action is None:
            text, changed = NOTHING, False
        else:
            changed = self._apply(action)
            text = self._describe(action)
        if changed:
            return self._observe(text)
        now = self.observation
        self.observation = Observation(text, now.admissible, now.score, now.done, now.won)
        return self.observation

    def snapshot(self) -> Snapshot:
        """Return this moment, to `restore` later."""
        facts, left = frozenset(self._facts), frozenset(self._left)
        return Snapshot(self.game.id, facts, left, self._location, self._holding, self.observation)

    def restore(self, snapshot: Snapshot) -> Observation:
        """Return the observation of `snapshot`, gone back to that moment. Raises ValueError for another game's."""
        if snapshot.game_id != self.game.id:
            raise ValueError(f"engine: the snapshot is of game {snapshot.game_id}; this one plays {self.game.id}")
        self._facts, self._left = set(snapshot.facts), set(snapshot.left)
        self._location, self._holding = snapshot.location, snapshot.holding
        self._choices = self._admissible()
        self.observation = snapshot.observation
        return self.observation

    def _observe(self, text: str) -> Observation:
        self._choices = self._admissible()
        won = self.game.goal.holds(self._facts)
        self.observation = Observation(text, tuple(sorted(self._choices)), float(won), won, won)
        return self.observation

    def _here(self) -> list[str]:
        return [receptacle for receptacle, place in self.game.location.items() if place == self._location]

    def _inside(self, receptacle: str) -> list[str]:
        return sorted([fact[1] for fact in self._facts if fact[0] == "inreceptacle" and fact[2] == receptacle])

    def _is_open(self, receptacle: str) -> bool:
        return receptacle not in self.game.traits["openable"] or ("opened", receptacle) in self._facts

    def _admissible(self) -> dict[str, _Action]:
        """Return the commands that are possible now, each with its action."""
        game, names, held = self.game, self.game.names, self._holding
        traits = game.traits
        choices = {"look": _Action("look"), "inventory": _Action("inventory")}
        if self.verbs == "current":
            choices["help"] = _Action("help")
        if held:
            # The domain means to allow any visible object, but a stray comma in it (`?l - location, ?r`) leaves this.
            choices[f"examine {names[held]}"] = _Action("examine", held)
        if held in game.knives:
            for thing in traits["sliceable"]:
                if ("objectatlocation", thing, self._location) in self._facts:
                    choices[f"slice {names[thing]} with {names[held]}"] = _Action("slice", thing)
        for receptacle, place in game.location.items():
            name = names[receptacle]
            if place != self._location:
                choices[f"go to {name}"] = _Action("go", "", receptacle)
                continue
            choices[f"examine {name}"] = _Action("examine", "", receptacle)
            accessible, contents = self._is_open(receptacle), self._inside(receptacle)
            if receptacle in traits["openable"]:
                verb = "close" if accessible else "open"
                choices[f"{verb} {name}"] = _Action(verb, "", receptacle)
            for thing in contents:
                if thing in traits["toggleable"]:
                    choices.setdefault(f"use {names[thing]}", _Action("use", thing))
                if accessible and not held and thing in traits["pickupable"]:
                    choices[f"take {names[thing]} from {name}"] = _Action("take", thing, receptacle)
            if not held:
                continue
            if accessible and held in game.fits[game.kind[receptacle]]:
                choices[in_verbs(f"move {names[held]} to {name}", self.verbs)] = _Action("move", held, receptacle)
            for verb, (trait, kind, _, _) in APPLIANCES.items():
                if held in traits[trait] and game.kind[receptacle] == kind:
                    choices[f"{verb} {names[held]} with {name}"] = _Action(verb, held, receptacle)
        return choices

    def _apply(self, action: _Action) -> bool:
        """Change the state as `action` does and return whether it changes any."""
        facts, agent = self._facts, self.game.agent
        verb, thing, receptacle = action
        if verb == "go":
            facts.discard(("atlocation", agent, self._location))
            self._location = self.game.location[receptacle]
            facts.add(("atlocation", agent, self._location))
        elif verb == "open":
            facts.add(("opened", receptacle))
        elif verb == "close":
            facts.discard(("opened", receptacle))
        elif verb == "take":
            facts -= {("inreceptacle", thing, receptacle), ("objectatlocation", thing, self._location)}
            facts |= {("holds", agent, thing), ("holdsany", agent)}
            self._left.add((thing, receptacle))
            self._holding = thing
        elif verb == "move":
            facts -= {("holds", agent, thing), ("holdsany", agent)}
            facts |= {("inreceptacle", thing, receptacle), ("objectatlocation", thing, self._location)}
            self._left.discard((thing, receptacle))
            self._holding = ""
        elif verb in APPLIANCES:
            _, _, adds, takes_back = APPLIANCES[verb]
            facts.discard((takes_back, thing))
            facts.add((adds, thing))
        elif verb == "use":
            facts.add(("istoggled", thing))
        elif verb == "slice":
            facts.add(("issliced", thing))
        else:
            return False
        return True

    def _describe(self, action: _Action) -> str:
        """Return the words for `action`, which has been applied."""
        verb, thing, receptacle = action
        name, place = self.game.names.get(thing, ""), self.game.names.get(receptacle, "")
        match verb:
            case "go":
                arrived = place if self.verbs == "current" else self.game.names[self._location]
                return f"You arrive at {arrived}. {self._view(receptacle)}"
            case "open":
                return f"You open the {place}. {self._view(receptacle)}"
            case "close":
                return f"You close the {place}."
            case "take":
                return f"You pick up the {name} from the {place}."
            case "move":
                return f"You move the {name} to the {place}." if self.verbs == "current" else _put(name, place)
            case "clean" | "heat" | "cool":
                return f"You {verb} the {name} using the {place}."
            case "use":
                return f"You turn on the {name}."
            case "slice":
                return f"You sliced the {name} with the {self.game.names[self._holding]}."
            case "examine":
                return self._examine(thing) if thing else self._view(receptacle)
            case "inventory":
                held = self.game.names.get(self._holding)
                return f"You are carrying: a {held}." if held else "You are not carrying anything."
            case "look":
                return self._look()
            case _:
                return HELP

    def _view(self, receptacle: str) -> str:
        name = self.game.names[receptacle]
        if not self._is_open(receptacle):
            return f"The {name} is closed."
        opening = f"The {name} is open. In it" if receptacle in self.game.traits["openable"] else f"On the {name}"
        return f"{opening}, you see {_listed(self.game.names[thing] for thing in self._inside(receptacle))}."

    def _look(self) -> str:
        here, names = self._here(), self.game.names
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        near = sorted(fact[1] for fact in self._facts if fact[0] == "objectatlocation" and fact[2] == self._location)
        beside = [names[thing] for thing in near for receptacle in here if (thing, receptacle) in self._left]
        facing = _joined([names[receptacle] for receptacle in here])
        return f"You are facing the {facing}. Next to it, you see {_listed(beside)}."

    def _examine(self, thing: str) -> str:
        name = self.game.names[thing]
        if thing in self.game.traits["isreceptacleobject"]:
            return f"This is a normal {name}. In it, you see {_listed(self.game.inside.get(thing, ()))}."
        text = next(text for marks, text in MARKS if all((mark, thing) in self._facts for mark in marks))
        return text.format(name)


def _put(name: str, place: str) -> str:
    return f"You put the {name} in/on the {place}."


def _joined(parts: list[str]) -> str:
    return ", and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "nothing"


def _listed(names: Iterable[str]) -> str:
    return _joined([f"a {name}" for name in names])
