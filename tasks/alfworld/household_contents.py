"""The contents of our own households: rooms, furniture and things, the places of things, and what can be done to them.

Names are ALFWorld's, whose problems and prompts use them; the tables are ours and much smaller.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """A room: receptacles that it always has or may have, and its kinds of things. number: in the games' ids."""

    number: int
    always: tuple[str, ...]
    more: tuple[str, ...]
    kinds: tuple[str, ...]


ROOMS = (
    Room(
        1,
        ("CounterTop", "Fridge", "Microwave", "SinkBasin", "Cabinet"),
        ("Cabinet", "Cabinet", "Drawer", "Drawer", "Shelf", "StoveBurner", "CounterTop", "DiningTable", "GarbageCan"),
        ("food", "dish", "cutlery", "pot", "jar"),
    ),
    Room(
        301,
        ("Bed", "Desk", "Drawer"),
        ("Drawer", "Drawer", "Shelf", "SideTable", "Dresser", "Safe", "ArmChair", "GarbageCan"),
        ("paper", "pocket", "soft", "lamp"),
    ),
    Room(
        201,
        ("Sofa", "CoffeeTable", "SideTable"),
        ("ArmChair", "Drawer", "Shelf", "Cabinet", "DiningTable", "TVStand", "GarbageCan"),
        ("paper", "pocket", "ornament", "soft", "lamp"),
    ),
    Room(
        401,
        ("SinkBasin", "Toilet", "CounterTop", "Cabinet"),
        ("Cabinet", "Drawer", "Shelf", "GarbageCan", "SideTable"),
        ("bath", "cloth"),
    ),
)
# Kind -> its things, and where they can be; their first two places are the usual ones.
THINGS = {
    "food": ("Apple", "Potato", "Tomato", "Egg", "Bread", "Lettuce"),
    "dish": ("Mug", "Cup", "Plate", "Bowl"),
    "cutlery": ("Fork", "Spoon", "Knife", "ButterKnife", "Spatula", "Ladle"),
    "pot": ("Pot", "Pan", "Kettle"),
    "jar": ("SaltShaker", "PepperShaker", "SoapBottle", "WineBottle"),
    "paper": ("Book", "Pen", "Pencil", "Newspaper", "Laptop"),
    "pocket": ("CellPhone", "KeyChain", "CreditCard", "Watch", "RemoteControl", "CD", "AlarmClock"),
    "ornament": ("Vase", "Statue", "Candle", "TissueBox"),
    "soft": ("Pillow", "TeddyBear"),
    "lamp": ("DeskLamp",),
    "bath": ("SoapBar", "SprayBottle", "ToiletPaper", "Candle"),
    "cloth": ("Cloth", "HandTowel"),
}
PLACES = {
    "food": ("Fridge", "CounterTop", "DiningTable", "SinkBasin", "Microwave", "GarbageCan"),
    "dish": ("Cabinet", "CounterTop", "DiningTable", "Shelf", "SinkBasin", "Fridge", "Microwave"),
    "cutlery": ("Drawer", "CounterTop", "DiningTable", "SinkBasin"),
    "pot": ("StoveBurner", "CounterTop", "Cabinet", "DiningTable", "SinkBasin"),
    "jar": ("Cabinet", "CounterTop", "Shelf", "Drawer", "DiningTable", "GarbageCan"),
    "paper": ("Desk", "CoffeeTable", "Drawer", "SideTable", "Shelf", "Dresser", "Bed", "Sofa", "DiningTable"),
    "pocket": ("Drawer", "SideTable", "Desk", "CoffeeTable", "Shelf", "Dresser", "Safe", "TVStand", "ArmChair", "Sofa"),
    "ornament": ("Shelf", "CoffeeTable", "SideTable", "Cabinet", "DiningTable", "TVStand", "GarbageCan"),
    "soft": ("Bed", "Sofa", "ArmChair"),
    "lamp": ("Desk", "SideTable", "Dresser", "CoffeeTable"),
    "bath": ("Cabinet", "CounterTop", "Drawer", "Shelf", "Toilet", "SideTable", "GarbageCan"),
    "cloth": ("CounterTop", "Cabinet", "SinkBasin", "Drawer", "SideTable"),
}
OPENABLE = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})
CLEANABLE = frozenset(
    {"Apple", "Potato", "Tomato", "Lettuce", *THINGS["dish"], *THINGS["cutlery"], *THINGS["pot"], "SoapBar", "Cloth"}
)
HEATABLE = frozenset({"Apple", "Potato", "Tomato", "Egg", "Bread", "Mug", "Cup", "Plate"})
COOLABLE = frozenset({*THINGS["food"], *THINGS["dish"], "Pot", "Pan", "WineBottle"})
SLICEABLE = frozenset({"Apple", "Potato", "Tomato", "Lettuce", "Bread"})
HOLLOW = frozenset({*THINGS["dish"], "Pot", "Pan"})
TRAITS = {
    "cleanable": CLEANABLE,
    "heatable": HEATABLE,
    "coolable": COOLABLE,
    "sliceable": SLICEABLE,
    "isReceptacleObject": HOLLOW,
}
