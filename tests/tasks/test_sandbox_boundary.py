"""The seccomp filter on both architectures, run by an interpreter of its instructions written here."""

import platform
import re
import struct
from pathlib import Path

import pytest

from matryoshka.tasks import sandbox_boundary as boundary

HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+) (\d+)"),
}
OWN, OTHER = 4711, 4712
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def decision(code: bytes, audit: int, number: int, *arguments: int) -> int:
    """Return the kernel's action on a call: classic BPF over struct seccomp_data, as linux/filter.h defines it."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *(arguments + (0,) * 6)[:6])
    place, accumulator = 0, 0
    while True:
        kind, if_true, if_false, value = struct.unpack_from("=HBBI", code, 8 * place)
        place += 1
        if kind == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif kind == 0x54:
            accumulator &= value
        elif kind == 0x05:
            place += value
        elif kind == 0x15:
            place += if_true if accumulator == value else if_false
        elif kind == 0x35:
            place += if_true if accumulator >= value else if_false
        else:
            assert kind == 0x06
            return int(value)


def filter_for(machine: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return the filter of a machine, for the process OWN."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    made = boundary.Filter()
    for place in made._own:
        struct.pack_into("=I", made._code, place, OWN)
    return bytes(made._code)


@pytest.mark.parametrize("machine", boundary.ARCHITECTURES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the lists in words, for every number up to 600; a call of another architecture ends the process."""
    code = filter_for(machine, monkeypatch)
    column, audit = boundary.ARCHITECTURES[machine]
    numbers = {name: n for name, row in boundary.NUMBERS.items() if (n := row[column]) is not None}
    free = {numbers[name] for name in boundary.FREE + (boundary.FREE_X86_64 if machine == "x86_64" else [])}
    # With an argument of 0 these are allowed: read-only, F_DUPFD, one's own limits.
    zero = {numbers[name] for name in ("openat", "open", "fcntl", "prlimit64") if name in numbers}
    for number in range(600):
        expected = ALLOW if number in free | zero else ENOSYS if number == numbers["clone3"] else EPERM
        assert decision(code, audit, number) == expected, number
    other = boundary.ARCHITECTURES["aarch64" if machine == "x86_64" else "x86_64"][1]
    assert decision(code, other, numbers["read"]) == KILL
    if machine == "x86_64":
        assert decision(code, audit, 0x40000000 + numbers["read"]) == KILL


@pytest.mark.parametrize("machine", boundary.ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "arguments", "is_allowed"),
    [
        ("openat", (0, 0, 0o2000000), True),  # O_CLOEXEC
        ("openat", (0, 0, 1), False),
        ("openat", (0, 0, 0o100), False),
        ("openat", (0, 0, 0o1000), False),
        ("openat", (0, 0, 0o20200000 | 2), False),  # O_TMPFILE
        ("kill", (OWN, 6), True),
        ("kill", (OTHER, 0), False),
        ("kill", (2**64 - 1, 9), False),  # everybody
        ("kill", (0, 9), False),  # one's group
        ("tgkill", (OWN, OWN, 6), True),
        ("tgkill", (OTHER, OTHER, 9), False),
        ("prlimit64", (0, 7, 0), True),
        ("prlimit64", (OTHER, 7, 0), False),
        ("fcntl", (0, 1030), True),
        ("fcntl", (0, 8), False),  # F_SETOWN
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),  # TIOCSTI
    ],
)
def test_arguments_decide(
    machine: str, name: str, arguments: tuple[int, ...], is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the meaning of each argument, from the manual pages."""
    column, audit = boundary.ARCHITECTURES[machine]
    number = boundary.NUMBERS[name][column]
    assert number is not None
    told = decision(filter_for(machine, monkeypatch), audit, number, *arguments)
    assert told == (ALLOW if is_allowed else EPERM)


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine: str) -> None:
    """Oracle: the kernel's own headers."""
    path, pattern = HEADERS[machine]
    if not path.is_file():
        pytest.skip(f"{path} is not installed (package linux-libc-dev)")
    known = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    known.setdefault("newfstatat", known.get("fstatat", -1))
    column = boundary.ARCHITECTURES[machine][0]
    for name, row in boundary.NUMBERS.items():
        assert row[column] == known.get(name), name
