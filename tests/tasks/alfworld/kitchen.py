"""A kitchen written by hand in PDDL, small enough to know by heart: what tests of the engine play in.

Two drawers stand one above the other (one position); a saltshaker is recorded in a drawer and on the countertop both,
as some of ALFWorld's objects are; the mug holds a spoon for good.
"""

from typing import Any

PROBLEM = """
(define (problem kitchen) (:domain alfred)   ; comments are skipped
(:objects
    agent1 - agent
    Potato_bar_1 Potato_bar_2 Mug_bar_1 Spoon_bar_1 Knife_bar_1 DeskLamp_bar_1 SaltShaker_bar_1 - object
    Fridge_bar_1 Microwave_bar_1 Sink_bar_1_bar_SinkBasin CounterTop_bar_1 Drawer_bar_1 Drawer_bar_2 - receptacle
    FridgeType MicrowaveType SinkBasinType CounterTopType DrawerType - rtype
    PotatoType MugType SpoonType KnifeType ButterKnifeType DeskLampType SaltShakerType SinkType - otype
    loc_bar_0 loc_bar_1 loc_bar_2 loc_bar_3 loc_bar_4 loc_bar_5 loc_bar_unused - location)
(:init
    (= (total-cost) 0)
    (atLocation agent1 loc_bar_0)
    (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 loc_bar_1) (openable Fridge_bar_1)
    (receptacleType Microwave_bar_1 MicrowaveType) (receptacleAtLocation Microwave_bar_1 loc_bar_2)
    (openable Microwave_bar_1)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_3)
    (receptacleType CounterTop_bar_1 CounterTopType) (receptacleAtLocation CounterTop_bar_1 loc_bar_4)
    (receptacleType Drawer_bar_1 DrawerType) (receptacleAtLocation Drawer_bar_1 loc_bar_5) (openable Drawer_bar_1)
    (receptacleType Drawer_bar_2 DrawerType) (receptacleAtLocation Drawer_bar_2 loc_bar_5) (openable Drawer_bar_2)
    (objectType Potato_bar_1 PotatoType) (objectType Potato_bar_2 PotatoType) (objectType Mug_bar_1 MugType)
    (objectType Spoon_bar_1 SpoonType) (objectType Knife_bar_1 KnifeType) (objectType DeskLamp_bar_1 DeskLampType)
    (objectType SaltShaker_bar_1 SaltShakerType)
    (pickupable Potato_bar_1) (pickupable Potato_bar_2) (pickupable Mug_bar_1) (pickupable Knife_bar_1)
    (pickupable SaltShaker_bar_1) (toggleable DeskLamp_bar_1)
    (sliceable Potato_bar_1) (sliceable Potato_bar_2)
    (cleanable Potato_bar_1) (heatable Potato_bar_1) (coolable Potato_bar_1)
    (cleanable Mug_bar_1) (heatable Mug_bar_1) (coolable Mug_bar_1) (isReceptacleObject Mug_bar_1)
    (inReceptacleObject Spoon_bar_1 Mug_bar_1)
    (canContain FridgeType PotatoType) (canContain CounterTopType PotatoType) (canContain SinkBasinType PotatoType)
    (canContain DrawerType SaltShakerType) (canContain CounterTopType SaltShakerType)
    (canContain CounterTopType MugType) (canContain CounterTopType KnifeType)
    (inReceptacle Potato_bar_1 CounterTop_bar_1) (objectAtLocation Potato_bar_1 loc_bar_4)
    (inReceptacle Potato_bar_2 Fridge_bar_1) (objectAtLocation Potato_bar_2 loc_bar_1)
    (inReceptacle Mug_bar_1 CounterTop_bar_1) (objectAtLocation Mug_bar_1 loc_bar_4)
    (inReceptacle Knife_bar_1 CounterTop_bar_1) (objectAtLocation Knife_bar_1 loc_bar_4)
    (inReceptacle DeskLamp_bar_1 CounterTop_bar_1) (objectAtLocation DeskLamp_bar_1 loc_bar_4)
    (inReceptacle SaltShaker_bar_1 Drawer_bar_1) (inReceptacle SaltShaker_bar_1 CounterTop_bar_1)
    (objectAtLocation SaltShaker_bar_1 loc_bar_5))
(:goal (exists (?r - receptacle) (exists (?o - object)
    (and (heatable ?o) (objectType ?o PotatoType) (receptacleType ?r FridgeType) (isHot ?o) (inReceptacle ?o ?r))))))
"""

# The potato on the countertop is the first id of its type, so its number is the highest: 2.
WALKTHROUGH = [
    "go to countertop 1",
    "take potato 2 from countertop 1",
    "go to microwave 1",
    "heat potato 2 with microwave 1",
    "go to fridge 1",
    "open fridge 1",
    "move potato 2 to fridge 1",
]

COUNTERTOP = "On the countertop 1, you see a desklamp 1, a knife 1, a mug 1, a potato 2, and a saltshaker 1."
# Commands from the first screen on and what they answer, written from ALFWorld's grammar.
TRANSCRIPT = [
    ("look", "You are in the middle of a room. Looking quickly around you, you see nothing."),
    ("inventory", "You are not carrying anything."),
    ("go to countertop 1", f"You arrive at countertop 1. {COUNTERTOP}"),
    ("examine countertop 1", COUNTERTOP),
    ("look", "You are facing the countertop 1. Next to it, you see nothing."),
    ("use desklamp 1", "You turn on the desklamp 1."),
    ("use desklamp 1", "You turn on the desklamp 1."),
    ("take mug 1 from countertop 1", "You pick up the mug 1 from the countertop 1."),
    ("inventory", "You are carrying: a mug 1."),
    ("examine mug 1", "This is a normal mug 1. In it, you see a spoon 1."),
    ("look", "You are facing the countertop 1. Next to it, you see nothing."),
    ("move mug 1 to countertop 1", "You move the mug 1 to the countertop 1."),
    # Salt: it is in the drawer too. Taken from the countertop and put into the drawer, it has left the countertop.
    ("take saltshaker 1 from countertop 1", "You pick up the saltshaker 1 from the countertop 1."),
    ("examine saltshaker 1", "There's nothing special about saltshaker 1."),
    ("go to drawer 2", "You arrive at drawer 2. The drawer 2 is closed."),
    ("look", "You are facing the drawer 2, and drawer 1. Next to it, you see nothing."),
    ("examine drawer 1", "The drawer 1 is closed."),
    ("open drawer 2", "You open the drawer 2. The drawer 2 is open. In it, you see a saltshaker 1."),
    ("open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see nothing."),
    ("move saltshaker 1 to drawer 2", "You move the saltshaker 1 to the drawer 2."),
    ("take saltshaker 1 from drawer 2", "You pick up the saltshaker 1 from the drawer 2."),
    ("move saltshaker 1 to drawer 1", "You move the saltshaker 1 to the drawer 1."),
    ("look", "You are facing the drawer 2, and drawer 1. Next to it, you see a saltshaker 1."),
    ("close drawer 2", "You close the drawer 2."),
    ("examine drawer 1", "The drawer 1 is open. In it, you see a saltshaker 1."),
    # A potato through everything that marks it.
    (
        "go to countertop 1",
        "You arrive at countertop 1. On the countertop 1, you see a desklamp 1, a knife 1, a mug 1, and a potato 2.",
    ),
    ("take potato 2 from countertop 1", "You pick up the potato 2 from the countertop 1."),
    ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing."),
    ("clean potato 2 with sinkbasin 1", "You clean the potato 2 using the sinkbasin 1."),
    ("examine potato 2", "This is a clean potato 2."),
    ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
    ("heat potato 2 with microwave 1", "You heat the potato 2 using the microwave 1."),
    ("examine potato 2", "This is a hot and clean potato 2."),
    ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
    ("cool potato 2 with fridge 1", "You cool the potato 2 using the fridge 1."),
    ("examine potato 2", "This is a cool and clean potato 2."),
    (
        "go to countertop 1",
        "You arrive at countertop 1. On the countertop 1, you see a desklamp 1, a knife 1, and a mug 1.",
    ),
    ("move potato 2 to countertop 1", "You move the potato 2 to the countertop 1."),
    ("take knife 1 from countertop 1", "You pick up the knife 1 from the countertop 1."),
    ("slice potato 2 with knife 1", "You sliced the potato 2 with the knife 1."),
    ("move knife 1 to countertop 1", "You move the knife 1 to the countertop 1."),
    ("take potato 2 from countertop 1", "You pick up the potato 2 from the countertop 1."),
    ("examine potato 2", "This is a cool and clean sliced potato 2."),
    ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
    ("heat potato 2 with microwave 1", "You heat the potato 2 using the microwave 1."),
    ("examine potato 2", "This is a hot and clean sliced potato 2."),
    ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
    ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a potato 1."),
    ("move potato 2 to fridge 1", "You move the potato 2 to the fridge 1."),
    ("examine fridge 1", "The fridge 1 is open. In it, you see a potato 2, and a potato 1."),
]


def row(**changes: Any) -> dict[str, Any]:
    """Return the kitchen's row with `changes`."""
    return {
        "game": "train/pick_heat_then_place_in_recep-Potato-None-Fridge-1/by_hand",
        "task_type": "pick_heat_then_place_in_recep",
        "task": "put a hot potato in fridge",
        "walkthrough": WALKTHROUGH,
        "pddl_problem": PROBLEM,
        **changes,
    }
