"""Reads a PDDL problem: its objects, its initial facts and its goal, all in lower case as PDDL is case-blind.

The goal is grounded once: quantifiers are replaced by the objects they range over and every fact that never changes by
its truth, so that what is left says which facts must hold and which must not. Actions are not read here: ALFWorld's
games share one domain, which the engine implements.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

Fact = tuple[str, ...]
Tree: TypeAlias = "str | list[Tree]"
Binding = dict[str, str]

CONNECTIVES = ("and", "or", "not", "exists", "forall", "=")
_TOKEN = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")


@dataclass(frozen=True, slots=True)
class Formula:
    """A grounded condition: kind "fact" with that fact, or "and", "or", "not" with its parts.

    An "and" without parts is true, an "or" without parts is false.
    """

    kind: str
    fact: Fact = ()
    parts: tuple["Formula", ...] = ()

    def holds(self, facts: Collection[Fact]) -> bool:
        """Return whether the condition is true where exactly `facts` are."""
        if self.kind == "fact":
            return self.fact in facts
        if self.kind == "and":
            return all(part.holds(facts) for part in self.parts)
        if self.kind == "or":
            return any(part.holds(facts) for part in self.parts)
        return not self.parts[0].holds(facts)


TRUE, FALSE = Formula("and"), Formula("or")


@dataclass(frozen=True)
class Problem:
    """A parsed problem. types: object -> its type; facts: predicate -> its argument tuples, in the file's order."""

    types: dict[str, str]
    facts: dict[str, list[Fact]]
    goal: Tree
    _found: dict[Fact, list[Fact]] = field(default_factory=dict)

    def matching(self, pattern: Fact) -> list[Fact]:
        """Return the arguments of the initial facts of the form (predicate, argument, ...); "?" is any object."""
        if pattern not in self._found:
            predicate, *words = pattern
            self._found[pattern] = [
                fact
                for fact in self.facts.get(predicate, ())
                if len(fact) == len(words)
                and all(word in ("?", value) for word, value in zip(words, fact, strict=True))
            ]
        return self._found[pattern]


def parse_problem(text: str) -> Problem:
    """Return the problem that `text` describes. Raises ValueError saying what is wrong with it."""
    tree = _read(text)
    if tree[:1] != ["define"]:
        raise ValueError(f"pddl: the text begins with ({_show(tree)}; expected (define (problem ...) ...)")
    sections = {part[0]: part[1:] for part in tree[1:] if isinstance(part, list) and part and isinstance(part[0], str)}
    if missing := [name for name in (":objects", ":init", ":goal") if name not in sections]:
        raise ValueError(f"pddl: the problem has no ({missing[0]} ...); it has {', '.join(map(str, sections))}")
    if len(sections[":goal"]) != 1:
        raise ValueError(f"pddl: (:goal ...) has {len(sections[':goal'])} conditions; expected one")
    facts: dict[str, list[Fact]] = {}
    for entry in sections[":init"]:
        if isinstance(entry, list) and entry and entry[0] == "=":
            continue  # a distance or a cost: it steers planners and changes nothing that a player sees
        predicate, *arguments = _words(entry, "fact")
        facts.setdefault(predicate, []).append(tuple(arguments))
    return Problem(dict(_typed(sections[":objects"])), facts, sections[":goal"][0])


def ground(problem: Problem, changing: Collection[str], hidden: Collection[str] = ()) -> Formula:
    """Return the goal over facts of the predicates `changing`; all others keep their initial truth.

    hidden: predicates that change too, but whose facts nobody keeps. Raises ValueError for a goal about one of them,
    and for one that is not made of and, or, not, exists, forall, = and facts.
    """
    return _Grounder(problem, frozenset(changing), frozenset(hidden)).condition(problem.goal, {})


def _read(text: str) -> list[Tree]:
    stack: list[list[Tree]] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) == 1:
            raise ValueError("pddl: a ')' closes nothing")
        else:
            done = stack.pop()
            stack[-1].append(done)
    if len(stack) > 1:
        raise ValueError(f"pddl: {len(stack) - 1} '(' not closed; is the text whole?")
    if len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise ValueError(f"pddl: expected one (define ...), got {len(stack[0])} expressions")
    return stack[0][0]


def _show(tree: Tree) -> str:
    text = tree if isinstance(tree, str) else " ".join(_show(part) for part in tree)
    return text if len(text) <= 60 else text[:57] + "..."


def _words(tree: Tree, what: str) -> list[str]:
    words = [word for word in tree if isinstance(word, str)]
    if isinstance(tree, str) or len(words) != len(tree) or not words:
        raise ValueError(f"pddl: ({_show(tree)}) is no {what}; expected (predicate argument ...)")
    return words


def _typed(parts: list[Tree]) -> Iterator[tuple[str, str]]:
    """Yield (name, type) of a typed list: `a b - t c - u`."""
    names: list[str] = []
    words = iter(_words(parts, "typed list") if parts else [])
    for word in words:
        if word != "-":
            names.append(word)
            continue
        kind = next(words, "")
        yield from ((name, kind) for name in names)
        names = []
    if names:
        raise ValueError(f"pddl: {names[0]!r} has no type; expected 'name - type'")


def _all(parts: list[Formula]) -> Formula:
    # Facts first: they are cheap, and one that fails spares the rest.
    kept = sorted([part for part in parts if part is not TRUE], key=lambda part: part.kind != "fact")
    if not kept:
        return TRUE
    if any(part is FALSE for part in kept):
        return FALSE
    return kept[0] if len(kept) == 1 else Formula("and", parts=tuple(kept))


def _any(parts: list[Formula]) -> Formula:
    kept = [part for part in parts if part is not FALSE]
    if not kept:
        return FALSE
    if any(part is TRUE for part in kept):
        return TRUE
    return kept[0] if len(kept) == 1 else Formula("or", parts=tuple(kept))


def _not(part: Formula) -> Formula:
    if part is TRUE or part is FALSE:
        return FALSE if part is TRUE else TRUE
    return Formula("not", parts=(part,))


@dataclass(frozen=True)
class _Grounder:
    problem: Problem
    changing: frozenset[str]
    hidden: frozenset[str]

    def condition(self, tree: Tree, binding: Binding) -> Formula:
        """Return `tree` grounded, its free variables being bound by `binding`."""
        if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
            raise ValueError(f"pddl: ({_show(tree)}) is no condition; expected (and ...), (exists ...) or a fact")
        head, rest = tree[0], tree[1:]
        if head == "and":
            return _all([self.condition(part, binding) for part in rest])
        if head == "or":
            return _any([self.condition(part, binding) for part in rest])
        if head == "not" and len(rest) == 1:
            return _not(self.condition(rest[0], binding))
        if head in ("exists", "forall") and len(rest) == 2 and isinstance(rest[0], list):
            variables, body = dict(_typed(rest[0])), rest[1]
            outer = {name: value for name, value in binding.items() if name not in variables}
            if head == "forall":
                return _all([self.condition(body, inner) for inner in self._bind(variables, [], outer)])
            demands, others = self._split(body)
            inners = self._bind(variables, demands, outer)
            return _any([_all([self.condition(part, inner) for part in others]) for inner in inners])
        name, *fact = _bound(_words(tree, "condition"), binding)
        if name == "=":
            return TRUE if len(set(fact)) == 1 else FALSE
        if name in self.hidden:
            raise ValueError(f"pddl: the goal asks for ({_show(tree)}), which is not kept track of")
        if name in self.changing:
            return Formula("fact", (name, *fact))
        return TRUE if self.problem.matching((name, *fact)) else FALSE

    def _split(self, tree: Tree) -> tuple[list[list[str]], list[Tree]]:
        """Return the initial facts that `tree` demands without any alternative, and what else it asks for."""
        head = tree[0] if tree else ""
        if head == "and":
            parts = [self._split(part) for part in tree[1:]]
            return [demand for demands, _ in parts for demand in demands], [rest for _, more in parts for rest in more]
        settled = isinstance(tree, list) and isinstance(head, str) and head not in CONNECTIVES
        if settled and head not in self.changing | self.hidden:
            return [_words(tree, "condition")], []
        return [], [tree]

    def _bind(self, variables: Binding, demands: list[list[str]], binding: Binding) -> Iterator[Binding]:
        """Yield every binding of `variables` (name -> type) to objects under which the `demands` are initial facts.

        The demand with the fewest open variables binds first, as it has the fewest matches: without this join a goal
        over four variables would try each of some hundred thousand combinations.
        """
        still_open = [name for name in variables if name not in binding]
        if not demands and not still_open:
            yield binding
        elif not demands:
            for candidate, kind in self.problem.types.items():
                if kind == variables[still_open[0]]:
                    yield from self._bind(variables, [], {**binding, still_open[0]: candidate})
        else:
            best = min(demands, key=lambda demand: sum(word in still_open for word in demand))
            others = [demand for demand in demands if demand is not best]
            words = _bound(best, binding, still_open)
            for fact in self.problem.matching(tuple("?" if word in still_open else word for word in words)):
                found: Binding = {}
                if all(
                    self.problem.types.get(value) == variables[word] and found.setdefault(word, value) == value
                    for word, value in zip(words[1:], fact, strict=True)
                    if word in still_open
                ):
                    yield from self._bind(variables, others, {**binding, **found})


def _bound(words: list[str], binding: Binding, still_open: Collection[str] = ()) -> list[str]:
    bound = [binding.get(word, word) for word in words]
    if unbound := [word for word in bound if word[0] == "?" and word not in still_open]:
        raise ValueError(f"pddl: {unbound[0]} in ({' '.join(words)}) is bound by no quantifier")
    return bound
