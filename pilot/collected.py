"""Collection and pairs apart from a run: episodes of any policy in a folder of their own, and pairs from such folders.

A folder of `collect --out`, a run's folder and a JSONL file of trajectories are read alike. Of a folder with a
configuration only the sampled episodes count, and of those only whole groups: an example whose other draws are missing,
because calls failed, would bias the pairs.
"""

import tomllib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from matryoshka.core.config import load_toml
from matryoshka.core.distributed import World
from matryoshka.core.files import write_jsonl
from matryoshka.core.json_input import parse_json
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Message, Messages, PairRule, Preference, Sample, Trajectory, from_json, to_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.dpo.pairs import make_pairs, winners
from matryoshka.pilot.config import RunConfig, run_part
from matryoshka.pilot.context import open_run
from matryoshka.pilot.episodes import run_episodes, sampled_settings
from matryoshka.pilot.evaluate import ALIASES, check_apart, check_splits, policy_conditions
from matryoshka.pilot.folder import CONFIG, GATEWAY, RUNS, cache_path
from matryoshka.pilot.stages import (
    after_first_turn,
    bootstrapped,
    episodes_seed,
    in_controller_tokens,
    replanned,
)
from matryoshka.tasks.find import make_task

MORE = "more"  # key of a journal's row: further trajectories of the same episode, one for each sample of its last call


@dataclass(frozen=True)
class CollectConfig(RunConfig):
    """The configuration of a pilot, whose episodes are collected, or under whose settings a policy's episodes are."""

    out: str = ""
    """Folder of its own for the episodes of --policy, which a second call continues; default: the run's own folder,
    where every round is collected whose starting policy is trained."""
    policy: str = "untrained"
    """With --out: the policy that is sampled. "untrained" is the controller as [controller] has it, "own" the generator
    in its place; otherwise an adapter folder, a stage as RUN:STAGE, or URL#MODEL for another model as controller."""
    split: tuple[str, ...] = ("train",)
    """With --out: splits whose problems are taken."""


def collect_apart(config: CollectConfig, world: World, runs: Path = RUNS) -> dict[str, Any]:
    """Sample `config.policy` on its splits, [rollout] samples times each, into the folder `config.out`; return counts.

    Training problems that it never solves are tried by the generator itself, where [rollout] bootstrap says so. The
    folder's trajectories.jsonl takes the episodes of several policies. The answers of the generator are shared with
    the run of the configuration's name. Raises ValueError for a policy or a split that is none, and for a folder that
    was begun under other settings.
    """
    settings, out = run_part(config), Path(config.out)
    check_apart(out, runs / settings.name)
    named = replace(settings, name=out.name)
    with ExitStack() as stack:
        run = stack.enter_context(open_run(named, out.parent, cache_path(runs / settings.name), world, trains=False))
        check_splits(run, config.split)
        (found,) = policy_conditions(run, [config.policy], stack, config.split).values()
        draws = sampled_settings(named, episodes_seed("collect", named, 1), named.rollout.samples)
        episodes = run_episodes(run, found[1], config.split, draws, f"collect {config.policy}")
        if config.split == CollectConfig.split and ALIASES.get(config.policy, config.policy) != "own_guidance":
            episodes += replanned(run, found[1], 1, episodes)
            episodes += bootstrapped(run, 1, episodes)
        right = sum(episode.reward > 0.5 for episode in episodes)
        return {"episodes": len(episodes), "right": right, "policy": episodes[0].info.controller, "out": str(out)}


@dataclass(frozen=True)
class PairsCommand:
    """Make preference pairs from recorded episodes."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.arg(name="in")]
    """Folders of runs or of `collect --out`, or JSONL files of trajectories; the pairs are of all of them together."""
    out: Path
    """The JSONL file to write."""
    form: Literal["ours", "trl", "original", "sft"] = "ours"
    """Form of the rows. "ours" keeps the drawn token ids, which `matryoshka dpo` trains on as they are. "trl" has
    prompt, chosen and rejected as messages; "original" has two whole conversations, rejected and chosen. These two are
    text: a rejected text that was cut at max_tokens loses its mark. "sft" has prompt and completion of every winner."""
    kind: Literal["task", "binary", "ranked"] = "task"
    """Rule of the pairs: "task" takes the rule of the folder's task, or of its gateway ("binary" for a file); "binary"
    pairs rewards above and below 0.5, "ranked" any two whose gap exceeds --margin."""
    margin: float = 0.0
    """Smallest gap of rewards, for "ranked"."""
    cap: int = 0
    """Most pairs of one example; 0 takes the folder's [dpo] pairs_per_example, 4 for a file."""
    seed: int = -1
    """Seed of the choice among pairs; -1 takes the first folder's."""

    def __post_init__(self) -> None:
        if self.cap < 0:
            raise ValueError(f"pairs: cap {self.cap} must be at least 1, or 0 for the folder's")


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes by key. left_out: of incomplete groups. rule, seed: the folder's, None for a file."""

    rows: dict[str, Trajectory]
    left_out: int = 0
    rule: PairRule | None = None
    seed: int | None = None


def read_episodes(path: Path) -> Episodes:
    """Return the sampled episodes of the folder `path`, or all trajectories of a file, in the order of collection.

    Raises FileNotFoundError, ValueError naming file and line for what is no trajectory.
    """
    if not path.is_dir():
        return Episodes(read_rows(path))
    files = sorted(path.glob("trajectories*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{path}: no trajectories.jsonl; expected the folder of a run or of `collect --out`")
    rows = {key: row for file in files for key, row in read_rows(file).items()}
    if (path / GATEWAY).is_file():  # the rule is that of `train-from`
        told = tomllib.loads((path / GATEWAY).read_text(encoding="utf-8"))
        rule = PairRule(told["rule"], told["pairs_per_problem"], told["margin"])
        turns = {f"{key}/{i}": one for key, row in rows.items() for i, one in enumerate(single_turns(row))}
        return Episodes(turns, rule=rule, seed=told["seed"])
    if not (path / CONFIG).is_file():
        return Episodes(rows)
    config = load_toml(RunConfig, path / CONFIG)
    rollout, order, replayed = config.rollout, {}, set()
    for round in range(1, max(1, config.rounds) + 1):
        order[episodes_seed("collect", config, round)] = (round, 0, rollout.samples)
        order[replans := episodes_seed("replan", config, round)] = (round, 1, rollout.replans)
        order[episodes_seed("bootstrap", config, round)] = (round, 2, rollout.bootstrap)
        replayed.add(replans)
    sampled = {key: row for key, row in rows.items() if row.info.seed in order}
    drawn = Counter(_group(row) for row in sampled.values())
    whole = {key: row for key, row in sampled.items() if drawn[_group(row)] >= order[row.info.seed][2]}
    ordered = dict(sorted(whole.items(), key=lambda item: (*order[item[1].info.seed], item[1].info.draw)))
    ordered = {key: after_first_turn(row) if row.info.seed in replayed else row for key, row in ordered.items()}
    if any(turn.action.token_ids is None for row in ordered.values() for turn in row.turns):
        tokenizer = Tokenizer.load(config.controller.folder)
        ordered = {key: _tokenized(tokenizer, row) for key, row in ordered.items()}
    setting = TaskSetting(config.task.sizes, config.seed)
    rule = make_task(config.task.name, config.task.options, setting).pair_rule
    rule = replace(rule, cap=config.dpo.pairs_per_example)
    return Episodes(ordered, len(sampled) - len(whole), rule, config.seed)


def write_pairs_of(command: PairsCommand) -> dict[str, Any]:
    """Write the pairs of all inputs to `command.out` in the form asked for and return the counts.

    Raises ValueError for inputs of different tasks or rules, and where there is nothing to write.
    """
    found = [read_episodes(path) for path in command.inputs]
    episodes = list({key: row for one in found for key, row in one.rows.items()}.values())
    if len(tasks := sorted({episode.task for episode in episodes})) > 1:
        raise ValueError(f"pairs: the inputs hold episodes of several tasks ({', '.join(tasks)}); give those of one")
    rules = list(dict.fromkeys(one.rule for one in found if one.rule is not None)) or [PairRule()]
    rule = rules[0] if command.kind == "task" else PairRule(command.kind, rules[0].cap, command.margin)
    if len(rules) > 1 and (command.kind == "task" or not command.cap):
        raise ValueError("pairs: the folders were collected under different rules; choose with --kind and --cap")
    if command.kind == "task" and command.margin:
        raise ValueError("pairs: --margin belongs to --kind ranked")
    rule = replace(rule, cap=command.cap or rule.cap)
    seeds = [one.seed for one in found if one.seed is not None]
    pairs, counts = make_pairs(episodes, rule, command.seed if command.seed >= 0 else [*seeds, 0][0])
    counts.left_out += sum(one.left_out for one in found)
    if command.form == "sft":
        rows = [_sft_row(prompt, sample) for _, prompt, sample, _ in winners(episodes)]
    else:
        rows = [FORMS[command.form](pair) for pair in pairs]
    if not rows:
        what = counts.why_none() if command.form != "sft" else "no whole guidance won"
        raise ValueError(f"pairs: nothing to write from {len(episodes)} episodes: {what}")
    write_jsonl(command.out, rows)
    return {"episodes": len(episodes), **counts.as_dict(), "rows": len(rows), "out": str(command.out)}


def read_rows(path: Path) -> dict[str, Trajectory]:
    """Return key -> trajectory of a journal, or of a file of bare trajectories (key: the line).

    The last line of a journal that is being written may be torn, and is left out. Raises FileNotFoundError, ValueError
    naming file and line for what is no trajectory.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected trajectories, one JSON object a line")
    rows: dict[str, Trajectory] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        where = f"{path}:{number}"
        if not line.endswith(b"\n") and line.startswith(b'{"key"'):
            break
        try:
            row = parse_json(line, where)
            bare = not isinstance(row, dict) or "trajectory" not in row
            key = where if bare else str(row.get("key"))
            for place, found in enumerate([row if bare else row["trajectory"], *([] if bare else row.get(MORE, []))]):
                rows[f"{key}#{place}" if place else key] = from_json(Trajectory, found)
        except ValueError as err:
            raise ValueError(f"{where}: not a trajectory ({err}); expected rows of a trajectories.jsonl") from err
    return rows


def single_turns(episode: Trajectory) -> list[Trajectory]:
    """Return a trajectory for each turn of an agent's episode, with the episode's reward.

    The agent's calls are steps of one piece of work; that another call followed says nothing against a step, as it does
    of a plan that a task's loop has replaced.
    """
    return [replace(episode, turns=(turn,)) for turn in episode.turns]


def _group(trajectory: Trajectory) -> tuple[str, str, int]:
    return trajectory.example_id, trajectory.info.controller, trajectory.info.seed


def _tokenized(tokenizer: Tokenizer, episode: Trajectory) -> Trajectory:
    given = all(turn.action.token_ids is not None for turn in episode.turns)
    return episode if given else in_controller_tokens(tokenizer, episode)


def _trl_row(pair: Preference) -> dict[str, Any]:
    chosen, rejected = ([_said(sample)] for sample in (pair.chosen, pair.rejected))
    return {"prompt": to_json(pair.prompt), "chosen": chosen, "rejected": rejected}


def _original_row(pair: Preference) -> dict[str, Any]:
    prompt = to_json(pair.prompt)
    return {"rejected": [*prompt, _said(pair.rejected)], "chosen": [*prompt, _said(pair.chosen)]}


def _sft_row(prompt: Messages, sample: Sample) -> dict[str, Any]:
    return {"prompt": to_json(prompt), "completion": [_said(sample)]}


def _said(sample: Sample) -> dict[str, str]:
    said: dict[str, str] = to_json(Message("assistant", sample.text))
    return said


FORMS: dict[str, Callable[[Preference], dict[str, Any]]] = {
    "ours": to_json,
    "trl": _trl_row,
    "original": _original_row,
}
