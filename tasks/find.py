"""Finds a task by its name, and a user's own class in a file or a package.

A shipped task is a folder `tasks/<name>/` whose module `task` holds one class that extends `Task`; nothing else names
it. A user's own is "FILE.py:CLASS" or "PACKAGE.MODULE:CLASS".
"""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

from matryoshka import tasks
from matryoshka.core.config import nearest
from matryoshka.core.own_module import load_own_module
from matryoshka.core.protocols import Task, TaskSetting
from matryoshka.core.records import content_key


def task_class(name: str) -> type[Task]:
    """Return the class of the task `name`: one of `task_names`, "FILE.py:CLASS" or "PACKAGE.MODULE:CLASS".

    Raises ValueError or FileNotFoundError naming what is missing or wrong.
    """
    if ":" in name:
        found = own_class(name, "the task")
    else:
        if name not in task_names():
            raise ValueError(
                f"the task {name!r} is unknown; expected one of {', '.join(task_names())}, FILE.py:CLASS or "
                "PACKAGE.MODULE:CLASS"
            )
        module = importlib.import_module(f"matryoshka.tasks.{name}.task")
        (found,) = (value for value in vars(module).values() if _is_task(value) and value.__module__ == module.__name__)
    if not _is_task(found):
        raise ValueError(f"the task {name!r} does not extend matryoshka.core.protocols.Task")
    for method in ("examples", "first_prompt", "rollout"):
        if getattr(found, method) is getattr(Task, method):
            raise ValueError(f"the task {name!r} has no method {method!r}; docs/own_task.md says what it returns")
    if not inspect.iscoroutinefunction(inspect.unwrap(found.rollout)):
        raise ValueError(f"the task {name!r}: `rollout` is no coroutine; begin it with `async def`")
    return typing.cast(type[Task], found)


def make_task(name: str, options: object, setting: TaskSetting) -> Task:
    """Return the task `name` with its options. Raises ValueError for a class whose `__init__` does not take or keep
    them.
    """
    kind, init = task_class(name), "`__init__`, where a task has one, is `def __init__(self, options, setting)` and"
    try:
        inspect.signature(kind).bind(options, setting)
    except TypeError as err:
        raise ValueError(f"the task {name!r}: {init} takes two arguments: {err}") from err
    task = kind(options, setting)
    if not hasattr(task, "setting"):
        raise ValueError(f"the task {name!r}: {init} calls super().__init__(options, setting); this one does not")
    return task


def check_named(made: object, where: str) -> None:
    """Raise ValueError, which begins with `where`, for a controller or generator of the user's without a name."""
    name = getattr(made, "name", None)
    if not isinstance(name, str) or not name:
        what = f"its attribute `name` is {name!r:.60}" if hasattr(made, "name") else "it has no attribute `name`"
        raise ValueError(f"{where}: {what}; expected a text, which changes when its answers change")


def task_names() -> list[str]:
    """Return the names of the shipped tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__) if module.ispkg)


def options_class(task: type[Task]) -> type[Any]:
    """Return the dataclass of a task's options: the annotation of its attribute `options`.

    Raises ValueError if it is no dataclass, or a name that the file does not define.
    """
    try:
        kind = typing.get_type_hints(task)["options"]
    except (NameError, TypeError) as err:
        raise ValueError(f"task {task.__name__}: its annotations cannot be read: {err}") from err
    if kind is object:
        return NoOptions
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"task {task.__name__}: `options` is annotated with {kind}; expected a dataclass")
    return kind


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a task that has none."""


def own_class(name: str, where: str, protocol: type | None = None, takes: int = 0) -> Any:
    """Return the class that "FILE.py:CLASS" or "PACKAGE.MODULE:CLASS" names. where: the setting, for the errors.

    protocol: its methods are demanded of the class, which is made with `takes` arguments. A file is loaded once in a
    process. Raises ValueError, FileNotFoundError.
    """
    place, _, attribute = name.rpartition(":")
    if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{where} {name!r}: {place!r} is no module; expected FILE.py:CLASS or PACKAGE.MODULE:CLASS")
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as err:
        hint = "a package must be installed, or its folder be in PYTHONPATH"
        raise ValueError(f"{where} {name!r}: {place} cannot be imported: {err}; {hint}") from err
    except ValueError as err:
        raise ValueError(f"{where} {name!r}: {err}") from err
    if not hasattr(module, attribute):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise ValueError(f"{where} {name!r}: {place} has no class {attribute!r}; {nearest(attribute, classes)}")
    found = getattr(module, attribute)
    if protocol is not None:
        methods = [key for key, value in vars(protocol).items() if inspect.isfunction(value) and key[0] != "_"]
        if missing := [key for key in methods if not callable(getattr(found, key, None))]:
            raise ValueError(f"{where} {name!r}: it has no {missing[0]!r}; expected {', '.join(methods)}")
        try:
            inspect.signature(found).bind(*[None] * takes)
        except TypeError as err:
            raise ValueError(f"{where} {name!r}: it is made with {takes} arguments, and that fails: {err}") from err
    return found


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}, where the command runs"
        raise FileNotFoundError(f"{path}: no such file{where}; expected a Python file with your class")
    source = path.resolve()
    return load_own_module(source, f"matryoshka_own_{source.stem}_{content_key(str(source))[:8]}")


def _is_task(value: object) -> bool:
    return isinstance(value, type) and Task in value.__mro__[1:]
