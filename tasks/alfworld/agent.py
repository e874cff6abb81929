"""The agent that a generated program drives: one method for each command, and what the household has confirmed.

Its state is a fold over (command, observation): it changes only when the household confirms a command, and the same
history gives the same state in another process. It runs inside the sandbox's child, so it imports the standard library
alone.
"""

from collections.abc import Callable, Sequence

# How an observation begins that confirms a command's first word.
CONFIRMED = {
    "go": ("You arrive at ",),
    "open": ("You open the ",),
    "close": ("You close the ",),
    "take": ("You pick up the ",),
    "move": ("You move the ",),
    "put": ("You put the ",),
    "examine": ("On the ", "The "),
}
SHOWN = 3  # interactions that a report quotes


class Agent:
    """The player's body in one household. Every method that acts returns the household's answer.

    screen: the household's first words, which name the receptacles and the task. act: performs a command and returns
    the observation. ask: answers a question in words. history: interactions of an earlier attempt in this household.
    """

    def __init__(
        self,
        screen: str,
        act: Callable[[str], str],
        ask: Callable[[str], str],
        verbs: str = "current",
        history: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._act, self._ask, self._verbs = act, ask, verbs
        self._receptacles = receptacles_of(screen)
        self._task = task_of(screen)
        self._location = ""
        self._holding = ""
        self._seen: dict[str, list[str]] = {}
        self._placed: dict[str, str] = {}
        self._history: list[tuple[str, str]] = []
        for command, observation in history:
            self._learn(command, observation)

    # The agent's knowledge. All are copies: writing to them changes nothing.

    @property
    def task(self) -> str:
        """The task sentence."""
        return self._task

    @property
    def receptacles(self) -> list[str]:
        """Names of all receptacles."""
        return list(self._receptacles)

    @property
    def location(self) -> str:
        """The receptacle where the agent stands, "" in the middle of the room."""
        return self._location

    @property
    def holding(self) -> str:
        """The object in hand, "" if there is none."""
        return self._holding

    @property
    def seen(self) -> dict[str, list[str]]:
        """Receptacle -> what was in it when it was last looked into; one that was not looked into is missing."""
        return {receptacle: list(objects) for receptacle, objects in self._seen.items()}

    # Commands.

    def go_to(self, receptacle: str) -> str:
        return self._do(f"go to {receptacle}")

    def open(self, receptacle: str) -> str:
        return self._do(f"open {receptacle}")

    def close(self, receptacle: str) -> str:
        return self._do(f"close {receptacle}")

    def take(self, thing: str, receptacle: str) -> str:
        return self._do(f"take {thing} from {receptacle}")

    def put(self, thing: str, receptacle: str) -> str:
        old = self._verbs == "old"
        return self._do(f"put {thing} in/on {receptacle}" if old else f"move {thing} to {receptacle}")

    def clean(self, thing: str, receptacle: str) -> str:
        return self._do(f"clean {thing} with {receptacle}")

    def heat(self, thing: str, receptacle: str) -> str:
        return self._do(f"heat {thing} with {receptacle}")

    def cool(self, thing: str, receptacle: str) -> str:
        return self._do(f"cool {thing} with {receptacle}")

    def slice(self, thing: str, knife: str) -> str:
        return self._do(f"slice {thing} with {knife}")

    def use(self, thing: str) -> str:
        return self._do(f"use {thing}")

    def examine(self, thing: str) -> str:
        return self._do(f"examine {thing}")

    def look(self) -> str:
        return self._do("look")

    def inventory(self) -> str:
        return self._do("inventory")

    # Methods that give several commands.

    def places(self, *kinds: str) -> list[str]:
        """Return the receptacles of these kinds, in this order: "cabinet" is every cabinet, "cabinet 2" itself."""
        found = [r for kind in kinds for r in self._receptacles if kind in (r, kind_of(r))]
        return list(dict.fromkeys(found))

    def visit(self, receptacle: str) -> list[str]:
        """Go there, open it if it is closed, and return what is in it. A receptacle that is known costs no step."""
        if self._location != receptacle:
            self.go_to(receptacle)
            if self._location != receptacle:  # a receptacle in the same spot cannot be gone to, but it can be examined
                self.examine(receptacle)
        if self._location == receptacle and receptacle not in self._seen:
            self.open(receptacle)
        return list(self._seen.get(receptacle, [])) if self._location == receptacle else []

    def find(self, kind: str, places: Sequence[str]) -> tuple[str, str] | None:
        """Return (object, receptacle) of the first object of `kind` in `places`, standing there; None if there is none.

        Places where one was seen come first, then those that were not looked into, in their order. An object that the
        agent has put down itself is left alone.
        """
        order = self.places(*places)
        known = [place for place in order if self._candidates(kind, place)]
        for place in known + [place for place in order if place not in self._seen]:
            self.visit(place)
            if self._location == place and (candidates := self._candidates(kind, place)):
                return candidates[0], place
        return None

    def fetch(self, kind: str, places: Sequence[str]) -> str:
        """Find the first object of `kind` in `places`, take it and return it; "" if there is none."""
        if (found := self.find(kind, places)) is None:
            return ""
        self.take(*found)
        return self._holding

    def go(self, *kinds: str) -> str:
        """Visit the first receptacle of these kinds or names and return it; "" if there is none."""
        if not (places := self.places(*kinds)):
            return ""
        self.visit(places[0])
        return places[0]

    def ask(self, question: str) -> str:
        """Return a language model's answer to `question`, in words."""
        return self._ask(str(question))

    def report(self) -> str:
        """Return the last interactions, where the agent is and what it holds, in words; it never raises."""
        lines = [line for pair in self._history[-SHOWN:] for line in (f"> {pair[0]}", pair[1])]
        where = f"at {self._location}" if self._location else "in the middle of the room"
        return "\n".join([*lines, f"You are {where}, holding {self._holding or 'nothing'}."])

    # How it learns.

    def _candidates(self, kind: str, place: str) -> list[str]:
        return [thing for thing in self._seen.get(place, []) if kind_of(thing) == kind and thing not in self._placed]

    def _do(self, command: str) -> str:
        observation = self._act(command)
        self._learn(command, observation)
        return observation

    def _learn(self, command: str, observation: str) -> None:
        self._history.append((command, observation))
        verb, _, rest = command.partition(" ")
        if not observation.startswith(CONFIRMED.get(verb, ("\0",))):
            return
        if verb in ("go", "open", "examine"):
            self._look(rest.removeprefix("to "), observation)
        elif verb == "close":
            self._seen.pop(rest, None)
        elif verb == "take":
            thing, _, receptacle = rest.partition(" from ")
            self._holding = thing
            self._placed.pop(thing, None)
            if thing in self._seen.get(receptacle, []):
                self._seen[receptacle].remove(thing)
        else:  # move, put
            thing, _, receptacle = rest.partition(" in/on " if verb == "put" else " to ")
            self._holding = ""
            self._placed[thing] = receptacle
            self._seen.setdefault(receptacle, []).append(thing)

    def _look(self, receptacle: str, observation: str) -> None:
        """Remember being at `receptacle` and what `observation` shows in it; a closed one shows nothing."""
        if receptacle in self._receptacles:
            self._location = receptacle
            if "you see " in observation:
                self._seen[receptacle] = names_in(observation.rpartition("you see ")[2])


def kind_of(name: str) -> str:
    """Return the type of a name, such as "mug" of "mug 1"."""
    return name.rpartition(" ")[0] or name


def names_in(text: str) -> list[str]:
    """Return ["mug 1", "plate 2"] of "a mug 1, and a plate 2." and [] of "nothing."."""
    parts = text.split("\n")[0].rstrip(". ").split(", ")
    names = [part.removeprefix("and ").removeprefix("a ").removeprefix("an ") for part in parts]
    return [name for name in names if name.rpartition(" ")[2].isdigit()]


def receptacles_of(screen: str) -> list[str]:
    """Return the receptacles that the first screen names, [] if it names none."""
    return names_in(screen.partition("you see ")[2])


def task_of(screen: str) -> str:
    """Return the task sentence of the first screen."""
    return screen.rpartition("Your task is to: ")[2].strip().rstrip(".")
