"""Parses the numbered steps of a plan, and writes the program that follows them literally.

A step is "find OBJECT in PLACES" (and take it), "clean|heat|cool OBJECT with PLACES", "put OBJECT in PLACES" or "use
OBJECT in PLACES", with articles or without; PLACES are names ("cabinet 2") or types ("cabinet": each of them in turn),
tried in the order in which the step names them. Lines that cannot be parsed are kept verbatim, with an empty verb.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matryoshka.core.config import nearest
from matryoshka.tasks.alfworld.agent import kind_of

NUMBERED = re.compile(r"\s*+#?\s*+(?:\[?step\s*\d+\]?|\d+\s*[.)])\s*:?\s*(.+)", re.IGNORECASE)
_NOISE = re.compile(r"\b(?:a|an|the|some|any|another|first|second|hot|cool|clean)\b|[\[\]().'\"]")
_VERBS = {
    **dict.fromkeys(("find", "look for", "search for", "take", "get", "pick up"), "find"),
    **{verb: verb for verb in ("clean", "heat", "cool")},
    **dict.fromkeys(("put", "place", "move"), "put"),
    **dict.fromkeys(("use", "turn on", "switch on"), "use"),
}
_STEP = re.compile(
    rf"({'|'.join(_VERBS)})\s+([a-z]+)(?:\s+\d+)?\s*(?::|\b(?:in|into|on|onto|at|to|from|with|using|near)\b)\s*(.+)"
)
_PLACE = re.compile(r"[a-z]+(?: \d+)?")


@dataclass(frozen=True)
class Step:
    """One step. verb: "find", "clean", "heat", "cool", "put", "use", or "" if the line cannot be parsed."""

    verb: str
    thing: str = ""
    places: tuple[str, ...] = ()
    words: str = ""


def steps_of(rows: Iterable[Sequence[Any]]) -> tuple[Step, ...]:
    """Return the steps of rows [verb, thing, [place, ...]], as files and examples hold them.

    Raises ValueError for a row of another form or with another verb.
    """
    found: list[Step] = []
    for row in rows:
        match row:
            case [str(verb), str(thing), [str(), *_] as places] if all(isinstance(place, str) for place in places):
                if verb not in _VERBS.values():
                    hint = nearest(verb, dict.fromkeys(_VERBS.values()))
                    raise ValueError(f"the step {row!r:.80}: its verb is unknown; {hint}")
                found.append(Step(verb, thing, tuple(places)))
            case _:
                raise ValueError(f"the step {row!r:.80}; expected [verb, thing, [place, ...]]")
    return tuple(found)


def parse_plan(text: str) -> list[Step]:
    """Return the numbered steps of a plan, in its order; lines without a number are not steps."""
    return [parse_step(match[1]) for line in text.splitlines() if (match := NUMBERED.match(line))]


def parse_step(words: str) -> Step:
    """Return the step that one line describes."""
    verb, separator, rest = words.lower().strip().partition(" ")
    plain = re.sub(r"\s+", " ", verb + separator + _NOISE.sub(" ", rest)).strip()
    plain, _, used = plain.partition(" and take")[0].partition(" and use")  # "find a lamp in ... and use it"
    match = _STEP.match(plain)
    if match is None:
        return Step("", words=words.strip())
    parts = [part.strip() for part in re.split(r",|;|\bor\b|\band\b", match[3])]
    places = tuple(part for part in parts if _PLACE.fullmatch(part))
    return Step("use" if used else _VERBS[match[1]], match[2], places, words.strip())


def write_full(steps: Sequence[Step]) -> str:
    """Return the plan in sentences: a general plan, then "[Step 1] ..."."""
    general = {"find": "find a {0}", "put": "put it in {1}", "use": "turn on the {0}"}
    told = [general.get(step.verb, f"{step.verb} it").format(step.thing, step.places[0]) for step in steps]
    sentences = [_sentence(step, step.places, "Turn on the {0} in {1}.", "with") for step in steps]
    lines = [f"[Step {number}] {text}" for number, text in enumerate(sentences, start=1)]
    return "\n".join([f"General plan: {', then '.join(told)}.", *lines])


def write_compact(steps: Sequence[Step]) -> str:
    """Return the plan in few words: "1. find mug: countertop, cabinet"."""
    lines = [f"{step.verb} {step.thing}: {', '.join(step.places)}" for step in steps]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def of_kinds(steps: Sequence[Step]) -> list[Step]:
    """Return the steps with types of places ("cabinet") in place of names ("cabinet 16").

    A controller that sees the types alone can learn to write no other plan.
    """
    return [replace(step, places=tuple(dict.fromkeys(map(kind_of, step.places)))) for step in steps]


def in_sentences(plan: str) -> str:
    """Return a compact plan in sentences; a line that is no step of the compact language stays as it is."""
    lines = []
    for line in plan.splitlines():
        match = NUMBERED.match(line)
        step = parse_step(match[1]) if match else Step("")
        if step.verb and step.places:  # names of places are quoted as the program must write them
            sentence = _sentence(step, [repr(place) for place in step.places], "Find a {0} in {1} and use it.", "in")
            line = f"{line.partition('.')[0]}. {sentence}"
        lines.append(line)
    return "\n".join(lines)


def _sentence(step: Step, places: Sequence[str], use: str, treat: str) -> str:
    """Return a step as a sentence. use: the form of a use; treat: the word before the place of a treatment."""
    *before, last = places
    known = {"find": "Find a {0} in {1} and take it.", "put": "Put the {0} in {1}.", "use": use}
    form = known.get(step.verb, f"{step.verb.capitalize()} the {{0}} {treat} {{1}}.")
    return form.format(step.thing, f"{', '.join(before)} or {last}" if before else last)


def straight_program(steps: Sequence[Step]) -> str:
    """Return a program of one line a step, which does what the steps say, each at the first place that they name."""
    lines = []
    for step in steps:
        match step.verb:
            case "find":
                lines.append(f"agent.fetch({step.thing!r}, {list(step.places)})")
            case "use":
                lines.append(f"agent.use(agent.find({step.thing!r}, {list(step.places)})[0])")
            case verb:
                lines.append(f"agent.{verb}(agent.holding, agent.go({step.places[0]!r}))")
    return "\n".join(["def step_1(agent, memory):", *(f"    {line}" for line in lines)])


def program(steps: Sequence[Step]) -> str:
    """Return the program that takes every step literally and stops at the first one that cannot be done."""
    blocks = [f"def step_{number}(agent, memory):\n{_body(number, step)}\n" for number, step in enumerate(steps, 1)]
    return "\n".join(blocks) or 'def step_1(agent, memory):\n    raise AssertionError("There is no plan to follow.")\n'


def _body(number: int, step: Step) -> str:
    # The comment quotes a model's own words, so it must stay on one line.
    words = "".join(char if char.isprintable() else " " for char in step.words or write_compact([step])[3:])
    note = f"# [Step {number}] {words.strip()}"
    thing, places = repr(step.thing), f"[{', '.join(map(repr, step.places))}]"
    if step.verb == "find":
        lines = [
            note,
            f"found = agent.find({thing}, {places})",
            f"assert found, 'There is no {step.thing} in these places.'",
            f"memory[{thing}], place = found",
            f"agent.take(memory[{thing}], place)",
            f"assert agent.holding == memory[{thing}], 'I could not take the {step.thing}.'",
        ]
    elif step.verb == "use":
        lines = [
            note,
            f"found = agent.find({thing}, {places})",
            f"assert found, 'There is no {step.thing} in these places.'",
            "answer = agent.use(found[0])",
            f"assert answer.startswith('You turn on'), 'I could not turn on the {step.thing}.'",
        ]
    elif step.verb == "put":
        lines = [
            note,
            f"for place in agent.places(*{places}):",
            "    agent.visit(place)",
            f"    agent.put(memory[{thing}], place)",
            "    if not agent.holding:",
            "        break",
            f"assert not agent.holding, 'I could not put the {step.thing} there.'",
        ]
    elif step.verb:
        lines = [
            note,
            "answer = ''",
            f"for place in agent.places(*{places}):",
            "    agent.go_to(place)",
            f"    answer = agent.{step.verb}(memory[{thing}], place)",
            f"    if answer.startswith('You {step.verb}'):",
            "        break",
            f"assert answer.startswith('You {step.verb}'), 'I could not {step.verb} the {step.thing} there.'",
        ]
    else:
        lines = [note, f"raise AssertionError({f'I do not understand: {step.words}'!r})"]
    return "\n".join(f"    {line}" for line in lines)


def merged(plans: Sequence[Sequence[Step]]) -> list[Step]:
    """Return one plan for games of the same task: the steps of the first, each with the places of all of them.

    Plans whose steps differ from those of the first are left out. A lamp is used last; the order does not matter.
    """
    ordered = [sorted(plan, key=lambda step: step.verb == "use") for plan in plans]
    form = [(step.verb, step.thing) for step in ordered[0]]
    same = [plan for plan in ordered if [(step.verb, step.thing) for step in plan] == form]
    places = [dict.fromkeys(place for step in steps for place in step.places) for steps in zip(*same, strict=True)]
    return [Step(verb, thing, tuple(names)) for (verb, thing), names in zip(form, places, strict=True)]


def from_walkthrough(commands: Sequence[str], where: Mapping[str, str]) -> list[Step]:
    """Return the steps that a walkthrough takes, every place by its own name. where: object -> its first receptacle.

    Raises ValueError naming a command that no step stands for.
    """
    steps: list[Step] = []
    for command in commands:
        match command.split(" "):
            case ["go" | "open" | "close", *_]:
                pass
            case ["take", thing, _, "from", *place]:
                steps.append(Step("find", thing, (" ".join(place),)))
            case ["clean" | "heat" | "cool" as verb, thing, _, "with", *place]:
                steps.append(Step(verb, thing, (" ".join(place),)))
            case ["move", thing, _, "to", *place]:
                steps.append(Step("put", thing, (" ".join(place),)))
            case ["use", thing, number]:
                steps.append(Step("use", thing, (where[f"{thing} {number}"],)))
            case _:
                raise ValueError(f"walkthrough: no step stands for {command!r}")
    return steps
