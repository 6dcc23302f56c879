"""Starting a program of several processes: on a pod, or on one machine under tools/launch_local.py.

Three variables say it: QWEN2_JAX_COORDINATOR (host:port of process 0), QWEN2_JAX_PROCESSES, QWEN2_JAX_PROCESS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.roll_call import SECONDS, roll_call

COORDINATOR, PROCESSES, PROCESS = "QWEN2_JAX_COORDINATOR", "QWEN2_JAX_PROCESSES", "QWEN2_JAX_PROCESS"


def start(environment: Mapping[str, str] = os.environ, *, seconds: float = SECONDS) -> None:
    """Join the other processes, if there are any. Comes before the first use of a device.

    Raises UserError: some of the variables are missing or no numbers, or a process is absent (`roll_call`).
    """
    given = {name: environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(given.values()):
        return
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set beside "
                        f"{' and '.join(name for name in given if name not in missing)}")
    address = str(given[COORDINATOR])
    processes, process = _number(PROCESSES, given[PROCESSES]), _number(PROCESS, given[PROCESS])
    roll_call(address, processes, process, seconds=seconds)
    if processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process)


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isascii() or not value.isdecimal():
        raise UserError(f"{name} must be a whole number, found {value!r}")
    return int(value)
