"""Preference pairs from scored episodes: by prompt over all rounds, deduplicated, capped, seeded.

The prompt of a new plan shows the plan that failed and what came of it, so a pair of new plans needs several samples
in one such state (`[rollout] replans`).

Both sides are the controller's own texts, token for token. Every guidance of an episode that was followed by a
new plan failed (reward 0); the last one has the episode's reward. A text cut by length is never chosen. An episode
whose black-box call failed for good says nothing of its guidance. It is left out with the other draws of its group, the
episodes of one policy on one example with one seed: a group that an outage has thinned out would bias the pairs.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from matryoshka.core.records import Messages, PairRule, Preference, Sample, Trajectory, content_key, stable_seed


@dataclass
class PairCounts:
    """Counts of the samples: episodes whose call failed for good, episodes left out with them since they are of
    the same group, samples that were scored, distinct texts, samples cut by length, prompts, prompts with both sides,
    pairs.
    """

    failed: int = 0
    left_out: int = 0
    samples: int = 0
    distinct: int = 0
    cut_by_length: int = 0
    prompts: int = 0
    prompts_with_both: int = 0
    pairs: int = 0

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def why_none(self) -> str:
        """Return why there is no pair, in words."""
        cut = f"; {self.cut_by_length} of {self.samples} samples were cut by length, and those are never chosen"
        left_out = f"; {self.left_out} episodes are left out, since other draws of their groups failed"
        none = "no prompt has both a better and a worse sample"
        return none + cut * bool(self.cut_by_length) + left_out * bool(self.left_out)


@dataclass
class _Candidate:
    sample: Sample
    prompt_ids: Sequence[int] | None
    rewards: list[float] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


def make_pairs(trajectories: Sequence[Trajectory], rule: PairRule, seed: int) -> tuple[list[Preference], PairCounts]:
    """Return pairs in a deterministic order, and the counts.

    Equal guidances to one prompt are one candidate with the mean of their rewards, whole if one of them was. Rule
    "binary": above 0.5 beats below 0.5; "ranked": any gap above `rule.margin` counts, the widest first. At most
    `rule.cap` pairs an example, no pair twice.
    Raises ValueError for an unknown rule, and for an episode without a measure that the rule names.
    """
    if rule.kind not in ("binary", "ranked"):
        raise ValueError(f"pairs: rule {rule.kind!r} is unknown; choose 'binary' or 'ranked'")
    counts = PairCounts()
    thinned = {_group(trajectory) for trajectory in trajectories if _failed(trajectory)}
    whole = [trajectory for trajectory in trajectories if _group(trajectory) not in thinned]
    counts.failed = sum(map(_failed, trajectories))
    counts.left_out = len(trajectories) - len(whole) - counts.failed
    prompts: dict[tuple[str, Messages], dict[str, _Candidate]] = defaultdict(dict)
    for trajectory, last_reward in zip(whole, _rewards(whole, rule.scores), strict=True):
        for index, turn in enumerate(trajectory.turns):
            reward = last_reward if index == len(trajectory.turns) - 1 else 0.0
            counts.samples += 1
            counts.cut_by_length += turn.action.finish_reason == "length"
            group = prompts[trajectory.example_id, turn.prompt]
            candidate = group.setdefault(turn.action.text, _Candidate(turn.action, turn.prompt_ids))
            if candidate.sample.finish_reason == "length":
                candidate.sample = turn.action
            candidate.rewards.append(reward)
            candidate.sources.append({"controller": trajectory.info.controller, "draw": trajectory.info.draw})
    counts.prompts = len(prompts)
    by_example: dict[str, list[list[Preference]]] = defaultdict(list)
    for (example_id, prompt), group in prompts.items():
        counts.distinct += len(group)
        ranked = [group[key] for key in sorted(group)]
        random.Random(stable_seed("pairs", seed, example_id, prompt)).shuffle(ranked)
        pairs = list(_matches(ranked, rule))
        counts.prompts_with_both += bool(pairs)
        by_example[example_id].append([_preference(prompt, example_id, *pair) for pair in pairs])
    # The prompts of an example take turns, so that first plans leave room under the cap for what followed failures.
    turns = {id: [p for row in zip_longest(*by_example[id]) for p in row if p is not None] for id in sorted(by_example)}
    kept = [pair for pairs in turns.values() for pair in pairs[: rule.cap]]
    counts.pairs = len(kept)
    return kept, counts


def _rewards(trajectories: Sequence[Trajectory], scores: Sequence[str]) -> list[float]:
    """Return each episode's reward or, where `scores` are named, the mean rank of these measures in its example.

    A rank is the share of the example's other episodes that the score beats, ties counted half: 0 worst, 1 best.
    """
    if not scores:
        return [trajectory.reward for trajectory in trajectories]
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.example_id].append(trajectory)

    for trajectory in trajectories:
        if lacking := [name for name in scores if name not in trajectory.info.measures]:
            raise ValueError(
                f"pairs: an episode of example {trajectory.example_id!r} has no measure {lacking[0]!r}, by which the "
                f"pair rule ranks; it has {sorted(trajectory.info.measures)}. The task must give it to every episode"
            )

    def rank(trajectory: Trajectory, name: str) -> float:
        own = trajectory.info.measures[name]
        rivals = [rival.info.measures[name] for rival in groups[trajectory.example_id]]
        beaten = sum((value < own) + 0.5 * (value == own) for value in rivals) - 0.5
        return beaten / max(1, len(rivals) - 1)

    return [sum(rank(trajectory, name) for name in scores) / len(scores) for trajectory in trajectories]


def winners(trajectories: Sequence[Trajectory]) -> list[tuple[Sequence[int] | None, Messages, Sample, str]]:
    """Return (prompt ids, prompt, sample, example id) of each distinct guidance that won and is whole: STaR's data."""
    found: dict[str, tuple[Sequence[int] | None, Messages, Sample, str]] = {}
    for trajectory in trajectories:
        turn = trajectory.turns[-1] if trajectory.turns else None
        if turn is not None and trajectory.reward > 0.5 and turn.action.finish_reason == "stop":
            key = content_key(trajectory.example_id, turn.prompt, turn.action.text)
            found.setdefault(key, (turn.prompt_ids, turn.prompt, turn.action, trajectory.example_id))
    return [found[key] for key in sorted(found)]


def _failed(trajectory: Trajectory) -> bool:
    return trajectory.info.verdict == "failed"


def _group(trajectory: Trajectory) -> tuple[str, str, int]:
    return trajectory.example_id, trajectory.info.controller, trajectory.info.seed


def _matches(ranked: Sequence[_Candidate], rule: PairRule) -> list[tuple[_Candidate, _Candidate]]:
    """Return up to `rule.cap` distinct (better, worse) couples, using as many different texts as there are."""
    if rule.kind == "binary":
        better = [c for c in ranked if c.reward > 0.5 and c.sample.finish_reason == "stop"]
        worse = [c for c in ranked if c.reward < 0.5]
        size = max(len(better), len(worse)) if better and worse else 0
        # Walk both lists round and round, each time shifted: all texts are used before any is used twice.
        indices = [(i % len(better), (i + shift) % len(worse)) for shift in range(len(worse)) for i in range(size)]
        return [(better[i], worse[j]) for i, j in dict.fromkeys(indices)][: rule.cap]
    whole = [c for c in ranked if c.sample.finish_reason == "stop"]
    couples = [(b, w) for b in whole for w in ranked if b.reward - w.reward > rule.margin]
    return sorted(couples, key=lambda couple: couple[1].reward - couple[0].reward)[: rule.cap]


def _preference(prompt: Messages, example_id: str, better: _Candidate, worse: _Candidate) -> Preference:
    provenance = {"chosen": better.sources, "rejected": worse.sources}
    ids = better.prompt_ids
    return Preference(prompt, ids, better.sample, worse.sample, better.reward, worse.reward, example_id, provenance)
