"""Evaluation: the conditions of a run's report over its held-out problems, and its policies with other generators.

`evaluate_policies` evaluates any policies under any settings in a folder of its own and leaves runs untouched. The
folder's name carries a hash of all settings, so the same command continues an evaluation and other settings begin
another one. It shares the generator's answers with the run of the configuration's name.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka.core.distributed import World
from matryoshka.core.files import write_json
from matryoshka.core.protocols import Controller, Task
from matryoshka.core.records import Trajectory, content_key, stable_seed, to_json
from matryoshka.eval.baselines import GeneratorGuidance, NoGuidance, ScriptedGuidance
from matryoshka.eval.report import Condition, ReportInput, write_report
from matryoshka.inference.local_controller import TokenSampler
from matryoshka.pilot.config import RunConfig, rollout_settings, run_part
from matryoshka.pilot.context import ENVIRONMENT, Problems, Run, Scheme, open_run
from matryoshka.pilot.environment import environment, hardware, typed_command, versions
from matryoshka.pilot.episodes import policy_scheme, run_episodes
from matryoshka.pilot.folder import cache_path, trained_stages
from matryoshka.pilot.generator import open_generator, with_generator
from matryoshka.pilot.stages import gold_text, is_trained, left_out

HELD_OUT_SPLITS = ("test", "held_out")
ALIASES = {"none": "no_guidance", "gold": "gold_guidance", "wrong": "wrong_guidance", "own": "own_guidance"}
Schemes = dict[str, tuple[str, Scheme]]  # condition -> (title, scheme)


def evaluate(
    run: Run, conditions: Schemes, label: str = "evaluate", splits: Sequence[str] = HELD_OUT_SPLITS
) -> list[Condition]:
    """Return `conditions` over the problems of `splits`, one episode each; `label` names the time it takes."""
    found = []
    for name, (title, scheme) in conditions.items():
        stage = f"{label} {name}"
        episodes = run_episodes(run, scheme, splits, label=stage)
        own = GeneratorGuidance(run.generator).name  # a guidance that the generator gives itself is a call, too
        calls = sum(t.info.calls + len(t.turns) * (t.info.controller == own) for t in episodes)
        seconds = run.seconds.as_dict().get(stage, 0.0)
        found.append(Condition(name, title, episodes, seconds, calls, num_tokens(episodes)))
    return found


def chosen(conditions: Schemes, only: Sequence[str], skip: Sequence[str]) -> Schemes:
    """Return the conditions that `only` names (all for none), without those that `skip` names; aliases are known.

    Raises ValueError for a name that is not there.
    """
    only, skip = ([ALIASES.get(name, name) for name in names] for names in (only, skip))
    if unknown := [name for name in (*only, *skip) if name not in conditions]:
        raise ValueError(f"evaluate: condition {unknown[0]!r} is not there; choose from {', '.join(conditions)}")
    return {name: found for name, found in conditions.items() if name in (only or conditions) and name not in skip}


def policy_conditions(
    run: Run, policies: Sequence[str], stack: ExitStack, splits: Sequence[str] = HELD_OUT_SPLITS
) -> Schemes:
    """Return the conditions that `policies` name, in their order, over the problems of `splits`.

    A policy is a condition of `schemes` or its alias ("none", "gold", "wrong", "own"); an adapter folder; a
    stage of a run as RUN:STAGE or as its folder; or another model as controller, as `with_generator` takes it, which
    `stack` closes. Raises ValueError for anything else.
    """
    known, found = schemes(replace(run, config=replace(run.config, wrong=True)), splits), Schemes()
    greedy = rollout_settings(run.config, greedy=True)
    known.setdefault("own_guidance", _own_guidance(run.config))
    for policy in policies:
        name = ALIASES.get(policy, policy)
        folder = policy_folder(policy)
        if name in known:
            found[name] = known[name]
        elif policy.endswith(".toml") or policy.startswith(("http://", "https://")):
            if run.config.executor == "ray":
                what = "the client of another model belongs to one process"
                raise ValueError(f"policy {policy!r} needs executor = 'local', since {what}")
            config = with_generator(run.config, policy)
            other = stack.enter_context(open_generator(config, run.folder, run.ranks, run.runner, run.cache))
            scheme = Scheme(slug(policy), _fixed(GeneratorGuidance(other)), greedy)
            found[slug(policy)] = (f"{other.name} as controller", scheme)
        elif run.policies.folder(str(folder)).exists():
            found[slug(policy)] = (policy, policy_scheme(run, str(folder)))
        else:
            if ":" in policy and (stages := trained_stages(folder.parent)):
                if folder.name in stages:
                    what = f"is an adapter, and [controller] tune = {run.config.controller.tune!r} computes none"
                    raise ValueError(f"policy {policy!r} {what}; merge it, or take a configuration of adapters")
                raise ValueError(f"policy {policy!r}: that run has no such stage; choose from {', '.join(stages)}")
            raise ValueError(
                f"policy {policy!r} is neither a condition ({', '.join(known)}) nor an adapter folder, a "
                "stage as RUN:STAGE, a model folder, URL#MODEL or a TOML file of another model"
            )
    return found


def check_splits(run: Run, splits: Sequence[str]) -> None:
    """Raise ValueError where one of `splits` is none, or all of them have no problems."""
    there = [split for split, examples in run.problems.items() if examples]
    if unknown := [split for split in splits if split not in run.problems] or [*splits] * (not {*splits} & {*there}):
        raise ValueError(f"split {unknown[0]!r} has no problems; choose from {', '.join(there)}")


def policy_folder(policy: str) -> Path:
    """Return the folder that "RUN:STAGE", or the path of a folder, names; tables write a stage with an underscore."""
    run, colon, stage = policy.rpartition(":")
    return (Path(run) / stage.replace("_", "-") if colon else Path(policy)).absolute()


def slug(policy: str) -> str:
    """Return a policy's name in tables: its path with an underscore for each other character."""
    return re.sub(r"\W+", "_", ALIASES.get(policy, policy)).strip("_")


def check_names(policies: Sequence[str]) -> None:
    """Raise ValueError for two policies with one name in tables, where one row would take the place of the other."""
    named: dict[str, str] = {}
    for policy in policies:
        if (other := named.setdefault(slug(policy), policy)) != policy:
            what = f"policies {other!r} and {policy!r} would both be named {slug(policy)!r}"
            raise ValueError(f"{what}; evaluate one of them by itself, or give it by another path (a link will do)")


def check_apart(folder: Path, run: Path) -> None:
    """Raise ValueError where `folder`, which is to take episodes of any policies, is that of the run itself."""
    if folder.resolve() == run.resolve():
        raise ValueError(f"out {folder} is the run's own folder, whose record and report are not touched; name another")


def num_tokens(episodes: Sequence[Trajectory]) -> int:
    """Return the tokens, prompts included, that controller and generator took for `episodes`."""
    usage = [turn.action.usage for t in episodes for turn in t.turns]
    controller = sum(u.prompt_tokens + u.completion_tokens for u in usage)
    generator: int = sum(t.info.prompt_tokens + t.info.completion_tokens for t in episodes)
    return controller + generator


def evaluate_with(run: Run, generator: str) -> list[Condition]:
    """Return every condition with another generator in place of the run's own; see `with_generator` for its name."""
    config = with_generator(run.config, generator)
    with open_generator(config, run.folder, run.ranks, run.runner, run.cache) as other:
        run = replace(run, config=config, generator=other)
        return evaluate(run, schemes(run), f"transfer {generator}")


def schemes(run: Run, splits: Sequence[str] = HELD_OUT_SPLITS) -> Schemes:
    """Return the conditions of the report: name -> (title, scheme), from no guidance to the last round."""
    found = fixed_schemes(run.config, run.task, run.problems, splits)
    found["untrained"] = ("untrained controller", policy_scheme(run, ""))
    if is_trained(run, "warmup"):
        found["warmup"] = ("after warm-up (SFT)", policy_scheme(run, "warmup"))
    for round in trained_rounds(run):
        found[f"round_{round}"] = (f"after round {round}", policy_scheme(run, f"round-{round}"))
    if is_trained(run, "star"):
        found["star"] = ("STaR control (SFT on round 1's wins)", policy_scheme(run, "star"))
    return found


def fixed_schemes(
    config: RunConfig, task: Task, problems: Problems, splits: Sequence[str] = HELD_OUT_SPLITS
) -> Schemes:
    """Return the conditions that need no model of ours: no guidance, fixed guidance, the generator's own.

    splits: of the problems whose fixed guidance is known.
    """
    examples = [example for split in splits for example in problems[split]]
    one_plan = replace(rollout_settings(config, greedy=True), outer_turns=1)  # fixed guidance has no second plan
    found = {"no_guidance": ("no guidance", Scheme("no-guidance", _fixed(NoGuidance()), one_plan))}
    gold = [guidance for example in examples if (guidance := gold_text(task, example)) is not None]
    if len(gold) == len(examples):
        tables = [("gold_guidance", "gold guidance", gold)]
        if config.wrong and len(set(gold)) > 1:  # where all problems have one guidance, there is no wrong one
            other = wrong_guidance(gold, config.seed)
            tables = [("wrong_guidance", "wrong guidance (another problem's)", other), *tables]
        prompts = [task.first_prompt(example) for example in examples]
        for name, title, texts in tables:
            controller = ScriptedGuidance(f"{name}-{config.seed}", dict(zip(prompts, texts, strict=True)))
            found[name] = (title, Scheme(name, _fixed(controller), one_plan))
    if config.warmup.source == "generator" or task.compares_own_guidance:
        found["own_guidance"] = _own_guidance(config)
    known = {task.first_prompt(example): task.baselines(example) for example in examples}
    for place, baseline in enumerate(task.baselines(examples[0])):
        table = {prompt: baselines[place].guidance for prompt, baselines in known.items()}
        fixed = _fixed(ScriptedGuidance(f"{baseline.name}-{config.seed}", table))
        found[baseline.name] = (baseline.label, Scheme(baseline.name, fixed, one_plan))
    return found


def _own_guidance(config: RunConfig) -> tuple[str, Scheme]:
    one_plan = replace(rollout_settings(config, greedy=True), outer_turns=1)
    scheme = Scheme("own-guidance", lambda run, _: GeneratorGuidance(run.generator), one_plan)
    return "the generator's own guidance", scheme


def trained_rounds(run: Run) -> list[int]:
    """Return the rounds whose policies are trained."""
    return [round for round in range(1, run.config.rounds + 1) if is_trained(run, f"round-{round}")]


def wrong_guidance(gold: Sequence[str], seed: int) -> list[str]:
    """Return for each example the gold guidance of another one, drawn by `seed`."""
    draws = random.Random(stable_seed("wrong", seed))
    return [draws.choice([other for other in gold if other != own]) for own in gold]


def _fixed(controller: Controller) -> Callable[[Run, TokenSampler], Controller]:
    return lambda _run, _sampler: controller


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """The configuration of a pilot, whose policies are evaluated, or under whose settings other policies are."""

    policy: tuple[str, ...] = ()
    """Policies to evaluate in a folder of their own: none, gold, wrong, own or untrained; an adapter folder; a stage as
    RUN:STAGE; a model folder; URL#MODEL or a TOML file with the keys of [generator] for another model as controller. By
    default the run's own policies are evaluated, and its report is written."""
    only: tuple[str, ...] = ()
    """Conditions of the run to evaluate, by name; without a report, which needs all of them."""
    skip: tuple[str, ...] = ()
    """Conditions of the run to leave out, by name; without a report, which needs all of them."""
    split: tuple[str, ...] = HELD_OUT_SPLITS
    """Splits of problems, where --policy is given."""
    out: str = ""
    """Folder for the evaluation of --policy; default: runs/NAME-evaluation- and a hash of all settings."""
    generators: str = ""
    """Other generators to evaluate the run's policies with instead, separated by commas: names of models at
    [generator], or of scripted generators where [serve] names one, or TOML files with the keys of [generator]."""


def evaluate_policies(config: EvaluateConfig, root: Path, world: World) -> list[dict[str, Any]]:
    """Evaluate `config.policy` under the other settings of `config` and return a row for each policy.

    The evaluation's folder gets evaluation.json, the report and every episode. Raises ValueError for a policy that is
    none and for splits that the task does not have.
    """
    settings = run_part(config)
    folder = root / f"{settings.name}-evaluation-{content_key(to_json(settings))[:8]}"
    folder = Path(config.out) if config.out else folder
    check_apart(folder, root / settings.name)
    check_names(policies := tuple(dict.fromkeys(config.policy)))
    cache = cache_path(root / settings.name)
    models = {policy: place for policy in policies if (place := _model_of(policy, settings)) is not None}
    with ExitStack() as stack:
        named = replace(settings, name=folder.name)
        run = stack.enter_context(open_run(named, folder.parent, cache, world, trains=False))
        check_splits(run, config.split)
        others = policy_conditions(run, [policy for policy in policies if policy not in models], stack, config.split)
        conditions = evaluate(run, others, splits=config.split)
    # There is no adapter for a warm-up to take, and nothing is trained.
    warmup = replace(settings.warmup, source="none") if settings.warmup.source == "adapter" else settings.warmup
    for policy, place in models.items():  # each is opened alone, so that two of them need not fit the memory
        model = replace(settings.controller, path=str(place), adapter="")
        nested = replace(settings, name=slug(policy), controller=model, warmup=warmup)
        with open_run(nested, folder, cache, world, trains=False) as of_model:
            (found,) = evaluate(of_model, {"untrained": schemes(of_model)["untrained"]}, splits=config.split)
            conditions.append(replace(found, name=slug(policy), label=policy))
    order = [slug(policy) for policy in policies]
    conditions.sort(key=lambda condition: order.index(slug(condition.name)))
    report = plain_report(run, f"Evaluation {run.config.name}", conditions, config.split)
    rows = [
        {"policy": c.name, "label": c.label, "metrics": to_json(report.metrics[c.name])}
        | {"episodes": len(c.trajectories), "calls": c.calls, "tokens": c.tokens}
        for c in conditions
    ]
    if world.is_first:
        write_json(run.folder / "evaluation.json", {"settings": to_json(settings), "policies": rows})
        first, *rest = report.metrics
        write_report(replace(report, comparisons=[(first, other) for other in rest]), run.folder)
    return rows


def _model_of(policy: str, settings: RunConfig) -> Path | None:
    """Return the model folder that `policy` names: itself or, for a run of adapters, the stage of a run that trained
    all weights."""
    folder = policy_folder(policy)
    places = (folder, folder / "model") if settings.controller.tune == "adapter" else (folder,)
    return next((place for place in places if (place / "config.json").is_file()), None)


def plain_report(run: Run, title: str, conditions: Sequence[Condition], splits: Sequence[str]) -> ReportInput:
    """Return what every report of an open run has: its conditions over `splits`, their metrics, and where they ran."""
    machine = environment()
    if run.is_read and (run.folder / ENVIRONMENT).is_file():  # the machine that the run was started on
        machine = json.loads((run.folder / ENVIRONMENT).read_text())
    return ReportInput(
        title=title,
        command=typed_command(),
        config=to_json(run.config),
        hardware=hardware(machine) | run.task.facts(),
        versions=versions(machine),
        conditions=conditions,
        examples=[example for split in splits for example in run.problems[split]],
        metrics={condition.name: run.task.score(condition.trajectories) for condition in conditions},
        counts={"left_out": left_out(run)},
    )
