"""Goals: the grounded formula against an evaluator that tries every object for every variable."""

import random
from itertools import product
from typing import Any

import pytest

from matryoshka.core.records import stable_seed
from matryoshka.tasks.alfworld.pddl import Fact, Tree, ground, parse_problem

TYPES = {"a": "object", "b": "object", "c": "object", "r": "box", "s": "box"}
STATIC = {"red": ("object",), "fits": ("object", "box")}
CHANGING = {"in": ("object", "box"), "hot": ("object",)}


def brute(tree: Any, facts: set[Fact], binding: dict[str, str]) -> bool:
    """Return the truth of `tree`, straight from the meaning of its words."""
    head, rest = tree[0], tree[1:]
    if head in ("and", "or"):
        return (all if head == "and" else any)(brute(part, facts, binding) for part in rest)
    if head == "not":
        return not brute(rest[0], facts, binding)
    if head in ("exists", "forall"):
        names, kinds = rest[0][::3], rest[0][2::3]
        every = [[name for name, its in TYPES.items() if its == kind] for kind in kinds]
        values = [
            brute(rest[1], facts, {**binding, **dict(zip(names, chosen, strict=True))}) for chosen in product(*every)
        ]
        return any(values) if head == "exists" else all(values)
    fact = tuple(binding.get(word, word) for word in rest)
    return len(set(fact)) == 1 if head == "=" else (head, *fact) in facts


def a_fact(rng: random.Random, scope: dict[str, str]) -> list[Tree]:
    if rng.random() < 0.15:
        return ["=", *(rng.choice([*scope, *TYPES]) for _ in range(2))]
    name, kinds = rng.choice(list({**STATIC, **CHANGING}.items()))
    return [name, *(rng.choice([word for word, its in {**scope, **TYPES}.items() if its == kind]) for kind in kinds)]


def a_condition(rng: random.Random, depth: int, scope: dict[str, str]) -> list[Tree]:
    if depth == 0 or rng.random() < 0.15:
        return a_fact(rng, scope)
    head = rng.choice(("and", "and", "or", "not", "exists", "exists", "forall"))
    if head in ("exists", "forall"):
        # Few names, so that inner variables shadow outer ones of another type too.
        added = {rng.choice(("?x", "?y", "?z")): rng.choice(("object", "box")) for _ in range(rng.randint(1, 3))}
        listed: list[Tree] = [word for name, kind in added.items() for word in (name, "-", kind)]
        return [head, listed, a_condition(rng, depth - 1, {**scope, **added})]
    parts: list[Tree] = [a_condition(rng, depth - 1, scope) for _ in range(1 if head == "not" else rng.randint(0, 3))]
    return [head, *parts]


def words(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(words(part) for part in tree)})"


@pytest.mark.parametrize("seed", range(300))
def test_a_grounded_goal_is_true_where_the_goal_is(seed: int) -> None:
    """Oracle: `brute`, over facts that are drawn anew as a game would change them."""
    rng = random.Random(stable_seed("pddl", seed))
    goal = a_condition(rng, 4, {})
    possible = [
        (name, *chosen)
        for name, kinds in {**STATIC, **CHANGING}.items()
        for chosen in product(*([word for word, its in TYPES.items() if its == kind] for kind in kinds))
    ]
    initial = {fact for fact in possible if rng.random() < 0.5}
    listed = " ".join(f"{name} - {kind}" for name, kind in TYPES.items())
    facts = " ".join(f"({' '.join(fact)})" for fact in sorted(initial))
    problem = parse_problem(f"(define (problem p) (:objects {listed}) (:init {facts}) (:goal {words(goal)}))")
    formula = ground(problem, CHANGING)
    static = {fact for fact in initial if fact[0] in STATIC}
    for _ in range(8):
        now = static | {fact for fact in possible if fact[0] in CHANGING and rng.random() < 0.5}
        assert formula.holds(now) == brute(goal, now, {}), words(goal)


def test_case_and_comments_do_not_count() -> None:
    """Oracle: PDDL's rules, by hand."""
    problem = parse_problem("(DEFINE (problem P) ; (unclosed\n(:Objects A B - Mug)(:INIT (Hot A))(:goal (HOT A)))")
    assert problem.types == {"a": "mug", "b": "mug"} and problem.facts == {"hot": [("a",)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected one \(define ...\), got 0 expressions"),
        ("(define (:objects) (:init) (:goal (and))) (define)", "got 2 expressions"),
        ("(define (:objects) (:init a) (:goal (and)))", r"\(a\) is no fact"),
        ("(define (:objects) (:init (a (b))) (:goal (and)))", r"\(a b\) is no fact"),
        ("(define (:objects) (:init) (:goal (and) (and)))", r"\(:goal ...\) has 2 conditions"),
    ],
)
def test_a_malformed_problem_is_explained(text: str, message: str) -> None:
    """Oracle: the message for each malformed text, by hand."""
    with pytest.raises(ValueError, match=message):
        parse_problem(text)


@pytest.mark.parametrize("goal", ["(when (hot a) (hot b))", "((hot a))", "(exists (hot a))", "()", "hot"])
def test_a_goal_beyond_the_language_is_refused(goal: str) -> None:
    """Oracle: the message, for goals that the games never have."""
    problem = parse_problem(f"(define (problem p) (:objects a - mug) (:init (hot a)) (:goal {goal}))")
    with pytest.raises(ValueError, match="is no condition"):
        ground(problem, ("hot",))
