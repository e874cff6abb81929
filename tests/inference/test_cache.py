"""The response cache holds its promise: an answer that `put` has taken is there, whatever happens to the process."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.core.database import open_database, use_wal
from matryoshka.core.records import Message, Sample, Sampling, Usage
from matryoshka.inference.accounts import Spending
from matryoshka.inference.cache import SCHEMA, CacheTotals, ResponseCache, answer_key

PROMPT = (Message("system", "be brief"), Message("user", "2 + 2 = \u2753"))
SAMPLE = Sample('4 "\u00e9"\n', "length", usage=Usage(11, 3))


def child(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom matryoshka.core.records import Sample\n"
    head += "from matryoshka.inference.cache import ResponseCache\n"
    return subprocess.Popen([sys.executable, "-c", head + code, *arguments])


def test_what_was_put_is_got_after_reopening(tmp_path: Path) -> None:
    """Oracle: the record itself, every field, text with quotes, newline and non-ASCII included."""
    cache = ResponseCache(tmp_path / "deep" / "cache.sqlite")
    assert cache.get("k") is None
    cache.put("k", SAMPLE, "m@url")
    white_box = Sample("a", token_ids=(1, 2), logprobs=(-0.1, -2e-17), mask=(1, 0))
    cache.put("w", white_box)
    assert cache.get("k") == SAMPLE
    cache.close()
    again = ResponseCache(tmp_path / "deep" / "cache.sqlite")
    assert again.get("k") == SAMPLE
    assert again.get("w") == white_box
    assert again.totals() == {"": CacheTotals(1, 0, 0), "m@url": CacheTotals(1, 11, 3)}


def test_the_first_answer_stays(tmp_path: Path) -> None:
    """Oracle: an answer that trajectories already rest on must not change under them."""
    cache = ResponseCache(tmp_path / "c")
    cache.put("k", SAMPLE)
    cache.put("k", Sample("other"))
    assert cache.get("k") == SAMPLE


def test_key_separates_what_makes_another_answer() -> None:
    """Oracle: every component changed alone gives another key; equal content, written 0 or 0.0, gives the same."""
    base = Sampling(temperature=1.0, top_p=1.0, max_tokens=8, stop=("\n",), seed=1, draw=0)
    key = answer_key("http://a/v1", "m", PROMPT, base)
    others = [
        answer_key("http://b/v1", "m", PROMPT, base),
        answer_key("http://a/v1", "n", PROMPT, base),
        answer_key("http://a/v1", "m", PROMPT[:1], base),
        answer_key("http://a/v1", "m", PROMPT[::-1], base),
        *(
            answer_key("http://a/v1", "m", PROMPT, replace(base, **change))
            for change in (
                {"temperature": 0.5},
                {"top_p": 0.9},
                {"max_tokens": 9},
                {"stop": ()},
                {"seed": 2},
                {"draw": 1},
            )
        ),
    ]
    assert len({key, *others}) == 11
    assert key == answer_key("http://a/v1/", "m", PROMPT, replace(base, temperature=1))


def test_an_answer_survives_kill_9(tmp_path: Path) -> None:
    """Oracle: a process that kills itself with SIGKILL right after `put`, with no close, leaves its answer."""
    path = tmp_path / "c"
    code = "c = ResponseCache(Path(sys.argv[1]))\nc.put('k', Sample('paid'))\nos.kill(os.getpid(), signal.SIGKILL)"
    process = child(code, str(path))
    assert process.wait(120) == -signal.SIGKILL
    assert ResponseCache(path).get("k") == Sample("paid")


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Oracle: count. Two processes open the same new file and write 100 answers each, 50 of them under shared keys."""
    path = tmp_path / "c"
    code = (
        "name = sys.argv[2]\nc = ResponseCache(Path(sys.argv[1]))\n"
        "for i in range(50): c.put(f'{name}-{i}', Sample(name)); c.put(f'both-{i}', Sample(name))"
    )
    processes = [child(code, str(path), name) for name in "ab"]
    assert [process.wait(120) for process in processes] == [0, 0]
    cache = ResponseCache(path)
    assert cache.totals()[""].answers == 150
    assert all(cache.get(f"{name}-{i}") == Sample(name) for name in "ab" for i in range(50))


def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    """Oracle: a put made while another connection holds the write lock for 0.2 s succeeds."""
    cache = ResponseCache(tmp_path / "c")
    other = sqlite3.connect(tmp_path / "c", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    timer.start()
    cache.put("k", SAMPLE)
    timer.join()
    assert cache.get("k") == SAMPLE


def test_the_switch_to_wal_waits_for_a_writer(tmp_path: Path) -> None:
    """Oracle: two processes open a new file; one switches while the other holds the write lock for 0.2 s."""
    mine = open_database(tmp_path / "c", SCHEMA)
    other = sqlite3.connect(tmp_path / "c", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    timer.start()
    assert use_wal(mine) and use_wal(other)
    timer.join()


def foreign_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE notes (text)")
    db.close()


def later_version(path: Path) -> None:
    ResponseCache(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b'{"not": "a database"}' * 100), "not a readable response cache"),
        (foreign_sqlite, "another program"),
        (later_version, "version 99"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, make: object, message: str) -> None:
    """Oracle: the error names the path, and the file's bytes are unchanged."""
    path = tmp_path / "c"
    make(path)  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        ResponseCache(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_damage_inside_the_file_is_an_error(tmp_path: Path) -> None:
    """Oracle: overwriting every page but the first with noise makes `get` raise with the path; nothing is deleted."""
    path = tmp_path / "c"
    cache = ResponseCache(path)
    for i in range(200):
        cache.put(str(i), SAMPLE)
    cache.close()
    data = path.read_bytes()
    damaged = data[:4096] + b"\xa5" * (len(data) - 4096)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="not a readable response cache") as caught:
        ResponseCache(path).get("7")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == damaged


def test_a_damaged_row_is_an_error(tmp_path: Path) -> None:
    """Oracle: a row whose JSON is no Sample raises with file and key; it is not taken for a miss and paid for again."""
    path = tmp_path / "c"
    cache = ResponseCache(path)
    cache.put("k", SAMPLE)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE answers SET sample = ?", (json.dumps({"nothing": 1}),))
    db.close()
    with pytest.raises(ValueError, match="answer under key k is damaged"):
        cache.get("k")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """Oracle: SQLite's own refusal to open a folder comes with its path."""
    with pytest.raises(ValueError, match="cannot use the response cache") as caught:
        ResponseCache(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_cache_of_version_1_is_taken_over(tmp_path: Path) -> None:
    """Oracle: the tables of version 1 written by hand; answers stay, and their cost is known."""
    path = tmp_path / "c"
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, generator TEXT NOT NULL, sample TEXT NOT NULL,"
            " created REAL NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
        )
        for key in "ab":
            db.execute("INSERT INTO answers VALUES (?, 'm@u', ?, 1.0, 11, 3)", (key, json.dumps({"text": key})))
        db.execute(f"PRAGMA application_id = {0x4D54524B}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    for _ in range(2):
        cache = ResponseCache(path)
        assert cache.get("b") == Sample("b") and cache.claim("k", "m@u")
        cache.release("k")
        assert cache.spending("m@u") == Spending(2, Usage(22, 6))
        cache.close()


def test_a_cache_of_version_2_is_taken_over(tmp_path: Path) -> None:
    """Oracle: version 2 is today's file without the table of prices; answers and accounts stay."""
    path = tmp_path / "c"
    cache = ResponseCache(path)
    cache.put("k", SAMPLE, "g")
    cache.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE prices")
        db.execute("PRAGMA user_version = 2")
    db.close()
    cache = ResponseCache(path)
    cache.set_price("g", 1.0, 2.0)
    assert cache.get("k") == SAMPLE and cache.spending("g").answers == 1 and cache.prices() == {"g": (1.0, 2.0)}


def test_another_machines_cache_is_taken_in_and_copied(tmp_path: Path) -> None:
    """Oracle: by hand: answers once, spending added up, calls in flight there are lost; the copy has spent nothing."""
    ours, theirs = ResponseCache(tmp_path / "a"), ResponseCache(tmp_path / "b")
    ours.put("both", SAMPLE, "g")
    theirs.put("both", replace(SAMPLE, text="another"), "g")
    theirs.put("new", SAMPLE, "h")
    theirs.set_price("h", 1.0, 2.0)
    assert theirs.claim("asked", "h") and theirs.hold("asked", "h", Usage(5, 7), lambda usages: True) is None
    theirs.close()
    ours.take_in(tmp_path / "b")
    assert ours.get("both") == SAMPLE and ours.get("new") == SAMPLE and ours.prices() == {"h": (1.0, 2.0)}
    assert ours.spending("g") == Spending(2, Usage(22, 6))
    assert ours.spending("h") == Spending(1, Usage(11, 3), 1, Usage(5, 7))
    ours.copy_answers(tmp_path / "c")
    copy = ResponseCache(tmp_path / "c")
    assert copy.get("both") == copy.get("new") == SAMPLE and copy.committed() == {}
    assert ours.committed() == {"g": Usage(22, 6), "h": Usage(16, 10)}


def test_pruned_answers_stay_paid_for(tmp_path: Path) -> None:
    """Oracle: by hand. Old answers of one generator go; what all cost is still known, and the file shrinks."""
    path = tmp_path / "c"
    cache = ResponseCache(path)
    for i in range(60):
        cache.put(f"a{i}", replace(SAMPLE, text="x" * 5000), "a")
        cache.put(f"b{i}", SAMPLE, "b")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE answers SET created = 100 + CAST(substr(key, 2) AS INTEGER)")
    db.close()
    assert [key for key, *_ in cache.rows("b")] == [f"b{i}" for i in range(60)]  # oldest first
    cache.prune(0.0)
    before = path.stat().st_size
    assert cache.prune(150.0, "a") == 50
    assert cache.totals() == {"a": CacheTotals(10, 110, 30), "b": CacheTotals(60, 660, 180)}
    assert (cache.totals()["a"].first, cache.totals()["a"].last) == (150.0, 159.0)
    assert cache.spending("a") == Spending(60, Usage(660, 180))
    assert cache.get("a49") is None and cache.get("a50") is not None and cache.get("b0") == SAMPLE
    assert path.stat().st_size < before / 2
    assert cache.prune(1e12) == 70 and cache.generators() == ["a", "b"]
