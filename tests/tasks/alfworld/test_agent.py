"""The agent's state against the household's own words: it may believe nothing that the household did not say."""

import random
from collections.abc import Callable

import pytest

from matryoshka.tasks.alfworld.agent import Agent, kind_of, names_in, receptacles_of, task_of
from matryoshka.tasks.alfworld.engine import Engine
from matryoshka.tasks.alfworld.game import load_game
from matryoshka.tasks.alfworld.households import households
from matryoshka.tests.tasks.alfworld import kitchen

SCREEN = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a cabinet 1, and a desk 1.\n\n"
    "Your task is to: put a mug in desk."
)


def agent_with(answers: dict[str, str], verbs: str = "current") -> tuple[Agent, list[str]]:
    """Return an agent in a household that answers as written, else "Nothing happens.", and the commands it gets."""
    commands: list[str] = []

    def act(command: str) -> str:
        commands.append(command)
        return answers.get(command, "Nothing happens.")

    return Agent(SCREEN, act, lambda question: f"answer to {question}", verbs), commands


def playing(engine: Engine) -> Agent:
    return Agent(engine.observation.text, lambda command: engine.step(command).text, str)


def test_the_first_screen_is_read() -> None:
    """Oracle: the screen above, by eye."""
    agent, _ = agent_with({})
    assert agent.receptacles == ["cabinet 2", "cabinet 1", "desk 1"]
    assert agent.task == "put a mug in desk"
    assert (agent.location, agent.holding, agent.seen) == ("", "", {})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a mug 1, and a plate 12.", ["mug 1", "plate 12"]),
        ("a mug 1.", ["mug 1"]),
        ("an apple 3, a book 1, and a cd 2.", ["apple 3", "book 1", "cd 2"]),
        ("nothing.", []),
        ("", []),
    ],
)
def test_lists_are_read(text: str, names: list[str]) -> None:
    """Oracle: by eye."""
    assert names_in(text) == names


def test_names_without_numbers_and_screens_without_lists_do_no_harm() -> None:
    """Oracle: by eye."""
    assert (kind_of("mug 1"), kind_of("mug"), kind_of("")) == ("mug", "mug", "")
    assert (receptacles_of("nothing here"), task_of("no task")) == ([], "no task")


@pytest.mark.parametrize(
    "call",
    [
        lambda agent: agent.go_to("desk 1"),
        lambda agent: agent.take("mug 1", "desk 1"),
        lambda agent: agent.open("cabinet 1"),
        lambda agent: agent.put("mug 1", "desk 1"),
        lambda agent: agent.heat("mug 1", "desk 1"),
    ],
)
def test_what_the_household_refuses_changes_nothing(call: Callable[[Agent], str]) -> None:
    """Oracle: an agent that has done nothing."""
    agent, _ = agent_with({})
    assert call(agent) == "Nothing happens."
    assert (agent.location, agent.holding, agent.seen) == ("", "", {})


def test_the_state_cannot_be_written() -> None:
    """Oracle: Python's own refusal, and copies that change nothing."""
    agent, _ = agent_with({})
    for name in ("location", "holding", "task"):
        with pytest.raises(AttributeError):
            setattr(agent, name, "mug 1")
    agent.receptacles.clear()
    agent.seen["desk 1"] = ["mug 1"]
    assert len(agent.receptacles) == 3 and agent.seen == {}


def test_verbs_are_those_of_the_household() -> None:
    """Oracle: ALFWorld's two wordings of putting something down."""
    for verbs, command, answer in (
        ("current", "move mug 1 to desk 1", "You move the mug 1 to the desk 1."),
        ("old", "put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1."),
    ):
        answers = {
            "go to desk 1": "You arrive at loc 4. On the desk 1, you see a mug 1.",
            "take mug 1 from desk 1": "You pick up the mug 1 from the desk 1.",
            command: answer,
        }
        agent, commands = agent_with(answers, verbs=verbs)
        agent.go_to("desk 1")
        agent.take("mug 1", "desk 1")
        assert (agent.location, agent.holding, agent.seen) == ("desk 1", "mug 1", {"desk 1": []})
        agent.put("mug 1", "desk 1")
        assert commands[-1] == command
        assert (agent.holding, agent.seen) == ("", {"desk 1": ["mug 1"]})


@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_state_is_what_the_household_says(size: str) -> None:
    """Oracle: after every random command, admissible or not, the household's own `inventory` and `look`."""
    draws = random.Random(1)
    for row in households("train", 6, 3, size):
        engine, asked = Engine(load_game(row)), Engine(load_game(row))
        agent = playing(engine)
        for _ in range(60):
            command = draws.choice([*engine.observation.admissible, "go to moon 1", "take mug 9 from moon 1"])
            verb, _, rest = command.partition(" ")
            # The agent's own method where it has one; what it has no method for it cannot do.
            if verb in ("go", "open", "close", "take", "move", "clean", "heat", "cool", "use", "examine"):
                agent._do(command)
            asked.restore(engine.snapshot())
            held = asked.step("inventory").text
            assert held == (
                f"You are carrying: a {agent.holding}." if agent.holding else "You are not carrying anything."
            )
            facing = asked.step("look").text
            assert (agent.location or "middle of a room") in facing
            for receptacle, things in agent.seen.items():
                if receptacle in facing and not asked.step(f"examine {receptacle}").text.endswith("closed."):
                    assert sorted(things) == sorted(
                        names_in(asked.step(f"examine {receptacle}").text.split("see ")[-1])
                    )


def test_the_same_history_gives_the_same_state() -> None:
    """Oracle: the agent that lived it. So an attempt can go on in another process."""
    engine = Engine(load_game(kitchen.row()))
    agent = playing(engine)
    history = [(command, agent._do(command)) for command in kitchen.WALKTHROUGH[:6]]
    twin = Agent(Engine(load_game(kitchen.row())).observation.text, str, str, history=history)
    assert (twin.location, twin.holding, twin.seen) == (agent.location, agent.holding, agent.seen)
    assert twin.report() == agent.report()


def test_places_are_expanded_in_order_each_once() -> None:
    """Oracle: by hand."""
    agent, _ = agent_with({})
    assert agent.places("desk", "cabinet", "cabinet 1", "moon") == ["desk 1", "cabinet 2", "cabinet 1"]
    assert agent.places() == []


def test_visit_opens_what_is_closed_and_spends_nothing_on_what_is_known() -> None:
    """Oracle: the kitchen by heart; commands counted by hand."""
    engine = Engine(load_game(kitchen.row()))
    commands: list[str] = []

    def act(command: str) -> str:
        commands.append(command)
        return engine.step(command).text

    agent = Agent(engine.observation.text, act, str)
    assert agent.visit("fridge 1") == ["potato 1"]
    assert agent.visit("fridge 1") == ["potato 1"]
    assert commands == ["go to fridge 1", "open fridge 1"]
    agent.close("fridge 1")
    assert "fridge 1" not in agent.seen
    assert agent.visit("fridge 1") == ["potato 1"]
    assert commands[2:] == ["close fridge 1", "open fridge 1"]
    assert agent.visit("moon 1") == [] and agent.location == "fridge 1"


def test_a_receptacle_in_the_same_spot_is_reached() -> None:
    """Oracle: the kitchen's two drawers stand in one spot, and one cannot go where one is."""
    engine = Engine(load_game(kitchen.row()))
    agent = playing(engine)
    agent.visit("drawer 1")
    assert agent.visit("drawer 2") == ["saltshaker 1"]
    assert agent.location == "drawer 2"


def test_find_follows_the_order_goes_back_to_what_it_saw_and_leaves_what_it_put() -> None:
    """Oracle: the kitchen by heart: potato 2 on the countertop, potato 1 in the fridge."""
    engine = Engine(load_game(kitchen.row()))
    agent = playing(engine)
    assert agent.find("potato", ["fridge", "countertop"]) == ("potato 1", "fridge 1")
    assert agent.find("potato", ["microwave"]) is None
    agent.visit("fridge 1")
    agent.take("potato 1", "fridge 1")
    agent.visit("countertop 1")
    agent.put("potato 1", "countertop 1")
    assert "potato 1" in agent.seen["countertop 1"]
    assert agent.find("potato", ["fridge", "countertop"]) == ("potato 2", "countertop 1")
    assert agent.find("mug", []) is None


def test_fetch_and_go_are_find_take_and_visit() -> None:
    """Oracle: the kitchen by heart: potato 1 in the fridge; what is not there is "", and nothing is done for it."""
    agent = playing(Engine(load_game(kitchen.row())))
    assert agent.fetch("potato", ["fridge", "countertop"]) == agent.holding == "potato 1"
    assert agent.go("countertop", "fridge") == agent.location == "countertop 1"
    assert agent.go("attic") == "" and agent.location == "countertop 1"
    agent.put(agent.holding, "countertop 1")
    assert agent.fetch("anvil", ["countertop"]) == "" == agent.holding


def test_a_report_never_raises_and_tells_the_last_three() -> None:
    """Oracle: by hand, after none, one, two and four actions."""
    agent, _ = agent_with({})
    assert agent.report() == "You are in the middle of the room, holding nothing."
    agent.look()
    assert agent.report().startswith("> look\nNothing happens.\nYou are in")
    agent.look()
    assert agent.report().count("> ") == 2
    agent.inventory()
    agent.use("lamp 1")
    assert agent.report().count("> ") == 3 and agent.report().startswith("> look\nNothing happens.\n> inventory")


def test_questions_go_to_the_one_who_answers() -> None:
    """Oracle: the echo above."""
    agent, commands = agent_with({})
    assert agent.ask("where is it?") == "answer to where is it?" and commands == []
