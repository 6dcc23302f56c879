"""One program in several processes of this machine, as on the hosts of a pod.

    python -m tools.launch_local -n 4 --devices 2 -- python -m experiments.NAME …

Each process gets the variables that `qwen2_jax.sharding.distributed.start` reads, and host devices of its own. Lines of
output are prefixed with the process's number. When a process fails, the others are stopped, and the exit status and the
message are the failed one's.
"""

from __future__ import annotations

import argparse
import os
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


def launch(command: list[str], processes: int, devices: int) -> int:
    """Exit status: 0 when all end with 0, otherwise the first failure's (128 + n for signal n)."""
    address = f"127.0.0.1:{free_port()}"
    children: list[subprocess.Popen] = []
    for number in range(processes):
        children.append(start(command, number, processes, devices, address))
    return watch(children, "launch_local: process")


def watch(children: list[subprocess.Popen], who: str, stop_all: Callable[[], None] = lambda: None) -> int:
    """Pass on what the children print until all are done, or one fails and the others are stopped.

    `who`: what a child is called in messages, in front of its number. `stop_all`: called before the children are
    stopped, when not all of them ended well. Exit status as in `launch`.
    """
    readers = [threading.Thread(target=pass_on, args=(number, child), daemon=True)
               for number, child in enumerate(children)]
    for reader in readers:
        reader.start()
    try:
        failed = first_failure(children)
        if failed is not None:
            stop_all()
    except KeyboardInterrupt:
        print(f"{who.partition(':')[0]}: stopping all", file=sys.stderr)
        stop_all()
        return 130
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
    while True:
        statuses = [child.poll() for child in children]
        for number, status in enumerate(statuses):
            if status:
                return number
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def stop(children: list[subprocess.Popen]) -> None:
    for send in (signal.SIGTERM, signal.SIGKILL):
        running = [child for child in children if child.poll() is None]
        for child in running:
            try:
                os.killpg(child.pid, send)
            except ProcessLookupError:
                pass
        deadline = time.monotonic() + GRACE
        for child in running:
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass


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
    try:
        sys.exit(launch(command, args.processes, args.devices))
    except OSError as error:
        parser.error(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
