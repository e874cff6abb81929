# ruff: noqa: E501
"""Programs that try to get out of the sandbox, by kind. Each works where nothing stops it, and says how harm is seen.

`$NAME` stands for something that the harness planted: $FOLDER (a folder of the user's, with $FOLDER/flag.txt, the module
flag_module.py, the database flag.db and a folder that is named after the flag), $MAIN (the process that
starts programs, with a key in its environment and its memory), $VICTIM (a process of the same user), $PORT, $UDP_PORT,
$SOCKET and $ABSTRACT (servers), $FD (a descriptor of $MAIN on the flag file), and $PRELUDE's helpers.

effect: "value": the program returned the planted number (or 1 where $FLAG is not what it looks for), so it saw or did
what it must not. "folder": something in $FOLDER changed. "heard": a server heard from it. "victim": the victim ended,
stopped or changed. "outlives": it ran on after its time. "survivor": a process of it is left. "neighbour": another
program's result changed.
"""

from dataclasses import dataclass
from typing import Literal

Effect = Literal["value", "folder", "heard", "victim", "outlives", "survivor", "neighbour"]

# Helpers that programs may use: the number in a text, raw system calls, and the processes whose parent is ours.
PRELUDE = r'''
import ctypes, os, re, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def number(text):
    if isinstance(text, str): text = text.encode("utf-8", "surrogateescape")
    found = re.search(rb"planted-(\d{12})", bytes(text))
    return int(found[1]) if found else 0
def call(nr, *args):
    result = libc.syscall(ctypes.c_long(nr), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def siblings():
    if os.getppid() == 1: return  # an orphan's siblings are the machine's daemons
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try: stat = open(f"/proc/{name}/stat").read()
            except OSError: continue
            if int(stat.rpartition(")")[2].split()[1]) == os.getppid() and int(name) != $VICTIM: yield int(name)
def search(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            place, rights = line.split()[:2]
            low, high = (int(x, 16) for x in place.split("-"))
            if rights.startswith("rw") and high - low < 2**27:
                try: mem.seek(low); data = mem.read(high - low)
                except (OSError, ValueError, OverflowError): continue
                if data and number(data): return number(data)
    return 0
'''


@dataclass(frozen=True)
class Escape:
    """One program. users: who can do it at all. needs: what of the machine it needs, see the harness."""

    kind: str
    name: str
    code: str
    effect: Effect = "value"
    users: tuple[str, ...] = ("user", "root")
    needs: str = ""


def _kind(kind: str, *escapes: tuple[str, str] | tuple[str, str, dict[str, object]]) -> list[Escape]:
    found = []
    for name, body, *more in escapes:
        if not body.startswith("def ") and "\ndef solution" not in body:
            lines = body.split("\n")
            body = "def solution():\n" + "\n".join(f"    {line}" for line in lines)
        found.append(Escape(kind, name, body, **(more[0] if more else {})))  # type: ignore[arg-type]
    return found


ROOT: dict[str, object] = {"users": ("root",)}
FOLDER: dict[str, object] = {"effect": "folder"}
HEARD: dict[str, object] = {"effect": "heard"}
VICTIM: dict[str, object] = {"effect": "victim"}
OUTLIVES: dict[str, object] = {"effect": "outlives"}
X86: dict[str, object] = {"needs": "x86_64"}

ESCAPES = [
    *_kind(
        "parent",
        ("its own environment", "return number(os.environ.get('OPENAI_API_KEY', ''))"),
        ("its own environment in /proc", "return number(open('/proc/self/environ', 'rb').read())"),
        ("the parent's environment", "return number(open(f'/proc/{os.getppid()}/environ', 'rb').read())"),
        ("the main process's environment", "return number(open('/proc/$MAIN/environ', 'rb').read())"),
        (
            "the environment of every process",
            "for name in os.listdir('/proc'):\n    try: found = number(open(f'/proc/{name}/environ', 'rb').read())\n"
            "    except OSError: continue\n    if found: return found",
        ),
        ("the main process's memory", "return search($MAIN)"),
        (
            "the main process's memory by process_vm_readv",
            "for line in open('/proc/$MAIN/maps'):\n"
            "    low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
            "    if ' rw' not in line or high - low > 2**26: continue\n"
            "    class V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]\n"
            "    data = ctypes.create_string_buffer(high - low)\n"
            "    here, there = V(ctypes.addressof(data), high - low), V(low, high - low)\n"
            "    libc.process_vm_readv($MAIN, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)\n"
            "    if number(data): return number(data)",
        ),
        ("ptrace of another process", "return int(libc.ptrace(0x4206, $VICTIM, 0, 0) == 0)"),
        ("a descriptor of the main process", "return number(open('/proc/$MAIN/fd/$FD', 'rb').read())"),
        (
            "a descriptor stolen by pidfd_getfd",
            "stolen = call(438, call(434, $MAIN, 0), $FD, 0)\nreturn number(os.pread(stolen, 100, 0))",
        ),
        (
            "descriptors that it inherited",
            "for fd in range(3, 256):\n    try: found = number(os.pread(fd, 100, 0))\n    except OSError: continue\n"
            "    if found: return found",
        ),
        ("the folder of the main process", "return number(open('/proc/$MAIN/root$FOLDER/flag.txt', 'rb').read())"),
    ),
    *_kind(
        "files read",
        ("open", "return number(open('$FOLDER/flag.txt').read())"),
        ("os.open and pread", "return number(os.pread(os.open('$FOLDER/flag.txt', 0), 100, 0))"),
        ("a relative path", "return number(open('../' * 40 + '$FOLDER/flag.txt').read())"),
        ("through /proc/self/root", "return number(open('/proc/self/root$FOLDER/flag.txt').read())"),
        (
            "out of the library's folder",
            "return number(open(os.path.dirname(os.__file__) + '/../' * 40 + '$FOLDER/flag.txt').read())",
        ),
        (
            "a path descriptor opened again",
            "fd = os.open('$FOLDER/flag.txt', os.O_PATH)\nreturn number(open(f'/proc/self/fd/{fd}').read())",
        ),
        ("the C library's open", "return number(os.pread(libc.open(b'$FOLDER/flag.txt', 0), 100, 0))"),
        (
            "openat2",
            "how = (ctypes.c_uint64 * 3)()\nfd = call(437, -100, ctypes.c_char_p(b'$FOLDER/flag.txt'), how, 24)\n"
            "return number(os.pread(fd, 100, 0))",
        ),
        (
            "mmap",
            "import mmap\nwith open('$FOLDER/flag.txt', 'rb') as f:\n"
            "    return number(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])",
        ),
        ("os.listdir", "return max(number(name) for name in os.listdir('$FOLDER'))"),
        ("os.scandir", "return max(number(entry.name) for entry in os.scandir('$FOLDER'))"),
        ("glob", "import glob\nreturn number(str(glob.glob('$FOLDER/planted-*')))"),
        ("import", "sys.path.insert(0, '$FOLDER')\nimport flag_module\nreturn flag_module.FLAG"),
        (
            "SQLite",
            "import sqlite3\nreturn sqlite3.connect('file:$FOLDER/flag.db?mode=ro', uri=True)"
            ".execute('select n from t').fetchone()[0]",
        ),
        (
            "a symbolic link",
            "os.symlink('$FOLDER/flag.txt', '$FOLDER/link')\ntry: return number(open('$FOLDER/link').read())\n"
            "finally: os.unlink('$FOLDER/link')",
        ),
        (
            "a hard link",
            "os.link('$FOLDER/flag.txt', '$FOLDER/link')\ntry: return number(open('$FOLDER/link').read())\n"
            "finally: os.unlink('$FOLDER/link')",
        ),
        (
            "another program's eyes",
            "import subprocess\nreturn number(subprocess.run(['cat', '$FOLDER/flag.txt'], capture_output=True).stdout)",
        ),
        (
            "changing the root",
            "os.chroot('$FOLDER')\nreturn number(open('/flag.txt').read())",
            ROOT,
        ),
        ("watching a folder", "return int(libc.inotify_add_watch(libc.inotify_init(), b'$FOLDER', 0xFFF) > 0)"),
        (
            "a file handle",
            "handle = (ctypes.c_char * 136)()\nctypes.c_uint.from_buffer(handle).value = 128\nmount = ctypes.c_int()\n"
            "call(303, -100, ctypes.c_char_p(b'$FOLDER/flag.txt'), handle, ctypes.byref(mount), 0)\n"
            "fd = call(304, os.open('$FOLDER', 0), handle, 0)\nreturn number(os.pread(fd, 100, 0))",
            ROOT | {"needs": "file handles"},
        ),
    ),
    *_kind(
        "files written",
        ("open for writing", "open('$FOLDER/new', 'w').write('x')\nreturn 1", FOLDER),
        ("appending", "open('$FOLDER/flag.txt', 'a').write('x')\nreturn 1", FOLDER),
        ("a folder", "os.mkdir('$FOLDER/new')\nreturn 1", FOLDER),
        ("folders within folders", "os.makedirs('$FOLDER/a' + '/a' * 200)\nreturn 1", FOLDER),
        ("a symbolic link", "os.symlink('/', '$FOLDER/new')\nreturn 1", FOLDER),
        ("a hard link", "os.link('$FOLDER/flag.txt', '$FOLDER/new')\nreturn 1", FOLDER),
        ("a new name", "os.rename('$FOLDER/flag.txt', '$FOLDER/new')\nreturn 1", FOLDER),
        ("removal", "os.unlink('$FOLDER/flag.txt')\nreturn 1", FOLDER),
        ("removal of a folder", "import glob\nos.rmdir(glob.glob('$FOLDER/planted-*')[0])\nreturn 1", FOLDER),
        ("truncation", "os.truncate('$FOLDER/flag.txt', 0)\nreturn 1", FOLDER),
        ("rights", "os.chmod('$FOLDER/flag.txt', 0)\nreturn 1", FOLDER),
        ("times", "os.utime('$FOLDER/flag.txt', (1, 1))\nreturn 1", FOLDER),
        ("a pipe with a name", "os.mkfifo('$FOLDER/new')\nreturn 1", FOLDER),
        ("a node", "os.mknod('$FOLDER/new')\nreturn 1", FOLDER),
        ("a socket with a name", "import socket\nsocket.socket(socket.AF_UNIX).bind('$FOLDER/new')\nreturn 1", FOLDER),
        ("a temporary file", "import tempfile\ntempfile.mkstemp(dir='$FOLDER')\nreturn 1", FOLDER),
        ("the C library's creat", "return libc.creat(b'$FOLDER/new', 0o600)", FOLDER),
        (
            "a file without a name, linked later",
            "fd = os.open('$FOLDER', os.O_TMPFILE | os.O_RDWR)\n"
            "return 1 + libc.linkat(-100, b'/proc/self/fd/%d' % fd, -100, b'$FOLDER/new', 0x400)",
            FOLDER | {"needs": "O_TMPFILE"},
        ),
        ("io_uring", "return int(call(425, 4, (ctypes.c_char * 120)()) > 0)", {"needs": "io_uring"}),
        ("the interpreter's own library", "open(os.__file__, 'r+').close()\nreturn 1", ROOT),
        ("a mount", "return 1 + libc.mount(b'none', b'$FOLDER', b'tmpfs', 0, 0) + libc.umount2(b'$FOLDER', 2)", ROOT),
        ("shared memory of POSIX", "return int(libc.shm_open(b'/escape', os.O_RDWR | os.O_CREAT, 0o600) >= 0) + libc.shm_unlink(b'/escape')"),
        ("shared memory of System V", "made = libc.shmget(0, 4096, 0o1600)\nlibc.shmctl(made, 0, 0)\nreturn int(made >= 0)"),
        ("a semaphore of System V", "made = libc.semget(0, 1, 0o1600)\nlibc.semctl(made, 0, 0)\nreturn int(made >= 0)"),
        ("a queue of System V", "made = libc.msgget(0, 0o1600)\nlibc.msgctl(made, 0, 0)\nreturn int(made >= 0)"),
    ),
    *_kind(
        "network",
        (
            "TCP",
            "import socket\ns = socket.create_connection(('127.0.0.1', $PORT), 1)\ns.sendall(b'heard')\nreturn 1",
            HEARD,
        ),
        ("UDP", "import socket\ns = socket.socket(2, 2)\ns.sendto(b'heard', ('127.0.0.1', $UDP_PORT))\nreturn 1", HEARD),
        ("HTTP", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:$PORT/heard', timeout=0.2)", HEARD),
        ("a Unix socket", "import socket\ns = socket.socket(1, 1)\ns.connect('$SOCKET')\ns.sendall(b'heard')\nreturn 1", HEARD),
        (
            "an abstract socket",
            "import socket\ns = socket.socket(1, 1)\ns.connect('\\0$ABSTRACT')\ns.sendall(b'heard')\nreturn 1",
            HEARD,
        ),
        (
            "raw system calls",
            "fd = call(41, 2, 2, 0)\nwhere = (2).to_bytes(2, 'little') + ($UDP_PORT).to_bytes(2, 'big')\n"
            "where = ctypes.c_char_p(where + bytes([127, 0, 0, 1]) + bytes(8))\n"
            "call(44, fd, ctypes.c_char_p(b'heard'), 5, 0, where, 16)\nreturn 1",
            HEARD | X86,
        ),
        (
            "a port of its own",
            "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nreturn 1",
        ),
        ("netlink", "import socket\nsocket.socket(16, 3, 0)\nreturn 1"),
        ("a packet socket", "import socket\nsocket.socket(17, 3, 0x300)\nreturn 1", ROOT | {"needs": "packet sockets"}),
        ("ICMP", "import socket\nsocket.socket(2, 3, 1)\nreturn 1", ROOT),
        ("the kernel's ciphers", "import socket\nsocket.socket(38, 5, 0)\nreturn 1", {"needs": "AF_ALG"}),
        ("virtual machines", "import socket\nsocket.socket(40, 1, 0)\nreturn 1", {"needs": "AF_VSOCK"}),
        ("a pair of sockets", "import socket\nsocket.socketpair()\nreturn 1"),
        ("a pair of sockets by ctypes", "return 1 + libc.socketpair(1, 1, 0, (ctypes.c_int * 2)())"),
    ),
    *_kind(
        "processes",
        ("fork", "child = os.fork()\nif not child: os._exit(0)\nreturn 1"),
        ("fork by ctypes", "child = libc.fork()\nif not child: os._exit(0)\nreturn int(child > 0)"),
        ("fork by a raw system call", "child = call(57)\nif not child: os._exit(0)\nreturn 1", X86),
        (
            "clone3",
            "args = (ctypes.c_uint64 * 11)()\nargs[4] = 17\nchild = call(435, args, 88)\nif not child: os._exit(0)\n"
            "return 1",
        ),
        ("a shell", "return int(os.system('true') == 0)"),
        ("another program", "import subprocess\nreturn 1 + subprocess.run(['true']).returncode"),
        ("posix_spawn", "return int(os.posix_spawn('/bin/true', ['true'], {}) > 0)"),
        (
            "fork under another name",
            "import multiprocessing.util, _posixsubprocess\nreturn int(multiprocessing.util.spawnv_passfds(b'/bin/true', [b'true'], []) > 0)",
        ),
        ("becoming another program", "os.execv('/bin/sh', ['sh', '-c', 'echo x > $FOLDER/new'])", FOLDER),
        ("a thread", "import threading\nt = threading.Thread(target=print)\nt.start()\nreturn 1"),
        ("a terminal", "import pty\nchild, _ = pty.fork()\nif not child: os._exit(0)\nreturn 1"),
        (
            "many processes",
            "made = 0\nfor _ in range(30):\n    child = os.fork()\n    if not child: time.sleep(0.2); os._exit(0)\n    made += 1\n"
            "return int(made == 30)",
        ),
        ("namespaces of its own", "return 1 + libc.unshare(0x10000000)", {"needs": "user namespaces"}),
        ("another's namespaces", "return 1 + libc.setns(os.open('/proc/$MAIN/ns/net', 0), 0)", ROOT),
    ),
    *_kind(
        "resources",
        ("memory", "x = bytearray(2**28)\nreturn len(x) >> 28"),
        ("memory by mmap", "import mmap\nx = mmap.mmap(-1, 2**28)\nfor i in range(0, 2**28, 4096): x[i] = 1\nreturn 1"),
        (
            "a higher limit of memory",
            "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\nreturn len(bytearray(2**28)) >> 28",
        ),
        ("a file in memory", "fd = os.memfd_create('x')\nos.truncate(fd, 2**29)\nreturn 1"),
        ("time", "while True: pass", OUTLIVES),
        ("time with deaf ears", "while True:\n    try:\n        while True: pass\n    except BaseException: pass", OUTLIVES),
        ("time without Python", "return len(str(9 ** 9 ** 9))", OUTLIVES),
        ("sleep", "time.sleep(999)", OUTLIVES),
        ("stopping itself", "os.kill(os.getpid(), 19)\ntime.sleep(999)", OUTLIVES),
        ("closing its line and sleeping", "os.closerange(0, 99)\ntime.sleep(999)", OUTLIVES),
        (
            "ignoring signals",
            "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
            "while True: pass",
            OUTLIVES,
        ),
        ("output", "for _ in range(40): print('x' * 2**20)\nsys.stdout.flush()\nreturn 1"),
        ("output past Python", "return int(sum(os.write(1, b'x' * 2**20) for _ in range(40)) == 40 * 2**20)"),
        ("a large file", "open('$FOLDER/new', 'wb').write(bytes(2**24))\nreturn 1", FOLDER),
        ("many files", "for n in range(300): open(f'$FOLDER/new{n}', 'w').close()\nreturn 1", FOLDER),
        ("many descriptors", "return len([os.dup(0) for _ in range(200)]) // 200"),
        ("locked memory", "return 1 + libc.mlockall(3)", {"needs": "mlock"}),
        ("a better place in the queue", "os.nice(-5)\nreturn 1", ROOT),
        ("real-time scheduling", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\nreturn 1", ROOT),
    ),
    *_kind(
        "others",
        ("is there such a process", "os.kill($MAIN, 0)\nreturn 1"),
        ("the parent", "os.kill(os.getppid(), 0)\nreturn 1"),
        ("everybody", "os.kill(-1, 0)\nreturn 1"),
        ("killing", "os.kill($VICTIM, 9)\nreturn 1", VICTIM),
        ("stopping", "os.kill($VICTIM, 19)\nreturn 1", VICTIM),
        ("killing a group", "os.killpg($VICTIM, 9)\nreturn 1", VICTIM),
        ("killing by ctypes", "return libc.kill($VICTIM, 9)", VICTIM),
        ("killing by pidfd", "import signal\nsignal.pidfd_send_signal(os.pidfd_open($VICTIM), 9)\nreturn 1", VICTIM),
        ("killing a thread", "return call(234, $VICTIM, $VICTIM, 9)", VICTIM | X86),
        (
            "killing with a value",
            "return call(129, $VICTIM, 9, (ctypes.c_int * 32)(9, 0, -1))",
            VICTIM | X86,
        ),
        (
            "a signal of another's pipe",
            "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, $VICTIM)\n"
            "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')\nreturn 1",
            VICTIM,
        ),
        ("limits", "import resource\nresource.prlimit($VICTIM, resource.RLIMIT_NOFILE, (9, 9))\nreturn 1", VICTIM),
        ("priority", "os.setpriority(os.PRIO_PROCESS, $VICTIM, 15)\nreturn 1", VICTIM),
        ("processors", "os.sched_setaffinity($VICTIM, [0])\nreturn 1", VICTIM | {"needs": "two cores"}),
    ),
    *_kind(
        "raw system calls",
        ("bpf", "return int(call(321, 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72) > 0)", ROOT | X86 | {"needs": "bpf"}),
        ("the kernel's log", "return int(call(103, 10, 0, 0) > 0)", ROOT | X86),
        ("performance counters", "return int(call(298, (ctypes.c_uint32 * 32)(1, 128, 0), 0, -1, -1, 0) > 0)", {"needs": "perf"}),
        ("page faults of its own", "return int(call(323, 1) > 0)", {"needs": "userfaultfd"}),
        ("the kernel's keys", "return int(call(248, ctypes.c_char_p(b'user'), ctypes.c_char_p(b'escape'), ctypes.c_char_p(b'x'), 1, -2) > 0)", X86 | {"needs": "keys"}),
        ("another personality", "return int(call(135, 0x0040000) >= 0)", X86),
        ("the name of the machine", "name = os.uname().nodename.encode()\nreturn 1 + libc.sethostname(name, len(name))", ROOT),
        ("the call table of 32 bits", "import mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
         "place = ctypes.addressof(ctypes.c_char.from_buffer(page))\nreturn int(ctypes.CFUNCTYPE(ctypes.c_int)(place)() > 0)", X86 | {"needs": "int80"}),
        ("a filter of its own", "return 1 + libc.prctl(22, 2, 0, 0, 0) + (ctypes.get_errno() == 14)"),
    ),
    *_kind(
        "interpreter",
        (
            "strings in its memory",
            "import gc\nfor thing in gc.get_objects():\n    try: values = list(thing.values() if type(thing) is dict else vars(thing).values())\n"
            "    except (TypeError, AttributeError): continue\n    for value in values:\n"
            "        if isinstance(value, str | bytes) and number(value): return number(value)",
        ),
        ("all of its memory", "return search('self')"),
        (
            "frames of its callers",
            "frame = sys._getframe()\nwhile frame:\n    for value in [*frame.f_globals.values(), *frame.f_locals.values()]:\n"
            "        if isinstance(value, str) and number(value): return number(value)\n    frame = frame.f_back\nreturn 0",
        ),
        (
            "its first stack",
            "environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\nfor n in range(500):\n"
            "    if not environ[n]: return 0\n    if number(environ[n]): return number(environ[n])",
        ),
        (
            "open files of the interpreter",
            "import gc, io\nfor thing in gc.get_objects():\n    if isinstance(thing, io.IOBase) and not thing.closed:\n"
            "        try: thing.seek(0); found = number(thing.read())\n        except (OSError, ValueError, TypeError): continue\n"
            "        if found: return found",
        ),
    ),
    *_kind(
        "neighbours",
        (
            "killing another program",
            "for pid in siblings(): os.kill(pid, 9)\nreturn 1",
            {"effect": "neighbour"},
        ),
        (
            "a forged result for another program",
            "for pid in siblings():\n    for n in range(1, 8):\n"
            "        try: os.write(os.open(f'/proc/{pid}/fd/{n}', os.O_WRONLY), b'ready\\n{\"value\": 666}')\n"
            "        except OSError: pass\n    os.kill(pid, 9)\nreturn 1",
            {"effect": "neighbour"},
        ),
        (
            "reading another program's memory",
            "for pid in siblings():\n    try: found = search(pid)\n    except OSError: continue\n    if found: return found",
        ),
    ),
    *_kind(
        "survivors",
        (
            "a daemon",
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nreturn 1",
            {"effect": "survivor"},
        ),
        (
            "another program in a session of its own",
            "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\nreturn 1",
            {"effect": "survivor"},
        ),
        (
            "a child of the C library",
            "if libc.fork() == 0:\n    libc.setsid()\n    libc.sleep(60)\n    os._exit(0)\nreturn 1",
            {"effect": "survivor"},
        ),
    ),
]
