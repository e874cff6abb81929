"""tasks/lamp/splits.py: LaMP's splits from the seed and from files keep users apart; wrong settings are refused."""

import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from matryoshka.core.config import load_toml, to_toml
from matryoshka.core.protocols import TaskSetting
from matryoshka.core.records import Example, Messages
from matryoshka.inference.generators import GeneratorConfig
from matryoshka.pilot.config import SPLITS, ControllerConfig, RolloutConfig, RunConfig, TaskConfig
from matryoshka.pilot.context import load_problems, open_task
from matryoshka.tasks.lamp import retrieval
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.options import LampOptions
from matryoshka.tasks.lamp.splits import with_other
from matryoshka.tasks.lamp.synthetic_users import fixtures
from matryoshka.tasks.lamp.task import LampTask
from matryoshka.tasks.lamp.task_specs import KINDS
from matryoshka.tests.tasks.lamp.lamp_files import write_items

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("MATRYOSHKA_DATA", ROOT.parent / "shared" / "data")) / "lamp"
SIZES = {"warmup": 2, "train": 3, "validation": 1, "test": 2}
TASK = TaskConfig("lamp", warmup=2, train=3, validation=1, test=2, options=LampOptions(task="2M"))
CONFIG = RunConfig("n", ControllerConfig("m"), GeneratorConfig("http://x/v1", "m"), task=TASK)


def letters(prompt: Messages) -> int:
    return sum(len(message.content) for message in prompt)


def config(test: int = 2, seed: int = 0, **options: Any) -> RunConfig:
    task = replace(TASK, test=test, options=LampOptions(**{"task": "2M", **options}))
    return replace(CONFIG, seed=seed, task=task)


def load_splits(config: RunConfig) -> Mapping[str, Sequence[Example]]:
    return load_problems(open_task(config, letters))


def written(folder: Path, items: list[Item], split: str = "train") -> str:
    write_items(items, KINDS["2M"], folder, split)
    return str(folder / f"{split}_questions.json")


def user(id: str, theme: str) -> Item:
    profile = [{"description": f"{theme} {i}", "tag": "action"} for i in range(2)]
    return Item(id, KINDS["2M"].ask("x"), profile, "action")


@pytest.mark.parametrize("name", KINDS)
def test_made_up_users_come_in_the_sizes_asked_for_with_gold(name: str) -> None:
    """Oracle: the numbers of the configuration; another seed is other users."""
    made = load_splits(config(task=name))
    assert {split: len(rows) for split, rows in made.items()} == {**SIZES, "held_out": 0}
    task = open_task(config(task=name), letters)
    assert all(task.gold_guidance(example) for rows in made.values() for example in rows)
    other = load_splits(config(task=name, seed=1))
    assert other["test"] != made["test"]


def test_two_files_are_cut_in_order(tmp_path: Path) -> None:
    """Oracle: by hand; ids that stand in both files are refused, real users have no gold guidance. A test file without
    a training file is enough where nothing is trained, and is never left aside.
    """
    train = written(tmp_path, [user(f"a{i}", f"t{i}") for i in range(8)])
    test = written(tmp_path, [user(f"b{i}", f"u{i}") for i in range(3)], "dev")
    splits = load_splits(config(train_file=train, test_file=test))
    ids = {split: [example.id for example in rows] for split, rows in splits.items()}
    expected = {"warmup": ["a0", "a1"], "train": ["a2", "a3", "a4"], "validation": ["a5"]}
    assert ids == {**expected, "test": ["b0", "b1"], "held_out": []}
    assert open_task(CONFIG, letters).gold_guidance(splits["train"][0]) is None
    with pytest.raises(ValueError, match="id 'a0' stands in both train_file and test_file \\(2 such ids\\)"):
        load_splits(config(train_file=train, test_file=train))
    with pytest.raises(ValueError, match="takes 6 problems for warm-up, .* but .* train_file is empty; give the path"):
        load_splits(config(test_file=test))
    setting = TaskSetting({**dict.fromkeys(SPLITS, 0), "test": 3})  # as `matryoshka score` asks for them
    alone = LampTask(LampOptions("2M", test_file=test), setting).examples("test")
    assert [example.id for example in alone] == ["b0", "b1", "b2"]
    with pytest.raises(ValueError, match=r"held_out 2: LaMP has no held-out problems; expected 0"):
        load_problems(open_task(replace(CONFIG, task=replace(TASK, held_out=2)), letters))


def test_one_file_is_cut_by_users(tmp_path: Path) -> None:
    """Oracle: by hand: test first; a user that shares an entry with an earlier one joins its split or none."""
    themes = ["t0", "t0", "t0", "t1", "t1", "t2", "t3", "t4", "t1", "t5", "t6"]
    items = [user(f"a{i}", theme) for i, theme in enumerate(themes)]
    splits = load_splits(config(train_file=written(tmp_path, items)))
    ids = {split: [example.id for example in rows] for split, rows in splits.items()}
    expected = {"test": ["a0", "a1"], "warmup": ["a3", "a4"], "train": ["a5", "a6", "a7"], "validation": ["a9"]}
    assert ids == {**expected, "held_out": []}
    with pytest.raises(ValueError, match="gives 2 problems for train but the configuration takes 3; no two"):
        load_splits(config(train_file=written(tmp_path, items[:9])))


def test_users_with_many_rows_each_are_dealt_side_by_side(tmp_path: Path) -> None:
    """Oracle: by hand: in order, u and v would go to warm-up and training, w too, and validation would get nobody."""
    items = [user(f"{theme}{i}", theme) for i in range(3) for theme in "uvw"]
    test = written(tmp_path, [user(f"b{i}", f"x{i}") for i in range(3)], "dev")
    splits = load_splits(config(train_file=written(tmp_path, items), test_file=test))
    ids = {split: [example.id for example in splits[split]] for split in ("warmup", "train", "validation")}
    assert ids == {"warmup": ["u0", "u1"], "train": ["v0", "v1", "v2"], "validation": ["w0"]}


def test_users_are_joined_by_what_goes_nowhere(tmp_path: Path) -> None:
    """Oracle: by hand: b shares an entry with a, of a full split, and c one with b: one user, and not in two splits. d
    shares one with a and one with e, of two splits: it goes nowhere, nor does f, whom d alone joins.
    """
    histories = {"x": "x", "a": "ab", "b": "bc", "c": "cC", "e": "eE", "d": "aeD", "f": "Df", **{n: n for n in "ghijk"}}
    items = [
        Item(id, KINDS["2M"].ask("x"), [{"description": entry, "tag": "action"} for entry in entries], "action")
        for id, entries in histories.items()
    ]
    splits = load_splits(config(train_file=written(tmp_path, items)))
    ids = {split: [example.id for example in rows] for split, rows in splits.items()}
    expected = {"test": ["x", "a"], "warmup": ["e", "g"], "train": ["h", "i", "j"], "validation": ["k"]}
    assert ids == {**expected, "held_out": []}


def test_the_control_of_real_users_is_another_user_s_history(tmp_path: Path) -> None:
    """Oracle: by hand: the next user's entries, past a question of the same user; none where all are one user's."""
    items = [user("a0", "t0"), user("a1", "t0"), user("a2", "t1"), *(user(f"b{i}", f"u{i}") for i in range(6))]
    test = load_splits(config(test=3, train_file=written(tmp_path, items)))["test"]
    others = {example.id: example.fields["baselines"]["other_4"] for example in test}
    first, other = "t0 0 => action\nt0 1 => action", "t1 0 => action\nt1 1 => action"
    assert others == {"a0": other, "a1": other, "a2": first}
    assert all(example.fields["baselines"].keys() == {"rag_1", "rag_4", "other_4"} for example in test)
    alone = [replace(e, fields={**e.fields, "baselines": {"rag_4": ""}}) for e in test[:2]]
    assert with_other(alone) == alone


def test_what_lies_behind_the_number_asked_for_is_not_read(tmp_path: Path) -> None:
    """Oracle: a file that is broken after the last problem needed is read without complaint."""
    path = Path(written(tmp_path, [user(f"a{i}", f"t{i}") for i in range(9)]))
    text = path.read_text()
    path.write_text(text[: text.index('"a8"') + 1])
    assert len(load_splits(config(train_file=str(path)))["validation"]) == 1


def test_a_loop_that_lamp_does_not_have_is_refused() -> None:
    """Oracle: the message says what came."""
    for rollout in (RolloutConfig(inner_attempts=2), RolloutConfig(outer_turns=2), RolloutConfig(protocol="oracle")):
        with pytest.raises(ValueError, match="LaMP has one turn and one answer"):
            open_task(replace(CONFIG, rollout=rollout), letters)
    with pytest.raises(ValueError, match="LaMP's scripted generators are"):
        LampTask.scripted_generator("literal")


class Embeddings(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    odd: ClassVar[Any] = None  # what is sent in place of the vectors

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        """Embed each of 256 texts at most as how often it says "ghost", and 1; in reversed order, as a server may."""
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        assert len(texts) <= 256
        self.asked.extend(texts)
        key = self.headers["Authorization"].removeprefix("Bearer ")
        rows = [{"object": "embedding", "index": i, "embedding": [t.count("ghost"), 1]} for i, t in enumerate(texts)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        found = {"object": "list", "data": rows[::-1], "model": "m", "usage": usage} if self.odd is None else self.odd
        refused = {"error": {"message": f"the key {key} is wrong"}}
        body = json.dumps(refused if key.startswith("sk-") else found).encode()
        self.send_response(401 if key.startswith("sk-") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def embeddings() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Embeddings)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_dense_retrieval_asks_an_endpoint(embeddings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: cosines by hand, over HTTP: the question speaks of a ghost, so do two of 302 entries, the last one most.
    """
    texts = ("a farm", "a ghost", *(f"farm {i}" for i in range(299)), "a ghost and a ghost")
    entries = [{"description": text, "tag": "classic"} for text in texts]
    items = [Item("a0", KINDS["2M"].ask("ghost, ghost"), entries, "action")]
    items += [user(f"b{i}", f"t{i}") for i in range(9)]
    cache = tmp_path / "kept" / "embeddings.sqlite"
    dense = {"retrieval": "dense", "embeddings_url": embeddings, "embeddings_model": "m"}
    keyed: dict[str, Any] = {**dense, "embeddings_cache": str(cache), "train_file": written(tmp_path, items)}
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY holds no key for the embeddings"):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        load_splits(config(**keyed))
    keyless = config(**keyed, embeddings_key_env="")
    found = load_splits(keyless)["test"][0].fields["entries"]
    assert [body for body, _ in found][:3] == ["a ghost and a ghost", "a ghost", "a farm"]
    asked = len(Embeddings.asked)
    assert load_splits(keyless)["test"][0].fields["entries"] == found
    assert len(Embeddings.asked) == asked == len(set(Embeddings.asked)) >= 302
    cache.unlink()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-4f9a7c21")
    with pytest.raises(ValueError, match="failed: .*the key \\[key\\] is wrong") as refused:
        load_splits(config(**keyed))
    assert "sk-planted" not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(ValueError, match="retrieval 'dense' needs embeddings_url and embeddings_model"):
        load_splits(config(retrieval="dense", train_file=keyed["train_file"]))


@pytest.mark.parametrize(
    "odd",
    [
        {}, {"data": None}, {"error": {"message": "busy"}}, "no JSON", [],
        {"data": [{"index": 0, "embedding": [1.0]}]}, {"data": [{"index": 0, "embedding": "AAAA"}] * 3},
        {"data": [{"index": i, "embedding": [1.0] * (i + 1)} for i in range(3)]},
        {"data": [{"index": i, "embedding": [1.0, None]} for i in range(3)]}, {"data": [{"embedding": [1.0]}] * 3},
        {"data": [{"index": i, "embedding": 1.0} for i in range(3)]}, {"data": [7, 8, 9]},
    ],
    ids=str,
)  # fmt: skip
def test_a_200_without_vectors_is_an_error_and_nothing_is_kept(
    odd: Any, embeddings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: three texts need three vectors of finite numbers of one length; the next, sound answer is taken."""
    monkeypatch.setattr(Embeddings, "odd", odd)
    endpoint: dict[str, Any] = {"embeddings_url": embeddings, "embeddings_model": "m", "embeddings_key_env": ""}
    embed = retrieval.Embeddings(LampOptions(**endpoint, embeddings_cache=str(tmp_path / "e.sqlite")))
    with pytest.raises(ValueError, match="the embeddings of http://.* failed: "):
        embed(["a", "b", "ghost"])
    monkeypatch.setattr(Embeddings, "odd", None)
    assert embed(["a", "b", "ghost"]) == [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("name", KINDS)
def test_the_shipped_configurations(name: str) -> None:
    """Oracle: they load, round-trip, and differ in the task alone."""
    shipped = load_toml(RunConfig, ROOT / "configs" / f"lamp_{name.lower()}_tiny.toml")
    assert isinstance(shipped.task.options, LampOptions)
    assert (shipped.task.name, shipped.task.options.task, shipped.serve.scripted) == ("lamp", name, "careful")
    assert shipped.dpo.pairs_per_example == 2
    load_splits(shipped)
    assert 'task = "' + name in to_toml(shipped)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("1", "LaMP_1/train236_top10profile"),
        ("2N", "LaMP_2-news/train235_top4percat_profile"),
        ("4", "LaMP_4-derived/loo"),
    ],
)
def test_real_rows_go_through(name: str, file: str) -> None:
    """Oracle: sizes as shipped; no entry of a test user's history stands in a training user's; all have a control."""
    path = DATA / f"{file}_questions.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set MATRYOSHKA_DATA)")
    shipped = ROOT / "configs" / f"lamp_{name.lower()}_rows.toml"
    splits = load_splits(load_toml(RunConfig, shipped, {"task.options.train_file": str(path)}))
    seen = {split: {tuple(e) for row in rows for e in row.fields["entries"]} for split, rows in splits.items()}
    assert len(splits["train"]) == 40 and not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    assert all("other_4" in example.fields["baselines"] for example in splits["test"])


def test_fixture_files_give_the_same_problems_as_the_seed(tmp_path: Path) -> None:
    """Oracle: the same users through the files: all fields but the summary, and the control that files have for it."""
    made = load_splits(CONFIG)["test"]
    items = [fixture.item for fixture in fixtures(KINDS["2M"], "test", 2, 0)]
    train = [fixture.item for fixture in fixtures(KINDS["2M"], "train", 6, 0)]
    files: dict[str, Any] = {"test_file": written(tmp_path, items, "dev"), "train_file": written(tmp_path, train)}
    read = load_splits(config(**files))["test"]
    bare = [{key: value for key, value in row.fields.items() if key != "summary"} for row in made]
    for row in read:
        assert row.fields["baselines"].pop("other_4")
    assert [row.fields for row in read] == bare and [row.id for row in read] == [row.id for row in made]
