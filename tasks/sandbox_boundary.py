"""The kernel's boundary around a generated program: no privileges, Landlock, and a seccomp allow-list.

The sandbox's server imports this file under `python -S`, so it uses the standard library alone and calls the kernel
through ctypes. `confine_server` comes first, once: it drops every privilege and lets the process read the interpreter's
library and nothing else. `confine_program` follows in every forked child, before the first line of its program: a
nested Landlock domain, which keeps it from signalling or tracing its parent and its neighbours, and the system calls in
FREE and CHECKED alone. Neither can be taken back by the process that called it, nor by anything that it starts.

The boundary does not hide the names and sizes of files (`stat` works everywhere), it does not bound the time of the CPU
(the sandbox does), and it is as good as the kernel is.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

# Read, compute, sleep, allocate, look at oneself. None of these takes a path for writing, another process or a socket.
FREE = """
    read write readv writev pread64 lseek close close_range dup dup3 fstat newfstatat statx faccessat faccessat2
    readlinkat getdents64 getcwd mmap munmap mremap mprotect madvise brk futex sched_yield sched_getaffinity
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall nanosleep clock_nanosleep clock_gettime
    clock_getres gettimeofday times getrusage sysinfo uname getrandom getitimer setitimer getpid getppid gettid getuid
    geteuid getgid getegid exit exit_group
""".split()
FREE_X86_64 = "stat lstat access readlink dup2 alarm time getrlimit".split()

# Numbers of the system calls: (x86-64, aarch64); None where the architecture has no such call.
NUMBERS: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "ioctl": (16, 29), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "kill": (62, 129), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17),
    "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "tgkill": (234, 131), "openat": (257, 56),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "dup3": (292, 24),
    "prlimit64": (302, 261), "getrandom": (318, 278), "statx": (332, 291), "clone3": (435, 435),
    "close_range": (436, 436), "faccessat2": (439, 439), "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column above, AUDIT_ARCH of the kernel

# Values of one argument with which a call is allowed. The kernel takes all of these arguments as 32 bits.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
IOCTL_REQUESTS = (0x5401, 0x5450, 0x5451)  # TCGETS (is it a terminal?), FIONCLEX, FIOCLEX
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)

# prctl and seccomp.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECCOMP_SET_MODE_FILTER = 1
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD, AND, JUMP, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06

# Landlock: access rights of files by the version that brought them, of the network, and scopes.
FILE_RIGHTS = {1: 0x1FFF, 2: 0x2000, 3: 0x4000, 5: 0x8000}
EXECUTE, READ_FILE, READ_DIR = 1, 4, 8
NETWORK_RIGHTS, SCOPES = 3, 3
NETWORK_SINCE, SCOPES_SINCE = 4, 6
RULE_PATH_BENEATH = 1
NOT_READABLE = ("site-packages", "dist-packages", "test", "idlelib", "ensurepip")  # folders of the library

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class BoundaryError(Exception):
    """The kernel refused a part of the boundary."""


def confine_server(library: list[str]) -> int:
    """Drop all privileges and let this process open files of `library` for reading and nothing else.

    Returns Landlock's version, 0 where the kernel has none. Raises BoundaryError if a step fails.
    """
    drop_privileges()
    version = landlock_version()
    if version:
        rights = 0
        for since, right in FILE_RIGHTS.items():
            rights |= right if version >= since else 0
        ruleset = _ruleset(rights, version)
        try:
            for path in library:
                _let_read(ruleset, path)
            _checked("landlock_restrict_self", ruleset, 0)
        finally:
            os.close(ruleset)
    return version


def drop_privileges() -> None:
    """Give up capabilities, the way to gain any, and being read by other processes of the same user."""
    hide_memory()
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # EINVAL after the last one; EPERM for a process that has no capabilities anyway
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # version 3, this process
    none = ctypes.create_string_buffer(24)
    if _libc.capset(header, none) != 0:
        raise BoundaryError(f"capset: {os.strerror(ctypes.get_errno())}")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def hide_memory() -> None:
    """Keep other processes of the same user from reading this process's memory and environment."""
    _prctl(PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of every process that a descendant leaves behind, so that it can be ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, 9)


def is_architecture_known() -> bool:
    """Return whether the seccomp filter can be written for this machine."""
    return platform.machine() in ARCHITECTURES and sys.byteorder == "little" and sys.maxsize > 2**32


def landlock_version() -> int:
    """Return the version of the kernel's Landlock, 0 where it has none or has it turned off."""
    if not is_architecture_known():
        return 0
    try:
        return _checked("landlock_create_ruleset", 0, 0, 1)
    except BoundaryError:
        return 0


def library_files() -> list[str]:
    """Return the paths that the interpreter may need later: its modules, and the folders of its shared libraries."""
    library = os.path.dirname(os.path.abspath(os.__file__))
    paths = [entry.path for entry in os.scandir(library) if entry.name not in NOT_READABLE]
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}
    for folder in {os.path.dirname(path) for path in mapped if ".so" in os.path.basename(path)}:
        if library.startswith(os.path.join(folder, "")):  # the modules lie below it, so that not all of it is readable
            paths += [entry.path for entry in os.scandir(folder) if ".so" in entry.name and entry.is_file()]
        elif not folder.startswith(library):
            paths.append(folder)
    return [path for path in [*paths, "/etc/ld.so.cache"] if os.path.exists(path)]


class Filter:
    """The seccomp filter, made once; `install` fills in the number of the process that it is for."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._own: list[int] = []  # where the process's own number stands
        column, audit = ARCHITECTURES[platform.machine()]
        self._emit(LOAD, 4)
        self._emit(EQUAL, audit, 1, 0)
        self._emit(RETURN, KILL)  # a call of another architecture has other numbers
        self._emit(LOAD, 0)
        if column == 0:
            self._emit(AT_LEAST, 0x40000000, 0, 1)
            self._emit(RETURN, KILL)  # x32: the same calls by other numbers
        names = [*FREE, *(FREE_X86_64 if column == 0 else ())]
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            self._emit(EQUAL, _number(name), left, 0)
        self._emit(JUMP, 1)
        self._emit(RETURN, ALLOW)
        self._check("openat", 2, (0,), WRITING)
        if column == 0:
            self._check("open", 1, (0,), WRITING)
        self._check("fcntl", 1, FCNTL_COMMANDS)
        self._check("ioctl", 1, IOCTL_REQUESTS)
        self._check("prlimit64", 0, (0,))
        self._check("kill", 0, None)
        self._check("tgkill", 0, None)
        self._emit(EQUAL, _number("clone3"), 0, 1)
        self._emit(RETURN, ERRNO | errno.ENOSYS)  # the C library then tries clone, which is refused
        self._emit(RETURN, ERRNO | errno.EPERM)

    def install(self) -> None:
        """Let this process make the calls of the filter and no others. Raises BoundaryError if the kernel refuses."""
        for place in self._own:
            struct.pack_into("=I", self._code, place, os.getpid())
        code = (ctypes.c_char * len(self._code)).from_buffer(self._code)
        program = ctypes.create_string_buffer(struct.pack("@HP", len(self._code) // 8, ctypes.addressof(code)))
        _checked("seccomp", SECCOMP_SET_MODE_FILTER, 0, ctypes.addressof(program))

    def _emit(self, code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        self._code += struct.pack("=HBBI", code, if_true, if_false, value)

    def _check(self, name: str, argument: int, values: tuple[int, ...] | None, mask: int = 0) -> None:
        """Allow the call if its argument, of which `mask` keeps some bits, is one of `values`; None: our own number."""
        known = values if values is not None else (0,)
        self._emit(EQUAL, _number(name), 0, len(known) + 3 + bool(mask))
        self._emit(LOAD, 16 + 8 * argument)
        if mask:
            self._emit(AND, mask)
        for left, value in zip(range(len(known), 0, -1), known, strict=True):
            if values is None:
                self._own.append(len(self._code) + 4)
            self._emit(EQUAL, value, left, 0)
        self._emit(RETURN, ERRNO | errno.EPERM)
        self._emit(RETURN, ALLOW)


def confine_program(version: int, filter: Filter) -> None:
    """Put this process, a child of a confined server, behind the whole boundary. `version`: Landlock's."""
    if version:
        domain = _ruleset(EXECUTE, version)
        _checked("landlock_restrict_self", domain, 0)
        os.close(domain)
    filter.install()


def _ruleset(rights: int, version: int) -> int:
    network = NETWORK_RIGHTS if version >= NETWORK_SINCE else 0
    scopes = SCOPES if version >= SCOPES_SINCE else 0
    fields = [rights, *([network] if version >= NETWORK_SINCE else ()), *([scopes] if version >= SCOPES_SINCE else ())]
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields))
    return _checked("landlock_create_ruleset", ctypes.addressof(attributes), 8 * len(fields), 0)


def _let_read(ruleset: int, path: str) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
        _checked("landlock_add_rule", ruleset, RULE_PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(descriptor)


def _number(name: str) -> int:
    number = NUMBERS[name][ARCHITECTURES[platform.machine()][0]]
    if number is None:
        raise BoundaryError(f"{platform.machine()} has no system call {name}")
    return number


def _checked(name: str, *arguments: int) -> int:
    result: int = _libc.syscall(ctypes.c_long(_number(name)), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        raise BoundaryError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise BoundaryError(f"prctl({option}, {value}): {os.strerror(ctypes.get_errno())}")
