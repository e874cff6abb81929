"""LaMP's problems by split, made from the seed or read from LaMP's own files, and the task over them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka.core.protocols import Generator
from matryoshka.core.records import Example, Messages
from matryoshka.pilot.config import LampConfig, RunConfig, TaskConfig
from matryoshka.pilot.embeddings import Embeddings
from matryoshka.tasks.lamp.data import Item, read_items
from matryoshka.tasks.lamp.retrieval import Retriever, bm25, dense, recency
from matryoshka.tasks.lamp.scripted_generator import ScriptedReader
from matryoshka.tasks.lamp.synthetic_users import fixtures
from matryoshka.tasks.lamp.task import LampTask, Options, make_example
from matryoshka.tasks.lamp.task_specs import Kind, kind_of

FROM_TRAINING = ("warmup", "train", "validation")


def load_splits(config: RunConfig) -> dict[str, Sequence[Example]]:
    """Return the problems: warmup, train, validation, test; held_out is empty.

    Without [task] train_file they are made from the seed. With it they are read from LaMP's files: test_file's for
    `test`, the others cut from train_file; without test_file all are cut from train_file, so that no user is in two.
    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short.
    """
    task, kind = config.task, kind_of(config.task.lamp.task)
    retriever = _retriever(task.lamp)

    def example(item: Item) -> Example:
        return make_example(kind, item, retriever, task.lamp.entries, task.lamp.entry_characters)

    if not task.train_file:
        return _made(kind, task, config.seed, example)
    found = _read(kind, task, example)
    return {**found, "test": with_other(found["test"]), "held_out": []}


def make_task(
    config: RunConfig, splits: Mapping[str, Sequence[Example]], count_tokens: Callable[[Messages], int]
) -> LampTask:
    """Return the task over the problems of `splits`. Raises ValueError for a loop that LaMP does not have."""
    rollout, lamp = config.rollout, config.task.lamp
    if (rollout.inner_attempts, rollout.outer_turns, rollout.protocol) != (1, 1, "label_free"):
        raise ValueError(
            "[rollout] LaMP has one turn and one answer; expected inner_attempts 1, outer_turns 1 and protocol "
            f"'label_free', got {rollout.inner_attempts}, {rollout.outer_turns} and {rollout.protocol!r}"
        )
    options = Options(lamp.prompt_tokens, lamp.show_question, lamp.retrieved)
    cap = config.dpo.pairs_per_example
    return LampTask(kind_of(lamp.task), splits, count_tokens, options, cap, with_meteor=lamp.meteor)


def with_other(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with one baseline more, the control that real users have: RAG from another user's history.

    "other_4": the best entries of the next example whose history shares none with it. Without such a one for each
    example (all are one user's) no example gets the baseline.
    """
    histories = [{tuple(entry) for entry in example.fields["entries"]} for example in examples]
    found = []
    for i, example in enumerate(examples):
        after = [(i + step) % len(examples) for step in range(1, len(examples))]
        other = next((j for j in after if not histories[i] & histories[j]), None)
        if other is None:
            return list(examples)
        baselines = {**example.fields["baselines"], "other_4": examples[other].fields["baselines"]["rag_4"]}
        found.append(replace(example, fields={**example.fields, "baselines": baselines}))
    return found


def scripted_generator(name: str) -> Generator:
    """Return the scripted reader `name`."""
    return ScriptedReader(name)


def _made(
    kind: Kind, task: TaskConfig, seed: int, example: Callable[[Item], Example]
) -> dict[str, Sequence[Example]]:
    def make(split: str, n: int) -> list[Example]:
        rows = []
        for fixture in fixtures(kind, split, n, seed):
            row = example(fixture.item)
            rows.append(replace(row, fields={**row.fields, "summary": fixture.summary(row.fields["entries"])}))
        return rows

    both = make("train", task.warmup + task.train)
    return {
        "warmup": both[: task.warmup],
        "train": both[task.warmup :],
        "validation": make("validation", task.validation),
        "test": make("test", task.test),
        "held_out": [],
    }


def _read(kind: Kind, task: TaskConfig, example: Callable[[Item], Example]) -> dict[str, Sequence[Example]]:
    counts = {split: getattr(task, split) for split in ("test", *FROM_TRAINING)}
    if not task.test_file:
        return _cut(Path(task.train_file), kind, counts, example)
    found = _cut(Path(task.test_file), kind, {"test": counts.pop("test")}, example)
    found |= _cut(Path(task.train_file), kind, counts, example)
    test = {example.id for example in found["test"]}
    if shared := test & {example.id for split in FROM_TRAINING for example in found[split]}:
        raise ValueError(
            f"[task] id {min(shared)!r} stands in both train_file and test_file ({len(shared)} such ids); training "
            "would see test: take LaMP's own train and dev files, or leave test_file empty"
        )
    return found


def _cut(
    path: Path, kind: Kind, counts: dict[str, int], example: Callable[[Item], Example]
) -> dict[str, Sequence[Example]]:
    """Return the first problems of `path` in the numbers asked for, split after split; the rest is not read.

    Problems whose histories share an entry, or are joined by others that do, are one user's: all go to the split of the
    first, and what of them is too much for it, or joins two splits, goes nowhere.
    """
    splits: dict[str, list[Example]] = {split: [] for split in counts}
    owner: dict[int, str] = {}  # hash of an entry -> the split of its user, "" where that would be two
    items = read_items(path, kind)
    while wanting := [split for split, count in counts.items() if len(splits[split]) < count]:
        item = next(items, None)
        if item is None:
            break
        entries = {hash(tuple(entry[name] for name in kind.fields)) for entry in item.profile}
        owners = {owner[entry] for entry in entries if entry in owner} or {wanting[0]}
        split = owners.pop() if len(owners) == 1 else ""
        owner.update(dict.fromkeys(entries - owner.keys(), split))
        if split in wanting:
            splits[split].append(example(item))
    for split, count in counts.items():
        if len(splits[split]) < count:
            raise ValueError(
                f"[task] {path} gives {len(splits[split])} problems for {split} but the configuration takes {count}; "
                "no two splits may share a user"
            )
    return dict(splits)


def _retriever(lamp: LampConfig) -> Retriever:
    if lamp.retrieval != "dense":
        return {"bm25": bm25, "recency": recency}[lamp.retrieval]
    return dense(Embeddings(lamp))
