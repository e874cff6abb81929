"""Runs a command in a process group of its own and ends all of it when this process or its parent ends.

    python vllm_guard.py COMMAND...

Prints the command's process id. It is asked to end when our standard input closes, as it does when the process that
holds the other end dies of whatever, or on SIGTERM; when it has ended, by itself or not, all that is left of its group
is killed: vLLM's engine runs in a process beside its API server, and survives it. Standard library only.
"""

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0


def main() -> int:
    """Return the command's exit status."""
    # Its output goes where our errors go: our standard output is for its id alone.
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    ending = threading.Event()

    def end() -> None:
        if not ending.is_set():
            ending.set()
            process.terminate()
            killer = threading.Timer(GRACE_S, process.kill)
            killer.daemon = True
            killer.start()

    def end_with_input() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        end()

    signal.signal(signal.SIGTERM, lambda *_: end())
    print(process.pid, flush=True)
    threading.Thread(target=end_with_input, daemon=True).start()
    status = process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left
        pass
    return status


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)  # a thread that waits for input must not hold us up
