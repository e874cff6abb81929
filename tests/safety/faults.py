"""Faults between the program and its disk: at one chosen fsync or rename the disk fails or the power goes.

`install(kind, at)` patches this process, so use it in a fork or in a process of its own. Kinds: "kill" (SIGKILL before
the operation), "short" (the file loses its last bytes, then SIGKILL: what a torn write leaves), "EIO" and "ENOSPC" (the
operation raises that error, this once).
"""

import errno
import io
import os
import signal
from collections.abc import Callable
from typing import Any

KINDS = ("kill", "short", "EIO", "ENOSPC")
LOST_BYTES = 7


def install(kind: str, at: int, operations: tuple[str, ...] = ("fsync", "replace", "rename")) -> Callable[[], int]:
    """Let the operation number `at`, from 1 on, meet the fault; return how many have been seen."""
    seen = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                _strike(kind, arguments[0])
            return real(*arguments, **options)

        return operation

    for name in operations:
        setattr(os, name, guarded(getattr(os, name)))
    return lambda: seen


def _strike(kind: str, target: Any) -> None:
    if kind in ("EIO", "ENOSPC"):
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number))
    if kind == "short":
        path = f"/proc/self/fd/{target}" if isinstance(target, int) else os.fspath(target)
        if os.path.isfile(path):
            os.truncate(path, max(0, os.path.getsize(path) - LOST_BYTES))
    os.kill(os.getpid(), signal.SIGKILL)


class NearlyFull(io.FileIO):
    """A file on a disk with `room` bytes left: writes are short, then fail."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data)[: self.room])
        self.room -= written
        return written
