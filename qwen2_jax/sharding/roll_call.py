"""Before JAX starts on several hosts: is every process there? An absent one is named, instead of a silent wait.

Process 0 listens where JAX's coordinator will; the others say who they are and wait for the word to go on. Standard
library only.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import socket
import time
from collections.abc import Sequence

from qwen2_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "QWEN2_JAX_COORDINATOR", "QWEN2_JAX_PROCESSES", "QWEN2_JAX_PROCESS"
"""The variables that tell a process of the others; here, so that launchers need no JAX."""
SECONDS = 60.0
LINE = 4096
"""Most bytes of a message."""
MOST_PROCESSES = 2**20
"""More than any pod has hosts, and a number that can be counted up to."""
LONGEST_HOST = 253
"""Letters of a host's name (RFC 1035, 2.3.4)."""
NAMED = 16
"""Processes that a message names, one by one."""


def roll_call(address: str, processes: int, process: int, *, seconds: float = SECONDS) -> None:
    """Returns when all processes are there.

    Args:
      address: "host:port" of process 0, the same for all.
      processes: how many there must be.
      process: which this one is, from 0.

    Raises UserError, on every process that is there: some did not come within `seconds` (their numbers are named),
    two have one number, they disagree on how many there are, or process 0 does not answer; at once: what is no address
    or no number of processes.
    """
    host, port = _parse(address)
    if not 1 <= processes <= MOST_PROCESSES:
        raise UserError(f"{PROCESSES}: there must be 1 to {MOST_PROCESSES} processes, found {processes}")
    if not 0 <= process < processes:
        raise UserError(f"process number {process} must lie between 0 and {processes - 1}")
    if process == 0:
        _call(host, port, processes, seconds)
    else:
        _answer(host, port, processes, process, seconds)


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"the address of process 0 must be host:port, found {address[:LONGEST_HOST]!r}")
    try:
        host.encode("idna")     # as looking it up does: an empty part, or one of more than 63 letters, has no address
    except UnicodeError as e:
        raise UserError(f"the address of process 0 must be host:port, and no host is called {host[:40]!r}: {e}") from e
    if len(host) > LONGEST_HOST:
        raise UserError(f"the address of process 0 must be host:port, and no host's name is longer than {LONGEST_HOST} "
                        f"letters: {host[:40]!r} … has {len(host)}")
    return host.strip("[]"), int(port)


def _call(host: str, port: int, processes: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    there: dict[int, str] = {0: platform.node()}
    peers: list[socket.socket] = []
    problem = None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=processes)
    except OSError as e:
        raise UserError(f"process 0 cannot listen on port {port}: {e.strerror}; is another run using it?") from e
    with server:
        while problem is None and len(there) < processes:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
                peers.append(peer)
                peer.settimeout(5)
                said = json.loads(peer.recv(LINE))
                problem = _enter(there, processes, int(said["process"]), int(said["processes"]), str(said["host"]))
            except (OSError, ValueError, KeyError, TypeError):      # nobody came, or not one of ours, or gone again
                if time.monotonic() >= deadline:
                    problem = _absent(there, processes, seconds)
    answer = json.dumps({"problem": problem}).encode()
    for peer in peers:
        with peer, contextlib.suppress(OSError):
            peer.sendall(answer)
    if problem:
        raise UserError(problem)


def _enter(there: dict[int, str], processes: int, number: int, count: int, host: str) -> str | None:
    """Note that a process is there; what is wrong with it."""
    if count != processes:
        return f"process {number} on {host} counts {count} processes, process 0 counts {processes}"
    if number in there:
        return f"two processes have the number {number}: one on {there[number]}, one on {host}"
    there[number] = host
    return None


def _absent(there: dict[int, str], processes: int, seconds: float) -> str:
    absent = sorted(set(range(processes)) - there.keys())
    return (f"{len(absent)} of {processes} processes did not come within {seconds:.0f} seconds: number "
            f"{_named(absent)}. There are {_named([f'{number} on {host}' for number, host in sorted(there.items())])}")


def _named(items: Sequence[int | str]) -> str:
    """Few enough of them for one message to hold."""
    more = [f"and {len(items) - NAMED} more"] if len(items) > NAMED else []
    return ", ".join([*map(str, items[:NAMED]), *more])


def _answer(host: str, port: int, processes: int, process: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    unknown = None
    me = json.dumps({"process": process, "processes": processes, "host": platform.node()}).encode()
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())) as peer:
                peer.sendall(me)
                peer.settimeout(seconds + 10)   # process 0 may have started that much later, and says who is absent
                answer = json.loads(peer.recv(LINE) or b"{}")
        except socket.gaierror as e:        # its name may come with it, as that of a pod of Kubernetes does
            answer, unknown = {}, e
        except (OSError, ValueError):
            answer, unknown = {}, None
        if "problem" in answer:
            break
        if time.monotonic() >= deadline:
            if unknown is not None:
                raise UserError(f"process {process} cannot find process 0's host {host} within {seconds:.0f} s: "
                                f"{unknown.strerror}") from unknown
            raise UserError(f"process {process}: process 0 at {host}:{port} did not answer within {seconds:.0f} s")
        time.sleep(0.2)
    if answer["problem"]:
        raise UserError(answer["problem"])
