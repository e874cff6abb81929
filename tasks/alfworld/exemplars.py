"""One worked household for each type of task: its first screen, and steps that win in it.

We wrote them. The rooms are small, and none is a game of ALFWorld. A test builds each and plays its program to the end.
"""

from dataclasses import dataclass

from matryoshka.tasks.alfworld.plan_language import Step


@dataclass(frozen=True)
class Exemplar:
    """screen: the first words of a household, in the game's wording. steps: a plan that wins there."""

    screen: str
    steps: tuple[Step, ...]


def screen(receptacles: tuple[str, ...], task: str) -> str:
    """Return the first screen of a room with these receptacles, without the game's title."""
    *before, last = (f"a {receptacle}" for receptacle in receptacles)
    seen = f"Looking quickly around you, you see {', '.join(before)}, and {last}."
    return f"You are in the middle of a room. {seen}\n\nYour task is to: {task}."


_KITCHEN = (
    *("cabinet 3", "cabinet 2", "cabinet 1", "coffeemachine 1", "countertop 2", "countertop 1", "diningtable 1"),
    *("drawer 2", "drawer 1", "fridge 1", "garbagecan 1", "microwave 1", "sinkbasin 1", "stoveburner 1"),
)
_BEDROOM = ("bed 1", "desk 1", "drawer 2", "drawer 1", "dresser 1", "garbagecan 1", "shelf 2", "shelf 1", "sidetable 1")
_LIVING_ROOM = ("armchair 1", "coffeetable 1", "garbagecan 1", "sidetable 2", "sidetable 1", "sofa 1", "tvstand 1")
_BATHROOM = ("bathtubbasin 1", "cabinet 2", "cabinet 1", "countertop 1", "garbagecan 1", "sinkbasin 1", "toilet 1")

EXEMPLARS = {
    "pick_and_place_simple": Exemplar(
        screen(_BEDROOM, "put some cellphone on desk"),
        (
            Step("find", "cellphone", ("bed", "sidetable", "dresser", "drawer")),
            Step("put", "cellphone", ("desk",)),
        ),
    ),
    "look_at_obj_in_light": Exemplar(
        screen(_LIVING_ROOM, "look at newspaper under the floorlamp"),
        (
            Step("find", "newspaper", ("coffeetable", "sofa", "armchair")),
            Step("use", "floorlamp", ("sidetable", "tvstand")),
        ),
    ),
    "pick_clean_then_place_in_recep": Exemplar(
        screen(_KITCHEN, "clean some plate and put it in cabinet"),
        (
            Step("find", "plate", ("countertop", "diningtable", "cabinet")),
            Step("clean", "plate", ("sinkbasin",)),
            Step("put", "plate", ("cabinet",)),
        ),
    ),
    "pick_heat_then_place_in_recep": Exemplar(
        screen(_KITCHEN, "put a hot potato in diningtable"),
        (
            Step("find", "potato", ("fridge", "countertop", "garbagecan")),
            Step("heat", "potato", ("microwave",)),
            Step("put", "potato", ("diningtable",)),
        ),
    ),
    "pick_cool_then_place_in_recep": Exemplar(
        screen(_KITCHEN, "cool some tomato and put it in countertop"),
        (
            Step("find", "tomato", ("diningtable", "sinkbasin", "countertop")),
            Step("cool", "tomato", ("fridge",)),
            Step("put", "tomato", ("countertop",)),
        ),
    ),
    "pick_two_obj_and_place": Exemplar(
        screen(_BATHROOM, "find two soapbar and put them in cabinet"),
        (
            Step("find", "soapbar", ("countertop", "sinkbasin", "bathtubbasin")),
            Step("put", "soapbar", ("cabinet",)),
            Step("find", "soapbar", ("countertop", "sinkbasin", "bathtubbasin")),
            Step("put", "soapbar", ("cabinet",)),
        ),
    ),
}
