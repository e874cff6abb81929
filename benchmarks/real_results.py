"""Outcomes of the real experiments over seeds and games, and their table with intervals, as JSON, Markdown and HTML."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matryoshka.benchmarks.levels import LevelledDifference, holm, levelled_difference
from matryoshka.benchmarks.real_causes import CAUSES
from matryoshka.core.files import write_json, write_text
from matryoshka.core.records import Trajectory

TITLES = {
    "no_guidance": "no plan",
    "react": "ReAct, no controller",
    "wrong_guidance": "another game's plan",
    "own_guidance": "the generator's own plan",
    "untrained": "untrained controller",
    "warmup": "after warm-up",
    "star": "STaR, one round",
    "star_2": "STaR, two rounds",
    "round_1": "after round 1",
    "round_2": "after round 2",
    "round_3": "after round 3",
    "new_games": "after round 2 on new games",
    "gold_guidance": "gold plan",
}
PRICE = (0.15, 0.60)
"""USD for a million tokens read and written, at which costs are stated: a small hosted model's (gpt-4o-mini). The
generator here runs on the machine itself and costs nothing."""
FIXED = ("no_guidance", "react", "wrong_guidance", "own_guidance", "untrained", "gold_guidance")
"""Conditions that do not depend on the seed of the training: they are evaluated once."""
CONTROLS = ("star", "star_2", "new_games")
"""Conditions that a seed may lack: they are in the tables once every seed has them."""
CONTROL_PAIRS = (("star", "round_1"), ("star_2", "round_2"), ("warmup", "new_games"), ("round_2", "new_games"))
"""Each control stands beside the round that took as many calls of the generator; new games beside the warm-up, too."""


@dataclass(frozen=True)
class GameOutcome:
    """One greedy episode. calls, prompt_tokens, completion_tokens: of the generator, as the server counts them.

    cause: why it is lost, a key of `CAUSES`; "" if it is won, or not known.
    """

    won: bool
    verdict: str
    task_type: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cause: str = ""


@dataclass
class Outcomes:
    """The outcomes measured so far: condition -> seed ("" for a fixed condition) -> game -> outcome."""

    table: dict[str, dict[str, dict[str, GameOutcome]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seed -> what its training took and used: calls, tokens and seconds by stage, wins and pairs."""

    def add(
        self, condition: str, seed: str, episodes: Sequence[Trajectory], seconds: float, causes: Mapping[str, str]
    ) -> None:
        """Record the episodes of a condition over the test games.

        seconds: that they took; the longest time stays, since episodes that are read back take none. causes: of the
        lost games, by game.
        """
        rows = {
            episode.example_id: GameOutcome(
                episode.reward > 0.5,
                episode.info.verdict,
                episode.example_id.split("/")[-2].partition("-")[0],  # SPLIT/TYPE-THING-.../TRIAL
                episode.info.calls,
                episode.info.prompt_tokens,
                episode.info.completion_tokens,
                causes.get(episode.example_id, ""),
            )
            for episode in episodes
        }
        seed = "" if condition in FIXED else seed
        self.table.setdefault(condition, {})[seed] = rows
        times = self.seconds.setdefault(condition, {})
        times[seed] = max(times.get(seed, 0.0), round(seconds, 1))

    @property
    def seeds(self) -> list[str]:
        """The seeds of which the warm-up and every round are measured."""
        ladder = [rows for condition, rows in self.table.items() if condition not in (*FIXED, *CONTROLS)]
        return sorted(set.intersection(*(set(rows) for rows in ladder))) if ladder else []

    @property
    def conditions(self) -> list[str]:
        """The conditions that are measured for all of these seeds, which are those that the tables have."""
        return [name for name, rows in self.table.items() if name in FIXED or set(self.seeds) <= set(rows)]

    def wins(self, condition: str, games: Sequence[str]) -> list[list[float]]:
        """Return one row a seed and one column a game; a fixed condition repeats its row."""
        rows = self.table[condition]
        picked = [rows[""] if condition in FIXED else rows[seed] for seed in self.seeds]
        return [[float(row[game].won) for game in games] for row in picked]

    def games(self) -> list[str]:
        """Return the games of which every one of `conditions` is measured for all seeds, in a fixed order."""
        seen = [
            set(row)
            for condition in self.conditions
            for seed, row in self.table[condition].items()
            if condition in FIXED or seed in self.seeds
        ]
        return sorted(set.intersection(*seen)) if seen else []

    def save(self, path: Path) -> None:
        """Write all to a JSON file, which appears whole."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Outcomes":
        """Return what `save` wrote; nothing measured where there is no file."""
        if not path.exists():
            return Outcomes()
        saved = json.loads(path.read_text())
        saved["table"] = {
            condition: {
                seed: {game: GameOutcome(**outcome) for game, outcome in row.items()} for seed, row in rows.items()
            }
            for condition, rows in saved["table"].items()
        }
        return Outcomes(**saved)


def comparisons(conditions: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that the table compares: the last round with all others, each step with the one before, and
    `CONTROL_PAIRS`.
    """
    rounds = sorted(name for name in conditions if name.startswith("round_"))
    if not rounds:
        return []
    last = rounds[-1]
    ladder = [name for name in ("untrained", "warmup", *rounds) if name in conditions]
    against = [name for name in ("warmup", "own_guidance", "no_guidance", "untrained") if name in conditions]
    pairs = [(name, last) for name in against] + list(zip(ladder, ladder[1:], strict=False))
    pairs += [pair for pair in CONTROL_PAIRS if set(pair) <= set(conditions)]
    return list(dict.fromkeys(pairs))


def differences(outcomes: Outcomes) -> dict[str, tuple[LevelledDifference, float]]:
    """Return "second - first" -> (difference over seeds and games, p adjusted by Holm over all of these)."""
    games = outcomes.games()
    if not games or not outcomes.seeds:
        return {}
    found = {
        f"{second} - {first}": levelled_difference(outcomes.wins(first, games), outcomes.wins(second, games))
        for first, second in comparisons(outcomes.conditions)
    }
    adjusted = holm({name: row.p for name, row in found.items()})
    return {name: (row, adjusted[name]) for name, row in found.items()}


def condition_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return one row a condition, in the order of `TITLES`: success, by seed and by type, and what an episode costs."""
    games, rows = outcomes.games(), []
    for name in (name for name in TITLES if name in outcomes.conditions):
        picked = [row for seed, row in outcomes.table[name].items() if name in FIXED or seed in outcomes.seeds]
        episodes = [row[game] for row in picked for game in games]
        if not episodes:
            continue
        types: dict[str, list[bool]] = {}
        for episode in episodes:
            types.setdefault(episode.task_type, []).append(episode.won)
        rows.append(
            {
                "condition": name,
                "title": TITLES[name],
                "success": round(_mean([episode.won for episode in episodes]), 4),
                "by_seed": [round(_mean([row[game].won for game in games]), 4) for row in picked],
                "by_type": {kind: round(_mean(won), 3) for kind, won in sorted(types.items())},
                "verdicts": {v: sum(e.verdict == v for e in episodes) for v in sorted({e.verdict for e in episodes})},
                "causes": {cause: sum(e.cause == cause for e in episodes) for cause in CAUSES},
                "calls": round(_mean([episode.calls for episode in episodes]), 2),
                "prompt_tokens": round(_mean([episode.prompt_tokens for episode in episodes]), 1),
                "completion_tokens": round(_mean([episode.completion_tokens for episode in episodes]), 1),
                "usd_per_1000": round(1000 * _mean([_price(episode) for episode in episodes]), 3),
                "seconds": round(_mean(list(outcomes.seconds.get(name, {}).values()) or [0.0]) / len(games), 1),
            }
        )
    return rows


def gain_per_thousand_calls(outcomes: Outcomes) -> float | None:
    """Return points of success that the last round gained over the warm-up for each thousand calls of its training."""
    names = sorted(name for name in outcomes.table if name.startswith("round_"))
    calls = [float(outcomes.training[seed]["round_calls"]) for seed in outcomes.seeds if seed in outcomes.training]
    games = outcomes.games()
    if not names or "warmup" not in outcomes.table or not calls or not games:
        return None
    gain = levelled_difference(outcomes.wins("warmup", games), outcomes.wins(names[-1], games)).difference
    return round(100 * gain / (_mean(calls) / 1000), 1)


def write_results(outcomes: Outcomes, about: Mapping[str, Any], prose: str, path: Path) -> dict[str, Any]:
    """Write `path`.json, .md and .html and return the JSON object. about: model, machine, versions, settings, price.

    prose: Markdown that stands below the tables.
    """
    rows, found = condition_rows(outcomes), differences(outcomes)
    result = {
        "games": len(outcomes.games()),
        "seeds": outcomes.seeds,
        "about": dict(about),
        "conditions": rows,
        "comparisons": [
            {"comparison": name, **asdict(row), "p_holm": adjusted} for name, (row, adjusted) in found.items()
        ],
        "points_per_thousand_calls": gain_per_thousand_calls(outcomes),
        "training": outcomes.training,
        "outcomes": {
            condition: {seed: {game: row.verdict for game, row in games.items()} for seed, games in seeds.items()}
            for condition, seeds in outcomes.table.items()
        },
    }
    write_json(path.with_suffix(".json"), result)
    text = _markdown(result)
    write_text(path.with_suffix(".md"), f"{text}\n{prose.strip()}\n")
    write_text(path.with_suffix(".html"), _page(result))
    return result


def _markdown(result: Mapping[str, Any]) -> str:
    about = result["about"]
    lines = [f"# {about['title']}", "", about["summary"], ""]
    lines += [f"{result['games']} test games, seeds {', '.join(result['seeds']) or 'none complete'}.", ""]
    lines += ["| condition | success | by seed | calls | tokens read | written | seconds | USD for 1,000 games |"]
    lines += ["|---" * 8 + "|"]
    for row in result["conditions"]:
        seeds = " / ".join(f"{value:.3f}" for value in row["by_seed"])
        costs = f"{row['calls']:.2f} | {row['prompt_tokens']:.0f} | {row['completion_tokens']:.0f}"
        costs += f" | {row['seconds']:.1f} | {row['usd_per_1000']:.3f}"
        lines.append(f"| {row['title']} | {row['success']:.3f} | {seeds} | {costs} |")
    read, written = PRICE
    lines += ["", f"Costs are those of one game, at {read} and {written} USD for a million tokens read and written."]
    lines += ["", "| difference | points | 95% interval | p | p (Holm) | by seed |", "|---|---|---|---|---|---|"]
    for row in result["comparisons"]:
        interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        seeds = " / ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        points = f"{100 * row['difference']:+.1f}"
        lines.append(
            f"| {_words(row['comparison'])} | {points} | {interval} | {row['p']:.3g} | {row['p_holm']:.3g} | {seeds} |"
        )
    lines += ["", "Success by type of task:", "", _types(result["conditions"]), ""]
    lines += ["Lost games by cause:", "", *_causes(result["conditions"]), ""]
    if (gain := result["points_per_thousand_calls"]) is not None:
        lines += [f"The rounds gained {gain:+.1f} points for each thousand calls of the generator in training.", ""]
    return "\n".join(lines)


def _types(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = sorted({kind for row in rows for kind in row["by_type"]})
    lines = [f"| condition | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        cells = [f"{row['by_type'][kind]:.2f}" if kind in row["by_type"] else "" for kind in kinds]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _causes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| condition | {' | '.join(CAUSES)} |", "|---" * (len(CAUSES) + 1) + "|"]
    known = [row for row in rows if any(row["causes"].values())]
    lines += [f"| {row['title']} | {' | '.join(str(row['causes'][cause]) for cause in CAUSES)} |" for row in known]
    return [*lines, "", "; ".join(f"{cause}: {meaning}" for cause, meaning in CAUSES.items()) + "."]


def _words(comparison: str) -> str:
    second, _, first = comparison.partition(" - ")
    return f"{TITLES[second]} minus {TITLES[first]}"


def _page(result: Mapping[str, Any]) -> str:
    """Return the results as one page with bars for success, which needs nothing from elsewhere."""
    bars = "".join(
        f"<tr><td>{html.escape(row['title'])}</td><td><div style='background:#4a7;height:1em;"
        f"width:{300 * row['success']:.0f}px'></div></td><td>{row['success']:.3f}</td></tr>"
        for row in result["conditions"]
    )
    title = html.escape(str(result["about"]["title"]))
    body = html.escape(_markdown(result))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f"<body style='font-family:sans-serif;max-width:60em;margin:2em auto'><h1>{title}</h1>"
        f"<table>{bars}</table><pre style='white-space:pre-wrap'>{body}</pre></body></html>\n"
    )


def _price(episode: GameOutcome) -> float:
    """Return the USD of one episode at the stated price."""
    return (PRICE[0] * episode.prompt_tokens + PRICE[1] * episode.completion_tokens) / 1e6


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
