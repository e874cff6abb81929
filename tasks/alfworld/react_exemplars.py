"""The worked households of `exemplars` as direct action: for each command the thought before it and the answer.

We wrote them. A test plays every command and compares every answer with the engine's.
"""

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld.agent import receptacles_of
from matryoshka.tasks.alfworld.exemplars import EXEMPLARS
from matryoshka.tasks.alfworld.game import in_verbs

# Each line: a thought | a command | the answer, in the current verbs.
_PLAYED = {
    "pick_and_place_simple": """
I look for a cellphone first, most likely on the bed. | go to bed 1 | On the bed 1, you see nothing.
No cellphone here. Next the sidetable. | go to sidetable 1 | On the sidetable 1, you see nothing.
No cellphone here. Next the dresser. | go to dresser 1 | On the dresser 1, you see a cellphone 1.
There is a cellphone. | take cellphone 1 from dresser 1 | You pick up the cellphone 1 from the dresser 1.
Now I put it on the desk. | go to desk 1 | On the desk 1, you see nothing.
I am at the desk with it. | move cellphone 1 to desk 1 | You move the cellphone 1 to the desk 1.""",
    "look_at_obj_in_light": """
I look for a newspaper first. | go to coffeetable 1 | On the coffeetable 1, you see nothing.
No newspaper here. Next the sofa. | go to sofa 1 | On the sofa 1, you see nothing.
No newspaper here. Next the armchair. | go to armchair 1 | On the armchair 1, you see a newspaper 1.
There is a newspaper. | take newspaper 1 from armchair 1 | You pick up the newspaper 1 from the armchair 1.
Now I need a floorlamp. | go to sidetable 2 | On the sidetable 2, you see nothing.
No lamp here. | go to sidetable 1 | On the sidetable 1, you see nothing.
No lamp here. Next the tvstand. | go to tvstand 1 | On the tvstand 1, you see a floorlamp 1.
There is the lamp, and I hold the newspaper. | use floorlamp 1 | You turn on the floorlamp 1.""",
    "pick_clean_then_place_in_recep": """
I look for a plate first. | go to countertop 2 | On the countertop 2, you see nothing.
No plate here. | go to countertop 1 | On the countertop 1, you see nothing.
No plate here. Next the diningtable. | go to diningtable 1 | On the diningtable 1, you see a plate 1.
There is a plate. | take plate 1 from diningtable 1 | You pick up the plate 1 from the diningtable 1.
Now I clean it at the sinkbasin. | go to sinkbasin 1 | On the sinkbasin 1, you see nothing.
I am at the sinkbasin with it. | clean plate 1 with sinkbasin 1 | You clean the plate 1 using the sinkbasin 1.
It is clean and goes in a cabinet. | go to cabinet 3 | The cabinet 3 is closed.
It must be open. | open cabinet 3 | You open the cabinet 3. The cabinet 3 is open. In it, you see nothing.
Now it takes the plate. | move plate 1 to cabinet 3 | You move the plate 1 to the cabinet 3.""",
    "pick_heat_then_place_in_recep": """
I look for a potato first, most likely in the fridge. | go to fridge 1 | The fridge 1 is closed.
It must be open. | open fridge 1 | You open the fridge 1. The fridge 1 is open. In it, you see nothing.
No potato here. Next the countertops. | go to countertop 2 | On the countertop 2, you see nothing.
No potato here. | go to countertop 1 | On the countertop 1, you see nothing.
No potato here. Next the garbagecan. | go to garbagecan 1 | On the garbagecan 1, you see a potato 1.
There is a potato. | take potato 1 from garbagecan 1 | You pick up the potato 1 from the garbagecan 1.
Now I heat it with the microwave. | go to microwave 1 | The microwave 1 is closed.
It need not be open. | heat potato 1 with microwave 1 | You heat the potato 1 using the microwave 1.
It is hot and goes on the diningtable. | go to diningtable 1 | On the diningtable 1, you see nothing.
I am at the diningtable with it. | move potato 1 to diningtable 1 | You move the potato 1 to the diningtable 1.""",
    "pick_cool_then_place_in_recep": """
I look for a tomato first. | go to diningtable 1 | On the diningtable 1, you see nothing.
No tomato here. Next the sinkbasin. | go to sinkbasin 1 | On the sinkbasin 1, you see a tomato 1.
There is a tomato. | take tomato 1 from sinkbasin 1 | You pick up the tomato 1 from the sinkbasin 1.
Now I cool it with the fridge. | go to fridge 1 | The fridge 1 is closed.
It need not be open. | cool tomato 1 with fridge 1 | You cool the tomato 1 using the fridge 1.
It is cool and goes on a countertop. | go to countertop 2 | On the countertop 2, you see nothing.
I am at a countertop with it. | move tomato 1 to countertop 2 | You move the tomato 1 to the countertop 2.""",
    "pick_two_obj_and_place": """
I look for the first soapbar. | go to countertop 1 | On the countertop 1, you see nothing.
No soapbar here. Next the sinkbasin. | go to sinkbasin 1 | On the sinkbasin 1, you see a soapbar 2.
There is one. | take soapbar 2 from sinkbasin 1 | You pick up the soapbar 2 from the sinkbasin 1.
It goes in a cabinet. | go to cabinet 2 | The cabinet 2 is closed.
It must be open. | open cabinet 2 | You open the cabinet 2. The cabinet 2 is open. In it, you see nothing.
Now it takes the soapbar. | move soapbar 2 to cabinet 2 | You move the soapbar 2 to the cabinet 2.
I look for the second one. | go to bathtubbasin 1 | On the bathtubbasin 1, you see a soapbar 1.
There it is. | take soapbar 1 from bathtubbasin 1 | You pick up the soapbar 1 from the bathtubbasin 1.
It goes where the first one is. | go to cabinet 2 | The cabinet 2 is open. In it, you see a soapbar 2.
The cabinet is open. | move soapbar 1 to cabinet 2 | You move the soapbar 1 to the cabinet 2.""",
}


def played(task_type: str, verbs: str = "current") -> list[tuple[str, str, str]]:
    """Return (thought, command, answer) of each action in the exemplar's household."""
    places = receptacles_of(EXEMPLARS[task_type].screen)
    turns = []
    for line in _PLAYED[task_type].strip().splitlines():
        thought, command, answer = line.split(" | ")
        if command.startswith("go to "):
            place = command.removeprefix("go to ")
            # Before ALFWorld 0.4.0 one arrived at numbered positions, whose order says nothing.
            arrived = place if verbs == "current" else f"loc {places.index(place) + 1}"
            answer = f"You arrive at {arrived}. {answer}"
        elif command.startswith("move ") and verbs == "old":
            answer = answer.replace("You move ", "You put ").replace(" to the ", " in/on the ")
        turns.append((thought, in_verbs(command, verbs), answer))
    return turns


def turns(task_type: str, verbs: str) -> Messages:
    """Return the exemplar's actions as a conversation that ends with the last one."""
    messages: list[Message] = []
    for thought, command, answer in played(task_type, verbs):
        messages += Message("assistant", f"Think: {thought}\nAct: {command}"), Message("user", answer)
    return tuple(messages[:-1])
