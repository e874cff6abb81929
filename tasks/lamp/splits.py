"""LaMP's problems by split, made from the seed or read from LaMP's own files, users kept apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka.core.records import Example
from matryoshka.tasks.lamp.data import Item, read_items
from matryoshka.tasks.lamp.options import LampOptions
from matryoshka.tasks.lamp.prompt_style import joined, line
from matryoshka.tasks.lamp.retrieval import Embeddings, Retriever, bm25, dense, recency
from matryoshka.tasks.lamp.synthetic_users import fixtures
from matryoshka.tasks.lamp.task_specs import Kind, kind_of

FROM_TRAINING = ("warmup", "train", "validation")
RAG = (1, 4)  # entries that the retrieval baselines show the generator


def load_splits(options: LampOptions, sizes: Mapping[str, int], seed: int) -> dict[str, Sequence[Example]]:
    """Return the problems: warmup, train, validation, test; held_out is empty.

    Without files they are made from the seed. Of LaMP's files, `test` is read from test_file and the others from
    train_file; without test_file all are cut from train_file, so that no user is in two.
    Raises ValueError, FileNotFoundError for files that are missing, malformed or too short, and for held-out problems.
    """
    if sizes.get("held_out"):
        raise ValueError(f"[task] held_out {sizes['held_out']}: LaMP has no held-out problems; expected 0")
    kind, retriever = kind_of(options.task), _retriever(options)

    def example(item: Item) -> Example:
        return make_example(kind, item, retriever, options.entries, options.entry_characters)

    if not options.train_file and not options.test_file:
        return _made(kind, sizes, seed, example)
    found = _read(kind, options, sizes, example)
    return {**found, "test": with_other(found["test"]), "held_out": []}


def make_example(kind: Kind, item: Item, retriever: Retriever, limit: int = 0, entry_characters: int = 2000) -> Example:
    """Return the example of `item`, its history ranked for the question and cut to `limit` entries.

    limit 0 is the published one. An entry's text is cut to entry_characters. fields: question; answer; entries: lines,
    best first; profile: number of entries that there were; cut: entries kept that were cut; baselines: name ->
    guidance.
    """
    documents = [" ".join(entry[name] for name in kind.texts) for entry in item.profile]
    dates = [entry.get("date", "") for entry in item.profile]
    ranking = retriever(kind.query(item.question), documents, dates)[: limit or kind.limit]
    shown = [line(kind, item.profile[index], entry_characters) for index in ranking]
    entries = [entry for entry, _ in shown]
    fields = {
        "question": item.question,
        "answer": item.gold,
        "entries": entries,
        "profile": len(item.profile),
        "cut": sum(cut for _, cut in shown),
        "baselines": {f"rag_{k}": joined(entries[:k]) for k in RAG},
    }
    return Example(item.id, fields)


def with_other(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with one baseline more, the control that real users have: RAG from another user's history.

    "other_4" holds the best entries of the next example whose history shares none with it. If some example has no such
    other one, because all are one user's, then no example gets the baseline.
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


def _made(
    kind: Kind, sizes: Mapping[str, int], seed: int, example: Callable[[Item], Example]
) -> dict[str, Sequence[Example]]:
    def make(split: str, n: int) -> list[Example]:
        rows = []
        for fixture in fixtures(kind, split, n, seed):
            row = example(fixture.item)
            rows.append(replace(row, fields={**row.fields, "summary": fixture.summary(row.fields["entries"])}))
        return rows

    both = make("train", sizes["warmup"] + sizes["train"])
    return {
        "warmup": both[: sizes["warmup"]],
        "train": both[sizes["warmup"] :],
        "validation": make("validation", sizes["validation"]),
        "test": make("test", sizes["test"]),
        "held_out": [],
    }


def _read(
    kind: Kind, options: LampOptions, sizes: Mapping[str, int], example: Callable[[Item], Example]
) -> dict[str, Sequence[Example]]:
    counts = {split: sizes[split] for split in ("test", *FROM_TRAINING)}
    if not options.test_file:
        return _cut(Path(options.train_file), kind, counts, example)
    found = _cut(Path(options.test_file), kind, {"test": counts.pop("test")}, example)
    if options.train_file:
        found |= _cut(Path(options.train_file), kind, counts, example)
    elif any(counts.values()):
        raise ValueError(
            f"[task] takes {sum(counts.values())} problems for warm-up, training and validation, but [task.options] "
            "train_file is empty; give the path of LaMP's training questions, or leave test_file empty, too"
        )
    else:
        found |= {split: [] for split in counts}
    test = {example.id for example in found["test"]}
    if shared := test & {example.id for split in FROM_TRAINING for example in found[split]}:
        raise ValueError(
            f"[task.options] id {min(shared)!r} stands in both train_file and test_file ({len(shared)} such ids); "
            "training would see test: take LaMP's own train and dev files, or leave test_file empty"
        )
    return found


def _cut(
    path: Path, kind: Kind, counts: dict[str, int], example: Callable[[Item], Example]
) -> dict[str, Sequence[Example]]:
    """Return problems of `path` in the numbers asked for, no user in two splits; reading ends when all are full.

    Problems belong to one user if their histories share an entry, directly or through other problems. A user's problems
    all go to the split of the first one; they are left out where that split is full already, or where they join users
    of two splits. At first the splits are filled one after the other. If the users of the first splits then own so much
    of the file that a later split stays short, all are filled side by side: each new user goes to the split that has
    the smallest share of its problems.
    """
    for side_by_side in (False, True):
        splits = _filled(read_items(path, kind), kind, counts, example, side_by_side)
        short = [split for split, count in counts.items() if len(splits[split]) < count]
        if not short:
            return dict(splits)
    raise ValueError(
        f"[task] {path} gives {len(splits[short[0]])} problems for {short[0]} but the configuration takes "
        f"{counts[short[0]]}; no two splits may share a user. Lower [task] {short[0]}"
    )


def _filled(
    items: Iterator[Item], kind: Kind, counts: dict[str, int], example: Callable[[Item], Example], side_by_side: bool
) -> dict[str, list[Example]]:
    """Return the splits as far as `items` fill them; see `_cut`."""
    splits: dict[str, list[Example]] = {split: [] for split in counts}
    owner: dict[int, str] = {}  # hash of an entry -> the split of its user, "" where that would be two
    while wanting := [split for split, count in counts.items() if len(splits[split]) < count]:
        item = next(items, None)
        if item is None:
            break
        entries = {hash(tuple(entry[name] for name in kind.fields)) for entry in item.profile}
        first = min(wanting, key=lambda split: len(splits[split]) / counts[split]) if side_by_side else wanting[0]
        owners = {owner[entry] for entry in entries if entry in owner} or {first}
        split = owners.pop() if len(owners) == 1 else ""
        owner.update(dict.fromkeys(entries - owner.keys(), split))
        if split in wanting:
            splits[split].append(example(item))
    return splits


def _retriever(options: LampOptions) -> Retriever:
    if options.retrieval != "dense":
        return {"bm25": bm25, "recency": recency}[options.retrieval]
    return dense(Embeddings(options))
