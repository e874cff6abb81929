"""The processes below one, read from /proc. A process or a thread that ends during the reading is left out."""

from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the processes that the threads of `pid` started, oldest first for each thread."""
    found: list[int] = []
    with suppress(OSError):  # pathlib raises when the folder of threads vanishes under it
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with suppress(OSError):
                found += [int(number) for number in (thread / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """Return every process below `pid`."""
    found = children(pid)
    for child in found:  # the list grows while it is walked
        found += children(child)
    return found


def command_line(pid: int) -> bytes:
    """Return the command line of a process, or nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    """Return whether a process exists and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
