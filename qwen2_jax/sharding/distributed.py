"""Starting a program of several processes: on a pod, or on one machine under tools/launch_local.py.

Three variables say it: QWEN2_JAX_COORDINATOR (host:port of process 0), QWEN2_JAX_PROCESSES, QWEN2_JAX_PROCESS. Or one:
QWEN2_JAX_COORDINATOR=auto takes all three from where the processes run: Cloud TPU, GKE, Slurm, Open MPI.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax._src.clusters import ClusterEnv  # neither what surrounds a process nor
from jax._src.distributed import global_state  # the coordinator's key-value store has a public name

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.roll_call import COORDINATOR, PROCESS, PROCESSES, SECONDS, roll_call

AUTO = "auto"


def start(environment: Mapping[str, str] = os.environ, *, seconds: float = SECONDS) -> None:
    """Join the other processes, if there are any. Comes before the first use of a device; a second call does nothing.

    Raises UserError: some of the variables are missing or no numbers, nothing can be detected, or a process is absent
    (`roll_call`).
    """
    if global_state.client is not None:
        return
    if environment.get(COORDINATOR) == AUTO:
        address, processes, process, local_devices = _detected(seconds)
    else:
        found = _given(environment)
        if found is None:
            return
        address, processes, process, local_devices = *found, None
    roll_call(address, processes, process, seconds=seconds)
    if processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process, local_devices)


def _given(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(address, processes, process) as the variables say; None where there are none."""
    given = {name: environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(given.values()):
        return None
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set beside "
                        f"{' and '.join(name for name in given if name not in missing)}")
    return str(given[COORDINATOR]), _number(PROCESSES, given[PROCESSES]), _number(PROCESS, given[PROCESS])


def _detected(seconds: float) -> tuple[str, int, int, Any]:
    """(address, processes, process, this process's devices or None) as JAX finds them around it."""
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds))
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"{COORDINATOR}={AUTO}: JAX cannot find the other processes: {e}") from e
    address, processes, process, local_devices = found
    if address is None or processes is None or process is None:
        raise UserError(f"{COORDINATOR}={AUTO}: JAX knows no cluster around this process; set {COORDINATOR} to "
                        f"host:port of process 0, and {PROCESSES} and {PROCESS}")
    return address, processes, process, local_devices


def _number(name: str, value: str | None) -> int:
    if value is None or not re.fullmatch("[0-9]{1,9}", value):
        raise UserError(f"{name} must be a whole number, found {value and value[:40]!r}")
    return int(value)


def is_first() -> bool:
    """Whether this is process 0, which speaks for all. Touches no device."""
    return (global_state.process_id or 0) == 0


def count() -> int:
    """Processes of this program. Touches no device."""
    return global_state.num_processes or 1


def exchange(subject: str, mine: Any, *, seconds: float, forget: bool = False) -> list[Any]:
    """Every process's `mine` (JSON), in the order of their numbers, on all of them; [mine] for one process.

    Goes by the coordinator, over the network of the hosts: no device is touched, so it also works where those do not.
    Each `subject` can be exchanged once; with `forget` the coordinator does not keep what was said, for exchanges that
    go on as long as the program does. Raises UserError naming the process that said nothing for `seconds`.
    """
    client = global_state.client
    if client is None:
        return [mine]
    client.key_value_set(f"qwen2_jax/{subject}/{global_state.process_id}", json.dumps(mine))
    found = []
    for number in range(count()):
        try:
            text = client.blocking_key_value_get(f"qwen2_jax/{subject}/{number}", int(seconds * 1000))
        except jax.errors.JaxRuntimeError as e:
            raise UserError(f"process {number} said nothing about its {subject} for {seconds:.0f} seconds: it hangs, "
                            "or has died") from e
        found.append(json.loads(text))
    if forget:
        try:
            client.wait_at_barrier(f"qwen2_jax/{subject}/heard", int(seconds * 1000))
        except jax.errors.JaxRuntimeError as e:
            raise UserError(f"a process did not hear the others' {subject} within {seconds:.0f} seconds: it hangs, or "
                            "has died") from e
        client.key_value_delete(f"qwen2_jax/{subject}/{global_state.process_id}")
    return found
