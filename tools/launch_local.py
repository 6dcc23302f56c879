"""One program in several processes of this machine, as on the hosts of a pod.

    python -m tools.launch_local -n 4 --devices 2 -- python -m experiments.NAME …

Each process gets the variables that `qwen2_jax.sharding.distributed.start` reads, and host devices of its own. Lines of
output are prefixed with the process's number. When a process fails, the others are stopped, and the exit status and the
message are the failed one's. When the launcher is interrupted or terminated, all are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from qwen2_jax.sharding.roll_call import COORDINATOR, PROCESS, PROCESSES

GRACE = 5.0
"""Seconds between asking the others to end and ending them."""
INTERRUPTED = 130


def launch(command: list[str], processes: int, devices: int) -> int:
    """Exit status: 0 when all end with 0, otherwise the first failure's (128 + n for signal n)."""
    address = f"127.0.0.1:{free_port()}"
    return watch(lambda number: start(command, number, processes, devices, address), processes, "launch_local: process")


def watch(start_one: Callable[[int], subprocess.Popen], count: int, who: str,
          stop_all: Callable[[], None] = lambda: None) -> int:
    """Pass on what `count` children print until all are done, or one fails and the others are stopped.

    `start_one`: starts the child of a number, in a session of its own. `who`: what a child is called in messages, in
    front of its number. `stop_all`: called before the children are stopped, when not all of them ended well. Exit
    status as in `launch`; 130 where the launcher is interrupted.
    """
    children: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    try:
        for number in range(count):
            children.append(start_one(number))
            readers.append(threading.Thread(target=pass_on, args=(number, children[-1]), daemon=True))
            readers[-1].start()
        failed = first_failure(children)
        if failed is not None:
            stop_all()
    except KeyboardInterrupt:
        print(f"{who.partition(':')[0]}: stopping all", file=sys.stderr)
        stop_all()
        return INTERRUPTED
    finally:
        stop(children)
        for reader in readers:
            reader.join(timeout=GRACE)
    if failed is None:
        return 0
    status = children[failed].returncode
    how = f"exited with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
    print(f"{who} {failed} {how}; the others were stopped", file=sys.stderr)
    return status if status > 0 else 128 - status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], number: int, processes: int, devices: int, address: str) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    env = os.environ | {COORDINATOR: address, PROCESSES: str(processes), PROCESS: str(number), "JAX_PLATFORMS": "cpu",
                        "XLA_FLAGS": flags}
    # A session of its own, so that what the process started is stopped with it.
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)


def pass_on(number: int, child: subprocess.Popen) -> None:
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            print(f"[{number}] {line}", end="", flush=True)


def first_failure(children: list[subprocess.Popen]) -> int | None:
    """The number of the process that failed first, None when all are done."""
    ended: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    # One thread waits for each, so that they are heard of in the order in which they end: the first is the cause, and
    # what the others say of it may come a moment later.
    for number, child in enumerate(children):
        threading.Thread(target=lambda n=number, c=child: ended.put((n, _fails(c))), daemon=True).start()
    return next((number for number, failed in (ended.get() for _ in children) if failed), None)


def _fails(child: subprocess.Popen) -> bool:
    """Waits for its end. The system keeps its number, where it can: its group is still to be stopped, and nobody else
    must get that number before."""
    if not hasattr(os, "waitid"):       # macOS
        return child.wait() != 0
    try:
        end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:       # stopped and taken note of by `stop`
        return False
    return end is not None and (end.si_code != os.CLD_EXITED or end.si_status != 0)


def stop(children: list[subprocess.Popen]) -> None:
    """End each child and what it started, also where the child itself has ended."""
    for send, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        children = [child for child in children if _reaches(child, send)]
        deadline = time.monotonic() + seconds
        with contextlib.suppress(KeyboardInterrupt):        # interrupted again: no more patience
            while children and time.monotonic() < deadline:
                children = [child for child in children if child.poll() is None or _reaches(child, 0)]
                time.sleep(0.02)


def _reaches(child: subprocess.Popen, number: int) -> bool:
    """Send a signal to the child's group; whether anybody is left in it."""
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):       # macOS says the second of a group of one that has ended
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, default=1, help="host devices of each (default: 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("a command is needed behind --")
    for name in ("processes", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)       # stops all, as Ctrl-C does
    try:
        sys.exit(launch(command, args.processes, args.devices))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        parser.error(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
