"""Loads a Python file of the user's own, such as a task's or an architecture's, as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_own_module(path: Path, name: str) -> ModuleType:
    """Return the module of the file at `path`, which is loaded under `name`, once in a process.

    It finds modules beside it, as a script does. Raises ValueError naming the file, and the line where it is known, for
    one that is no Python or imports what is not there; other errors of the file are its own.
    """
    module = sys.modules.get(name)
    if module is not None and module.__file__ == str(path):
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by its name
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as err:
        del sys.modules[name]
        if isinstance(err, SyntaxError):
            raise ValueError(f"{err.filename}, line {err.lineno}: {err.msg}") from err
        if isinstance(err, ImportError):
            raise ValueError(f"{path} cannot be imported: {err}") from err
        raise
    return module
