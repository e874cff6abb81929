"""Every function of the package that can write a file is listed here, with how secrets are kept out of the file.

A new function that opens a file, a database or a stream by itself fails this test: it should write through
`core/files.py`, or be listed with its reason. Benchmarks are not listed: they run without a key.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matryoshka.core import redaction
from matryoshka.core.files import Journal, SharedJournal, append_jsonl, write_json, write_jsonl, write_text
from matryoshka.core.records import Sample
from matryoshka.core.redaction import MARK, add_secret
from matryoshka.inference.cache import ResponseCache

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "lora", "dpo", "inference", "tasks", "eval", "pilot", "scripts")
KEY = "sk-planted-Zq7Kd93hLm20XvTbW5"

# Functions that write texts: each calls `redact` or `to_redacted_json`.
REDACTING = {
    "core/files.py: append_jsonl",
    "core/files.py: write_text",
    "scripts/cache.py: _export.write",
    "scripts/cli.py: _tell_torchrun",
}
# Functions that open a file which another one, named behind it, fills.
FILLED_BY = {
    "core/files.py: Journal.__init__": "core/files.py: Journal.append",
    "inference/cache.py: ResponseCache.__init__": "inference/cache.py: ResponseCache.put",
}
# Functions that write no text that could hold a secret of this process.
NO_TEXT = {
    "core/database.py: open_database": "lays out tables; the two callers are listed by themselves",
    "core/files.py: folder_lock": "the number of this process",
    "core/models/from_gguf.py: write_tokenizer": "a tokenizer",
    "core/models/weights.py: save_tensors": "tensors",
    "core/signals.py: async_stop_event.end": "a constant",
    "dpo/reference.py: ReferenceLogps.__init__": "numbers under hashes",
    "inference/vllm_guard.py: <main>": "the number of a process; it holds no key",
    "inference/vllm_server.py: VllmServer._launch": "the output of vLLM, which runs in a process of its own",
    "pilot/download.py: _download": "a file of a benchmark, as it came",
    "pilot/download.py: _unpack": "files of a benchmark, as they came",
    "pilot/export.py: copy_tokenizer": "a tokenizer",
    "pilot/export.py: export_policy": "a copy of an adapter",
    "pilot/folder.py: copy_folder": "a copy of files that were written by these functions",
    "pilot/serving.py: running_server": "the output of `matryoshka serve`, which redacts it",
    "pilot/training.py: scalar_writer": "numbers under the names of metrics",
    "pilot/training.py: wandb_writer": "numbers under the names of metrics",
    "tasks/lamp/retrieval.py: Embeddings.__init__": "numbers under hashes",
    "scripts/cli.py: main": "nothing: it opens /dev/null",
    "tasks/sandbox_server.py: <main>": "messages of a process without secrets",
    "tasks/sandbox_server.py: Boundary._try": "messages of a process without secrets",
    "tasks/sandbox_server.py: Server._become_program": "messages of a process without secrets",
    "tasks/sandbox_server.py: main": "nothing: it opens /dev/null",
}
WRITING = {
    "FileHandler", "NamedTemporaryFile", "RotatingFileHandler", "SummaryWriter", "copy2", "copyfile",
    "copytree", "dump", "fdopen", "memmap", "mkstemp", "move", "open_database", "save_file", "savefig", "writer",
    "write_bytes",
}  # fmt: skip
METHODS = {"write_text"}  # the function of that name in core/files.py is ours
OWNERS = {"write": "os", "init": "wandb", "connect": "sqlite3", "save": "tokenizer"}


def is_writing(call: ast.Call) -> bool:
    """Return whether a call opens something for writing, or writes outside of a file that was opened."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        inner = [node for argument in (*call.args, *call.keywords) for node in ast.walk(argument)]
        modes = (node.value for node in inner if isinstance(node, ast.Constant) and isinstance(node.value, str))
        flags = {node.attr for node in inner if isinstance(node, ast.Attribute)}
        return any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes) or bool(
            flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}
        )
    # A function that writes may be handed on, and called elsewhere.
    values = (*call.args, *(keyword.value for keyword in call.keywords))
    if WRITING.intersection(value.attr for value in values if isinstance(value, ast.Attribute)):
        return True
    if name in OWNERS:
        return isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == OWNERS[name]
    return name in WRITING or (name in METHODS and isinstance(call.func, ast.Attribute))


def functions(source: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield every function of a file by its dotted name, each without those inside of it, and the code of `<main>`."""

    def inside(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from inside(child, f"{name}.{child.name}".removeprefix("."))
            else:
                is_main = isinstance(child, ast.If) and "__main__" in ast.unparse(child.test)
                yield "<main>" if is_main else name, child
                yield from inside(child, name)

    yield from inside(ast.parse(source), "")


def found_in(source: str) -> set[str]:
    """Return the functions of a file that write, and `<main>` of a program of its own, whose output is not redacted."""
    return {
        name
        for name, node in functions(source)
        if name == "<main>"
        or (isinstance(node, ast.Call) and is_writing(node))
        or (name and isinstance(node, ast.ImportFrom) and WRITING.intersection(alias.name for alias in node.names))
    }


def test_every_writer_is_listed() -> None:
    """Oracle: the calls in the source that open files, databases and streams; `scripts/cli.py` redacts its output."""
    sources = {path.relative_to(ROOT): path.read_text() for top in FOLDERS for path in (ROOT / top).rglob("*.py")}
    found = {f"{path}: {name}" for path, source in sources.items() for name in found_in(source)}
    listed = REDACTING | FILLED_BY.keys() | NO_TEXT.keys()
    assert found - {"scripts/cli.py: <main>"} == listed
    for writer in REDACTING | set(FILLED_BY.values()) | {"scripts/cli.py: main", "pilot/ray.py: _task"}:
        path, name = writer.split(": ")
        code = " ".join(ast.unparse(node) for where, node in functions(sources[Path(path)]) if where == name)
        assert "redact" in code, f"{writer} writes texts as they are"


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    open('x', 'w').write(text)",
        "def f():\n    with path.open(mode='ab') as file: pass",
        "def f():\n    path.open('r+b' if have else 'wb')",
        "def f():\n    path.write_text(text)",
        "def f():\n    write_atomic(path, partial(Path.write_bytes, data=data))",
        "def f():\n    os.write(2, text)",
        "def f():\n    os.open(path, os.O_WRONLY | os.O_CREAT)",
        "def f():\n    sqlite3.connect(path)",
        "def f():\n    json.dump(value, file)",
        "def f():\n    logging.FileHandler(path)",
    ],
)
def test_a_new_writer_is_found(source: str) -> None:
    """Oracle: writers by hand; reading is none."""
    assert found_in(source) == {"f"}
    reading = "def f():\n    path.open('rb').read()\n    open(path, encoding='utf-8')\n    stream.write(b'')"
    assert found_in(reading) == set()


def put(path: Path) -> None:
    cache = ResponseCache(path)
    cache.put("key", Sample(f"the key is {KEY}"), "generator")
    cache.close()


def record(journal: Journal) -> None:
    journal.append("1", {"text": KEY})
    journal.close()


FILLING: dict[str, Callable[[Path], None]] = {
    "a text": lambda path: write_text(path, KEY),
    "JSON": lambda path: write_json(path, {"a": [KEY]}),
    "JSON lines": lambda path: write_jsonl(path, [{KEY: 1}]),
    "a line more": lambda path: append_jsonl(path, {"a": f"Bearer {KEY}"}),
    "a journal": lambda path: record(Journal(path)),
    "a journal of several processes": lambda path: record(SharedJournal(path, "*")),
    "the response cache": put,
}


@pytest.mark.parametrize("kind", FILLING)
def test_what_is_written_holds_no_secret(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a search for the key's letters in every byte of the folder; the mark stands in their place."""
    monkeypatch.setattr(redaction, "_secrets", {})
    add_secret(KEY)
    FILLING[kind](tmp_path / "file")
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in data and MARK.encode() in data
